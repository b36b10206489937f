"""Staging memory on the device: rings of slots between the arena and the paged blocks, each with its own streams.

The host enqueues ahead of the device. A slot is reused in the order of the device's events, without the host; what
bounds the host are the rings of digests, which it reads when a slot's use is done. It may be far ahead: another thread
can keep it from the interpreter for 5 ms, and the device should have work for so long. The engine's own stream never
waits for a lane.

Locking design: whoever enqueues or settles holds the lane's lock, and never while it waits for the device; one lane
may serve several runs, each of which has a share of the uses.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from cachetier.core.layout import DIGEST_BYTES, PAGE_BYTES
from cachetier_connector.cuda.device import Device, Event, Stream

NUM_SLOTS = 2  # one is copied while the kernels work on the other
NUM_AHEAD = 24  # uses of slots that the host may be ahead: 7 ms with slots of 16 MiB

# Called once a use is done, with the digests of its pages as bytes.
Settle = Callable[[memoryview], None]


class Use:
    """One use of a slot, from the moment its memory is asked for until its digests have been read.

    Attributes:
        address: of the slot.
        before: the slot's previous use has ended; None: there is none.
        middle: for the user, to order the lane's two streams.
        done: recorded by `Turns.end`.
        upload: numbers that the use needs on the device, if any; released once it is done.
    """

    def __init__(self, device: Device, digests: torch.Tensor) -> None:
        """`digests` is where the digests go, int64 in host memory."""
        self.address = self.slot = 0
        self.before: Event | None = None
        self.middle: Event = device.new_event()
        self.done: Event = device.new_event()
        self.upload: Any = None
        self._device, self._digests = device, digests
        self._bytes = memoryview(digests.numpy()).cast("B")
        self._views: dict[tuple[int, int], torch.Tensor] = {}
        self._num_bytes = 0
        self.owner: Turns | None = None
        self.settle: Settle | None = None

    def digests(self, num_chunks: int, num_pages: int) -> torch.Tensor:
        """Return where the digest kernel writes: int64 `[num_chunks, num_pages]`."""
        count, key = num_chunks * num_pages, (num_chunks, num_pages)
        self._num_bytes = count * DIGEST_BYTES
        if key not in self._views:
            self._views[key] = self._digests[:count].view(key)
        return self._views[key]

    def take(self) -> None:
        """Hand the digests to whoever asked for them; the device is done with this use."""
        owner, settle, self.owner, self.settle = self.owner, self.settle, None, None
        assert owner is not None
        assert settle is not None
        owner.num_pending -= 1
        if self.upload is not None:
            self._device.release(self.upload)
            self.upload = None
        settle(self._bytes[: self._num_bytes])


class Lane:
    """A ring of slots, a stream for copies and one for kernels.

    Attributes:
        copies, kernels: the streams.
        slot_bytes: staging memory a slot.
    """

    def __init__(self, device: Device, memory: torch.Tensor, *, is_urgent: bool, num_pages: int = 0) -> None:
        """Take over `memory`, uint8 on the device; a use may digest a slot's pages, or `num_pages` if it is more."""
        self._device, self._memory, self._start = device, memory, memory.data_ptr()
        self._lock = threading.Lock()
        self.copies: Stream = device.new_stream(is_urgent=False)
        self.kernels: Stream = device.new_stream(is_urgent=is_urgent)
        self.slot_bytes = memory.numel() // NUM_SLOTS // PAGE_BYTES * PAGE_BYTES
        digests = device.empty_host(NUM_AHEAD, max(self.slot_bytes // PAGE_BYTES, num_pages))
        self._free = deque(Use(device, row) for row in digests)
        self._pending: deque[Use] = deque()
        self._last: list[Event | None] = [None] * NUM_SLOTS
        self._number = self._num_runs = 0
        self._addresses: dict[tuple[int, int, int], torch.Tensor] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no run is open; whoever opens runs sees to it that this stays so."""
        return self._num_runs == 0

    def addresses(self, use: Use, num_chunks: int, stage_bytes: int) -> torch.Tensor:
        """Return int64 `[num_chunks]` on the device: where the chunks of a slot start, `stage_bytes` apart."""
        key = (use.slot, stage_bytes, num_chunks)
        if key not in self._addresses:
            whole = (use.slot, stage_bytes, self.slot_bytes // stage_bytes)
            if whole not in self._addresses:
                starts = range(use.address, use.address + self.slot_bytes - stage_bytes + 1, stage_bytes)
                self._addresses[whole] = self._device.constant(starts, torch.int64)
            self._addresses[key] = self._addresses[whole][:num_chunks]
        return self._addresses[key]

    def drain(self) -> None:
        """Wait until the device does nothing for this lane. Raises what the device raises."""
        self.copies.synchronize()
        self.kernels.synchronize()

    def _settle_passed(self) -> None:
        while self._pending and self._pending[0].done.has_passed():
            self._settle_oldest()

    def _settle_oldest(self) -> None:
        use = self._pending.popleft()
        self._free.append(use)
        use.take()


class Turns:
    """The turns of one run on a lane: `with` it, the run is the one that enqueues, and a use is free.

    Attributes:
        num_pending: uses of this run that are not settled.
        is_alone: no other run is open on the lane.
    """

    def __init__(self, lane: Lane) -> None:
        """Open."""
        self._lane, self.num_pending = lane, 0
        self._newest: Use | None = None
        with lane._lock:
            lane._num_runs += 1

    @property
    def is_alone(self) -> bool:
        return self._lane._num_runs == 1

    def close(self) -> None:
        """Give up the share of the uses; may be called once."""
        with self._lane._lock:
            self._lane._num_runs -= 1

    def __enter__(self) -> None:
        lane = self._lane
        while True:
            lane._lock.acquire()
            try:
                lane._settle_passed()
                share = max(1, NUM_AHEAD // lane._num_runs)
                if lane._free and self.num_pending < share:
                    return
                # Not only for the oldest: each waking up is a fight for the interpreter.
                event = lane._pending[len(lane._pending) // 4].done
            except BaseException:
                lane._lock.release()
                raise
            lane._lock.release()
            event.synchronize()

    def __exit__(self, *error: object) -> None:
        self._lane._lock.release()

    def begin(self) -> Use:
        """Return the next slot's use. `end` or `Lane.drain` must follow."""
        lane = self._lane
        use, slot = lane._free[0], lane._number % NUM_SLOTS
        use.upload = None
        use.slot, use.address, use.before = slot, lane._start + slot * lane.slot_bytes, lane._last[slot]
        return use

    def end(self, use: Use, stream: Stream, settle: Settle) -> None:
        """Say that `stream` is the last to use the slot; `settle` is called when it is done."""
        lane = self._lane
        use.done.record(stream)
        use.owner, use.settle = self, settle
        lane._last[use.slot] = use.done
        lane._number += 1
        lane._pending.append(lane._free.popleft())
        self.num_pending += 1
        self._newest = use

    def wait(self) -> None:
        """Wait until all of the run's uses are done and settled."""
        while True:
            with self._lane._lock:
                self._lane._settle_passed()
                if not self.num_pending:
                    return
                assert self._newest is not None
                event = self._newest.done
            event.synchronize()

    def give_up(self) -> None:
        """Wait until the device does nothing for the lane, and settle this run's uses without a look at them."""
        lane = self._lane
        with lane._lock:
            for use in lane._pending:
                if use.owner is self:
                    use.settle = _ignore
        lane.drain()
        self.wait()


def _ignore(_: memoryview) -> None:
    """Take digests that nobody wants any more."""
