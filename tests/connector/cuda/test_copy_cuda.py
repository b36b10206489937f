"""The copy engine on a device without a GPU whose streams run at random; see `copy_cases` and `host_device`."""

import functools
import gc
import random
import threading

import pytest
import torch

from cachetier.core.checksum import object_checksum
from cachetier.core.errors import CachetierError, ConfigError
from cachetier.core.layout import PAGE_BYTES, KVLayout, Shard
from cachetier_connector.copy_cpu import CpuCopyEngine
from cachetier_connector.cuda import copy_cuda, registration, staged_load, staged_store, staging, transfers
from cachetier_connector.cuda.copy_cuda import StagedCopyEngine
from cachetier_connector.plan import ChunkSource
from tests.connector.cuda import plain_kernels
from tests.connector.cuda.copy_cases import (
    BLOCK,
    CHUNK,
    CHUNK_BYTES,
    HEADS,
    LAYERS,
    LAYOUT,
    NUM_BLOCKS,
    ROW,
    STAGING_BYTES,
    WHOLE,
    CopyCases,
    Rank,
    Tier,
    blocks_for,
    canonical,
    kv_of,
    load,
    load_op,
)
from tests.connector.cuda.host_device import HostDevice, Mark


@pytest.fixture(autouse=True)
def _kernels(request, monkeypatch) -> None:
    """Plain kernels, unless a test asks for those of Triton."""
    if "real_kernels" not in request.fixturenames:
        for module in (copy_cuda, staged_load, staged_store):
            for name, kernel in plain_kernels.of(module).items():
                monkeypatch.setattr(module, name, kernel)


@pytest.fixture
def real_kernels() -> None:
    """Run Triton's interpreter."""


@pytest.fixture
def host() -> HostDevice:
    return HostDevice()


@pytest.fixture
def make(host):
    return functools.partial(StagedCopyEngine, host, warm_up_tokens=CHUNK)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")


@pytest.fixture
def tier(tmp_path) -> Tier:
    return Tier(tmp_path)


@pytest.fixture
def rank(make, device) -> Rank:
    return Rank(make, device, WHOLE[0], STAGING_BYTES)


class TestOnTheHost(CopyCases):
    pass


@pytest.fixture
def registered(host, tier, monkeypatch) -> Tier:
    """A tier in memory that kernels can write; they take two chunks at once."""
    monkeypatch.setattr(staged_store, "PAGES_MAX", 2 * CHUNK_BYTES // PAGE_BYTES)
    host.register(tier.view.address, tier.view.geometry.data_bytes)
    return tier


@pytest.mark.usefixtures("registered")
class TestInRegisteredMemory(CopyCases):
    def test_stores_are_not_staged(self, host, rank, registered):
        kv, blocks = kv_of(1, 5 * CHUNK), blocks_for(5 * CHUNK)
        rank.write(kv, blocks)
        snapshot, frames = rank.engine.snapshot(blocks, 0, 5, CHUNK), registered.frames(WHOLE[0], 5)
        assert None not in rank.engine.fill(snapshot, range(5), registered.view, frames, lambda: True)
        assert host.transfers == []


@pytest.mark.parametrize(
    ("slot_bytes", "is_registered"),
    [(2 * CHUNK_BYTES, False), pytest.param(CHUNK_BYTES // 2, False, marks=pytest.mark.slow), (2 * CHUNK_BYTES, True)],
)
def test_with_the_real_kernels_what_was_stored_loads(real_kernels, host, make, device, tier, slot_bytes, is_registered):
    if is_registered:
        host.register(tier.view.address, tier.view.geometry.data_bytes)
    kv, blocks = kv_of(1, 3 * CHUNK), blocks_for(3 * CHUNK)
    rank = Rank(make, device, WHOLE[0], 6 * slot_bytes)
    rank.write(kv, blocks)
    frames, snapshot = tier.frames(WHOLE[0], 3), rank.engine.snapshot(blocks, 0, 3, CHUNK)
    checksums = rank.engine.fill(snapshot, range(3), tier.view, frames, lambda: True)
    chunks = [ChunkSource(b"k", 0, [frame], [checksum]) for frame, checksum in zip(frames, checksums, strict=True)]
    written, others = rank.snapshot_of_blocks(), blocks[::-1]
    rank.memory.zero_()
    assert load(rank, tier, load_op([WHOLE], others, 0, 3 * CHUNK), chunks) == (3, None)
    assert torch.equal(rank.snapshot_of_blocks()[:, others], written[:, blocks])
    num_copied = (3 if is_registered else 6) * CHUNK_BYTES  # what is loaded, and what is stored
    assert sum(each.width_bytes * each.rows for each in host.transfers) == num_copied


class TestOrder:
    """With streams that run as late as they may."""

    def test_a_snapshot_waits_for_the_step_that_computes_its_kv(self, host, rank, tier):
        kv, blocks = kv_of(1, 2 * CHUNK), blocks_for(2 * CHUNK)
        host.engine.enqueue(lambda: rank.write(kv, blocks))
        snapshot = rank.engine.snapshot(blocks, 0, 2, CHUNK)
        checksums = rank.engine.fill(snapshot, [0, 1], tier.view, tier.frames(WHOLE[0], 2), lambda: True)
        assert checksums == [object_checksum(memoryview(canonical(kv, WHOLE[0], number))) for number in (0, 1)]

    def test_what_the_engine_does_later_neither_is_waited_for_nor_seen(self, host, rank, tier):
        kv, blocks = kv_of(2, 2 * CHUNK), blocks_for(2 * CHUNK)
        rank.write(kv, blocks)
        snapshot = rank.engine.snapshot(blocks, 0, 2, CHUNK)
        host.engine.enqueue(transfers_never := host.new_event().mark)
        transfers_never.is_passed = False
        checksums = rank.engine.fill(snapshot, [0, 1], tier.view, tier.frames(WHOLE[0], 2), lambda: True)
        assert None not in checksums
        chunk = tier.put(kv, WHOLE, 0)
        transfers_never.is_passed = True
        assert load(rank, tier, load_op([WHOLE], blocks, 0, CHUNK), [chunk]) == (1, None)

    def test_a_load_waits_for_its_fence_before_it_writes(self, host, rank, tier):
        kv, old, blocks = kv_of(3, 4 * CHUNK), kv_of(4, 4 * CHUNK), blocks_for(4 * CHUNK)
        chunks = [tier.put(kv, WHOLE, number) for number in range(4)]
        host.engine.enqueue(lambda: rank.write(old, blocks))  # a pass on the blocks' behalf
        op, fence = load_op([WHOLE], blocks, 0, 4 * CHUNK), rank.engine.fence()
        assert load(rank, tier, op, chunks, fence=fence) == (4, None)
        host.engine.synchronize()
        written = rank.snapshot_of_blocks()
        rank.write(kv, blocks)
        assert torch.equal(rank.snapshot_of_blocks(), written)

    def test_a_load_does_not_wait_for_the_blocks_of_another_one(self, host, rank, tier):
        kv = kv_of(1, 2 * CHUNK)
        chunks = [tier.put(kv, WHOLE, number) for number in range(2)]
        first, second = blocks_for(4 * CHUNK)[: 2 * CHUNK // BLOCK], blocks_for(4 * CHUNK)[2 * CHUNK // BLOCK :]
        one = rank.engine.open_load(tier.view, load_op([WHOLE], first, 0, 2 * CHUNK), rank.engine.fence())
        one.push(chunks[:1])
        host.engine.enqueue(busy := Mark())
        other = rank.engine.open_load(tier.view, load_op([WHOLE], second, 0, 2 * CHUNK), rank.engine.fence())
        with pytest.raises(AssertionError, match="everything waits"):  # on the other's own thread, for the engine
            other.push(chunks)
        one.push(chunks[1:])
        assert one.finish() == 2
        busy.is_passed = True
        assert other.finish() == 0

    def test_the_engine_may_still_be_clearing_its_blocks_when_the_kernels_are_compiled_on_them(
        self, host, rank, monkeypatch
    ):
        order = []
        monkeypatch.setattr(copy_cuda, "gather", lambda *args: (order.append("gather"), plain_kernels.gather(*args)))
        host.engine.enqueue(lambda: order.append("clear"))
        StagedCopyEngine(host, rank.caches, LAYOUT, WHOLE[0], staging_bytes=STAGING_BYTES, warm_up_tokens=CHUNK)
        assert (order[0], set(order[1:])) == ("clear", {"gather"})

    @pytest.mark.parametrize("seed", range(3))
    def test_load_threads_and_a_store_thread_do_not_disturb_each_other(self, device, tier, seed, monkeypatch):
        """Many more groups than slots and than digest buffers, with runs that share a lane."""
        monkeypatch.setattr(staging, "NUM_AHEAD", 4)
        make = functools.partial(StagedCopyEngine, HostDevice(seed), warm_up_tokens=CHUNK)
        rank, errors = Rank(make, device, WHOLE[0], STAGING_BYTES // 2), []
        kv = kv_of(seed, 8 * CHUNK)
        tables = [list(range(number * 10, number * 10 + 10)) for number in range(4)]
        rank.write(kv[:, :, : 5 * CHUNK], tables[3])
        checksums = [object_checksum(memoryview(canonical(kv, WHOLE[0], number))) for number in range(5)]
        chunks = [tier.put(kv, WHOLE, number) for number in range(5)]
        bad = tier.put(kv, WHOLE, 2)
        tier.view.frame(bad.frames[0] + 99, 1)[0] ^= 1

        def guarded(work, number):
            try:
                work(number)
            except BaseException as error:
                errors.append(error)

        def loads(number):
            rng = random.Random(number)
            for _ in range(3):
                is_bad = rng.random() < 0.5
                sources = [chunks[0], chunks[1], bad if is_bad else chunks[2], chunks[3], chunks[4]]
                found = load(rank, tier, load_op([WHOLE], tables[number], 0, 5 * CHUNK), sources, rng.randrange(1, 4))
                assert found == ((2, bad.key) if is_bad else (5, None))

        def stores(_):
            for _ in range(3):
                snapshot = rank.engine.snapshot(tables[3], 0, 5, CHUNK)
                frames = tier.frames(WHOLE[0], 5)
                assert rank.engine.fill(snapshot, range(5), tier.view, frames, lambda: True) == checksums

        works = [(loads, 0), (loads, 1), (loads, 2), (stores, 3)]
        threads = [threading.Thread(target=guarded, args=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


class TestRegistration:
    @pytest.fixture(autouse=True)
    def _small_cells(self, monkeypatch) -> None:
        for module in (registration, transfers):
            monkeypatch.setattr(module, "CELL_BYTES", 3 * CHUNK_BYTES + 4096)

    @pytest.mark.parametrize("is_finished", [False, True])
    def test_copies_never_touch_registered_and_other_memory_at_once(self, host, rank, tier, is_finished):
        """While the registration is under way, too: at any moment it may have come to any cell."""
        kv, blocks = kv_of(1, 8 * CHUNK), blocks_for(8 * CHUNK)
        chunks = [tier.put(kv, WHOLE, number) for number in range(8)]
        if is_finished:
            rank.engine.use_arena(tier.view)
            assert rank.engine._registrations[0].join() == len(host.registered) > 10
        else:
            cell, address = transfers.CELL_BYTES, tier.view.address
            host.registered = {address + n * cell: address + (n + 1) * cell for n in range(0, 60, 2)}
        assert load(rank, tier, load_op([WHOLE], blocks, 0, 8 * CHUNK), chunks) == (8, None)
        assert any(transfer.width_bytes < CHUNK_BYTES for transfer in host.transfers)  # a border was in the way
        host.transfers.clear()
        snapshot, frames = rank.engine.snapshot(blocks, 0, 8, CHUNK), tier.frames(WHOLE[0], 8)
        assert None not in rank.engine.fill(snapshot, range(8), tier.view, frames, lambda: True)
        assert bool(host.transfers) != is_finished

    def test_an_arena_is_unregistered_with_its_last_reader_and_before_it_is_unmapped(self, host, rank, tier):
        rank.engine.use_arena(tier.view)
        rank.engine._registrations[0].join()
        chunk, first = tier.put(kv_of(1, CHUNK), WHOLE, 0), tier.view
        run = rank.engine.open_load(tier.view, load_op([WHOLE], blocks_for(CHUNK), 0, CHUNK), rank.engine.fence())
        tier.view = None
        del first
        gc.collect()
        assert host.registered, "the run still reads it"
        run.push([chunk])
        assert run.finish() == 1
        del run
        gc.collect()
        assert not host.registered

    @pytest.mark.parametrize(
        ("error", "remedy"),
        [("CUDA_ERROR_OUT_OF_MEMORY (2)", "ulimit -l"), ("CUDA_ERROR_INVALID_VALUE (1)", "/dev/shm must be a tmpfs")],
    )
    def test_a_refused_registration_is_logged_once_with_the_remedy_and_costs_speed_only(
        self, host, rank, tier, caplog, error, remedy
    ):
        host.register_error = error
        rank.engine.use_arena(tier.view)
        assert rank.engine._registrations[0].join() == 0
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert error in caplog.text
        assert remedy in caplog.text
        chunk = tier.put(kv_of(1, CHUNK), WHOLE, 0)
        assert load(rank, tier, load_op([WHOLE], blocks_for(CHUNK), 0, CHUNK), [chunk]) == (1, None)

    def test_stop_unregisters_while_the_arena_is_still_mapped(self, host, rank, tier):
        rank.engine.use_arena(tier.view)
        rank.engine._registrations[0].join()
        rank.engine.stop()
        assert not host.registered


def test_adjacent_frames_are_copied_together(host, make, device, tier):
    """Frames are larger than objects, so rows with gaps between them."""
    rank = Rank(make, device, WHOLE[0], 6 * 8 * CHUNK_BYTES)
    kv, blocks = kv_of(1, 5 * CHUNK), blocks_for(5 * CHUNK)
    chunks = [tier.put(kv, WHOLE, number) for number in range(5)]
    assert load(rank, tier, load_op([WHOLE], blocks, 0, 5 * CHUNK), chunks, group=5) == (5, None)
    assert len(host.transfers) == 1
    written = rank.snapshot_of_blocks()
    rank.write(kv, blocks)
    assert torch.equal(rank.snapshot_of_blocks(), written)


def test_a_device_that_has_failed_ends_caching_and_says_so_once(host, rank, tier, caplog):
    chunk = tier.put(kv_of(1, CHUNK), WHOLE, 0)
    run = rank.engine.open_load(tier.view, load_op([WHOLE], blocks_for(CHUNK), 0, CHUNK), rank.engine.fence())
    snapshot = rank.engine.snapshot(blocks_for(CHUNK), 0, 1, CHUNK)
    host.fails_with = RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal"):
        run.push([chunk])
    with pytest.raises(RuntimeError, match="illegal"):
        run.finish()
    assert rank.engine.fill(snapshot, [0], tier.view, tier.frames(WHOLE[0], 1), lambda: True) == [None]
    with pytest.raises(CachetierError, match="the device has failed"):
        rank.engine.open_load(tier.view, load_op([WHOLE], blocks_for(CHUNK), 0, CHUNK), None)
    assert len(caplog.records) == 1


def test_a_store_that_fails_leaves_nothing_behind_that_a_later_one_would_finish(host, rank, tier, monkeypatch):
    kv, blocks = kv_of(1, 4 * CHUNK), blocks_for(4 * CHUNK)
    rank.write(kv, blocks)
    frames, later = tier.frames(WHOLE[0], 4), tier.frames(WHOLE[0], 1)
    snapshot = rank.engine.snapshot(blocks, 0, 4, CHUNK)
    with pytest.raises(ValueError, match="outside"):
        rank.engine.fill(snapshot, range(4), tier.view, [*frames[:3], -4096], lambda: True)
    before = bytes(tier.view.frame(0, tier.view.geometry.data_bytes)[: later[0]])
    assert None not in rank.engine.fill(snapshot, [0], tier.view, later, lambda: True)
    assert bytes(tier.view.frame(0, tier.view.geometry.data_bytes)[: later[0]]) == before


def test_what_the_cpu_engine_stored_loads(rank, tier):
    kv, blocks = kv_of(1, 3 * CHUNK), blocks_for(3 * CHUNK)
    halves = kv.view(HEADS, LAYERS, 3 * CHUNK, 2, ROW // 2)
    caches = [torch.zeros(NUM_BLOCKS, HEADS, BLOCK, ROW, dtype=torch.bfloat16) for _ in range(LAYERS)]
    for layer, cache in enumerate(caches):
        flat = cache.view(torch.int16).view(NUM_BLOCKS, HEADS, 2, BLOCK, ROW // 2)
        for token in range(3 * CHUNK):
            flat[blocks[token // BLOCK], :, :, token % BLOCK] = halves[:, layer, token]
    in_order = torch.arange(BLOCK * ROW // 2).view(BLOCK, ROW // 2)
    cpu = CpuCopyEngine(caches, (in_order, in_order), LAYOUT, WHOLE[0])
    frames = tier.frames(WHOLE[0], 3)
    checksums = cpu.fill(cpu.snapshot(blocks, 0, 3, CHUNK), range(3), tier.view, frames, lambda: True)
    chunks = [
        tier.put(kv, WHOLE, 0)._replace(frames=[f], checksums=[c]) for f, c in zip(frames, checksums, strict=True)
    ]
    assert load(rank, tier, load_op([WHOLE], blocks, 0, 3 * CHUNK), chunks) == (3, None)
    written = rank.snapshot_of_blocks()
    rank.write(kv, blocks)
    assert torch.equal(rank.snapshot_of_blocks(), written)


def test_caches_that_the_model_does_not_describe_are_refused(host):
    caches = [torch.zeros(NUM_BLOCKS, HEADS, BLOCK, ROW, dtype=torch.bfloat16) for _ in range(LAYERS)]
    wrong = KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, row_bytes=ROW)
    with pytest.raises(ConfigError, match="bytes a row"):
        StagedCopyEngine(host, caches, wrong, WHOLE[0], staging_bytes=STAGING_BYTES)
    with pytest.raises(ConfigError, match="do not fit"):
        StagedCopyEngine(host, caches, LAYOUT, WHOLE[0], staging_bytes=6 * 4096, warm_up_tokens=256)
    with pytest.raises(ConfigError, match="heads"):
        StagedCopyEngine(host, caches, LAYOUT, Shard(0, 2, 0, 2), staging_bytes=STAGING_BYTES)
