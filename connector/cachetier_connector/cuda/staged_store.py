"""A store through staging memory: paged blocks to slots, digests, slots to frames, each behind the other.

While one slot is copied to the arena, the other is gathered. Digests reach the host on their own way, so the checksum
vouches for what was gathered, whatever becomes of the bytes in the arena; the host writes them into the frame.

Frames in registered memory are written over the bus by a few programs of the gathering kernel, without staging, and
what is digested is what stands in the paged blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from cachetier.client import ArenaView
from cachetier.core.checksum import checksum_of
from cachetier.core.layout import DIGEST_BYTES, digests_offset
from cachetier_connector.cuda.device import Device
from cachetier_connector.cuda.device_plan import DevicePlan
from cachetier_connector.cuda.kernels import Digests, digest_paged, digest_pages, gather
from cachetier_connector.cuda.stage_plan import ArenaMemory, StagePlan
from cachetier_connector.cuda.staging import Lane, Turns

PAGES_MAX = 1 << 14  # 64 MiB that go without staging at once: a store that is not wanted any more ends behind them
# That write host memory: the fewest that come near the bus's rate in an idle engine (H200: 52 GB/s; beside GEMMs 30,
# which they slow down by 1%).
STORE_PROGRAMS = 4


class Snapshot(NamedTuple):
    """Consecutive chunks that stand in paged blocks once `event` has passed."""

    event: Any
    block_ids: Sequence[int]
    first_token: int
    num_chunks: int
    chunk_tokens: int


class _Chunk(NamedTuple):
    """A chunk to be filled: its number in the snapshot, its frame, and the digests of its first parts."""

    number: int
    frame: int
    digests: bytearray


class StagedStore:
    """One `fill` on the store lane."""

    def __init__(
        self,
        device: Device,
        lane: Lane,
        plans_of: Callable[[bool], Sequence[DevicePlan]],
        snapshot: Snapshot,
        arena: ArenaView,
    ) -> None:
        """Prepare; `plans_of` returns those of the rank's own shard as the only object, staged or not."""
        self._device, self._lane, self._snapshot, self._arena = device, lane, snapshot, arena
        self._plans_of, self._plans = plans_of, plans_of(True)
        self._memory = ArenaMemory.of(arena)
        self._checksums: dict[int, int] = {}

    def fill(self, numbers: Sequence[int], frames: Sequence[int], is_wanted: Callable[[], bool]) -> list[int | None]:
        """Do what `CopyEngine.fill` says."""
        chunks = [_Chunk(number, frame, bytearray()) for number, frame in zip(numbers, frames, strict=True)]
        at_once, enqueue = min(self._lane.slot_bytes // each.plan.stage_bytes for each in self._plans), self._stage
        if self._are_registered(frames):
            self._plans, enqueue = self._plans_of(False), self._write
            at_once = PAGES_MAX // len(self._plans[0].plan.page_bytes)
        turns = Turns(self._lane)
        try:
            with turns:
                # First what needs no waiting: the copy must not stand between the step's end and the gathering.
                blocks = self._device.upload(self._snapshot.block_ids, self._lane.kernels)
                self._lane.kernels.wait_event(self._snapshot.event)
            for batch in _batches(chunks, at_once):
                if not is_wanted():
                    break
                for each in self._plans:
                    with turns:
                        enqueue(turns, each, batch, blocks.tensor)
            turns.wait()
            if self._checksums:  # else nothing has waited for the upload
                self._device.release(blocks)
        except BaseException:
            turns.give_up()
            raise
        finally:
            turns.close()
        return [self._checksums.get(number) for number in numbers]

    def _stage(self, turns: Turns, each: DevicePlan, batch: Sequence[_Chunk], blocks: torch.Tensor) -> None:
        """Enqueue all that one slot's content takes."""
        lane, plan, use = self._lane, each.plan, turns.begin()
        targets = lane.addresses(use, len(batch), plan.stage_bytes)
        digests = Digests(each.page_bytes, use.digests(len(batch), len(plan.page_bytes)))
        chunk_tokens = self._snapshot.chunk_tokens
        first_token = self._snapshot.first_token + batch[0].number * chunk_tokens

        def work(stream: int | None) -> None:
            gather(each.layers, blocks, first_token, len(batch), chunk_tokens, targets, stream)
            digest_pages(targets, digests, stream)

        if use.before is not None:
            lane.kernels.wait_event(use.before)
        self._device.launch(lane.kernels, work)
        use.middle.record(lane.kernels)
        lane.copies.wait_event(use.middle)
        for transfer in plan.transfers([[chunk.frame] for chunk in batch], self._memory, use.address):
            self._device.copy_out(transfer, lane.copies)
        is_last = each is self._plans[-1]
        turns.end(use, lane.copies, lambda computed: self._take(plan, batch, computed, is_last))

    def _are_registered(self, frames: Sequence[int]) -> bool:
        """Tell whether kernels can write all of `frames`. Raises ValueError."""
        each, *others = self._plans_of(False)
        if others or not each.is_exact or len(each.plan.page_bytes) > PAGES_MAX:
            return False
        copies = (copy for frame in frames for copy in each.plan.copies([frame], self._memory, 0))
        return all(self._device.is_registered(address, length_bytes) for address, _, length_bytes in copies)

    def _write(self, turns: Turns, each: DevicePlan, batch: Sequence[_Chunk], blocks: torch.Tensor) -> None:
        """Enqueue what it takes to write chunks where they shall lie."""
        lane, plan, use = self._lane, each.plan, turns.begin()
        if use.before is not None:
            lane.kernels.wait_event(use.before)
        use.upload = self._device.upload([self._memory.address + chunk.frame for chunk in batch], lane.kernels)
        targets, chunk_tokens = use.upload.tensor, self._snapshot.chunk_tokens
        first_token = self._snapshot.first_token + batch[0].number * chunk_tokens
        digests = Digests(each.page_bytes, use.digests(len(batch), len(plan.page_bytes)))

        def work(stream: int | None) -> None:
            digest_paged(each.layers, blocks, first_token, chunk_tokens, digests, stream)
            gather(each.layers, blocks, first_token, len(batch), chunk_tokens, targets, stream, STORE_PROGRAMS)

        self._device.launch(lane.kernels, work)
        turns.end(use, lane.kernels, lambda computed: self._take(plan, batch, computed, True))

    def _take(self, plan: StagePlan, batch: Sequence[_Chunk], computed: memoryview, is_last: bool) -> None:
        """Collect the digests of one part of `batch`; with the last part's, the chunks are complete."""
        row_bytes = len(plan.page_bytes) * DIGEST_BYTES
        for index, chunk in enumerate(batch):
            digests = computed[index * row_bytes : (index + 1) * row_bytes]
            if len(self._plans) > 1:
                chunk.digests.extend(digests)
                digests = memoryview(chunk.digests)
            if is_last:
                start = chunk.frame + digests_offset(plan.object_bytes[0])
                self._arena.frame(start, len(digests))[:] = digests
                self._checksums[chunk.number] = checksum_of(digests)


def _batches(chunks: Sequence[_Chunk], at_once: int) -> Iterator[list[_Chunk]]:
    """Yield runs of at most `at_once` chunks with consecutive numbers."""
    batch: list[_Chunk] = []
    for chunk in chunks:
        if batch and (len(batch) == at_once or chunk.number != batch[-1].number + 1):
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch
