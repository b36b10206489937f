"""A real server for the connector's tests, and what stores KV in it and finds it there."""

import json
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from cachetier.client import Client
from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import KVLayout, Shard
from cachetier.core.messages import Match, MatchReply
from cachetier_connector.arena_cache import ArenaCache
from cachetier_connector.copy_base import CopyEngine
from cachetier_connector.copy_cpu import CpuCopyEngine, as_integers
from cachetier_connector.link import ServerLink
from cachetier_connector.plan import LoadOp, StoreOp, chunks_to_load, tokens_to_bytes
from cachetier_connector.storer import Storer
from tests.service.running import RunningServer

CHUNK, BLOCK = 64, 32
HEADS, LAYERS, HEAD_SIZE = 2, 2, 32
LAYOUT = KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, row_bytes=4 * HEAD_SIZE)
WHOLE = [LAYOUT.whole()]
HALVES = [Shard(0, 1, 0, 2), Shard(1, 2, 0, 2)]
TIMEOUT_S = 5.0


def identity(weights: str = "w") -> ModelIdentity:
    return ModelIdentity(
        model="tiny", weights=weights, kv_dtype="bfloat16", attention="full", num_layers=LAYERS, num_kv_heads=HEADS,
        k_head_size=HEAD_SIZE, v_head_size=HEAD_SIZE,
    )  # fmt: skip


def tokens_of(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(32_000) for _ in range(count)]


def connect(server: RunningServer, name: str = "test") -> ServerLink:
    link = ServerLink(name, "engine", lambda: server.socket_path)
    link.connect()
    return link


def stats_of(server: RunningServer) -> dict[str, Any]:
    client = Client(server.socket_path)
    try:
        stats: dict[str, Any] = json.loads(client.get("/v1/stats", TIMEOUT_S))
        return stats
    finally:
        client.close()


def eventually(condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
    """Return what `condition` says once it is true."""
    deadline_s = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.005)
    return result


class Blocks:
    """Paged blocks of one rank with the copy engine that serves them; filled with random bits."""

    def __init__(
        self,
        shard: Shard = WHOLE[0],
        num_blocks: int = 64,
        seed: int = 0,
        engine_type: type[CpuCopyEngine] = CpuCopyEngine,
    ) -> None:
        heads = shard.head_end - shard.head_start
        generator = torch.Generator().manual_seed(seed)
        shape = (num_blocks, heads, BLOCK, 2 * HEAD_SIZE)
        self.caches = [
            torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator).view(torch.bfloat16)
            for _ in range(shard.layer_start, shard.layer_end)
        ]
        in_order = torch.arange(BLOCK * HEAD_SIZE).view(BLOCK, HEAD_SIZE)
        self.engine = engine_type(self.caches, (in_order, in_order), LAYOUT, shard)

    def rows(self, blocks: list[int], start: int, end: int) -> torch.Tensor:
        """Return the KV of tokens `[start, end)` of a request with these blocks: `[layers, heads, tokens, ...]`."""
        layers = torch.stack([as_integers(cache)[blocks] for cache in self.caches])  # [layers, blocks, heads, ...]
        whole = layers.view(*layers.shape[:3], 2, BLOCK, HEAD_SIZE).permute(0, 2, 1, 4, 3, 5)
        return whole.reshape(*whole.shape[:2], -1, 2, HEAD_SIZE)[:, :, start:end]


def store_op(namespace: bytes, tokens: list[int], blocks: list[int], **changes: Any) -> StoreOp:
    """Return the op that stores all of `tokens`, which start a chain."""
    fields: dict[str, Any] = {
        "request_id": "r", "namespace": namespace, "salt": "", "parent": b"", "chunk_tokens": CHUNK, "position": 0,
        "tokens": tokens_to_bytes(tokens), "extras": [], "block_ids": blocks,
    }  # fmt: skip
    return StoreOp(**(fields | changes))


def blocks_for(num_tokens: int, seed: int = 0) -> list[int]:
    """Return a shuffled block table."""
    return random.Random(seed).sample(range(64), -(-num_tokens // BLOCK))


class Tier:
    """A server, a session with it, and the namespace of the tiny model."""

    def __init__(self, server: RunningServer, weights: str = "w") -> None:
        self.server, self.link = server, connect(server)
        namespace = self.link.namespace(identity(weights), [LAYOUT], TIMEOUT_S)
        assert namespace is not None
        self.namespace, self.arenas = namespace, ArenaCache(lambda arena: None)

    def storer(self, engine: CopyEngine, tiling: list[Shard] = WHOLE, shard: int = 0, **settings: Any) -> Storer:
        """Return a storer with a link of its own."""
        link = connect(self.server, f"storer {shard}")
        return Storer(
            engine, link, tiling, shard, self.arenas, **({"staging_bytes": 1 << 24, "deadline_s": 1.0} | settings)
        )

    def store(self, tokens: list[int], tiling: list[Shard] = WHOLE, seed: int = 0) -> torch.Tensor:
        """Store random KV for all complete chunks of `tokens`, each rank its shard; return the rows of all ranks."""
        num_chunks, blocks, storers = len(tokens) // CHUNK, blocks_for(len(tokens), seed), []
        end, before = num_chunks * CHUNK, stats_of(self.server)["tokens"]["stored"]
        rows = torch.zeros(LAYERS, HEADS, end, 2, HEAD_SIZE, dtype=torch.int16)
        for number, shard in enumerate(tiling):
            paged = Blocks(shard, seed=seed + number)
            storers.append(self.storer(paged.engine, tiling, number))
            storers[-1].submit(store_op(self.namespace, tokens[:end], blocks))
            rows[shard.layer_start : shard.layer_end, shard.head_start : shard.head_end] = paged.rows(blocks, 0, end)
        eventually(lambda: stats_of(self.server)["tokens"]["stored"] == before + end)
        for storer in storers:  # a session that ends takes along what it has not committed
            storer.stop()
        return rows

    def match(self, tokens: list[int], **fields: Any) -> MatchReply:
        """Match `tokens` with a lease."""
        reply: MatchReply = self.link.call(
            lambda session: Match(session=session, namespace=self.namespace, tokens=tokens_to_bytes(tokens), **fields),
            TIMEOUT_S,
        )
        return reply

    def load_op(self, reply: MatchReply, start: int, end: int, blocks: list[int], name: str = "r") -> LoadOp:
        """Return the op that loads tokens `[start, end)` of what `reply` found."""
        first, chunks = chunks_to_load(reply, start, end, CHUNK)
        server = self.link.server
        assert server is not None
        return LoadOp(
            request_id=name, start=start, end=end, chunk_tokens=CHUNK, first_chunk=first, chunks=chunks,
            tilings=reply.tilings, block_ids=blocks, arena_path=server.arena_path, instance=server.instance,
        )  # fmt: skip
