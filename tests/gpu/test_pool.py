"""Pools of another process on real devices: read through CUDA IPC, on the same device and on a peer, dead or alive.

The owner is a child process that fills its pool and then waits to be told to end, or is killed.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest
import torch

from cachetier.client import ArenaView
from cachetier.core.pool_messages import POOL_FILL
from cachetier_connector.cuda.copy_cuda import CudaCopyEngine
from cachetier_connector.plan import ChunkSource, LoadOp
from tests.connector.cuda.copy_cases import (
    CHUNK,
    HALVES,
    LAYOUT,
    NUM_BLOCKS,
    STAGING_BYTES,
    TILINGS,
    WHOLE,
    Rank,
    Tier,
    blocks_for,
    kv_of,
    load_op,
)
from tests.connector.cuda.pool_cases import NUM_CHUNKS, carry_out, in_frames, pool_of, pooled_rank, spoil

pytestmark = pytest.mark.gpu

FRAMES = [7, 0, 3, 4, 5]
ANSWER_TIMEOUT_S = 120
BALLAST_BYTES = 2 << 30


class AttachedTier(Tier):
    """The arena of another process."""

    def __init__(self, path: str) -> None:
        self.view = ArenaView.attach(path)


def own(pipe: Connection, path: str, number: int, device: int, chunks: list[ChunkSource], op: LoadOp) -> None:
    """Fill the pool's part of shard `number` of the op's tiling, send what a match would say, and wait."""
    torch.cuda.set_device(device)
    shard = op.tilings[0][number]
    owner = pooled_rank(CudaCopyEngine, torch.device("cuda", device), shard, has_pool=True)
    ballast = torch.empty(BALLAST_BYTES, dtype=torch.uint8, device="cuda")
    filled = carry_out(owner, AttachedTier(path), op, in_frames(chunks, POOL_FILL, FRAMES))
    pipe.send((filled, pool_of([owner])))
    pipe.recv()
    owner.engine.stop()
    del ballast


class Owner:
    """A process that owns one part of a pool."""

    def __init__(self, path: str, number: int, device: int, chunks: list[ChunkSource], op: LoadOp) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=own, args=(theirs, path, number, device, chunks, op), daemon=True)
        self.process.start()
        assert self.pipe.poll(ANSWER_TIMEOUT_S), "the owner did not fill its pool"
        filled, self.pool = self.pipe.recv()
        assert filled == (NUM_CHUNKS, None, FRAMES)

    def kill(self) -> None:
        """Kill it, and wait until the kernel has cleaned up after it."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def end(self) -> None:
        """Let it end in order."""
        if self.process.is_alive():
            self.pipe.send(None)
            self.process.join(30)


class Stand:
    """Chunks in an arena, owners of pools that hold them, and what a reader should find."""

    def __init__(self, folder: Path, tiling_name: str, devices: list[int]) -> None:
        self.tiling = TILINGS[tiling_name]
        self.tier = Tier(folder)
        self.kv = kv_of(1, NUM_CHUNKS * CHUNK)
        self.blocks = blocks_for(NUM_CHUNKS * CHUNK)
        chunks = [self.tier.put(self.kv, self.tiling, number) for number in range(NUM_CHUNKS)]
        op = load_op([self.tiling], self.blocks, 0, NUM_CHUNKS * CHUNK)
        path = str(folder / "arena")
        self.owners = [
            Owner(path, number, devices[number % len(devices)], chunks, op) for number in range(len(self.tiling))
        ]
        parts = [owner.pool.parts[0] for owner in self.owners]
        self.op = msgspec.structs.replace(op, pools=[msgspec.structs.replace(self.owners[0].pool, parts=parts)])
        self.chunks = in_frames(chunks, 1, FRAMES)

    def reader(self, shard_of: list = WHOLE, number: int = 0) -> Rank:
        """Return a reader without a pool of its own, on device 0."""
        return pooled_rank(CudaCopyEngine, torch.device("cuda", 0), shard_of[number], has_pool=False)

    def load(self, reader: Rank) -> tuple[int, bytes | None, list[int]]:
        """Load all chunks from the pool."""
        return carry_out(reader, self.tier, self.op, self.chunks)

    def assert_right(self, reader: Rank) -> None:
        """Compare what a reader loaded with what was stored."""
        expected = Rank(CudaCopyEngine, torch.device("cuda", 0), reader.shard, STAGING_BYTES)
        expected.memory.copy_(reader.memory)
        expected.write(self.kv, self.blocks)
        assert torch.equal(reader.snapshot_of_blocks(), expected.snapshot_of_blocks())


@pytest.fixture
def stand(tmp_path) -> Iterator[object]:
    made: list[Stand] = []

    def make(tiling_name: str = "whole", devices: tuple[int, ...] = (0,)) -> Stand:
        made.append(Stand(tmp_path, tiling_name, list(devices)))
        return made[-1]

    yield make
    for one in made:
        for owner in one.owners:
            owner.end()


def assert_the_device_works() -> None:
    """An error that sticks would show here."""
    torch.cuda.synchronize()
    assert int(torch.ones(1000, device="cuda").sum()) == 1000


@pytest.mark.parametrize("read_as", [WHOLE, HALVES], ids=["whole", "halves"])
@pytest.mark.parametrize("owned_as", ["whole", "halves", "stages"])
def test_another_process_reads_a_pool_on_its_own_device(stand, owned_as, read_as):
    made = stand(owned_as)
    spoil(made.tier, made.chunks)
    for number in range(len(read_as)):
        reader = made.reader(read_as, number)
        assert made.load(reader) == (NUM_CHUNKS, None, [])
        made.assert_right(reader)
        reader.engine.stop()


@pytest.mark.gpu(count=2)
@pytest.mark.parametrize("owned_as", ["whole", "halves"])
def test_another_process_reads_a_pool_on_a_peer(stand, owned_as):
    made = stand(owned_as, (1, 0))
    spoil(made.tier, made.chunks)
    reader = made.reader()
    assert made.load(reader) == (NUM_CHUNKS, None, [])
    made.assert_right(reader)


@pytest.mark.parametrize("device", [0, pytest.param(1, marks=pytest.mark.gpu(count=2))])
def test_after_the_owner_was_killed_a_load_that_named_its_pool_is_right_or_a_miss(stand, device):
    """The books name the pool no more, but this load's match was before."""
    made = stand(devices=(device,))
    reader = made.reader()
    assert made.load(reader) == (NUM_CHUNKS, None, [])
    made.owners[0].kill()
    for _ in range(20):
        reader.memory.zero_()
        num_good, corrupt, _ = made.load(reader)
        assert num_good == NUM_CHUNKS or corrupt is not None
        if num_good == NUM_CHUNKS:
            made.assert_right(reader)
        time.sleep(0.05)
    assert_the_device_works()
    reader.engine.pools.close_gone([made.op.pools[0].id])
    assert reader.engine.pools.opened() == []
    assert_the_device_works()


def test_killing_the_owner_while_its_pool_is_read_harms_nobody(stand):
    made = stand()
    reader = made.reader()
    loads = 0
    kill_at = time.monotonic() + 0.5
    while time.monotonic() < kill_at + 0.5:
        if time.monotonic() >= kill_at and made.owners[0].process.is_alive():
            run = reader.engine.open_load(made.tier.view, made.op, reader.engine.fence())
            run.push(made.chunks)
            made.owners[0].kill()
            num_good = run.finish()
        else:
            num_good, _, _ = made.load(reader)
        loads += 1
        if num_good == NUM_CHUNKS:
            made.assert_right(reader)
    assert loads > 10
    assert_the_device_works()


def test_a_pool_whose_owner_is_gone_before_it_was_opened_is_read_from_host_memory(stand):
    made = stand()
    made.owners[0].kill()
    reader = made.reader()
    assert made.load(reader) == (NUM_CHUNKS, None, [])
    made.assert_right(reader)
    assert_the_device_works()


def test_closing_the_pool_of_a_dead_owner_gives_the_device_its_memory_back(stand):
    """Or a new engine would not find room where the old one was."""
    torch.cuda.synchronize()
    made = stand()
    with_owner = torch.cuda.mem_get_info()[0]
    reader = made.reader()
    made.load(reader)
    made.owners[0].kill()
    reader.engine.pools.close_gone([made.op.pools[0].id])
    deadline = time.monotonic() + 10
    while torch.cuda.mem_get_info()[0] < with_owner + BALLAST_BYTES and time.monotonic() < deadline:
        time.sleep(0.1)
    assert torch.cuda.mem_get_info()[0] >= with_owner + BALLAST_BYTES


def test_the_owner_reads_its_own_pool(tmp_path):
    tier, kv, blocks = Tier(tmp_path), kv_of(2, NUM_CHUNKS * CHUNK), list(range(NUM_BLOCKS))[: NUM_CHUNKS * 2]
    chunks = [tier.put(kv, WHOLE, number) for number in range(NUM_CHUNKS)]
    owner = pooled_rank(CudaCopyEngine, torch.device("cuda", 0), LAYOUT.whole(), has_pool=True)
    op = load_op([WHOLE], blocks, 0, NUM_CHUNKS * CHUNK)
    assert carry_out(owner, tier, op, in_frames(chunks, POOL_FILL, FRAMES)) == (NUM_CHUNKS, None, FRAMES)
    loaded = owner.snapshot_of_blocks()
    spoil(tier, chunks)
    owner.memory.zero_()
    op = msgspec.structs.replace(op, pools=[pool_of([owner])])
    assert carry_out(owner, tier, op, in_frames(chunks, 1, FRAMES)) == (NUM_CHUNKS, None, [])
    assert torch.equal(owner.snapshot_of_blocks()[:, blocks], loaded[:, blocks])
    owner.engine.stop()
