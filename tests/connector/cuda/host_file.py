"""A stand-in for `kvikio.CuFile`, which does not load without a GPU: real files to addresses of host memory."""

import ctypes
from pathlib import Path


class Later:
    """A read that is done when somebody asks for it."""

    def __init__(self, work) -> None:
        self._work = work

    def get(self) -> int:
        return self._work()


class HostFile:
    """Reads like a `CuFile`, and notes what is open and under way."""

    num_opened = 0
    under_way = 0

    def __init__(self, path: str) -> None:
        self._data = Path(path).read_bytes()
        HostFile.num_opened += 1

    def pread(self, buffer: object, size: int, file_offset: int) -> Later:
        address = buffer.__cuda_array_interface__["data"][0]
        HostFile.under_way += 1

        def work() -> int:
            HostFile.under_way -= 1
            part = self._data[file_offset : file_offset + size]
            ctypes.memmove(address, part, len(part))
            return len(part)

        return Later(work)
