"""cachetier: a content-addressed KV cache tier for vLLM, in host memory and on NVMe.

The server's wing is `cli`, `service`, `store`, `storage` and `remote`; the engine's wing is `client` and the
packages `cachetier_connector` and `cachetier_blend`. Both stand on `core` and neither imports the other.
"""

__version__ = "0.1.0"
