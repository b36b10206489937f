"""Launching Triton kernels at little cost to the host.

Triton's own launch looks at every argument to find the compiled kernel, tens of microseconds in Python. A kernel that
is always called with the same compile-time values, and whose other arguments are kept from specialising it, has
exactly one compiled form: the first call returns it, the others go straight to it.
"""

import threading
from typing import Any

import triton

# Triton's interpreter patches `triton.language` and keeps the program's number in globals: one thread at a time.
_interpreter = threading.Lock()


class Launch:
    """One kernel with its compile-time values. Any thread, also several at once."""

    def __init__(self, kernel: Any, constants: tuple[Any, ...], num_warps: int) -> None:
        """Prepare `kernel` (a Triton function whose arguments end with `constants`); nothing is compiled yet."""
        self._kernel, self._constants, self._num_warps = kernel, constants, num_warps
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Enqueue the kernel on the current device's current stream."""
        if self._compiled is not None:
            self._compiled[grid](*args, *self._constants)
        elif isinstance(self._kernel, triton.JITFunction):
            self._compiled = self._kernel[grid](*args, *self._constants, num_warps=self._num_warps)
        else:
            with _interpreter:
                self._kernel[grid](*args, *self._constants, num_warps=self._num_warps)
