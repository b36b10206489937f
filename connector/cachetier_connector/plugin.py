"""The `vllm.general_plugins` entry point: makes the name `CachetierConnector` known to vLLM in every process of it."""


def register() -> None:
    """Register the connector, so that `kv_connector_module_path` need not be given. May be called repeatedly."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(
            "CachetierConnector", "cachetier_connector.connector", "CachetierConnector"
        )
    except ValueError:  # registered before
        return
