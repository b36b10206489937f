"""Staging memory on the device: rings of slots between the arena and the paged blocks, each with its own streams.

The host enqueues ahead of the device. A slot is reused in the order of the device's events, without the host; what
bounds the host are the rings of digests, which it reads when a slot's use is done. The engine's own stream never waits
for a lane.

Locking design: whoever enqueues or settles holds the lane's `lock`; one lane may serve several runs.
"""

import threading
from collections import deque
from collections.abc import Callable

import torch

from cachetier.core.layout import DIGEST_BYTES, PAGE_BYTES
from cachetier_connector.cuda.device import Device, Event, Stream

NUM_SLOTS = 2  # one is copied while the kernels work on the other
NUM_AHEAD = 4 * NUM_SLOTS  # uses of slots that the host may be ahead
POOL_PAGES_MAX = 1 << 16  # of chunks in pools, 256 MiB of them, that one use may digest; they take no slot

# Called once a use is done, with the digests of its pages as bytes.
Settle = Callable[[memoryview], None]


class Use:
    """One use of a slot, from the moment its memory is asked for until its digests have been read.

    Attributes:
        address: of the slot.
        before: the slot's previous use has ended; None: there is none.
        middle: for the user, to order the lane's two streams.
        done: recorded by `Lane.end`.
    """

    def __init__(self, device: Device, num_pages: int) -> None:
        self.address = self.slot = 0
        self.before: Event | None = None
        self.middle: Event = device.new_event()
        self.done: Event = device.new_event()
        self._digests = device.empty_host(num_pages)
        self._num_bytes = 0
        self.settle: Settle | None = None

    def digests(self, num_chunks: int, num_pages: int) -> torch.Tensor:
        """Return where the digest kernel writes: int64 `[num_chunks, num_pages]`."""
        count = num_chunks * num_pages
        self._num_bytes = count * DIGEST_BYTES
        return self._digests[:count].view(num_chunks, num_pages)

    def read(self) -> None:
        """Wait for the device, and hand the digests to whoever asked for them."""
        self.done.synchronize()
        settle, self.settle = self.settle, None
        assert settle is not None
        settle(memoryview(self._digests.numpy()).cast("B")[: self._num_bytes])


class Lane:
    """A ring of slots, a stream for copies and one for kernels.

    Attributes:
        lock: held from `begin` to `end`, and by whoever settles.
        copies, kernels: the streams.
        slot_bytes: staging memory a slot.
        num_users: runs that are open on it; the owner of the lanes counts.
    """

    def __init__(self, device: Device, memory: torch.Tensor, *, is_urgent: bool) -> None:
        """Take over `memory`, uint8 on the device."""
        self._device, self._memory = device, memory
        self.lock = threading.Lock()
        self.copies: Stream = device.new_stream(is_urgent=True)
        self.kernels: Stream = device.new_stream(is_urgent=is_urgent)
        self.slot_bytes = memory.numel() // NUM_SLOTS // PAGE_BYTES * PAGE_BYTES
        self.num_users = 0
        num_pages = max(self.slot_bytes // PAGE_BYTES, POOL_PAGES_MAX)
        self._free = deque(Use(device, num_pages) for _ in range(NUM_AHEAD))
        self._pending: deque[Use] = deque()
        self._last: list[Event | None] = [None] * NUM_SLOTS
        self._number = 0
        self._addresses: dict[tuple[int, int], torch.Tensor] = {}

    def begin(self) -> Use:
        """Return the next slot's use; may wait for the oldest use under way. `end` or `drain` must follow."""
        if not self._free:
            self.settle_oldest()
        use, slot = self._free[0], self._number % NUM_SLOTS
        use.slot, use.address, use.before = slot, self._memory.data_ptr() + slot * self.slot_bytes, self._last[slot]
        return use

    def end(self, use: Use, stream: Stream, settle: Settle) -> None:
        """Say that `stream` is the last to use the slot; `settle` is called when it is done."""
        use.done.record(stream)
        use.settle = settle
        self._last[use.slot] = use.done
        self._number += 1
        self._pending.append(self._free.popleft())

    def settle_oldest(self) -> bool:
        """Wait for the oldest use under way and settle it; False: there is none."""
        if not self._pending:
            return False
        use = self._pending.popleft()
        self._free.append(use)
        use.read()
        return True

    def discard(self) -> None:
        """Forget all uses under way, once the lane is drained or the device has failed."""
        while self._pending:
            self._free.append(self._pending.popleft())

    def addresses(self, use: Use, stage_bytes: int) -> torch.Tensor:
        """Return int64 on the device: where the chunks of a slot start, `stage_bytes` apart."""
        key = (use.slot, stage_bytes)
        if key not in self._addresses:
            starts = range(use.address, use.address + self.slot_bytes - stage_bytes + 1, stage_bytes)
            self._addresses[key] = self._device.constant(starts, torch.int64)
        return self._addresses[key]

    def drain(self) -> None:
        """Wait until the device does nothing for this lane. Raises what the device raises."""
        self.copies.synchronize()
        self.kernels.synchronize()
