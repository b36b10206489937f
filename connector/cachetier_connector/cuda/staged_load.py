"""A load through staging memory: frames to slots, slots to paged blocks, digests, each behind the other.

What is verified is what was staged: one kernel scatters and digests the same bytes. The digests are compared when the
device is done with a slot, so wrong bytes may reach paged blocks first; they are the request's own, which nobody reads
before the load has finished, and are then reported as bad.

Chunks that stand in a pool in device memory are used where they lie, without staging. Their frames are kept by the
load's lease; should one be written all the same (the server lost touch with a worker for minutes), it was so before
the kernel scattered it or after, and what is digested then is not what the checksum vouches for: bytes go from right to
wrong, not back. Hence two kernels there: scatter, then digest. Chunks that the match wants in the worker's own pool are
copied there out of the slot; a frame counts as filled once the slot's digests were found good.

Chunks that the match names in segment files are read from there into the slot. This thread waits for these reads, and
where one fails the load ends before that chunk.
"""

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch

from cachetier.client import ArenaView
from cachetier.core.errors import StorageError
from cachetier.core.layout import DIGEST_BYTES, pool_frame_bytes
from cachetier.core.pool_messages import POOL_FILL, POOL_NONE
from cachetier_blend.rotation import Rotary, cos_sin
from cachetier_connector.copy_base import LoadRun
from cachetier_connector.cuda.device import Device
from cachetier_connector.cuda.device_plan import DevicePlan
from cachetier_connector.cuda.direct_reads import DirectReader, FileFrames, FileRead
from cachetier_connector.cuda.kernels import Digests, Rotation, digest_pages, scatter
from cachetier_connector.cuda.pool import DevicePools, PoolReads
from cachetier_connector.cuda.stage_plan import ArenaMemory, StagePlan
from cachetier_connector.cuda.staging import Lane, Turns, Use
from cachetier_connector.plan import ChunkSource, LoadOp

PAGES_MAX = 1 << 16  # of chunks in pools, 256 MiB of them, that one use may digest; they take no slot

# The plans, one a part, by number of the tiling in the load and whether the chunks are staged.
PlansOf = Callable[[int, bool], Sequence[DevicePlan]]

ANY_FILE = ArenaMemory(0, 1 << 62)  # "addresses" in it are offsets in the file

log = logging.getLogger(__name__)


class Keys(NamedTuple):
    """How the model rotates keys, and the dtype of their numbers."""

    rotary: Rotary
    dtype: torch.dtype


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
        pools: DevicePools,
        direct: DirectReader | None,
        keys: "Keys | None",
        on_end: Callable[[BaseException | None], None],
    ) -> None:
        """Start; `on_end` is called once, with what went wrong, when nothing is under way any more.

        `keys` are needed by loads that shift chunks.
        """
        self._device, self._lane, self._arena, self._load = device, lane, arena, load
        self._plans_of, self._direct, self._keys, self._on_end = plans_of, direct, keys, on_end
        self._own, self._reads = pools.own, PoolReads(pools, load.pools)
        self._fills: dict[int, int] = {}  # frame in the own pool, by number of the chunk
        self._filled: list[int] = []
        self._memory = ArenaMemory.of(arena)
        self._turns = Turns(lane)
        self._fence = fence
        self._blocks: Any = None  # uploaded with the first push
        self._num_pushed = 0
        self._num_good: int | None = None  # known once a chunk was bad
        self._corrupt_key: bytes | None = None
        self._error: BaseException | None = None

    @property
    def corrupt_key(self) -> bytes | None:
        return self._corrupt_key

    def push(self, group: Sequence[ChunkSource]) -> None:
        assert self._error is None, "pushed after a failure"
        try:
            for (tiling, is_staged, segment), chunks in groupby(group, key=self._kind):
                plans = self._plans_of(tiling, is_staged)
                if is_staged:
                    at_once = min(self._lane.slot_bytes // each.plan.stage_bytes for each in plans)
                    self._push(plans, list(chunks), at_once, self._stage_from_file if segment else self._stage)
                else:
                    at_once = min(PAGES_MAX // len(each.plan.page_bytes) for each in plans)
                    self._push(plans, list(chunks), at_once, self._read)
        except BaseException as error:
            self._error = error
            raise

    def finish(self) -> int:
        try:
            if self._error is not None:
                self._turns.give_up()
            self._turns.wait()
            if self._blocks is not None:
                self._device.release(self._blocks)
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._turns.close()
            self._reads.end()
            self._on_end(self._error)
        if self._error is not None:
            return 0
        num_good = self._num_pushed if self._num_good is None else self._num_good
        self._filled = [frame for number, frame in self._fills.items() if number < num_good]
        return num_good

    @property
    def filled(self) -> list[int]:
        return self._filled

    def _kind(self, chunk: ChunkSource) -> tuple[int, bool, bool]:
        """Return what must be the same of chunks that are pushed together."""
        return chunk.tiling, self._is_staged(chunk), chunk.segment > 0

    def _is_staged(self, chunk: ChunkSource) -> bool:
        """Tell whether a chunk has to come through staging memory: it is in no pool, or in one out of reach."""
        if not POOL_NONE < chunk.pool < POOL_FILL:
            return True
        return any(
            len(plan.page_bytes) > PAGES_MAX or self._reads.address(chunk.pool - 1, plan.ranges[0].of_object) is None
            for plan, *_ in self._plans_of(chunk.tiling, False)
        )

    def _push(
        self,
        plans: Sequence[DevicePlan],
        chunks: Sequence[ChunkSource],
        at_once: int,
        enqueue: Callable[[DevicePlan, Sequence[ChunkSource]], None],
    ) -> None:
        if self._blocks is None:
            self._start()
        for first in range(0, len(chunks), at_once):
            if self._num_good is not None:
                return
            batch = chunks[first : first + at_once]
            for each in plans:
                try:
                    with self._turns:
                        enqueue(each, batch)
                except StorageError as error:
                    log.warning("cachetier: computing what could not be read: %s", error)
                    self._num_good = self._num_pushed
                    return
            self._num_pushed += len(batch)

    def _start(self) -> None:
        """Enqueue what goes before all the rest. Another load's kernels must not wait for this one's blocks."""
        lane, fence = self._lane, self._fence
        if fence is not None and not self._turns.is_alone:
            fence.synchronize()
        numbers, load = self._load.block_ids, self._load
        if load.shift:
            assert self._keys is not None, "chunks are only shifted once it is known how keys are rotated"
            numbers = [*numbers, *_packed(torch.cat(cos_sin(load.shift, self._keys.rotary)))]
        with self._turns:
            self._blocks = self._device.upload(numbers, lane.copies)
            uploaded = self._device.new_event()
            uploaded.record(lane.copies)
            lane.kernels.wait_event(uploaded)
            if fence is not None and not fence.has_passed():
                lane.kernels.wait_event(fence)

    def _stage(self, each: DevicePlan, batch: Sequence[ChunkSource]) -> None:
        """Enqueue all that one slot's content takes."""
        lane, plan, use = self._lane, each.plan, self._turns.begin()
        if use.before is not None:
            lane.copies.wait_event(use.before)
        for transfer in plan.transfers([chunk.frames for chunk in batch], self._memory, use.address):
            self._device.copy_in(transfer, lane.copies)
        use.middle.record(lane.copies)
        lane.kernels.wait_event(use.middle)
        sources = lane.addresses(use, len(batch), plan.stage_bytes)
        self._device.launch(lane.kernels, self._kernels(each, len(batch), use, sources))
        for number, chunk in enumerate(batch):
            if chunk.pool == POOL_FILL and self._own is not None:
                self._fill(plan, chunk, use.address + number * plan.stage_bytes, self._num_pushed + number)
        self._end(each, batch, use)

    def _stage_from_file(self, each: DevicePlan, batch: Sequence[ChunkSource]) -> None:
        """Read one slot's content from segment files, and enqueue the rest. Raises StorageError."""
        lane, plan, segments = self._lane, each.plan, self._load.segments
        if self._direct is None:
            raise StorageError("this worker does not read segment files")
        use = self._turns.begin()
        if use.before is not None:
            use.before.synchronize()
        reads = [
            FileRead(segments[chunk.segment - 1], *copy)
            for number, chunk in enumerate(batch)
            for copy in plan.copies(chunk.frames, ANY_FILE, use.address + number * plan.stage_bytes)
        ]
        self._direct.read(self._load.instance, reads)
        sources = lane.addresses(use, len(batch), plan.stage_bytes)
        self._device.launch(lane.kernels, self._kernels(each, len(batch), use, sources))
        self._end(each, batch, use)

    def _read(self, each: DevicePlan, batch: Sequence[ChunkSource]) -> None:
        """Enqueue what it takes to use chunks where they lie in pools."""
        lane, [wanted] = self._lane, each.plan.ranges
        frame_size = pool_frame_bytes(each.plan.object_bytes[wanted.of_object])
        starts = []
        for chunk in batch:
            part = self._reads.address(chunk.pool - 1, wanted.of_object)
            assert part is not None, "a pool out of reach"
            starts.append(part + chunk.pool_frame * frame_size + wanted.object_offset)
        use = self._turns.begin()
        use.upload = self._device.upload(starts, lane.kernels)
        self._device.launch(lane.kernels, self._kernels(each, len(batch), use, use.upload.tensor, is_staged=False))
        self._end(each, batch, use)

    def _fill(self, plan: StagePlan, chunk: ChunkSource, staged: int, number: int) -> None:
        """Enqueue the copy of a staged chunk to its frame in the own pool."""
        assert self._own is not None
        for index, object_offset, staged_offset, length_bytes in plan.ranges:
            frame = self._own.frame(chunk.pool_frame, plan.object_bytes[index])
            self._device.copy_within(frame + object_offset, staged + staged_offset, length_bytes, self._lane.kernels)
        self._fills[number] = chunk.pool_frame

    def _end(self, each: DevicePlan, batch: Sequence[ChunkSource], use: Use) -> None:
        first = self._num_pushed
        self._turns.end(use, self._lane.kernels, lambda digests: self._verify(each.plan, batch, first, digests))

    def _kernels(
        self, each: DevicePlan, num_chunks: int, use: Use, sources: torch.Tensor, *, is_staged: bool = True
    ) -> Callable[[int | None], None]:
        load = self._load
        chunks_start = (load.first_chunk + self._num_pushed) * load.chunk_tokens + load.shift
        start = max(load.start, chunks_start)
        end = min(load.end, chunks_start + num_chunks * load.chunk_tokens)
        digests = Digests(each.page_bytes, use.digests(num_chunks, len(each.plan.page_bytes)))
        blocks, rotation = self._blocks.tensor, None
        if load.shift:
            assert self._keys is not None
            table = blocks[len(load.block_ids) :].view(torch.float32)
            rotation = Rotation(self._keys.rotary, self._keys.dtype, table)

        def work(stream: int | None) -> None:
            scatter(
                each.layers,
                blocks,
                start,
                end - start,
                start - chunks_start,
                load.chunk_tokens,
                sources,
                each.unit_offsets,
                stream,
                rotation,
                digests=digests if is_staged else None,
            )
            if not is_staged:  # see above
                digest_pages(sources, digests, stream)

        return work

    def _verify(self, plan: StagePlan, batch: Sequence[ChunkSource], first: int, digests: memoryview) -> None:
        row_bytes = len(plan.page_bytes) * DIGEST_BYTES
        for number, chunk in enumerate(batch):
            if self._num_good is not None and self._num_good <= first + number:
                return
            computed = digests[number * row_bytes : (number + 1) * row_bytes]
            frames = FileFrames(self._load.segments[chunk.segment - 1]) if chunk.segment else self._arena
            if not plan.matches(computed, chunk.frames, chunk.checksums, frames):
                self._num_good, self._corrupt_key = first + number, chunk.key


def _packed(numbers: torch.Tensor) -> list[int]:
    """Return an even number of float32 as the int64 that have the same bytes."""
    packed: list[int] = numbers.view(torch.int64).tolist()
    return packed
