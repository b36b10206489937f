"""A pool's life with a real server: offered, filled by a load, read by another engine, gone with its owner."""

import time

import pytest
import torch

from cachetier.core.messages import TIER_GPU, TIER_HOST, LeaseUse, Release
from cachetier_connector import pool_keeper
from cachetier_connector.cuda import copy_cuda, staged_load
from cachetier_connector.cuda.copy_cuda import StagedCopyEngine
from cachetier_connector.loader import Loader
from cachetier_connector.plan import chunks_to_load
from tests.connector.cuda import plain_kernels
from tests.connector.cuda.host_device import HostDevice
from tests.connector.servers import (
    BLOCK,
    CHUNK,
    HEAD_SIZE,
    HEADS,
    LAYERS,
    LAYOUT,
    TIMEOUT_S,
    WHOLE,
    blocks_for,
    eventually,
    stats_of,
    tokens_of,
)

NUM_CHUNKS = 3


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    monkeypatch.setattr(pool_keeper, "CHECK_INTERVAL_S", 0.05)
    for module in (copy_cuda, staged_load):
        for name, kernel in plain_kernels.of(module).items():
            monkeypatch.setattr(module, name, kernel)


class Worker:
    """One rank's copy engine with its threads, as the worker half puts them together."""

    def __init__(self, tier, peers: list[HostDevice], pool_bytes: int = 0) -> None:
        self.tier, self.host = tier, HostDevice()
        peers.append(self.host)
        self.host.peers = peers
        caches = [torch.zeros(64, HEADS, BLOCK, 2 * HEAD_SIZE, dtype=torch.bfloat16) for _ in range(LAYERS)]
        self.engine = StagedCopyEngine(
            self.host, caches, LAYOUT, WHOLE[0], staging_bytes=6 << 18, pool_bytes=pool_bytes, warm_up_tokens=CHUNK
        )
        self.storer = tier.storer(self.engine)
        self.corrupt: list[bytes] = []
        self.loader = Loader(
            self.engine, tier.arenas, stall_s=2.0, report_corrupt=self.corrupt.append,
            report_filled=self.storer.commit_pool,
        )  # fmt: skip

    def load(self, tokens: list[int]) -> bytes:
        """Match, load everything, release; return the tiers."""
        reply = self.tier.match(tokens, reads_pools=True)
        op = self.tier.load_op(reply, 0, NUM_CHUNKS * CHUNK, blocks_for(NUM_CHUNKS * CHUNK))
        _, chunks = chunks_to_load(reply, 0, NUM_CHUNKS * CHUNK, CHUNK)
        fields = {name: getattr(op, name) for name in op.__struct_fields__}
        self.loader.submit(type(op)(**fields | {"chunks": chunks, "pools": reply.pools, "fill": reply.fill}))
        eventually(self.loader.take_finished)
        assert self.loader.take_bad_blocks() == set()
        assert self.corrupt == []
        use = LeaseUse(lease=reply.lease, host_tokens=CHUNK, gpu_tokens=10**9)
        self.tier.link.call(lambda session: Release(session=session, uses=[use]), TIMEOUT_S)
        return reply.tiers

    def stop(self) -> None:
        self.loader.stop()
        self.storer.stop()


def test_a_pool_is_offered_filled_read_by_others_and_forgotten_with_its_owner(tier):
    peers: list[HostDevice] = []
    tokens = tokens_of(3, NUM_CHUNKS * CHUNK)
    tier.store(tokens)
    owner = Worker(tier, peers, pool_bytes=1 << 20)
    other = Worker(tier, peers)
    assert eventually(lambda: stats_of(tier.server)["bytes"]["gpu"]["limit"]) == (1 << 20)
    assert owner.load(tokens) == bytes([TIER_HOST]) * NUM_CHUNKS
    assert eventually(lambda: stats_of(tier.server)["chunks_gpu"] == NUM_CHUNKS)
    assert other.load(tokens) == bytes([TIER_GPU]) * NUM_CHUNKS
    assert stats_of(tier.server)["tokens"]["hit"]["gpu"] == NUM_CHUNKS * CHUNK
    assert len(other.host.opened) == 1, "it read the owner's memory"
    time.sleep(0.2)
    assert len(other.host.opened) == 1, "and keeps it open as long as the pool stands"
    owner.stop()
    assert eventually(lambda: stats_of(tier.server)["bytes"]["gpu"]["limit"] == 0)
    assert eventually(lambda: other.host.opened == []), "the server says that the pool is gone"
    assert other.load(tokens) == bytes([TIER_HOST]) * NUM_CHUNKS
    other.stop()


def test_a_new_session_offers_the_pool_again(tier):
    tokens = tokens_of(5, NUM_CHUNKS * CHUNK)
    tier.store(tokens)
    owner = Worker(tier, [], pool_bytes=1 << 20)
    assert eventually(lambda: stats_of(tier.server)["bytes"]["gpu"]["limit"])
    link, first = owner.storer._link, owner.storer._link.server
    owner.storer._jobs.put(link.close)  # as the breaker does
    assert eventually(lambda: link.server is not None and link.server is not first)
    assert eventually(lambda: stats_of(tier.server)["bytes"]["gpu"]["limit"])
    owner.load(tokens)
    assert eventually(lambda: stats_of(tier.server)["chunks_gpu"] == NUM_CHUNKS)
    owner.stop()


def test_a_load_that_fails_commits_what_it_has_so_that_the_frames_are_free(tier):
    """The frames would otherwise be kept for a lease time."""
    tokens = tokens_of(4, NUM_CHUNKS * CHUNK)
    tier.store(tokens)
    owner = Worker(tier, [], pool_bytes=1 << 20)
    eventually(lambda: stats_of(tier.server)["bytes"]["gpu"]["limit"])
    reply = tier.match(tokens, reads_pools=True)
    assert reply.fill
    op = tier.load_op(reply, 0, NUM_CHUNKS * CHUNK, blocks_for(NUM_CHUNKS * CHUNK))
    fields = {name: getattr(op, name) for name in op.__struct_fields__}
    owner.loader.submit(type(op)(**fields | {"fill": reply.fill, "arena_path": "/nowhere", "instance": "another"}))
    eventually(owner.loader.take_finished)
    again = eventually(lambda: _fill_of(tier, tokens))
    assert again != reply.fill, "the frames were free to be ordered again"
    owner.stop()


def _fill_of(tier, tokens: list[int]) -> int:
    return int(tier.match(tokens, reads_pools=True).fill)
