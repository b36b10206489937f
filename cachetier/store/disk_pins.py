"""Which chunks on disk must stay, and which are leaving: what reclaiming a segment asks, and what a match asks.

Locking design: a lock of its own, held for a look-up or two and never while calling anything. Reclaiming asks from
inside the disk tier, which may hold locks of its own, so it must not need the store's lock.

Between a look-up that finds a chunk and the read of its bytes, nothing may vanish. So a match pins a key before it
looks it up, and reclaiming marks a key as leaving in the same step in which it sees that nobody pins it. A match that
meets a leaving key treats it as a miss.
"""

import threading
from collections import OrderedDict

from cachetier.core.keys import ChainKey

HOT_MAX = 1 << 17


class DiskPins:
    """Pinned, leaving and hot keys. Any thread. Past HOT_MAX the key that became hot longest ago is forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pins: dict[ChainKey, int] = {}
        self._leaving: set[ChainKey] = set()
        self._hot: OrderedDict[ChainKey, None] = OrderedDict()

    def pin(self, key: ChainKey) -> bool:
        """Keep `key` on disk until `unpin`; False: it is leaving."""
        with self._lock:
            if key in self._leaving:
                return False
            self._pins[key] = self._pins.get(key, 0) + 1
            return True

    def unpin(self, key: ChainKey) -> None:
        """Give one pin back."""
        with self._lock:
            left = self._pins[key] - 1
            if left:
                self._pins[key] = left
            else:
                del self._pins[key]

    def touch(self, key: ChainKey) -> None:
        """Note that `key` was read from disk: reclaiming its segment carries it over, once."""
        with self._lock:
            self._hot[key] = None
            if len(self._hot) > HOT_MAX:
                self._hot.popitem(last=False)

    def was_read(self, key: ChainKey) -> bool:
        """Tell whether `key` was read since its record was written."""
        with self._lock:
            return key in self._hot

    def is_pinned(self, key: ChainKey) -> bool:
        """Tell whether `key` must be carried over; if not, it counts as leaving until `take_leaving`."""
        with self._lock:
            if key in self._pins:
                return True
            self._leaving.add(key)
            return False

    def is_hot(self, key: ChainKey) -> bool:
        """Tell whether `key` was read since its record was written; asking uses that up."""
        with self._lock:
            return self._hot.pop(key, self) is None

    def take_leaving(self) -> set[ChainKey]:
        """Return the keys that may have left, and begin anew; called when the reclaiming is over."""
        with self._lock:
            leaving, self._leaving = self._leaving, set()
            return leaving

    @property
    def num_pinned(self) -> int:
        """Keys that are pinned."""
        return len(self._pins)
