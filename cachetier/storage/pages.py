"""A file of pages that are replaced atomically and never believed without their checksum.

Every page has two slots on disk. A commit writes the new image of a page into the slot that does not hold its current
one, then syncs; so whatever a crash tears, the image before it still stands in the other slot, and there is nothing
to recover at open. A reader takes the newer slot whose checksum holds. A flipped bit therefore costs the newest
changes of one page at most, and it is noticed at the next read, however large the file is.

    slot, little-endian:  0  u64 XXH64 of the rest of the slot
                          8  u64 generation: the larger one of two intact slots is current; 0: never written
                         16  u32 number of the page
                         20  u32 zero
                         24  payload

Locking: `stage`, `commit` and `staged` belong to one thread at a time (the owner's lock); `read` may run on any thread
at the same time. It never sees a staged image, and if a commit overtakes it, it looks again under the lock.
"""

import mmap
import struct
import threading

import xxhash

from cachetier.core.layout import PAGE_BYTES
from cachetier.storage.file_layer import FileLayer

PAGE_HEADER = struct.Struct("<QQII")
PAYLOAD_OFFSET = PAGE_HEADER.size
_BODY_HEADER = struct.Struct("<QII")
_digest = xxhash.xxh64_intdigest
_FILL_BYTES = 4 << 20
_UNKNOWN = 2  # which slot is current has not been looked up yet
_BLANK = 3  # neither: the page is as it was made, and need not be read from a file that the page cache does not hold


class PageFile:
    """Pages of `page_bytes` each, of which `page_bytes - PAYLOAD_OFFSET` are payload.

    Attributes:
        num_bad: slots whose checksum did not hold when they were needed, since the file was opened.
    """

    def __init__(self, path: str, num_pages: int, page_bytes: int, files: FileLayer) -> None:
        """Open or create the file; new pages read as zero.

        Raises:
            OSError: there is no room for it, or it cannot be opened.
        """
        self._files = files
        self._page_bytes = page_bytes
        self._empty = bytes(page_bytes)
        self._current = bytearray([_UNKNOWN]) * num_pages
        self._staged: dict[int, bytes] = {}
        self._read_ahead: dict[int, bytes] = {}  # what `staged` has read since the last commit
        self._lock = threading.Lock()
        self.num_bad = 0
        self._descriptor = files.open(path, create=True)
        try:
            self._fill(path, num_pages * page_bytes * 2)
        except OSError:
            files.close(self._descriptor)
            raise

    def read(self, page: int) -> bytes:
        """Return the committed image of `page`, its payload from PAYLOAD_OFFSET on; all zero if there is none.

        Raises:
            OSError: the disk fails.
        """
        slot = self._current[page]
        if slot == _BLANK:
            return self._empty
        if slot != _UNKNOWN:
            size = self._page_bytes
            image = self._files.pread(self._descriptor, size, (page * 2 + slot) * size)
            if self._is_intact(image, page):
                return image
        with self._lock:
            return self._find_current(page)

    def staged(self, page: int) -> bytes:
        """Return the image of `page` that the next commit would leave."""
        image = self._staged.get(page) or self._read_ahead.get(page)
        if image is None:
            image = self._read_ahead[page] = self.read(page)
        return image

    def stage(self, page: int, payload: bytes) -> None:
        """Replace the payload of `page` at the next commit; it is padded with zeros."""
        generation = _generation(self.staged(page)) + (page not in self._staged)
        body = _BODY_HEADER.pack(generation, page, 0) + payload
        body += bytes(self._page_bytes - 8 - len(body))
        self._staged[page] = struct.pack("<Q", _digest(body)) + body

    def commit(self) -> None:
        """Make all staged images durable, then visible.

        Raises:
            OSError: the disk fails; everything stays staged for the next commit, and nothing becomes visible.
        """
        self._read_ahead = {}
        if not self._staged:
            return
        for page, image in sorted(self._staged.items()):
            slot = self._target(page)
            self._files.pwritev(self._descriptor, [image], (page * 2 + slot) * self._page_bytes)
        self._files.fdatasync(self._descriptor)
        with self._lock:
            for page in self._staged:
                self._current[page] = self._target(page)
            self._staged = {}

    @property
    def num_staged(self) -> int:
        """Pages that the next commit writes."""
        return len(self._staged)

    def num_copies(self, page: int) -> int:
        """Return how many slots of `page` hold an intact image."""
        return sum(_generation(image) > 0 and self._is_intact(image, page) for image in self._slots(page))

    def damaged_slots(self, page: int) -> int:
        """Return how many of the two slots of `page` are neither intact nor blank."""
        return sum(not self._is_intact(image, page) for image in self._slots(page))

    def close(self) -> None:
        """Close the file; staged images are forgotten."""
        self._files.close(self._descriptor)

    def _fill(self, path: str, file_bytes: int) -> None:
        """Give a new file its size and write zeros all over it.

        Pages are written in random order. In space that is only reserved each of them would become an extent of its
        own, and with a million extents the file system needs seconds to open and minutes to remove the file. Past the
        page cache (O_DIRECT) it takes a tenth of the time on a busy machine, and the first sync has nothing to do.
        """
        start = self._files.size(self._descriptor) // PAGE_BYTES * PAGE_BYTES
        if start >= file_bytes:
            return
        self._files.fallocate(self._descriptor, file_bytes)
        descriptor = self._files.open(path, direct=True)
        try:
            zeros = memoryview(mmap.mmap(-1, _FILL_BYTES))  # page-aligned
            for offset in range(start, file_bytes, _FILL_BYTES):
                self._files.pwritev(descriptor, [zeros[: file_bytes - offset]], offset)
        finally:
            self._files.close(descriptor)
        if start == 0:
            self._current = bytearray([_BLANK]) * len(self._current)

    def _target(self, page: int) -> int:
        return 0 if self._current[page] == _BLANK else 1 - self._current[page]

    def _slots(self, page: int) -> tuple[bytes, bytes]:
        size = self._page_bytes
        both = self._files.pread(self._descriptor, size * 2, page * size * 2)
        return both[:size], both[size:]

    def _is_intact(self, image: bytes, page: int) -> bool:
        checksum, generation, number, _ = PAGE_HEADER.unpack_from(image)
        if generation == 0:
            return image == self._empty
        return number == page and bool(_digest(image[8:]) == checksum)

    def _find_current(self, page: int) -> bytes:
        slots = self._slots(page)
        first = int(_generation(slots[1]) > _generation(slots[0]))
        for slot in (first, 1 - first):
            if self._is_intact(slots[slot], page):
                self._current[page] = slot
                return slots[slot]
            self.num_bad += 1
        self._current[page] = 1
        return self._empty


def _generation(image: bytes) -> int:
    return int.from_bytes(image[8:16], "little")
