"""What the copy engine needs of a device: memory, streams, events, copies; and the CUDA device.

Behind an interface, so that all the rest, above all what waits for what, also runs where there is no GPU.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from cachetier_connector.cuda.driver import Driver
from cachetier_connector.cuda.transfers import Transfer


class Event(Protocol):
    """A point in a stream. Recording it again moves it, once nobody waits for the old point."""

    def record(self, stream: Any) -> None:
        """Put it at the end of what is enqueued on `stream`."""

    def synchronize(self) -> None:
        """Block until the stream has passed it, without the interpreter's lock and without spinning."""


class Stream(Protocol):
    """Work that the device does in order, beside other streams."""

    def wait_event(self, event: Any) -> None:
        """Have what is enqueued from now on wait until `event`, as recorded now, has passed; does not block."""

    def synchronize(self) -> None:
        """Block until all that is enqueued is done."""


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
    def upload(self, values: Sequence[int], stream: Any) -> torch.Tensor:
        """Return int64 device memory that `stream` will fill; it must be kept until the streams that use it have."""

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
    def launch(self, stream: Any, work: Callable[[], None]) -> None:
        """Have `work` enqueue kernels on `stream`."""

    @abstractmethod
    def register(self, address: int, length_bytes: int) -> None:
        """Page-lock host memory. Raises DriverError."""

    @abstractmethod
    def unregister(self, address: int) -> None:
        """Undo `register`. Raises DriverError."""

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


class CudaDevice(Device):
    """A CUDA device by torch's streams and events and the driver's copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._driver = Driver(self._device.index)
        self._bound = threading.local()
        self._setup = self.new_stream(is_urgent=True)

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
        # On a stream of its own: the default one would wait for the engine's step.
        with torch.cuda.stream(self._setup):
            tensor = torch.tensor(values, dtype=dtype, device=self._device)
        self._setup.synchronize()
        return tensor

    def upload(self, values: Sequence[int], stream: Any) -> torch.Tensor:
        # Allocated for `stream`: memory freed by another stream's tensors may still be in use there.
        with torch.cuda.stream(stream):
            pinned = torch.tensor(values, dtype=torch.int64, pin_memory=True)
            return pinned.to(self._device, non_blocking=True)

    def new_stream(self, *, is_urgent: bool) -> Any:
        return torch.cuda.Stream(self._device, priority=-1 if is_urgent else 0)

    def new_event(self) -> Any:
        return torch.cuda.Event(blocking=True)

    def mark(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy_in(self, transfer: Transfer, stream: Any) -> None:
        host, device, width, rows, host_pitch, device_pitch = transfer
        if rows == 1:
            self._driver.copy_in(device, host, width, stream.cuda_stream)
        else:
            self._driver.copy_rows_in(device, device_pitch, host, host_pitch, width, rows, stream.cuda_stream)

    def copy_out(self, transfer: Transfer, stream: Any) -> None:
        host, device, width, rows, host_pitch, device_pitch = transfer
        if rows == 1:
            self._driver.copy_out(host, device, width, stream.cuda_stream)
        else:
            self._driver.copy_rows_out(host, host_pitch, device, device_pitch, width, rows, stream.cuda_stream)

    def copy_within(self, target: int, source: int, length_bytes: int, stream: Any) -> None:
        self._driver.copy_within(target, source, length_bytes, stream.cuda_stream)

    def launch(self, stream: Any, work: Callable[[], None]) -> None:
        with torch.cuda.stream(stream):
            work()

    def register(self, address: int, length_bytes: int) -> None:
        self._driver.register(address, length_bytes)

    def unregister(self, address: int) -> None:
        self._driver.unregister(address)

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
