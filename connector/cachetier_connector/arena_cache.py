"""The arenas that a worker has mapped: one a server, and for a moment two after a server was replaced."""

import threading
from collections.abc import Callable

from cachetier.client import ArenaView


class ArenaCache:
    """Maps arenas on demand. Thread-safe; the mapping of an earlier server goes when its last reader lets go of it."""

    def __init__(self, on_map: Callable[[ArenaView], None]) -> None:
        """Map nothing yet; `on_map` is called with each arena that is mapped, before anyone else gets it."""
        self._on_map = on_map
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
                arena = ArenaView.attach(path)
                self._on_map(arena)
                self._arena, self._instance = arena, instance
            return self._arena
