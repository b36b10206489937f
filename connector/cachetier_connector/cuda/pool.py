"""Pools in device memory, as one worker sees them: its own part, and the parts of others that it reads.

The own part is one allocation of the driver's, made at start-up and outside of torch's allocator, so that it can be
shared with other processes; what stands in it is decided by the server. Parts of others, of other ranks of the same
engine as well, are opened when a load first names them, and closed once the server says that their pool is gone and no
load reads them any more: as long as they are open, the memory of a process that has ended may stay taken. A part that
cannot be opened (another machine's partition, no path between the devices) is out of reach, and everything in it is
read from host memory.

Locking design: `_lock` guards the table of opened parts; opening happens under it, so that it happens once.
"""

import logging
import threading
from collections.abc import Iterable, Sequence

from cachetier.core.errors import CachetierError, ConfigError
from cachetier.core.layout import pool_frame_bytes
from cachetier.core.pool_messages import Pool
from cachetier.core.units import format_bytes
from cachetier_connector.copy_base import PoolOffer, Pools
from cachetier_connector.cuda.device import Device
from cachetier_connector.cuda.driver import DriverError

log = logging.getLogger(__name__)


class OwnPart:
    """The part of its engine's pool that this worker owns.

    Attributes:
        address: of its first frame.
        handle: by which other processes open it.
    """

    def __init__(self, device: Device, size_bytes: int) -> None:
        """Allocate.

        Raises:
            ConfigError: the device has not so much memory left.
        """
        self._device, self._size_bytes = device, size_bytes
        try:
            self.address = device.allocate(size_bytes)
        except DriverError as error:
            raise ConfigError(
                f"gpu_bytes: the device has no {format_bytes(size_bytes)} left beside vLLM's own memory ({error}); "
                "lower gpu_bytes or vLLM's gpu_memory_utilization"
            ) from error
        self.handle = device.handle_of(self.address)

    def frame(self, number: int, object_bytes: int) -> int:
        """Return the address of a frame for objects of a size.

        Raises:
            ValueError: there is no such frame.
        """
        start = number * pool_frame_bytes(object_bytes)
        if not 0 <= start <= self._size_bytes - pool_frame_bytes(object_bytes):
            raise ValueError(f"frame {number} is outside of the pool")
        return self.address + start

    def offer(self, object_bytes: int) -> PoolOffer:
        """Describe it to the server, which hands out frames for objects of a size."""
        num_frames = self._size_bytes // pool_frame_bytes(object_bytes)
        return PoolOffer(object_bytes, num_frames, self._device.uuid, self.handle)

    def close(self) -> None:
        """Free it; whoever has opened it must not read it any more, and the server must know."""
        self._device.free(self.address)


class _Opened:
    """A part of another process. `address` is None if it is out of reach; `num_users` are the loads that read it."""

    def __init__(self, address: int | None) -> None:
        self.address = address
        self.num_users = 0
        self.is_gone = False


class DevicePools(Pools):
    """All pools that this worker has to do with."""

    def __init__(self, device: Device, own_bytes: int) -> None:
        """Allocate the own part, unless `own_bytes` is 0. Raises ConfigError."""
        self._device = device
        self.own = OwnPart(device, own_bytes) if own_bytes else None
        self._lock = threading.Lock()
        self._opened: dict[tuple[int, int], _Opened] = {}

    def offer(self, object_bytes: int) -> PoolOffer | None:
        offered = self.own.offer(object_bytes) if self.own is not None else None
        if offered is not None and not offered.num_frames:
            log.warning("cachetier: gpu_bytes is less than the %s of one chunk: no pool", format_bytes(object_bytes))
            return None
        return offered

    def opened(self) -> list[int]:
        with self._lock:
            return sorted({pool for pool, _ in self._opened})

    def close_gone(self, pools: Iterable[int]) -> None:
        gone = set(pools)
        self._device.bind_thread()
        with self._lock:
            for (pool, part), opened in list(self._opened.items()):
                if pool in gone:
                    opened.is_gone = True
                    self._close_if_unused((pool, part), opened)

    def acquire(self, pool: Pool, part: int) -> int | None:
        """Return the address of a part for one load, None if it is out of reach. Every call takes a `release`."""
        named, key = pool.parts[part], (pool.id, part)
        if self.own is not None and named.handle == self.own.handle:
            return self.own.address
        with self._lock:
            opened = self._opened.get(key)
            if opened is None:
                opened = self._opened[key] = _Opened(self._open(named.handle, named.device, pool.engine))
            opened.num_users += 1
            return opened.address

    def release(self, pool: Pool, part: int) -> None:
        """Say that the load reads the part no more."""
        key = (pool.id, part)
        with self._lock:
            opened = self._opened.get(key)
            if opened is not None:
                opened.num_users -= 1
                self._close_if_unused(key, opened)

    def stop(self) -> None:
        """Close and free everything. Nothing may be under way."""
        with self._lock:
            for key, opened in list(self._opened.items()):
                opened.is_gone, opened.num_users = True, 0
                self._close_if_unused(key, opened)
        if self.own is not None:
            self.own.close()

    def _open(self, handle: bytes, device: str, engine: str) -> int | None:
        try:
            return self._device.open_handle(handle)
        except (DriverError, ValueError) as error:
            log.warning(
                "cachetier: the pool of engine %s on device %s is out of reach (%s): reading from host memory instead",
                engine,
                device,
                error,
            )
            return None

    def _close_if_unused(self, key: tuple[int, int], opened: _Opened) -> None:
        if not opened.is_gone or opened.num_users:
            return
        del self._opened[key]
        if opened.address is not None:
            try:
                self._device.close_handle(opened.address)
            except CachetierError as error:
                log.warning("cachetier: a pool that is gone cannot be closed: %s", error)


class PoolReads:
    """The parts that one load reads, kept open until `end`. Used by one thread."""

    def __init__(self, pools: DevicePools, named: Sequence[Pool]) -> None:
        """Take the pools that the load's chunks name by number."""
        self._pools, self._named = pools, named
        self._addresses: dict[tuple[int, int], int | None] = {}

    def address(self, number: int, part: int) -> int | None:
        """Return where a part of pool `number` of the load starts, None if it is out of reach."""
        key = (number, part)
        if key not in self._addresses:
            if not (0 <= number < len(self._named) and part < len(self._named[number].parts)):
                return None
            self._addresses[key] = self._pools.acquire(self._named[number], part)
        return self._addresses[key]

    def end(self) -> None:
        """Let go of them."""
        for number, part in self._addresses:
            self._pools.release(self._named[number], part)
        self._addresses = {}
