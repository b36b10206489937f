"""Segment files: preallocated files of one size that hold records one after the other.

O_DIRECT where the file system has it: payloads go between disk and arena without passing through the page cache. All
buffers are therefore page-aligned, and so are offsets and lengths. Which records are alive is the index's business.

Threads: `activate`, `write` and `sync` belong to the writer; `read` and `read_header` run on any thread.
"""

import contextlib
import mmap
import os
import threading
from collections.abc import Iterator, Sequence

from cachetier.core.layout import PAGE_BYTES
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.records import RecordHeader, peek_header_bytes, unpack_header

SUFFIX = ".seg"


def aligned_buffer(size_bytes: int) -> memoryview:
    """Return `size_bytes` of zeroed memory at a page-aligned address."""
    return memoryview(mmap.mmap(-1, size_bytes))


class SegmentFiles:
    """The files of all segments, by slot: slot 0 is `00000001.seg`."""

    def __init__(self, folder: str, segment_bytes: int, files: FileLayer) -> None:
        self.segment_bytes = segment_bytes
        self._folder = folder
        self._files = files
        self._descriptors: dict[int, int] = {}
        self._scratch = threading.local()

    def open_existing(self, num_slots: int) -> None:
        """Open the files that are there and complete; remove those of slots from `num_slots` on.

        Raises:
            OSError: the folder cannot be read or a file cannot be opened.
        """
        for name in self._files.listdir(self._folder):
            number = name.removesuffix(SUFFIX)
            if not name.endswith(SUFFIX) or not number.isdigit():
                continue
            slot = int(number) - 1
            if not 0 <= slot < num_slots:
                self._files.unlink(self.path(slot))
                continue
            descriptor = self._files.open(self.path(slot), direct=True)
            if self._files.size(descriptor) == self.segment_bytes:
                self._descriptors[slot] = descriptor
            else:
                self._files.close(descriptor)

    def __contains__(self, slot: int) -> bool:
        return slot in self._descriptors

    @property
    def num_files(self) -> int:
        """Segment files on disk."""
        return len(self._descriptors)

    def activate(self, slot: int) -> None:
        """Make sure that the file of `slot` exists with all its space reserved.

        Raises:
            OSError: there is no room for it.
        """
        if slot in self._descriptors:
            return
        path = self.path(slot)
        descriptor = self._files.open(path, create=True, direct=True)
        try:
            self._files.fallocate(descriptor, self.segment_bytes)
            self._files.fsync_dir(self._folder)
        except OSError:
            self._files.close(descriptor)
            with contextlib.suppress(OSError):  # what cannot be removed is completed by the next attempt
                self._files.unlink(path)
            raise
        self._descriptors[slot] = descriptor

    def write(self, slot: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Write `buffers` one after the other at `offset`.

        Raises:
            OSError: the disk fails; what stands there now is undefined.
        """
        self._files.pwritev(self._descriptors[slot], buffers, offset)

    def sync(self, slot: int) -> None:
        """Make everything written to `slot` durable.

        Raises:
            OSError: the disk fails; what was written since the last sync may be lost.
        """
        self._files.fdatasync(self._descriptors[slot])

    def read(self, slot: int, buffers: Sequence[memoryview], offset: int) -> None:
        """Fill `buffers` from `offset`.

        Raises:
            OSError: the disk fails.
        """
        self._files.preadv(self._descriptors[slot], buffers, offset)

    def header_scratch(self, size_bytes: int) -> memoryview:
        """Return page-aligned memory of this thread; the next call on the thread reuses it."""
        buffer: memoryview | None = getattr(self._scratch, "buffer", None)
        if buffer is None or len(buffer) < size_bytes:
            buffer = self._scratch.buffer = aligned_buffer(size_bytes)
        return buffer[:size_bytes]

    def read_header(self, slot: int, offset: int) -> RecordHeader | None:
        """Return the record header at `offset`, or None if none stands there.

        Raises:
            OSError: the disk fails.
        """
        if offset + PAGE_BYTES > self.segment_bytes:
            return None
        buffer = self.header_scratch(PAGE_BYTES)
        self.read(slot, [buffer], offset)
        size = peek_header_bytes(bytes(buffer))
        if not size or offset + size > self.segment_bytes:
            return None
        if size > PAGE_BYTES:
            buffer = self.header_scratch(size)
            self.read(slot, [buffer], offset)
        header = unpack_header(bytes(buffer))
        return header if header and offset + header.record_bytes <= self.segment_bytes else None

    def headers(self, slot: int, sequence: int, offset: int) -> Iterator[tuple[int, RecordHeader]]:
        """Return offset and header of the records of segment `sequence` from `offset` on, up to the first gap.

        Raises:
            OSError: the disk fails.
        """
        while (header := self.read_header(slot, offset)) and header.sequence == sequence:
            yield offset, header
            offset += header.record_bytes

    def close(self) -> None:
        """Close all files."""
        for descriptor in self._descriptors.values():
            self._files.close(descriptor)
        self._descriptors = {}

    def path(self, slot: int) -> str:
        """Return where the file of `slot` is."""
        return os.path.join(self._folder, f"{slot + 1:08d}{SUFFIX}")
