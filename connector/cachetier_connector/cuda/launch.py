"""Launching Triton kernels at little cost to the host.

Triton's own launch looks at every argument to find the compiled kernel, tens of microseconds in Python, asks the driver
about every pointer, and lets go of the interpreter's lock. A kernel that is always called with the same compile-time
values, and whose other arguments are kept from specialising it, has exactly one compiled form: the first call has
Triton compile and launch it, the others hand it to the driver. Its arguments are then those of the call, and behind
them two addresses of scratch memory, of which these kernels use none.
"""

import ctypes
import logging
import threading
from typing import Any

import torch
import triton

from cachetier_connector.cuda.driver import launch_kernel

NUM_SCRATCH = 2

log = logging.getLogger(__name__)

# Triton's interpreter patches `triton.language` and keeps the program's number in globals: one thread at a time.
_interpreter = threading.Lock()


class Launch:
    """One kernel with its compile-time values. Any thread, also several at once."""

    def __init__(self, kernel: Any, constants: tuple[Any, ...], num_warps: int) -> None:
        """Prepare `kernel` (a Triton function whose arguments end with `constants`); nothing is compiled yet."""
        self._kernel, self._constants, self._num_warps = kernel, constants, num_warps
        self._compiled: _Compiled | None = None

    def __call__(self, grid: tuple[int, int, int], *args: Any, stream: int | None = None) -> None:
        """Enqueue the kernel for `args`, tensors and numbers from 0 on, on `stream` of the current device.

        Without a stream it goes to the current one.
        """
        if self._compiled is not None:
            self._compiled.launch(grid, args, torch.cuda.current_stream().cuda_stream if stream is None else stream)
        elif not isinstance(self._kernel, triton.JITFunction):
            with _interpreter:
                self._kernel[grid](*args, *self._constants, num_warps=self._num_warps)
        else:
            current = torch.cuda.current_stream() if stream is None else torch.cuda.ExternalStream(stream)
            with torch.cuda.stream(current):
                compiled = self._kernel[grid](*args, *self._constants, num_warps=self._num_warps)
            if _is_plain(compiled, len(args)):
                self._compiled = _Compiled(compiled, len(args))


def _is_plain(kernel: Any, num_args: int) -> bool:
    """Tell whether a compiled kernel takes what this module gives it; if not, Triton goes on launching it."""
    metadata = kernel.metadata
    entry = kernel.asm["ptx"].partition(".entry")[2].partition(")")[0]
    scratch_bytes = (metadata.global_scratch_size or 0, metadata.profile_scratch_size or 0)
    found = (entry.count(".param"), metadata.num_ctas, scratch_bytes)
    if found == (num_args + NUM_SCRATCH, 1, (0, 0)):
        return True
    log.warning("cachetier: this Triton compiles kernels of another form %s; launching them costs more", found)
    return False


class _Compiled:
    """A compiled kernel, as the driver launches it. The kernel's module stays loaded as long as this lives."""

    def __init__(self, kernel: Any, num_args: int) -> None:
        metadata = kernel.metadata
        self._kernel, self._function = kernel, kernel.function
        self._num_threads, self._shared_bytes = 32 * metadata.num_warps, metadata.shared
        self._num_values = num_args + NUM_SCRATCH
        self._local = threading.local()

    def launch(self, grid: tuple[int, int, int], args: tuple[Any, ...], stream: int) -> None:
        """Enqueue it."""
        try:
            values, pointers = self._local.arrays
        except AttributeError:
            values, pointers = self._local.arrays = self._new_arrays()
        for number, value in enumerate(args):
            values[number] = value if value.__class__ is int else value.data_ptr()
        launch_kernel(self._function, grid, self._num_threads, self._shared_bytes, stream, pointers)

    def _new_arrays(self) -> tuple[Any, Any]:
        """Return the calling thread's arguments, and their addresses; the driver reads as much as each takes."""
        values = (ctypes.c_uint64 * self._num_values)()
        start = ctypes.addressof(values)
        return values, (ctypes.c_void_p * self._num_values)(*range(start, start + 8 * self._num_values, 8))
