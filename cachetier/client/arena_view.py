"""The arena as an engine's process sees it: mapped, read and written in place, never owned."""

import contextlib
import ctypes
import mmap
import os

from cachetier.core.arena_format import ArenaGeometry, unpack_header
from cachetier.core.errors import StorageError
from cachetier.core.layout import PAGE_BYTES


class ArenaView:
    """A mapping of the server's arena. Frames may be touched only under a lease; any thread may do so."""

    def __init__(self, memory: mmap.mmap, geometry: ArenaGeometry) -> None:
        self._memory = memory
        self._view = memoryview(memory)
        self.geometry = geometry

    @classmethod
    def attach(cls, path: str) -> "ArenaView":
        """Map the arena file at `path`.

        Raises:
            StorageError: the file is gone (the server ended) or may not be opened.
            FormatError: it is no arena, or not one of this version.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise StorageError(f"cannot map the arena {path}: {error.strerror}") from error
        try:
            geometry = unpack_header(os.pread(descriptor, PAGE_BYTES, 0).ljust(PAGE_BYTES, b"\0"))
            if os.fstat(descriptor).st_size < geometry.file_bytes:  # touching what is not there would be a SIGBUS
                raise StorageError(f"the arena {path} is shorter than its header says")
            return cls(mmap.mmap(descriptor, geometry.file_bytes), geometry)
        finally:
            os.close(descriptor)

    @property
    def address(self) -> int:
        """Where the data area starts in this process: offset 0 of `frame`. Valid until the file is unmapped."""
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory, self.geometry.data_offset))

    def frame(self, offset: int, length_bytes: int) -> memoryview:
        """Return the writable bytes `[offset, offset + length_bytes)` of the data area, without a copy."""
        if not 0 <= offset <= offset + length_bytes <= self.geometry.data_bytes:
            raise ValueError(f"frame {offset}+{length_bytes} is outside of the arena")
        start = self.geometry.data_offset + offset
        return self._view[start : start + length_bytes]

    def state(self, offset: int) -> int:
        """Return the STATE_... of the frame at `offset`."""
        return self._memory[self.geometry.state_offset + offset // PAGE_BYTES]

    def close(self) -> None:
        """Unmap the file, or leave that to whoever still holds a frame's memoryview."""
        self._view.release()
        with contextlib.suppress(BufferError):  # the last memoryview takes the mapping with it
            self._memory.close()
