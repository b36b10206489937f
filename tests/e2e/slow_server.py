"""`cachetier` with a disk that gives no more than a file says: `python -m tests.e2e.slow_server LIMIT_FILE serve ...`.

The file holds bytes a second, 0: as fast as the disk is. It is looked at all the time, so a test can make the disk slow
and fast again under a running server.
"""

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from cachetier.cli.main import main
from cachetier.storage.file_layer import FileLayer

SLICE_S = 0.005


class Throttle:
    """One queue of reads for all threads, as for a disk."""

    def __init__(self, limit_file: Path) -> None:
        self._limit_file = limit_file
        self._lock = threading.Lock()

    def wait(self, size_bytes: int) -> None:
        """Return when the disk would have read so much."""
        left = float(size_bytes)
        with self._lock:
            while left > 0 and (bytes_per_s := float(self._limit_file.read_text() or 0)):
                time.sleep(SLICE_S)
                left -= bytes_per_s * SLICE_S


if __name__ == "__main__":
    throttle, preadv = Throttle(Path(sys.argv[1])), FileLayer.preadv

    def slow_preadv(files: FileLayer, descriptor: int, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        throttle.wait(sum(map(len, buffers)))
        preadv(files, descriptor, buffers, offset)

    FileLayer.preadv = slow_preadv  # type: ignore[method-assign]
    sys.exit(main(sys.argv[2:]))
