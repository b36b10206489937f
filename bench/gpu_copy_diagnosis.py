"""What holds the copy engine back when several threads want the interpreter: a part of `gpu_copy`, for `--diagnose`.

Loads and stores at once: as they are, with another switch interval of the interpreter, and beside a thread that loops
as vLLM's main loop does while it waits for a load. Then the time that the host spends in each phase, by wrapping.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from cachetier_connector.cuda.copy_cuda import StagedCopyEngine
from cachetier_connector.cuda.device import CudaDevice
from cachetier_connector.cuda.device_plan import DevicePlans
from cachetier_connector.cuda.stage_plan import StagePlan
from cachetier_connector.cuda.staged_load import StagedLoad
from cachetier_connector.cuda.staged_store import StagedStore
from cachetier_connector.cuda.staging import Lane, Turns, Use

SWITCH_INTERVAL_S = 1e-4
LOOP_BUSY_S, LOOP_SLEEP_S = 0.3e-3, 1e-3
# Phases of a slot; `take` and `turn` include what they call: verification, and waiting for the device.
PHASES = {
    "load, all": (StagedLoad, "_stage"),
    "store, all": (StagedStore, "_stage"),
    "turn (lock, settle, wait)": (Turns, "__enter__"),
    "plan copies": (StagePlan, "transfers"),
    "settle (verify, list)": (Use, "take"),
    "end": (Turns, "end"),
    "last wait": (Turns, "wait"),
}
DEVICE_PHASES = {"copy in": "copy_in", "copy out": "copy_out", "launches": "launch"}
# What takes device memory when an engine is made, in this order.
STEPS = {
    "driver and a stream": (CudaDevice, "__init__"),
    "staging": (CudaDevice, "empty"),
    "a lane's streams and events": (Lane, "__init__"),
    "plans": (DevicePlans, "get"),
    "kernels and the rest": (StagedCopyEngine, "_warm_up"),
}


@contextmanager
def quick_switches() -> Iterator[None]:
    """Have the interpreter ask for its lock more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def main_loop() -> Iterator[None]:
    """Run a thread that computes a little and sleeps a little."""
    is_over = threading.Event()

    def loop() -> None:
        while not is_over.is_set():
            until = time.perf_counter() + LOOP_BUSY_S
            while time.perf_counter() < until:
                pass
            time.sleep(LOOP_SLEEP_S)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


@contextmanager
def memory_steps(free_bytes: Callable[[], int], found: list[tuple[str, int]]) -> Iterator[None]:
    """Note in `found` by how many bytes each step of making an engine has lowered what is free."""

    def measured(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            before = free_bytes()
            result = original(*args, **kwargs)
            found.append((name, before - free_bytes()))
            return result

        return step

    with ExitStack() as stack:
        for name, (owner, method) in STEPS.items():
            stack.enter_context(mock.patch.object(owner, method, measured(name, getattr(owner, method))))
        yield


class Phases:
    """Times of the phases: by name the sum and the longest, in nanoseconds, and how many there were."""

    def __init__(self) -> None:
        self.times: dict[str, list[int]] = {}

    @contextmanager
    def measured(self, device: type) -> Iterator[None]:
        """Wrap everything."""
        phases = {**PHASES, **{name: (device, method) for name, method in DEVICE_PHASES.items()}}
        with ExitStack() as stack:
            for name, (owner, method) in phases.items():
                wrapped = self._wrapped(name, getattr(owner, method))
                stack.enter_context(mock.patch.object(owner, method, wrapped))
            yield

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        times = self.times.setdefault(name, [0, 0, 0])

        def timed(*args: Any, **kwargs: Any) -> Any:
            since = time.perf_counter_ns()
            result = original(*args, **kwargs)
            spent = time.perf_counter_ns() - since
            times[0] += spent
            times[1] = max(times[1], spent)
            times[2] += 1
            return result

        return timed

    def lines(self) -> list[str]:
        """Return the table."""
        return [
            f"  {name:28} {total / max(count, 1) / 1e3:9.1f} us mean {longest / 1e3:9.0f} us longest {count:7} times"
            for name, (total, longest, count) in self.times.items()
        ]


def diagnosed(bench: Any) -> list[str]:
    """Return what was found about one `gpu_copy.Bench`, whose arena is registered."""
    both, lines = (bench.load, bench.store), [f"{bench.shape.name}, GB/s:"]

    def note(name: str, works: tuple[Callable[[], None], ...]) -> None:
        lines.append(f"  {name:44} {bench.speed_together(*works):7.1f}")
        print(lines[-1], file=sys.stderr, flush=True)

    note("load and store", both)
    with quick_switches():
        note("load and store, switch interval 0.1 ms", both)
    with main_loop():
        note("load and store, beside a main loop", both)
        note("load, beside a main loop", both[:1])
        with quick_switches():
            note("load and store, beside a loop, 0.1 ms", both)
    for name, works in {"load": both[:1], "load and store": both}.items():
        phases = Phases()
        with phases.measured(type(bench.device)):
            speed = bench.speed_together(*works)
        lines += [f"host time of a slot, {name} ({speed:.1f} GB/s with the clocks):", *phases.lines()]
    return lines
