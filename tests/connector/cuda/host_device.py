"""A device without a GPU whose streams run as late and in as odd an order as their events allow.

Nothing that is enqueued runs before somebody waits for it; then streams are served at random, the engine's last of
all. Whatever the copy engine
relies on without having said it with an event goes wrong here sooner or later.
"""

import ctypes
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from cachetier_connector.cuda.device import Device
from cachetier_connector.cuda.driver import DriverError
from cachetier_connector.cuda.transfers import Transfer


class Mark:
    """A point in a stream that has been passed or not."""

    is_passed = False


class HostEvent:
    """An event of a `HostDevice`."""

    def __init__(self, device: "HostDevice") -> None:
        self._device = device
        self.mark = Mark()
        self.mark.is_passed = True

    def record(self, stream: "HostStream") -> None:
        mark = self.mark = Mark()
        stream.enqueue(lambda: setattr(mark, "is_passed", True))

    def has_passed(self) -> bool:
        self._device.check()
        return self.mark.is_passed

    def synchronize(self) -> None:
        mark = self.mark
        self._device.run_until(lambda: mark.is_passed)


class HostStream:
    """A stream of a `HostDevice`: work, and marks that the work behind them waits for."""

    def __init__(self, device: "HostDevice") -> None:
        self._device = device
        self.queue: deque[Callable[[], object] | Mark] = deque()
        device.streams.append(self)

    def enqueue(self, work: Callable[[], object] | Mark) -> None:
        with self._device.lock:
            self._device.check()
            self.queue.append(work)

    def wait_event(self, event: HostEvent) -> None:
        self.enqueue(event.mark)

    def synchronize(self) -> None:
        self._device.run_until(lambda: not self.queue)

    def step(self) -> bool:
        """Do the next piece of work; False: it has to wait, or there is none."""
        if not self.queue:
            return False
        head = self.queue[0]
        if isinstance(head, Mark):
            if head.is_passed:
                self.queue.popleft()
            return head.is_passed
        self.queue.popleft()
        head()
        return True


class HostUpload:
    """Numbers on their way to a `HostDevice`."""

    def __init__(self, values: Sequence[int]) -> None:
        self._values = torch.tensor(values, dtype=torch.int64)
        self.tensor = torch.full((len(values),), -1)
        self.is_released = False

    def arrive(self) -> None:
        assert not self.is_released, "released while it was under way"
        self.tensor.copy_(self._values)


class HostDevice(Device):
    """Memory, streams and events on the CPU.

    Attributes:
        engine: the stream of the engine, on which a test may enqueue what the engine does to its blocks.
        registered: registered ranges, start to end.
        register_error: refuse registrations with this error of the driver's.
        fails_with: what every call raises from now on, as a CUDA device does after an error that sticks.
        transfers: all that were copied.
        memory_bytes: more than that is not allocated for pools.
        allocated: memory of pools, by address.
        peers: devices of other processes whose memory this one can open.
        opened: addresses of theirs that it has opened.
    """

    def __init__(self, seed: int = 0) -> None:
        self.lock = threading.RLock()
        self.streams: list[HostStream] = []
        self.engine = HostStream(self)
        self.registered: dict[int, int] = {}
        self.register_error = ""
        self.fails_with: Exception | None = None
        self.transfers: list[Transfer] = []
        self.memory_bytes = 1 << 30
        self.allocated: dict[int, torch.Tensor] = {}
        self.peers: list[HostDevice] = []
        self.opened: list[int] = []
        self._random = random.Random(seed)

    def check(self) -> None:
        if self.fails_with is not None:
            raise self.fails_with

    def run_until(self, is_reached: Callable[[], bool]) -> None:
        """Serve streams at random until `is_reached`."""
        while True:
            with self.lock:
                self.check()
                if is_reached():
                    return
                order = self._random.sample(self.streams, len(self.streams))
                order.sort(key=lambda stream: stream is self.engine)
                assert any(stream.step() for stream in order), "everything waits for something that never comes"

    def bind_thread(self) -> None:
        pass

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.full((num_bytes,), 0xEE, dtype=torch.uint8)

    def empty_host(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, -1, dtype=torch.int64)

    def constant(self, values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype)

    def upload(self, values: Sequence[int], stream: HostStream) -> HostUpload:
        upload = HostUpload(values)
        stream.enqueue(upload.arrive)
        return upload

    def release(self, upload: HostUpload) -> None:
        upload.is_released = True
        upload.tensor.fill_(-1 << 40)  # as another upload would

    def new_stream(self, *, is_urgent: bool) -> HostStream:
        return HostStream(self)

    def new_event(self) -> HostEvent:
        return HostEvent(self)

    def mark(self) -> HostEvent:
        event = HostEvent(self)
        event.record(self.engine)
        return event

    def copy_in(self, transfer: Transfer, stream: HostStream) -> None:
        self._note(transfer)
        stream.enqueue(lambda: [ctypes.memmove(device, host, width) for host, device, width in rows_of(transfer)])

    def copy_out(self, transfer: Transfer, stream: HostStream) -> None:
        self._note(transfer)
        stream.enqueue(lambda: [ctypes.memmove(host, device, width) for host, device, width in rows_of(transfer)])

    def copy_within(self, target: int, source: int, length_bytes: int, stream: HostStream) -> None:
        stream.enqueue(lambda: ctypes.memmove(target, source, length_bytes))

    @property
    def uuid(self) -> str:
        return "GPU-host"

    def allocate(self, length_bytes: int) -> int:
        if length_bytes > self.memory_bytes:
            raise DriverError("cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY (2)")
        memory = torch.full((length_bytes,), 0xDD, dtype=torch.uint8)
        self.allocated[memory.data_ptr()] = memory
        return memory.data_ptr()

    def free(self, address: int) -> None:
        del self.allocated[address]

    def handle_of(self, address: int) -> bytes:
        return f"{id(self)}:{address}".encode()

    def open_handle(self, handle: bytes) -> int:
        device, address = map(int, handle.split(b":"))
        memory = [peer.allocated[address] for peer in self.peers if id(peer) == device and address in peer.allocated]
        if not memory:
            raise DriverError("cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_VALUE (1)")
        self.opened.append(address)
        return address

    def close_handle(self, address: int) -> None:
        self.opened.remove(address)

    def launch(self, stream: HostStream, work: Callable[[int | None], None]) -> None:
        stream.enqueue(lambda: work(None))

    def register(self, address: int, length_bytes: int) -> None:
        if self.register_error:
            raise DriverError(f"cuMemHostRegister_v2: {self.register_error}")
        assert address not in self.registered
        self.registered[address] = address + length_bytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def is_registered(self, address: int, length_bytes: int) -> bool:
        end = address + length_bytes
        for first, last in sorted(self.registered.items()):
            if first <= address < last:
                address = last
        return address >= end

    def _note(self, transfer: Transfer) -> None:
        """Refuse what the driver refuses: memory of which one part is registered and another is not."""
        self.transfers.append(transfer)
        start = transfer.host
        end = start + (transfer.rows - 1) * transfer.host_pitch_bytes + transfer.width_bytes
        for first, last in list(self.registered.items()):
            assert end <= first or last <= start or first <= start <= end <= last, "partly registered"


def rows_of(transfer: Transfer) -> Iterator[tuple[int, int, int]]:
    """Yield host address, device address and bytes of each row."""
    for row in range(transfer.rows):
        yield (
            transfer.host + row * transfer.host_pitch_bytes,
            transfer.device + row * transfer.device_pitch_bytes,
            transfer.width_bytes,
        )
