"""The few file operations that storage needs, in one class, so that a test can put a faulty disk underneath.

Stateless; any thread. Every method raises OSError as the system call does. Writes and reads are complete or raise.
"""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress

Buffer = bytes | bytearray | memoryview


class FileLayer:
    """The operating system's files."""

    def open(self, path: str, *, create: bool = False, direct: bool = False) -> int:
        """Open `path` for reading and writing and return its descriptor; new files have mode 0600.

        With `direct`, O_DIRECT is used where the file system has it: then addresses, offsets and lengths of reads
        and writes must be multiples of 4 KiB.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        if direct:
            with suppress(OSError):
                return os.open(path, flags | os.O_DIRECT, 0o600)
        return os.open(path, flags, 0o600)

    def close(self, descriptor: int) -> None:
        """Close `descriptor`."""
        os.close(descriptor)

    def pwritev(self, descriptor: int, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all bytes of `buffers` at `offset`."""
        written = os.pwritev(descriptor, buffers, offset)
        if written != sum(len(buffer) for buffer in buffers):
            raise OSError(errno.ENOSPC, "short write")

    def pread(self, descriptor: int, size_bytes: int, offset: int) -> bytes:
        """Return `size_bytes` bytes from `offset`."""
        data = os.pread(descriptor, size_bytes, offset)
        if len(data) != size_bytes:
            raise OSError(errno.EIO, "short read")
        return data

    def preadv(self, descriptor: int, buffers: Sequence[bytearray | memoryview], offset: int) -> None:
        """Fill `buffers` from `offset`."""
        read = os.preadv(descriptor, buffers, offset)
        if read != sum(len(buffer) for buffer in buffers):
            raise OSError(errno.EIO, "short read")

    def fdatasync(self, descriptor: int) -> None:
        """Make written bytes and the file's size durable."""
        os.fdatasync(descriptor)

    def fallocate(self, descriptor: int, size_bytes: int) -> None:
        """Reserve space on disk for the first `size_bytes` of the file; new bytes read as zero."""
        os.posix_fallocate(descriptor, 0, size_bytes)

    def fsync_dir(self, path: str) -> None:
        """Make creations, renames and removals in the folder `path` durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def unlink(self, path: str) -> None:
        """Remove the file."""
        os.unlink(path)

    def rename(self, source: str, target: str) -> None:
        """Rename `source` to `target`, replacing it."""
        os.rename(source, target)

    def listdir(self, path: str) -> list[str]:
        """Return the names in the folder, sorted."""
        return sorted(os.listdir(path))

    def size(self, descriptor: int) -> int:
        """Return the file's size in bytes."""
        return os.fstat(descriptor).st_size


def read_file(files: FileLayer, path: str) -> bytes:
    """Return the whole of a small file, or nothing if it does not exist.

    Raises:
        OSError: it cannot be read.
    """
    if os.path.basename(path) not in files.listdir(os.path.dirname(path)):
        return b""
    descriptor = files.open(path)
    try:
        return files.pread(descriptor, files.size(descriptor), 0)
    finally:
        files.close(descriptor)


def replace_file(files: FileLayer, path: str, data: bytes) -> None:
    """Write a small file so that after a crash either the old or the new one stands there, whole.

    Raises:
        OSError: the disk is full or fails.
    """
    temporary = path + ".new"
    if os.path.basename(temporary) in files.listdir(os.path.dirname(path)):
        files.unlink(temporary)
    descriptor = files.open(temporary, create=True)
    try:
        files.pwritev(descriptor, [data], 0)
        files.fdatasync(descriptor)
    finally:
        files.close(descriptor)
    files.rename(temporary, path)
    files.fsync_dir(os.path.dirname(path))
