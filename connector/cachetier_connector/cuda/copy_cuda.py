"""The copy engine of CUDA devices: loads through staging memory, stores by kernels that write host memory themselves.

What is staged goes in copies as large as the bus likes them: all loads, for which the copy engine is 7% faster than
kernels that read over the bus, and stores to memory that is not registered. Other stores cost the host two launches
for 64 MiB, where staging costs it ten calls for 8 MiB, each under the interpreter's lock, which the engine's main
thread needs.

Two lanes, each with its own slots and streams: one for loads, with two thirds of the staging memory, and one for
stores. Loads take turns on theirs, slot by slot, and one that waits for a disk takes none. Kernels of loads go before
those of the engine, since a request waits for them; kernels of stores take their turn behind.

A CUDA error that sticks ends caching in this worker: the engine then has the same error, and the log should say so
once and not with every request.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cachetier.client import ArenaView
from cachetier.core.errors import CachetierError, ConfigError
from cachetier.core.layout import PAGE_BYTES, KVLayout, Shard
from cachetier_blend.rotation import Rotary, cos_sin
from cachetier_connector.copy_base import CopyEngine
from cachetier_connector.cuda import staged_load, staged_store
from cachetier_connector.cuda.device import CudaDevice, Device
from cachetier_connector.cuda.device_plan import DevicePlans
from cachetier_connector.cuda.direct_reads import DirectReader
from cachetier_connector.cuda.kernels import Digests, Rotation, digest_paged, digest_pages, gather, scatter
from cachetier_connector.cuda.pool import DevicePools
from cachetier_connector.cuda.probe_disk import MODE_DIRECT, MODE_HOST, probe
from cachetier_connector.cuda.registration import Registration
from cachetier_connector.cuda.staged_load import Keys, StagedLoad
from cachetier_connector.cuda.staged_store import Snapshot, StagedStore
from cachetier_connector.cuda.staging import NUM_SLOTS, Lane, Turns
from cachetier_connector.plan import LoadOp

LOAD_SHARES, STORE_SHARES = 2, 1  # of the staging memory
USUAL_CHUNK_TOKENS = 64  # what is compiled at start-up; another chunk size is compiled when it first comes
WAYS = {MODE_DIRECT: "from segment files", MODE_HOST: "through host memory"}
LANES_WAIT_S, LANES_INTERVAL_S = 60.0, 0.01

log = logging.getLogger(__name__)


class StagedCopyEngine(CopyEngine):
    """The copy engine of a `Device`."""

    def __init__(
        self,
        device: Device,
        caches: Sequence[torch.Tensor],
        layout: KVLayout,
        shard: Shard,
        *,
        staging_bytes: int,
        pool_bytes: int = 0,
        warm_up_tokens: int = USUAL_CHUNK_TOKENS,
    ) -> None:
        """Serve the paged blocks of one rank; takes all the device memory it will need and compiles its kernels.

        Args:
            device: that the caches lie on; the calling thread is bound to it.
            caches: of each of the rank's layers in order, `[blocks, heads, block_tokens, row]`, without heads for MLA.
            layout: of the model's KV cache group.
            shard: what of it this rank holds.
            staging_bytes: device memory for staging.
            pool_bytes: device memory for this worker's part of the engine's pool; 0: it has none.
            warm_up_tokens: tokens of the chunks that kernels are compiled for.

        Raises:
            ConfigError: the caches have another form, or a chunk cannot be staged in so little memory.
        """
        _check_form(caches, layout, shard)
        device.bind_thread()
        self._device, self._layout, self._shard = device, layout, shard
        self._caches, self._block_tokens = caches, int(caches[0].shape[-2])
        share = staging_bytes // (LOAD_SHARES + STORE_SHARES) // (NUM_SLOTS * PAGE_BYTES) * (NUM_SLOTS * PAGE_BYTES)
        memory = device.empty(share * (LOAD_SHARES + STORE_SHARES))
        self._load_memory = memory[: share * LOAD_SHARES]
        self._load_lane = self._new_load_lane(self._load_memory)
        self._store_lane = Lane(
            device, memory[share * LOAD_SHARES :], is_urgent=False, num_pages=staged_store.PAGES_MAX
        )
        now = device.mark()  # the caches may still be written, and memory that torch gave may still be read
        for lane in (self._load_lane, self._store_lane):
            lane.copies.wait_event(now)
            lane.kernels.wait_event(now)
        self._plans = DevicePlans(device, caches, layout, shard, self._store_lane.slot_bytes)
        self._lock = threading.Lock()
        self._registrations: list[Registration] = []
        self._is_broken = False
        self._pools = DevicePools(device, pool_bytes)
        self._direct: DirectReader | None = None
        self._direct_lane: Lane | None = None
        self._warm_up_tokens = warm_up_tokens
        self._warm_up(None)

    def use_rotary(self, rotary: Rotary) -> None:
        super().use_rotary(rotary)
        keys = Keys(rotary, _number_type(self._caches[0]))
        self._warm_up(Rotation(*keys, self._device.constant(torch.cat(cos_sin(0, rotary)).tolist(), torch.float32)))

    @property
    def block_tokens(self) -> int:
        return self._block_tokens

    @property
    def keeps_blocks(self) -> bool:
        return True

    @property
    def pools(self) -> DevicePools:
        return self._pools

    def shard_bytes(self, chunk_tokens: int) -> int:
        return self._layout.object_bytes(self._shard, chunk_tokens)

    def use_arena(self, arena: ArenaView) -> None:
        with self._lock:
            self._registrations = [each for each in self._registrations if each.is_alive]
            self._registrations.append(Registration(self._device, arena))

    def snapshot(self, block_ids: Sequence[int], first_token: int, num_chunks: int, chunk_tokens: int) -> Snapshot:
        return Snapshot(self._device.mark(), block_ids, first_token, num_chunks, chunk_tokens)

    def fill(
        self,
        snapshot: Snapshot,
        numbers: Sequence[int],
        arena: ArenaView,
        frames: Sequence[int],
        is_wanted: Callable[[], bool],
    ) -> list[int | None]:
        if self._is_broken or not numbers:
            return [None] * len(numbers)
        self._device.bind_thread()
        try:
            return StagedStore(
                self._device,
                self._store_lane,
                lambda is_staged: self._plans.get([self._shard], snapshot.chunk_tokens, is_staged=is_staged),
                snapshot,
                arena,
            ).fill(numbers, frames, is_wanted)
        except Exception as error:
            self._note(self._store_lane, error)
            raise

    def fence(self) -> Any:
        return self._device.mark()

    def open_load(self, arena: ArenaView, load: LoadOp, fence: Any) -> StagedLoad:
        if self._is_broken:
            raise CachetierError("the device has failed; nothing is loaded any more")
        self._device.bind_thread()

        def end(error: BaseException | None) -> None:
            if error is not None:
                self._note(lane, error)

        with self._lock:  # a lane that a run is open on stays
            lane = self._lane_for(load)
            return StagedLoad(
                self._device,
                lane,
                arena,
                load,
                fence,
                lambda tiling, is_staged: self._plans.get(load.tilings[tiling], load.chunk_tokens, is_staged=is_staged),
                self._pools,
                self._direct,
                Keys(self.rotary, _number_type(self._caches[0])) if self.rotary else None,
                end,
            )

    def read_keys(self, layer: int, block_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
        cache = self._caches[layer]
        rows = cache[torch.tensor(block_ids, device=cache.device)][..., : cache.shape[-1] // 2]
        keys = rows.transpose(0, 1).flatten(1, 2)[:, :num_tokens]
        return keys.view(_number_type(cache))

    def read_with(self, reader: DirectReader) -> bool:
        """Have `reader` read chunks that lie in segment files; False: there was no moment without a load.

        Such loads get a lane of their own, half of the loads' memory: they wait for the disk with the lane's turn in
        hand, and a load from memory should not. Lanes change when no load is open on them. May block for long.
        """
        half = self._load_memory.numel() // LOAD_SHARES
        deadline_s = time.monotonic() + LANES_WAIT_S
        while time.monotonic() < deadline_s:
            with self._lock:
                if self._is_broken:
                    return False
                if self._load_lane.is_idle:
                    self._load_lane = self._new_load_lane(self._load_memory[:half])
                    self._direct_lane = self._new_load_lane(self._load_memory[half:])
                    self._direct = reader
                    return True
            time.sleep(LANES_INTERVAL_S)
        return False

    def _new_load_lane(self, memory: torch.Tensor) -> Lane:
        return Lane(self._device, memory, is_urgent=True, num_pages=staged_load.PAGES_MAX)

    def _lane_for(self, load: LoadOp) -> Lane:
        return self._direct_lane if self._direct_lane is not None and load.segments else self._load_lane

    def stop(self) -> None:
        self._device.bind_thread()
        try:
            for lane in (self._load_lane, self._store_lane, self._direct_lane):
                if lane is not None:
                    lane.drain()
        except Exception as error:
            self._note(self._store_lane, error)
        with self._lock:
            for registration in self._registrations:
                registration.end()
            self._registrations = []
            self._is_broken = True  # for who still measures the disk
            if self._direct is not None:
                self._direct.close()
            # And with the lanes their memory.
            del self._load_lane, self._store_lane, self._direct_lane, self._load_memory, self._plans
        try:
            self._pools.stop()
        except CachetierError as error:
            log.warning("cachetier: the pool cannot be given back: %s", error)

    def _note(self, lane: Lane, error: BaseException) -> None:
        """Find out whether the device still works after `error`; if not, give up caching."""
        try:
            lane.drain()
        except Exception:
            if not self._is_broken:
                self._is_broken = True
                log.error("cachetier: the device has failed (%s); nothing is loaded or stored any more", error)

    def _warm_up(self, rotation: Rotation | None) -> None:
        """Compile the kernels on the real shapes: copies a chunk out of the first blocks and back to where it was.

        A `rotation` must be by no angle.
        """
        chunk_tokens = self._warm_up_tokens
        count = -(-chunk_tokens // self._block_tokens)
        if count > self._caches[0].shape[0]:
            return
        lane, turns = self._store_lane, Turns(self._store_lane)
        blocks = self._device.upload(range(count), lane.kernels)
        for each in [*self._plans.get([self._shard], chunk_tokens)] * 2:  # compiled, then as later
            with turns:
                use = turns.begin()
                staged = lane.addresses(use, 1, each.plan.stage_bytes)
                digests = Digests(each.page_bytes, use.digests(1, len(each.plan.page_bytes)))

                def work(stream: int | None) -> None:
                    gather(each.layers, blocks.tensor, 0, 1, chunk_tokens, staged, stream)  # noqa: B023
                    digest_pages(staged, digests, stream)  # noqa: B023
                    scatter(
                        each.layers,  # noqa: B023
                        blocks.tensor,
                        0,
                        chunk_tokens,
                        0,
                        chunk_tokens,
                        staged,  # noqa: B023
                        each.unit_offsets,  # noqa: B023
                        stream,
                        rotation,
                        digests,  # noqa: B023
                    )

                self._device.launch(lane.kernels, work)
                turns.end(use, lane.kernels, lambda _: None)
            turns.wait()
        self._warm_up_whole(turns, blocks.tensor)
        turns.close()
        self._device.release(blocks)

    def _warm_up_whole(self, turns: Turns, blocks: torch.Tensor) -> None:
        """Compile what works on whole shards, which may be larger than a slot: the copies are of nothing."""
        lane, chunk_tokens = self._store_lane, self._warm_up_tokens
        [each] = self._plans.get([self._shard], chunk_tokens, is_staged=False)
        num_pages = len(each.plan.page_bytes)
        if not each.is_exact or num_pages > staged_store.PAGES_MAX:
            return
        for _ in range(2):
            with turns:
                use = turns.begin()
                digests = Digests(each.page_bytes, use.digests(1, num_pages))

                def work(stream: int | None) -> None:
                    gather(each.layers, blocks, 0, 0, chunk_tokens, blocks, stream, 1)
                    digest_paged(each.layers, blocks, 0, chunk_tokens, digests, stream)  # noqa: B023

                self._device.launch(lane.kernels, work)
                turns.end(use, lane.kernels, lambda _: None)
            turns.wait()


class CudaCopyEngine(StagedCopyEngine):
    """The copy engine of the CUDA device that `caches` lie on."""

    def __init__(self, caches: Sequence[torch.Tensor], layout: KVLayout, shard: Shard, **sizes: int) -> None:
        """See `StagedCopyEngine`."""
        super().__init__(CudaDevice(caches[0].device), caches, layout, shard, **sizes)

    def measure_direct(self, folder: str) -> float:
        self._device.bind_thread()
        found = probe(folder)
        log.info("cachetier: chunks on disk are loaded %s: %s", WAYS[found.mode], found.why)
        if found.mode != MODE_DIRECT:
            return 0.0
        return found.direct_bytes_per_s if self.read_with(DirectReader()) else 0.0


def _check_form(caches: Sequence[torch.Tensor], layout: KVLayout, shard: Shard) -> None:
    first = caches[0]
    heads = int(first.shape[1]) if first.dim() == 4 else 1
    found = (len(caches), heads, int(first.shape[-1]) * first.element_size())
    expected = (shard.layer_end - shard.layer_start, shard.head_end - shard.head_start, layout.row_bytes)
    if found != expected:
        raise ConfigError(f"KV caches have (layers, heads, bytes a row) {found}, and the model says {expected}")


def _number_type(cache: torch.Tensor) -> torch.dtype:
    """Return what a cache's numbers are: vLLM calls those of eight bits uint8."""
    return torch.float8_e4m3fn if cache.dtype is torch.uint8 else cache.dtype
