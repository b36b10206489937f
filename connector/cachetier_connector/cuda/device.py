"""What the copy engine needs of a device: memory, streams, events, copies; and the CUDA device.

Behind an interface, so that all the rest, above all what waits for what, also runs where there is no GPU.
"""

import contextlib
import sys
import threading
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from cachetier_connector.cuda.driver import Driver
from cachetier_connector.cuda.transfers import Transfer

UPLOAD_NUMBERS_MIN = 8192  # blocks of a request of 128K tokens


class Event(Protocol):
    """A point in a stream. Recording it again moves it, once nobody waits for the old point."""

    def record(self, stream: Any) -> None:
        """Put it at the end of what is enqueued on `stream`."""

    def has_passed(self) -> bool:
        """Tell whether the stream has passed it, or it was never recorded; does not block."""

    def synchronize(self) -> None:
        """Block until the stream has passed it, without the interpreter's lock and without spinning."""


class Stream(Protocol):
    """Work that the device does in order, beside other streams."""

    def wait_event(self, event: Any) -> None:
        """Have what is enqueued from now on wait until `event`, as recorded now, has passed; does not block."""

    def synchronize(self) -> None:
        """Block until all that is enqueued is done."""


class Upload(Protocol):
    """Numbers on their way to the device.

    Attributes:
        tensor: int64 on the device; the stream that they were uploaded on fills it.
    """

    tensor: torch.Tensor


class Device(ABC):
    """One device. Any thread that was bound to it."""

    @abstractmethod
    def bind_thread(self) -> None:
        """Make this the calling thread's device. Cheap after the first time."""

    @abstractmethod
    def empty(self, num_bytes: int) -> torch.Tensor:
        """Return device memory, uint8, for any stream."""

    @abstractmethod
    def empty_host(self, *shape: int) -> torch.Tensor:
        """Return int64 host memory that kernels can write to."""

    @abstractmethod
    def constant(self, values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return `values` in device memory, for any stream; blocks a moment."""

    @abstractmethod
    def upload(self, values: Sequence[int], stream: Any) -> Any:
        """Return an `Upload` by `stream`, to be kept until the streams that use it have, and then released."""

    @abstractmethod
    def release(self, upload: Any) -> None:
        """Take back the memory of an `Upload` for another one; nothing that uses it is under way any more."""

    @abstractmethod
    def new_stream(self, *, is_urgent: bool) -> Any:
        """Return a `Stream`; the kernels of urgent ones go before all others that are not running yet."""

    @abstractmethod
    def new_event(self) -> Any:
        """Return an `Event`."""

    @abstractmethod
    def mark(self) -> Any:
        """Return a new `Event`, recorded on the stream that the calling thread, the engine's main thread, works on."""

    @abstractmethod
    def copy_in(self, transfer: Transfer, stream: Any) -> None:
        """Enqueue a copy from host to device memory."""

    @abstractmethod
    def copy_out(self, transfer: Transfer, stream: Any) -> None:
        """Enqueue a copy from device to host memory."""

    @abstractmethod
    def copy_within(self, target: int, source: int, length_bytes: int, stream: Any) -> None:
        """Enqueue a copy between device addresses."""

    @abstractmethod
    def launch(self, stream: Any, work: Callable[[int | None], None]) -> None:
        """Have `work` enqueue kernels on `stream`, whose handle it is called with."""

    @abstractmethod
    def register(self, address: int, length_bytes: int) -> None:
        """Page-lock host memory. Raises DriverError."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undo `register`. Raises DriverError."""

    @abstractmethod
    def is_registered(self, address: int, length_bytes: int) -> bool:
        """Tell whether all of this host memory is registered, so that kernels may use it by its address."""

    @property
    @abstractmethod
    def uuid(self) -> str:
        """Which device of the node it is, in all processes."""

    @abstractmethod
    def allocate(self, length_bytes: int) -> int:
        """Return the address of device memory that other processes can open. Raises DriverError."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Undo `allocate`. Raises DriverError."""

    @abstractmethod
    def handle_of(self, address: int) -> bytes:
        """Return by what other processes open what `allocate` returned. Raises DriverError."""

    @abstractmethod
    def open_handle(self, handle: bytes) -> int:
        """Return the address of another process's memory, on this device or a peer. Raises DriverError, ValueError."""

    @abstractmethod
    def close_handle(self, address: int) -> None:
        """Undo `open_handle`. Raises DriverError."""


class CudaEvent:
    """An event of the driver's. Making one costs a microsecond."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self.handle = driver, driver.new_event()

    def record(self, stream: "CudaStream") -> None:
        self._driver.record(self.handle, stream.handle)

    def has_passed(self) -> bool:
        return self._driver.has_passed(self.handle)

    def synchronize(self) -> None:
        self._driver.synchronize(self.handle)

    def __del__(self) -> None:
        try:
            self._driver.destroy_event(self.handle)
        except Exception:
            return  # at the end of the process there may be no driver any more


class CudaStream:
    """A stream of the driver's: torch would make 32 of a kind at once, which take device memory and share queues."""

    def __init__(self, driver: Driver, priority: int) -> None:
        self._driver, self.handle = driver, driver.new_stream(priority)

    def wait_event(self, event: CudaEvent) -> None:
        self._driver.wait_event(self.handle, event.handle)

    def synchronize(self) -> None:
        event = CudaEvent(self._driver)
        event.record(self)
        event.synchronize()

    def __del__(self) -> None:
        try:
            self._driver.destroy_stream(self.handle)
        except Exception:
            return


class CudaUpload:
    """Pinned memory and device memory for up to `capacity` numbers, which are used again and again."""

    def __init__(self, memory: torch.Tensor, capacity: int) -> None:
        """Take `memory`, int64 on the device."""
        self.capacity, self._memory = capacity, memory
        self._pinned = torch.empty(capacity, dtype=torch.int64, pin_memory=True)
        self._numbers = memoryview(self._pinned.numpy()).cast("B").cast("q")
        self.host, self.device = self._pinned.data_ptr(), memory.data_ptr()
        self.tensor = memory

    def put(self, values: Sequence[int]) -> int:
        """Take over `values`; return how many bytes to copy."""
        self._numbers[: len(values)] = array("q", values)
        self.tensor = self._memory[: len(values)]
        return len(values) * self._numbers.itemsize


class CudaDevice(Device):
    """A CUDA device by the driver's streams, events and copies; memory comes from torch."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._driver = Driver(self._device.index)
        self._bound = threading.local()
        self.bind_thread()
        self._setup = self.new_stream(is_urgent=True)
        self._uploads: list[CudaUpload] = []
        self._registered: tuple[tuple[int, int], ...] = ()  # sorted ranges; replaced, never changed
        self._registering = threading.Lock()

    def bind_thread(self) -> None:
        if not getattr(self._bound, "is_bound", False):
            torch.cuda.set_device(self._device)
            self._driver.bind_thread()
            self._bound.is_bound = True

    def empty(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def empty_host(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int64, pin_memory=True)

    def constant(self, values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with self._set_up():
            tensor = torch.tensor(values, dtype=dtype, device=self._device)
        self._setup.synchronize()
        return tensor

    def upload(self, values: Sequence[int], stream: CudaStream) -> CudaUpload:
        try:
            upload = self._uploads.pop()
        except IndexError:
            upload = None
        if upload is None or upload.capacity < len(values):
            capacity = max(UPLOAD_NUMBERS_MIN, 1 << (len(values) - 1).bit_length())
            with self._set_up():
                upload = CudaUpload(torch.empty(capacity, dtype=torch.int64, device=self._device), capacity)
        num_bytes = upload.put(values)
        self._driver.copy_in(upload.device, upload.host, num_bytes, stream.handle, may_wait=False)
        return upload

    def release(self, upload: CudaUpload) -> None:
        self._uploads.append(upload)

    def new_stream(self, *, is_urgent: bool) -> CudaStream:
        return CudaStream(self._driver, -1 if is_urgent else 0)

    def new_event(self) -> CudaEvent:
        return CudaEvent(self._driver)

    def mark(self) -> CudaEvent:
        self.bind_thread()
        event = CudaEvent(self._driver)
        self._driver.record(event.handle, torch.cuda.current_stream(self._device).cuda_stream)
        return event

    def copy_in(self, transfer: Transfer, stream: CudaStream) -> None:
        host, device, width, rows, host_pitch, device_pitch = transfer
        may_wait = not self.is_registered(host, 1)  # no copy crosses the border of a registered range
        if rows == 1:
            self._driver.copy_in(device, host, width, stream.handle, may_wait=may_wait)
        else:
            self._driver.copy_rows_in(
                device, device_pitch, host, host_pitch, width, rows, stream.handle, may_wait=may_wait
            )

    def copy_out(self, transfer: Transfer, stream: CudaStream) -> None:
        host, device, width, rows, host_pitch, device_pitch = transfer
        may_wait = not self.is_registered(host, 1)  # no copy crosses the border of a registered range
        if rows == 1:
            self._driver.copy_out(host, device, width, stream.handle, may_wait=may_wait)
        else:
            self._driver.copy_rows_out(
                host, host_pitch, device, device_pitch, width, rows, stream.handle, may_wait=may_wait
            )

    def copy_within(self, target: int, source: int, length_bytes: int, stream: CudaStream) -> None:
        self._driver.copy_within(target, source, length_bytes, stream.handle)

    def launch(self, stream: CudaStream, work: Callable[[int | None], None]) -> None:
        work(stream.handle)

    def register(self, address: int, length_bytes: int) -> None:
        self._driver.register(address, length_bytes)
        with self._registering:
            self._registered = tuple(sorted((*self._registered, (address, address + length_bytes))))

    def unregister(self, address: int) -> None:
        with self._registering:
            self._registered = tuple(each for each in self._registered if each[0] != address)
        self._driver.unregister(address)

    def is_registered(self, address: int, length_bytes: int) -> bool:
        ranges, end = self._registered, address + length_bytes
        number = bisect_right(ranges, (address, sys.maxsize)) - 1
        while 0 <= number < len(ranges) and ranges[number][0] <= address < ranges[number][1]:
            address, number = ranges[number][1], number + 1
            if address >= end:
                return True
        return False

    def _set_up(self) -> contextlib.AbstractContextManager[Any]:
        """Have torch allocate for and work on a stream of its own: the default one would wait for the engine's step."""
        context: contextlib.AbstractContextManager[Any] = torch.cuda.stream(
            torch.cuda.ExternalStream(self._setup.handle, self._device)
        )
        return context

    @property
    def uuid(self) -> str:
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def allocate(self, length_bytes: int) -> int:
        return self._driver.allocate(length_bytes)

    def free(self, address: int) -> None:
        self._driver.free(address)

    def handle_of(self, address: int) -> bytes:
        return self._driver.handle_of(address)

    def open_handle(self, handle: bytes) -> int:
        return self._driver.open_handle(handle)

    def close_handle(self, address: int) -> None:
        self._driver.close_handle(address)
