"""Which stores there are, by the scheme of their URL; each is imported when it is used, and so is what it needs."""

from importlib import import_module
from urllib.parse import SplitResult, urlsplit

from cachetier.core.errors import ConfigError
from cachetier.remote.base import FrameMemory, RemoteStore

STORES = {"mooncake": "cachetier.remote.mooncake", "s3": "cachetier.remote.s3"}


def open_remote(url: str, memory: FrameMemory) -> RemoteStore:
    """Return the store that `url` names. Waits for nobody: whether the store can be reached shows when it is used.

    Raises:
        ConfigError: the URL is none, its scheme is unknown, or the package that the store needs is not installed.
    """
    parts = check_url(url)
    try:
        module = import_module(STORES[parts.scheme])
    except ImportError as error:
        raise ConfigError(f"remote {url}: {error}; run: pip install 'cachetier[{parts.scheme}]'") from error
    store: RemoteStore = module.open_store(parts, memory)
    return store


def check_url(url: str) -> SplitResult:
    """Return the parts of a store's URL.

    Raises:
        ConfigError: it names no store.
    """
    parts = urlsplit(url)
    if parts.scheme not in STORES or not parts.netloc:
        raise ConfigError(f"remote is {url!r}; write mooncake://MASTER_HOST:PORT or s3://BUCKET/PREFIX")
    return parts
