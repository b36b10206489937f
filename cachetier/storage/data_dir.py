"""The data directory: who may use it, its secret, and which format it has."""

from cachetier.core.config import ServerConfig


class DataDir:
    """A data directory that this process has locked.

    Attributes:
        path: real path of the folder.
        secret: 32 bytes for `ChainHasher`.
    """

    path: str
    secret: bytes

    @classmethod
    def open(cls, config: ServerConfig) -> "DataDir":
        """Make the folder if need be, lock it and read its secret.

        Raises:
            StorageError: others can read it, another process holds its lock (the text names its pid), or it is unusable.
            FormatError: it has another format version or other fixed settings.
        """
        raise NotImplementedError

    def publish(self, instance: str, socket: str) -> None:
        """Write `server.json` ({"pid", "socket", "instance"}): the server answers now."""
        raise NotImplementedError

    def arena_path(self) -> str:
        """Return where this directory's arena lies."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove `server.json` and give the lock back."""
        raise NotImplementedError
