"""The few calls of the CUDA driver that torch does not offer, on raw addresses.

A ctypes call releases the interpreter's lock, which torch's copies do not always do. A result of the driver's own
interface does not linger: a refused registration cannot surface in an innocent call of torch's later, as an error of
the CUDA runtime would. Thread-safe; a thread that calls must have been bound to the device.
"""

import ctypes
from typing import Any

from cachetier.core.errors import CachetierError

HANDLE_BYTES = 64
_REGISTER_PORTABLE = 1
_IPC_LAZY_PEER_ACCESS = 1
_MEMORY_HOST, _MEMORY_DEVICE = 1, 2


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
    "cuMemHostRegister_v2": [_POINTER, _SIZE, ctypes.c_uint],
    "cuMemHostUnregister": [_POINTER],
    "cuMemcpyHtoDAsync_v2": [_POINTER, _POINTER, _SIZE, _STREAM],
    "cuMemcpyDtoHAsync_v2": [_POINTER, _POINTER, _SIZE, _STREAM],
    "cuMemcpyDtoDAsync_v2": [_POINTER, _POINTER, _SIZE, _STREAM],
    "cuMemcpy2DAsync_v2": [ctypes.c_void_p, _STREAM],
    "cuMemAlloc_v2": [ctypes.c_void_p, _SIZE],
    "cuMemFree_v2": [_POINTER],
    "cuIpcGetMemHandle": [ctypes.c_void_p, _POINTER],
    "cuIpcOpenMemHandle_v2": [ctypes.c_void_p, _Handle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [_POINTER],
}


class Driver:
    """The driver, seen from one device. Addresses and sizes are bytes; `stream` is a CUstream as a number."""

    def __init__(self, device_index: int) -> None:
        """Load the driver.

        Args:
            device_index: as CUDA counts the visible devices.

        Raises:
            DriverError: there is no driver or no such device.
        """
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(f"there is no CUDA driver: {error}") from error
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        device = ctypes.c_int()
        context = ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), device_index)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context

    def bind_thread(self) -> None:
        """Make the device's primary context, which is torch's too, the calling thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def register(self, address: int, length_bytes: int) -> None:
        """Page-lock host memory for all contexts; copies from and to it become asynchronous and fast."""
        self._call("cuMemHostRegister_v2", address, length_bytes, _REGISTER_PORTABLE)

    def unregister(self, address: int) -> None:
        """Undo `register` of the range that starts at `address`."""
        self._call("cuMemHostUnregister", address)

    def copy_in(self, device: int, host: int, length_bytes: int, stream: int) -> None:
        """Enqueue a copy from host to device memory; memory that is not registered is read before this returns."""
        self._call("cuMemcpyHtoDAsync_v2", device, host, length_bytes, stream)

    def copy_out(self, host: int, device: int, length_bytes: int, stream: int) -> None:
        """Enqueue a copy from device to host memory; memory that is not registered is written before this returns."""
        self._call("cuMemcpyDtoHAsync_v2", host, device, length_bytes, stream)

    def copy_within(self, target: int, source: int, length_bytes: int, stream: int) -> None:
        """Enqueue a copy between device addresses."""
        self._call("cuMemcpyDtoDAsync_v2", target, source, length_bytes, stream)

    def copy_rows_in(
        self, device: int, device_pitch: int, host: int, host_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """Enqueue a copy of `rows` rows of `width` bytes, `..._pitch` bytes apart, from host to device memory."""
        copy = _Copy2D(src_type=_MEMORY_HOST, src_host=host, src_pitch=host_pitch, width=width, height=rows)
        copy.dst_type, copy.dst_device, copy.dst_pitch = _MEMORY_DEVICE, device, device_pitch
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

    def copy_rows_out(
        self, host: int, host_pitch: int, device: int, device_pitch: int, width: int, rows: int, stream: int
    ) -> None:
        """Enqueue a copy of `rows` rows of `width` bytes, `..._pitch` bytes apart, from device to host memory."""
        copy = _Copy2D(src_type=_MEMORY_DEVICE, src_device=device, src_pitch=device_pitch, width=width, height=rows)
        copy.dst_type, copy.dst_host, copy.dst_pitch = _MEMORY_HOST, host, host_pitch
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), stream)

    def allocate(self, length_bytes: int) -> int:
        """Return the address of new device memory, an allocation of its own, as handles for other processes need."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), length_bytes)
        return address.value

    def free(self, address: int) -> None:
        """Free what `allocate` returned, after the work that uses it; waits for the device."""
        self._call("cuMemFree_v2", address)

    def handle_of(self, address: int) -> bytes:
        """Return the handle by which another process opens the allocation that starts at `address`."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        return ctypes.string_at(ctypes.addressof(handle), HANDLE_BYTES)

    def open_handle(self, handle: bytes) -> int:
        """Map another process's allocation; return its address in this one."""
        address = ctypes.c_uint64()
        value = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), value, _IPC_LAZY_PEER_ACCESS)
        return address.value

    def close_handle(self, address: int) -> None:
        """Unmap what `open_handle` returned."""
        self._call("cuIpcCloseMemHandle", address)

    def _call(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'?').decode()} ({code})")
