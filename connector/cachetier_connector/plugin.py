"""The `vllm.general_plugins` entry point, which runs in every process of vLLM before the model is loaded.

It makes the name `CachetierConnector` known, and lets the connector find the model to blend with.
"""

from contextlib import suppress

from cachetier_connector.model_keeper import keep_loaded_model


def register() -> None:
    """Register the connector, so that `kv_connector_module_path` need not be given. May be called repeatedly."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    with suppress(ValueError):  # registered before
        KVConnectorFactory.register_connector(
            "CachetierConnector", "cachetier_connector.connector", "CachetierConnector"
        )
    keep_loaded_model()
