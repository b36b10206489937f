"""Calls of the CUDA driver, on raw addresses and handles.

A result of the driver's own interface does not linger: a refused registration cannot surface in an innocent call of
torch's later, as an error of the CUDA runtime would. Thread-safe; a thread that calls must have been bound to the
device.

Locking design: a call that only enqueues keeps the interpreter's lock. It takes microseconds, and the lock, once let
go, is another thread's for up to 5 ms; a copy takes ten calls. A call that may wait, for the device or for memory to
be copied or page-locked, lets go of the lock.
"""

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

from cachetier.core.errors import CachetierError

HANDLE_BYTES = 64
_REGISTER_PORTABLE = 1
_IPC_LAZY_PEER_ACCESS = 1
_MEMORY_HOST, _MEMORY_DEVICE = 1, 2
_STREAM_NON_BLOCKING = 1  # beside the default stream
_EVENT_BLOCKING_SYNC, _EVENT_DISABLE_TIMING = 1, 2  # who waits sleeps, instead of spinning
_CAPTURE_RELAXED = 2
_NOT_READY = 600


class DriverError(CachetierError):
    """A call of the CUDA driver failed; the text names the call and the driver's error."""


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = [
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_uint),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_uint),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which the driver takes by value."""

    _fields_ = [("data", ctypes.c_char * HANDLE_BYTES)]


_POINTER, _SIZE, _STREAM = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGet": [ctypes.c_void_p, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.c_void_p, ctypes.c_int],
    "cuCtxSetCurrent": [ctypes.c_void_p],
    "cuThreadExchangeStreamCaptureMode": [ctypes.c_void_p],
    "cuMemHostRegister_v2": [_POINTER, _SIZE, ctypes.c_uint],
    "cuMemHostUnregister": [_POINTER],
    "cuMemcpyHtoDAsync_v2": [_POINTER, _POINTER, _SIZE, _STREAM],
    "cuMemcpyDtoHAsync_v2": [_POINTER, _POINTER, _SIZE, _STREAM],
    "cuMemcpyDtoDAsync_v2": [_POINTER, _POINTER, _SIZE, _STREAM],
    "cuMemcpy2DAsync_v2": [ctypes.c_void_p, _STREAM],
    "cuStreamCreateWithPriority": [ctypes.c_void_p, ctypes.c_uint, ctypes.c_int],
    "cuStreamDestroy_v2": [_STREAM],
    "cuStreamWaitEvent": [_STREAM, _STREAM, ctypes.c_uint],
    "cuEventCreate": [ctypes.c_void_p, ctypes.c_uint],
    "cuEventDestroy_v2": [_STREAM],
    "cuEventRecord": [_STREAM, _STREAM],
    "cuEventQuery": [_STREAM],
    "cuEventSynchronize": [_STREAM],
    "cuLaunchKernel": [_STREAM, *[ctypes.c_uint] * 7, _STREAM, ctypes.c_void_p, ctypes.c_void_p],
    "cuMemAlloc_v2": [ctypes.c_void_p, _SIZE],
    "cuMemFree_v2": [_POINTER],
    "cuIpcGetMemHandle": [ctypes.c_void_p, _POINTER],
    "cuIpcOpenMemHandle_v2": [ctypes.c_void_p, _Handle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [_POINTER],
}


@cache
def _library(kind: Callable[[str], ctypes.CDLL]) -> Any:
    """Return the driver's library: a `ctypes.PyDLL` keeps the interpreter's lock, a `ctypes.CDLL` lets it go."""
    try:
        library = kind("libcuda.so.1")
    except OSError as error:
        raise DriverError(f"there is no CUDA driver: {error}") from error
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library


def _check(name: str, code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _library(ctypes.CDLL).cuGetErrorName(code, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'?').decode()} ({code})")


def launch_kernel(
    function: int, grid: tuple[int, int, int], num_threads: int, shared_bytes: int, stream: int, pointers: Any
) -> None:
    """Enqueue a kernel of the current device; `pointers` is a ctypes array of the addresses of its arguments."""
    x, y, z = grid
    code = _library(ctypes.PyDLL).cuLaunchKernel(
        function, x, y, z, num_threads, 1, 1, shared_bytes, stream, pointers, None
    )
    _check("cuLaunchKernel", code)


class Driver:
    """The driver, seen from one device. Addresses and sizes are bytes; streams and events are handles, as numbers."""

    def __init__(self, device_index: int) -> None:
        """Load the driver.

        Args:
            device_index: as CUDA counts the visible devices.

        Raises:
            DriverError: there is no driver or no such device.
        """
        self._short, self._long = _library(ctypes.PyDLL), _library(ctypes.CDLL)
        device = ctypes.c_int()
        context = ctypes.c_void_p()
        _check("cuInit", self._long.cuInit(0))
        _check("cuDeviceGet", self._long.cuDeviceGet(ctypes.byref(device), device_index))
        _check("cuDevicePrimaryCtxRetain", self._long.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        self._context = context

    def bind_thread(self) -> None:
        """Make the device's primary context, which is torch's too, the calling thread's.

        Any thread but the main one may then allocate and register memory while the main one captures a CUDA graph;
        otherwise the capture fails, and vLLM with it. What a thread of ours does is never a part of a graph.
        """
        _check("cuCtxSetCurrent", self._long.cuCtxSetCurrent(self._context))
        if threading.current_thread() is not threading.main_thread():
            mode = ctypes.c_int(_CAPTURE_RELAXED)
            code = self._short.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
            _check("cuThreadExchangeStreamCaptureMode", code)

    def register(self, address: int, length_bytes: int) -> None:
        """Page-lock host memory for all contexts; copies from and to it become asynchronous and fast."""
        _check("cuMemHostRegister_v2", self._long.cuMemHostRegister_v2(address, length_bytes, _REGISTER_PORTABLE))

    def unregister(self, address: int) -> None:
        """Undo `register` of the range that starts at `address`."""
        _check("cuMemHostUnregister", self._long.cuMemHostUnregister(address))

    def copy_in(self, device: int, host: int, length_bytes: int, stream: int, *, may_wait: bool) -> None:
        """Enqueue a copy from host to device memory; may wait if the host memory is not registered."""
        library = self._long if may_wait else self._short
        _check("cuMemcpyHtoDAsync_v2", library.cuMemcpyHtoDAsync_v2(device, host, length_bytes, stream))

    def copy_out(self, host: int, device: int, length_bytes: int, stream: int, *, may_wait: bool) -> None:
        """Enqueue a copy from device to host memory; may wait if the host memory is not registered."""
        library = self._long if may_wait else self._short
        _check("cuMemcpyDtoHAsync_v2", library.cuMemcpyDtoHAsync_v2(host, device, length_bytes, stream))

    def copy_within(self, target: int, source: int, length_bytes: int, stream: int) -> None:
        """Enqueue a copy between device addresses."""
        _check("cuMemcpyDtoDAsync_v2", self._short.cuMemcpyDtoDAsync_v2(target, source, length_bytes, stream))

    def copy_rows_in(
        self,
        device: int,
        device_pitch: int,
        host: int,
        host_pitch: int,
        width: int,
        rows: int,
        stream: int,
        *,
        may_wait: bool,
    ) -> None:
        """Enqueue a copy of `rows` rows of `width` bytes, `..._pitch` bytes apart, from host to device memory."""
        copy = _Copy2D(src_type=_MEMORY_HOST, src_host=host, src_pitch=host_pitch, width=width, height=rows)
        copy.dst_type, copy.dst_device, copy.dst_pitch = _MEMORY_DEVICE, device, device_pitch
        library = self._long if may_wait else self._short
        _check("cuMemcpy2DAsync_v2", library.cuMemcpy2DAsync_v2(ctypes.byref(copy), stream))

    def copy_rows_out(
        self,
        host: int,
        host_pitch: int,
        device: int,
        device_pitch: int,
        width: int,
        rows: int,
        stream: int,
        *,
        may_wait: bool,
    ) -> None:
        """Enqueue a copy of `rows` rows of `width` bytes, `..._pitch` bytes apart, from device to host memory."""
        copy = _Copy2D(src_type=_MEMORY_DEVICE, src_device=device, src_pitch=device_pitch, width=width, height=rows)
        copy.dst_type, copy.dst_host, copy.dst_pitch = _MEMORY_HOST, host, host_pitch
        library = self._long if may_wait else self._short
        _check("cuMemcpy2DAsync_v2", library.cuMemcpy2DAsync_v2(ctypes.byref(copy), stream))

    def new_stream(self, priority: int) -> int:
        """Return a new stream, which waits for no other; kernels of a lower `priority` go first."""
        stream = ctypes.c_void_p()
        code = self._long.cuStreamCreateWithPriority(ctypes.byref(stream), _STREAM_NON_BLOCKING, priority)
        _check("cuStreamCreateWithPriority", code)
        assert stream.value is not None
        return stream.value

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream once its work is done; does not wait."""
        _check("cuStreamDestroy_v2", self._long.cuStreamDestroy_v2(stream))

    def new_event(self) -> int:
        """Return a new event, which counts as passed."""
        event = ctypes.c_void_p()
        code = self._short.cuEventCreate(ctypes.byref(event), _EVENT_BLOCKING_SYNC | _EVENT_DISABLE_TIMING)
        _check("cuEventCreate", code)
        assert event.value is not None
        return event.value

    def destroy_event(self, event: int) -> None:
        """Destroy an event; streams that wait for it go on doing so."""
        _check("cuEventDestroy_v2", self._short.cuEventDestroy_v2(event))

    def record(self, event: int, stream: int) -> None:
        """Move `event` to the end of what is enqueued on `stream`."""
        _check("cuEventRecord", self._short.cuEventRecord(event, stream))

    def wait_event(self, stream: int, event: int) -> None:
        """Have what is enqueued on `stream` from now on wait for `event` as recorded now."""
        _check("cuStreamWaitEvent", self._short.cuStreamWaitEvent(stream, event, 0))

    def has_passed(self, event: int) -> bool:
        """Tell whether the device has passed `event`."""
        code = self._short.cuEventQuery(event)
        if code == _NOT_READY:
            return False
        _check("cuEventQuery", code)
        return True

    def synchronize(self, event: int) -> None:
        """Wait until the device has passed `event`."""
        _check("cuEventSynchronize", self._long.cuEventSynchronize(event))

    def allocate(self, length_bytes: int) -> int:
        """Return the address of new device memory, an allocation of its own, as handles for other processes need."""
        address = ctypes.c_uint64()
        _check("cuMemAlloc_v2", self._long.cuMemAlloc_v2(ctypes.byref(address), length_bytes))
        return address.value

    def free(self, address: int) -> None:
        """Free what `allocate` returned, after the work that uses it; waits for the device."""
        _check("cuMemFree_v2", self._long.cuMemFree_v2(address))

    def handle_of(self, address: int) -> bytes:
        """Return the handle by which another process opens the allocation that starts at `address`."""
        handle = _Handle()
        _check("cuIpcGetMemHandle", self._long.cuIpcGetMemHandle(ctypes.byref(handle), address))
        return ctypes.string_at(ctypes.addressof(handle), HANDLE_BYTES)

    def open_handle(self, handle: bytes) -> int:
        """Map another process's allocation; return its address in this one."""
        address = ctypes.c_uint64()
        value = _Handle.from_buffer_copy(handle)
        _check(
            "cuIpcOpenMemHandle_v2",
            self._long.cuIpcOpenMemHandle_v2(ctypes.byref(address), value, _IPC_LAZY_PEER_ACCESS),
        )
        return address.value

    def close_handle(self, address: int) -> None:
        """Unmap what `open_handle` returned."""
        _check("cuIpcCloseMemHandle", self._long.cuIpcCloseMemHandle(address))
