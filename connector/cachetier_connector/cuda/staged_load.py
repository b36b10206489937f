"""A load through staging memory: frames to slots, digests, slots to paged blocks, each behind the other.

What is verified is what was staged: the kernel digests the same bytes that it scatters. The digests are compared when
the device is done with a slot, so wrong bytes may reach paged blocks first; they are the request's own, which nobody
reads before the load has finished, and are then reported as bad.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch

from cachetier.client import ArenaView
from cachetier.core.layout import DIGEST_BYTES
from cachetier_connector.copy_base import LoadRun
from cachetier_connector.cuda.device import Device
from cachetier_connector.cuda.device_plan import DevicePlan
from cachetier_connector.cuda.kernels import digest_pages, scatter
from cachetier_connector.cuda.stage_plan import ArenaMemory, StagePlan
from cachetier_connector.cuda.staging import Lane, Use
from cachetier_connector.cuda.transfers import plan_transfers
from cachetier_connector.plan import ChunkSource, LoadOp

# The plans, one a part, by number of the tiling in the load.
PlansOf = Callable[[int], Sequence[DevicePlan]]


class StagedLoad(LoadRun):
    """One load on a lane."""

    def __init__(
        self,
        device: Device,
        lane: Lane,
        arena: ArenaView,
        load: LoadOp,
        fence: Any,
        plans_of: PlansOf,
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        """Start; `on_end` is called once, with what went wrong, when nothing is under way any more."""
        self._device, self._lane, self._arena, self._load = device, lane, arena, load
        self._plans_of, self._on_end = plans_of, on_end
        self._memory = ArenaMemory.of(arena)
        self._num_pushed = self._num_unsettled = 0
        self._num_good: int | None = None  # known once a chunk was bad
        self._corrupt_key: bytes | None = None
        self._error: BaseException | None = None
        with lane.lock:
            self._blocks = device.upload(load.block_ids, lane.copies)
            lane.kernels.wait_event(fence)

    @property
    def corrupt_key(self) -> bytes | None:
        return self._corrupt_key

    def push(self, group: Sequence[ChunkSource]) -> None:
        assert self._error is None, "pushed after a failure"
        try:
            for tiling, chunks in groupby(group, key=lambda chunk: chunk.tiling):
                self._push(self._plans_of(tiling), list(chunks))
        except BaseException as error:
            self._error = error
            raise

    def finish(self) -> int:
        try:
            with self._lane.lock:
                if self._error is not None:
                    self._lane.drain()
                while self._num_unsettled and self._lane.settle_oldest():
                    pass
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._on_end(self._error)
        if self._error is not None:
            return 0
        return self._num_pushed if self._num_good is None else self._num_good

    def _push(self, plans: Sequence[DevicePlan], chunks: Sequence[ChunkSource]) -> None:
        at_once = min(self._lane.slot_bytes // each.plan.stage_bytes for each in plans)
        for first in range(0, len(chunks), at_once):
            if self._num_good is not None:
                return
            batch = chunks[first : first + at_once]
            for each in plans:
                with self._lane.lock:
                    self._stage(each, batch)
            self._num_pushed += len(batch)

    def _stage(self, each: DevicePlan, batch: Sequence[ChunkSource]) -> None:
        """Enqueue all that one slot's content takes."""
        lane, stage_bytes = self._lane, each.plan.stage_bytes
        use = lane.begin()
        sources = lane.addresses(use, stage_bytes)[: len(batch)]
        if use.before is not None:
            lane.copies.wait_event(use.before)
        copies = (
            copy
            for number, chunk in enumerate(batch)
            for copy in each.plan.copies(chunk.frames, self._memory, use.address + number * stage_bytes)
        )
        for transfer in plan_transfers(copies, self._memory.address):
            self._device.copy_in(transfer, lane.copies)
        use.middle.record(lane.copies)
        lane.kernels.wait_event(use.middle)
        self._device.launch(lane.kernels, self._kernels(each, len(batch), use, sources))
        first = self._num_pushed
        self._num_unsettled += 1
        lane.end(use, lane.kernels, lambda digests: self._verify(each.plan, batch, first, digests))

    def _kernels(self, each: DevicePlan, num_chunks: int, use: Use, sources: torch.Tensor) -> Callable[[], None]:
        load, block_tokens = self._load, each.layers.block_tokens
        chunks_start = (load.first_chunk + self._num_pushed) * load.chunk_tokens
        start = max(load.start, chunks_start)
        end = min(load.end, chunks_start + num_chunks * load.chunk_tokens)
        digests = use.digests(num_chunks, len(each.page_bytes))
        blocks = self._blocks[start // block_tokens : -(-end // block_tokens)]

        def work() -> None:
            digest_pages(sources, each.page_bytes, digests)
            scatter(
                each.layers,
                blocks,
                start % block_tokens,
                end - start,
                start - chunks_start,
                load.chunk_tokens,
                sources,
                each.unit_offsets,
            )

        return work

    def _verify(self, plan: StagePlan, batch: Sequence[ChunkSource], first: int, digests: memoryview) -> None:
        self._num_unsettled -= 1
        row_bytes = len(plan.page_bytes) * DIGEST_BYTES
        for number, chunk in enumerate(batch):
            if self._num_good is not None and self._num_good <= first + number:
                return
            computed = digests[number * row_bytes : (number + 1) * row_bytes]
            if not plan.matches(computed, chunk.frames, chunk.checksums, self._arena):
                self._num_good, self._corrupt_key = first + number, chunk.key
