"""The server's side of the arena: the shared file, and which frames of it are taken.

The data area is cut into units of equal size. A slab is a run of consecutive units, cut into frames of one size class;
objects of one namespace have one size, so few classes are in use. There are 64 classes to the power of two, so a frame
wastes at most a 64th of itself, and a slab has as many units as it takes to waste at most a 32nd at its end: an 8 MiB
object with its digests is just over a power of two.
A slab whose frames are all free goes back to the common pool.
"""

import contextlib
import mmap
import os

from cachetier.core.arena_format import STATE_FILLING, STATE_FREE, geometry_for, pack_header
from cachetier.core.errors import StorageError
from cachetier.core.layout import PAGE_BYTES, round_up
from cachetier.core.units import format_bytes

_UNIT_BYTES_MIN, _UNIT_BYTES_MAX = 1 << 16, 1 << 26
_UNITS_AIM = 64
_CLASSES_PER_DOUBLING = 64
_WASTE_MAX = 1 / 32


class _Slab:
    """Units `[first, first + num_units)`, cut into frames of `frame_bytes`."""

    def __init__(self, first: int, num_units: int, frame_bytes: int, unit_bytes: int) -> None:
        self.first = first
        self.num_units = num_units
        self.frame_bytes = frame_bytes
        start = first * unit_bytes
        self.num_frames = num_units * unit_bytes // frame_bytes
        self.free = [start + number * frame_bytes for number in reversed(range(self.num_frames))]
        self.used: set[int] = set()


class Arena:
    """Frames in shared memory.

    Not thread-safe: the store calls it under its lock. `frame` and the bytes it returns may be used on any thread.

    Attributes:
        path: the file.
        data_bytes: size of the data area.
        largest_frame_bytes: the largest frame that `allocate` can ever give.
    """

    def __init__(self, path: str, descriptor: int, file_bytes: int, instance: bytes) -> None:
        """Take over the open, empty file; `create` is the way to make an arena."""
        self.path = path
        self._inode = os.fstat(descriptor).st_ino
        self._geometry = geometry_for(file_bytes, instance)
        self._map = mmap.mmap(descriptor, self._geometry.file_bytes)
        self._view = memoryview(self._map)
        header = pack_header(self._geometry)
        self._view[: len(header)] = header
        self.data_bytes = self._geometry.data_bytes
        aim = self.data_bytes // _UNITS_AIM // PAGE_BYTES * PAGE_BYTES
        self._unit_bytes = min(max(aim, _UNIT_BYTES_MIN), _UNIT_BYTES_MAX)
        num_units = self.data_bytes // self._unit_bytes
        self.largest_frame_bytes = num_units * self._unit_bytes
        self._slab_at: list[_Slab | None] = [None] * num_units
        self._open_slabs: dict[int, dict[int, _Slab]] = {}  # frame size -> slabs with a free frame, by first unit
        self._units_of: dict[int, int] = {}  # frame size -> units of its slabs
        self._num_free_units = num_units
        self._used_bytes = 0

    @classmethod
    def create(cls, path: str, file_bytes: int, instance: bytes) -> "Arena":
        """Make a new arena file of `file_bytes` at `path`, replacing an old one.

        Raises:
            StorageError: there is no room for it.
        """
        try:
            if os.path.lexists(path):
                os.unlink(path)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot make the arena {path}: {error}") from error
        try:
            os.posix_fallocate(descriptor, 0, file_bytes)
            return cls(path, descriptor, file_bytes, instance)
        except (OSError, ValueError) as error:
            os.unlink(path)
            folder = os.path.dirname(path)
            room = os.statvfs(folder)
            raise StorageError(
                f"cannot make an arena of {format_bytes(file_bytes)} in {folder}, which has "
                f"{format_bytes(room.f_bavail * room.f_frsize)} left: {error}; choose a smaller host_bytes"
            ) from error
        finally:
            os.close(descriptor)

    @property
    def file_bytes(self) -> int:
        """Size of the file that workers map."""
        return self._geometry.file_bytes

    @property
    def data_offset(self) -> int:
        """Where in the file the data area begins."""
        return self._geometry.data_offset

    @property
    def used_bytes(self) -> int:
        """Bytes in frames that are taken."""
        return self._used_bytes

    def size_class(self, size_bytes: int) -> int:
        """Return the frame size that `allocate(size_bytes)` uses: freeing a frame of this class makes it succeed.

        Raises:
            StorageError: no arena of this size ever has such a frame; the text names the host_bytes needed.
        """
        if size_bytes > self.largest_frame_bytes:
            needed = round_up(size_bytes, 1 << 20) + (1 << 20) + self.file_bytes - self.largest_frame_bytes
            raise StorageError(
                f"an object needs {format_bytes(size_bytes)} at once, but host_bytes allows "
                f"{format_bytes(self.largest_frame_bytes)}; set host_bytes to at least {needed} (better, many times it)"
            )
        step = max(PAGE_BYTES, (1 << (size_bytes - 1).bit_length()) // (2 * _CLASSES_PER_DOUBLING))
        return min(round_up(size_bytes, step), self.largest_frame_bytes)

    def allocate(self, size_bytes: int) -> int | None:
        """Return the offset of a frame of at least `size_bytes`, in STATE_FILLING; None: its class has none left.

        Raises:
            StorageError: no arena of this size ever has such a frame; the text names the host_bytes needed.
        """
        frame_bytes = self.size_class(size_bytes)
        slabs = self._open_slabs.setdefault(frame_bytes, {})
        slab = next(iter(slabs.values()), None) or self._add_slab(frame_bytes)
        if slab is None:
            return None
        offset = slab.free.pop()
        slab.used.add(offset)
        if not slab.free:
            del slabs[slab.first]
        self._used_bytes += frame_bytes
        self.set_state(offset, STATE_FILLING)
        return offset

    def free(self, offset: int) -> None:
        """Give a frame back; its state becomes STATE_FREE."""
        slab = self._slab_at[offset // self._unit_bytes]
        assert slab is not None, f"frame {offset} is not taken"
        assert offset in slab.used, f"frame {offset} is not taken"
        self.set_state(offset, STATE_FREE)
        self._used_bytes -= slab.frame_bytes
        slab.used.remove(offset)
        slab.free.append(offset)
        self._open_slabs[slab.frame_bytes][slab.first] = slab
        if not slab.used:
            del self._open_slabs[slab.frame_bytes][slab.first]
            for number in range(slab.first, slab.first + slab.num_units):
                self._slab_at[number] = None
            self._num_free_units += slab.num_units

    def slab_victim(self, size_bytes: int) -> list[int] | None:
        """Return the used frames of the emptiest run of slabs of other classes that would make room for `size_bytes`.

        Once they are freed, `allocate(size_bytes)` succeeds. None: no other class has a slab.
        """
        frame_bytes = self.size_class(size_bytes)
        wanted = self._num_units(frame_bytes)
        best: list[int] | None = None
        for first in range(len(self._slab_at) - wanted + 1):
            slabs = {id(slab): slab for slab in self._slab_at[first : first + wanted] if slab}
            if any(slab.frame_bytes == frame_bytes for slab in slabs.values()):
                continue
            frames = [offset for slab in slabs.values() for offset in slab.used]
            if frames and (best is None or len(frames) < len(best)):
                best = frames
        return best

    def frame(self, offset: int, length: int) -> memoryview:
        """Return the writable bytes `[offset, offset + length)` of the data area; the address is page-aligned."""
        assert 0 <= offset <= offset + length <= self.data_bytes, f"no frame at {offset} of {length}"
        start = self._geometry.data_offset + offset
        return self._view[start : start + length]

    def state(self, offset: int) -> int:
        """Return a frame's state (core.arena_format.STATE_...)."""
        return self._view[self._geometry.state_offset + offset // PAGE_BYTES]

    def set_state(self, offset: int, state: int) -> None:
        """Set a frame's state."""
        self._view[self._geometry.state_offset + offset // PAGE_BYTES] = state

    def check_integrity(self) -> None:
        """Raise AssertionError if frames overlap, are lost, or are counted wrongly."""
        used_bytes = 0
        for number, slab in enumerate(self._slab_at):
            if slab is None:
                continue
            assert slab.first <= number < slab.first + slab.num_units
            if number > slab.first:
                continue
            assert len(slab.free) + len(slab.used) == slab.num_frames
            assert slab.used.isdisjoint(slab.free)
            assert slab.used, "an empty slab belongs to the common pool"
            is_open = self._open_slabs[slab.frame_bytes].get(slab.first) is slab
            assert is_open == bool(slab.free)
            assert all(self.state(offset) == STATE_FREE for offset in slab.free)
            assert all(self.state(offset) != STATE_FREE for offset in slab.used)
            used_bytes += len(slab.used) * slab.frame_bytes
        assert used_bytes == self._used_bytes <= self.data_bytes
        assert self._slab_at.count(None) == self._num_free_units

    def close(self) -> None:
        """Unmap the arena and remove its file, unless another server has put its own there."""
        self._view.release()
        with contextlib.suppress(BufferError):  # somebody still holds a frame: the memory goes with the last of them
            self._map.close()
        if os.path.lexists(self.path) and os.stat(self.path).st_ino == self._inode:
            os.unlink(self.path)

    def _num_units(self, frame_bytes: int) -> int:
        """Return how many units a slab of this class has."""
        known = self._units_of.get(frame_bytes)
        if known is None:
            least = -(-frame_bytes // self._unit_bytes)
            most = max(least, len(self._slab_at) // 8)
            wastes = {n: n * self._unit_bytes % frame_bytes / (n * self._unit_bytes) for n in range(least, most + 1)}
            good = [n for n, waste in wastes.items() if waste <= _WASTE_MAX]
            known = self._units_of[frame_bytes] = good[0] if good else min(wastes, key=lambda n: wastes[n])
        return known

    def _add_slab(self, frame_bytes: int) -> _Slab | None:
        wanted = self._num_units(frame_bytes)
        if self._num_free_units < wanted:
            return None
        free_run = 0
        for number, slab in enumerate(self._slab_at):
            free_run = free_run + 1 if slab is None else 0
            if free_run == wanted:
                first = number - wanted + 1
                made = _Slab(first, wanted, frame_bytes, self._unit_bytes)
                self._slab_at[first : number + 1] = [made] * wanted
                self._num_free_units -= wanted
                self._open_slabs[frame_bytes][first] = made
                return made
        return None
