"""The breaker in front of the remote tier: while it is open, nobody asks the remote store for anything.

It begins open, and closes when a probe succeeds. A failure opens it; the first probe comes a second later, and the next
ones a second apart. A store that answers probes but fails again as soon as it is used is probed less and less often.

Thread-safe, with a lock of its own that is taken last.
"""

import threading
import time
from collections.abc import Callable

PROBE_INTERVAL_S = 1.0
RELAPSE_S = 5.0
HOLD_MAX_S = 30.0


class Breaker:
    """Whether the remote store may be asked, and the thread that finds out when it may again.

    Attributes:
        is_open: nobody may ask it.
        opened_at: when it opened last (time.monotonic).
    """

    def __init__(self, probe: Callable[[], bool], on_change: Callable[[bool], None]) -> None:
        """Make one.

        Args:
            probe: asks the store for something; may block. Returns whether it answered.
            on_change: is told the new `is_open`, on any thread, without a lock.
        """
        self.is_open, self.opened_at = True, time.monotonic()
        self._probe = probe
        self._on_change = on_change
        self._wake = threading.Condition()
        self._hold_s = 0.0
        self._closed_at = -RELAPSE_S
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="cachetier-remote-probe", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def fail(self) -> None:
        """Open it: the store failed, or did not answer in time."""
        with self._wake:
            if self.is_open:
                return
            is_relapse = time.monotonic() - self._closed_at < RELAPSE_S
            self._hold_s = min(2 * self._hold_s, HOLD_MAX_S) if is_relapse and self._hold_s else PROBE_INTERVAL_S
            self.is_open, self.opened_at = True, time.monotonic()
            self._wake.notify()
        self._on_change(True)

    def stop(self) -> None:
        """End the thread, now or when its probe ends."""
        with self._wake:
            self._is_stopping = True
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self.is_open and not self._is_stopping:
                    self._wake.wait()
                hold_s = self._hold_s
                if self._wake.wait_for(lambda: self._is_stopping, hold_s):
                    return
            while not self._probe():
                with self._wake:
                    if self._wake.wait_for(lambda: self._is_stopping, PROBE_INTERVAL_S):
                        return
            with self._wake:
                self.is_open, self._closed_at = False, time.monotonic()
            self._on_change(False)
