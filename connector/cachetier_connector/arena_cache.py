"""The arenas that a worker has mapped: one a server, and for a moment two after a server was replaced."""

import threading

from cachetier.client import ArenaView


class ArenaCache:
    """Maps arenas on demand. Thread-safe; the mapping of an earlier server goes when its last reader lets go of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._instance = ""
        self._arena: ArenaView | None = None

    def get(self, path: str, instance: str) -> ArenaView:
        """Return the arena of the server run `instance`.

        Raises:
            StorageError: it is gone: that server has ended.
        """
        with self._lock:
            if self._arena is None or self._instance != instance:
                self._arena, self._instance = ArenaView.attach(path), instance
            return self._arena
