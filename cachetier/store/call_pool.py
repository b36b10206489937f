"""Calls that may take far longer than their caller can wait.

A call runs on a thread of the pool. A caller whose time is over leaves it there; as long as it runs it takes up one of
the pool's threads, and when all are taken up, further calls are refused at once. So a store that hangs costs a bounded
number of threads, and no caller more than its patience.
"""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)


class _Call(Generic[T]):
    __slots__ = ("answer", "is_over", "work")

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.answer: T | None = None
        self.is_over = threading.Event()


class CallPool:
    """At most `num_threads` threads, made when they are needed. They end with the process, or after `stop`."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._name = name
        self._most = num_threads
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[_Call[object] | None] = queue.SimpleQueue()
        self._num_threads = self._num_busy = 0

    def call(self, work: Callable[[], T], timeout_s: float) -> T | None:
        """Return what `work` returns; None: it raised, is not done after `timeout_s`, or no thread is free."""
        with self._lock:
            if self._num_busy == self._most:
                return None
            self._num_busy += 1
            if self._num_busy > self._num_threads:
                self._num_threads += 1
                name = f"cachetier-{self._name}-{self._num_threads}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
        call = _Call(work)
        self._calls.put(call)  # type: ignore[arg-type]
        return call.answer if call.is_over.wait(timeout_s) else None

    def stop(self) -> None:
        """Let the threads end when they have nothing to do any more. Nothing is called afterwards."""
        for _ in range(self._num_threads):
            self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call.answer = call.work()
            except Exception:  # the thread's boundary
                log.exception("a call failed")
            with self._lock:
                self._num_busy -= 1
            call.is_over.set()
