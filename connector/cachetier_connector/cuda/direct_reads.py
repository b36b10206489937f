"""Reads of segment files straight into device memory, with kvikio: by GPUDirect Storage where the machine has it.

The one module that imports kvikio, and only when a reader is made. kvikio reads with a pool of MAX_IN_FLIGHT threads,
each of which has one read of at most TASK_BYTES under way: GPUDirect Storage is known to hang with 256 in flight.

Thread-safe: load threads share one reader. Files stay open, the least recently used of more than MAX_FILES is closed
when nobody reads it any more.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from cachetier.core.errors import StorageError

MAX_IN_FLIGHT = 16
TASK_BYTES = 1 << 20
MAX_FILES = 64


class FileRead(NamedTuple):
    """`length_bytes` bytes of a file from `offset` on, to go to device memory at `address`."""

    path: str
    offset: int
    address: int
    length_bytes: int


class DeviceBytes:
    """Device memory as other libraries like to see it."""

    def __init__(self, address: int, length_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (length_bytes,),
            "strides": None,
            "typestr": "|u1",
            "version": 3,
        }


def open_with_kvikio(path: str) -> Any:
    """Return the file at `path` as a `kvikio.CuFile`."""
    import kvikio

    return kvikio.CuFile(path, "r")


class DirectReader:
    """Reads files into device memory.

    Args:
        open_file: gives an object like `kvikio.CuFile`.

    Raises:
        StorageError: from the constructor, there is no kvikio here, or it does not work.
    """

    def __init__(self, open_file: Callable[[str], Any] = open_with_kvikio) -> None:
        if open_file is open_with_kvikio:
            _set_up_kvikio()
        self._open_file = open_file
        self._lock = threading.Lock()
        self._instance = ""
        self._files: OrderedDict[str, Any] = OrderedDict()

    def read(self, instance: str, reads: Iterable[FileRead]) -> None:
        """Do all of `reads`; blocks until none is under way any more, also when it raises.

        Args:
            instance: of the server whose segments they are; another one may have made its files anew.
            reads: what to read.

        Raises:
            StorageError: a file cannot be opened or read, or is too short.
        """
        under_way = []
        problem: str = ""
        try:
            for read in reads:
                file = self._file(instance, read.path)
                future = file.pread(DeviceBytes(read.address, read.length_bytes), read.length_bytes, read.offset)
                under_way.append((read, file, future))
        except Exception as error:  # kvikio's exceptions are of many kinds
            problem = str(error)
        for read, _, future in under_way:
            try:
                if future.get() != read.length_bytes:
                    problem = problem or f"{read.path} ends too early"
            except Exception as error:
                problem = problem or str(error)
        if problem:
            raise StorageError(f"a segment file cannot be read directly: {problem}")

    def close(self) -> None:
        """Let go of all files."""
        with self._lock:
            self._files.clear()

    def _file(self, instance: str, path: str) -> Any:
        with self._lock:
            if instance != self._instance:
                self._files.clear()
                self._instance = instance
            file = self._files.pop(path, None) or self._open_file(path)
            self._files[path] = file
            if len(self._files) > MAX_FILES:
                self._files.popitem(last=False)
            return file


class FileFrames:
    """The frames in a segment file, read through the host: for the few bytes that list digests."""

    def __init__(self, path: str) -> None:
        self._path = path

    def frame(self, offset: int, length_bytes: int) -> bytes:
        """Return bytes `[offset, offset + length_bytes)`, fewer or none if they cannot be read."""
        try:
            with open(self._path, "rb", buffering=0) as file:
                return os.pread(file.fileno(), length_bytes, offset)
        except OSError:
            return b""


def gds_problem() -> str:
    """Return why kvikio does not read with GPUDirect Storage on this machine; empty: it does."""
    import kvikio.cufile_driver
    import kvikio.defaults

    try:
        is_available = kvikio.cufile_driver.get("is_gds_available")
    except RuntimeError as error:  # no libcufile
        return str(error)
    if not is_available:
        return "the cuFile driver finds no GPUDirect Storage (the nvidia-fs kernel module)"
    if kvikio.defaults.is_compat_mode_preferred():
        return "kvikio prefers its compatibility mode (KVIKIO_COMPAT_MODE, or no access to /run/udev)"
    return ""


def _set_up_kvikio() -> None:
    try:
        import kvikio.defaults

        kvikio.defaults.set({"num_threads": MAX_IN_FLIGHT, "task_size": TASK_BYTES, "auto_direct_io_read": True})
    except Exception as error:  # missing, or missing libraries of its own
        raise StorageError(f"kvikio cannot be used: {error}") from error
