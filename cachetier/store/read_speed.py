"""How fast the disk gives chunks, as the promoter sees it: what tells an engine when a chunk will be in host memory.

Pure bookkeeping; the caller holds the store's lock and names the time. What counts is the throughput of all threads
together while there is something to read, so it is taken over windows of such time, and the latest windows count most:
a disk that has become slow is known to be slow after a few of them, and one that has become fast again as well.
"""

import math

WINDOW_S = 0.05
LATEST_SHARE = 0.4  # of the estimate's logarithm: after five windows nine tenths of a change are known
STALE_S = 1.0


class ReadSpeed:
    """Bytes a second, from reads that begin and end."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._log_speed: float | None = None
        self._flying_bytes = 0
        self._window_start = 0.0
        self._window_bytes = 0
        self._window_reads = 0
        self._measured_at = -math.inf

    def begin(self, size_bytes: int, now: float) -> None:
        """A thread starts to read."""
        if not self._flying_bytes:
            self._window_start = now
        self._flying_bytes += size_bytes

    def end(self, size_bytes: int, now: float, *, is_read: bool) -> None:
        """What `begin` announced is over; a read that failed says nothing about speed."""
        self._flying_bytes -= size_bytes
        self._window_bytes += size_bytes if is_read else 0
        self._window_reads += 1
        is_long = now - self._window_start >= WINDOW_S and self._window_reads >= self._num_threads
        if is_long or not self._flying_bytes:
            self._close_window(now)

    def bytes_per_s(self, now: float) -> float | None:
        """Return the speed; None while nothing was read.

        Where the reads under way take longer than the speed explains, it is what it would be if they all ended now.
        """
        speed = None if self._log_speed is None else math.exp(self._log_speed)
        elapsed_s = now - self._window_start
        if not self._flying_bytes or elapsed_s < WINDOW_S:
            return speed
        at_most = (self._window_bytes + self._flying_bytes) / elapsed_s
        return at_most if speed is None else min(speed, at_most)

    def is_stale(self, now: float) -> bool:
        """Whether nothing was read for long, so that the disk may have become another."""
        return not self._flying_bytes and now - self._measured_at >= STALE_S

    def _close_window(self, now: float) -> None:
        elapsed_s = now - self._window_start
        if self._window_bytes and elapsed_s > 0:
            latest = math.log(self._window_bytes / elapsed_s)
            before = latest if self._log_speed is None else self._log_speed
            self._log_speed = before + LATEST_SHARE * (latest - before)
            self._measured_at = now
        self._window_start, self._window_bytes, self._window_reads = now, 0, 0
