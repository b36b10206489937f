"""The vLLM connector: `CachetierConnector`, its scheduler half and its worker half.

Importing this package imports neither vllm nor torch; asking it for `CachetierConnector` does. So vLLM finds the class
through `kv_connector_module_path="cachetier_connector"`, and `cachetier_connector.plan` stays importable anywhere.
"""

from typing import Any

__all__ = ["CachetierConnector"]


def __getattr__(name: str) -> Any:
    if name == "CachetierConnector":
        from cachetier_connector.connector import CachetierConnector

        return CachetierConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
