"""What to load and what to store: pure functions and values, without vllm, torch, threads or I/O.

The scheduler half makes a `StepPlan` in every step; vLLM carries it to the workers, which carry it out. Token ranges
are half-open and count from the start of the prompt; chunk numbers are positions in the chain.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import xxhash

from cachetier.core.keys import KEY_BYTES, TOKEN_BYTES
from cachetier.core.layout import Shard
from cachetier.core.messages import TIER_HOST, MatchReply
from cachetier.core.pool_messages import POOL_NONE, Pool


class ChunkSource(NamedTuple):
    """Where one chunk to load lies: its key, and arena offsets and checksums of its objects in tiling order.

    `segment`, if it is not 0, says that `frames` are offsets in a segment file: the load's `segments[segment - 1]`.

    `pool` and `pool_frame` say where it stands, or is to be copied to, in device memory: see `MatchReply.pool_of`.
    """

    key: bytes
    tiling: int
    frames: list[int]
    checksums: list[int]
    pool: int = POOL_NONE
    pool_frame: int = 0
    segment: int = 0


class HeldChunks(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive held chunks, packed as in `MatchReply`: the scheduler's thread only slices, a worker unpacks."""

    keys: bytes
    tiling_of: bytes
    frames: list[int]
    checksums: list[int]
    pool_of: bytes = b""
    pool_frames: list[int] = []
    segment_of: list[int] = []

    def unpack(self, tilings: Sequence[Sequence[Shard]]) -> list[ChunkSource]:
        """Return the chunks one by one."""
        sizes, offset, sources = [len(tiling) for tiling in tilings], 0, []
        for number, tiling in enumerate(self.tiling_of):
            until = offset + sizes[tiling]
            key = self.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
            pool = (self.pool_of[number], self.pool_frames[number]) if self.pool_of else (POOL_NONE, 0)
            segment = self.segment_of[number] if self.segment_of else 0
            frames, checksums = self.frames[offset:until], self.checksums[offset:until]
            sources.append(ChunkSource(key, tiling, frames, checksums, *pool, segment))
            offset = until
        return sources


class LoadOp(msgspec.Struct, frozen=True, kw_only=True):
    """Fill the paged blocks of one request with tokens `[start, end)`.

    Attributes:
        request_id: vLLM's id.
        start, end: tokens to write.
        chunk_tokens: tokens a chunk.
        first_chunk: position of `chunks[0]`; the chunks cover `[start, end)`.
        chunks: where they lie.
        tilings: the tilings that `chunks` refer to.
        block_ids: the request's block table from its first block on.
        arena_path, instance: the arena that the frames lie in.
        pools: the pools that `chunks` refer to.
        fill: what the commit of chunks that are copied to the own pool names, 0 when there are none.
        segments: the segment files that `chunks` refer to.
        patience_s: how long the load waits for frames that are still being filled, in all; None: as long as they come.
        shift: position of a token in the prompt minus its position in the chain of `chunks`; K is rotated by it.
        part: number among the loads of a request that is blended, None: it is not.
        is_last: with this load, and those before it, what the request loads is complete. One without chunks says that
            the rest is not to be had.
    """

    request_id: str
    start: int
    end: int
    chunk_tokens: int
    first_chunk: int
    chunks: HeldChunks
    tilings: list[list[Shard]]
    block_ids: list[int]
    arena_path: str
    instance: str
    pools: list[Pool] = []
    fill: int = 0
    segments: list[str] = []
    patience_s: float | None = None
    shift: int = 0
    part: int | None = None
    is_last: bool = True


class StoreOp(msgspec.Struct, frozen=True, kw_only=True):
    """Copy consecutive complete chunks of one request out of the paged blocks.

    Attributes:
        request_id: vLLM's id; the worker continues the chain of an earlier op with the same id.
        namespace, salt, extras: as in `Reserve`; the numbers in `extras` count from the first chunk of the op.
        parent: key of the chunk before, or empty: the chain starts here; None: continue this request's chain.
        chunk_tokens: tokens a chunk.
        position: chunk number of the first chunk.
        tokens: complete chunks, little-endian int32.
        block_ids: blocks that hold the tokens, from the one with the first token on.
    """

    request_id: str
    namespace: bytes
    salt: str
    parent: bytes | None
    chunk_tokens: int
    position: int
    tokens: bytes
    extras: list[tuple[int, bytes]]
    block_ids: list[int]


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Which tokens a blend pass is to choose itself, by the attention that the prompt's last tokens pay them.

    Attributes:
        loads: (start, end) of the loaded tokens to choose from.
        budget: share of them to choose.
        computed: (start, end) of the runs after the first of them that passes have computed by then: they are computed
            again with the chosen ones. The last of them, after the last document, pays the attention.
    """

    loads: list[tuple[int, int]]
    budget: float
    computed: list[tuple[int, int]]


class BlendOp(msgspec.Struct, frozen=True, kw_only=True):
    """Compute runs of one request whose loads have ended.

    Attributes:
        request_id: vLLM's id.
        runs: (start, end) of each, ascending; a few steps may share a request's runs.
        first_token: position of the first of `tokens`.
        tokens: of the prompt, as far as the op needs them, little-endian int32.
        block_ids: the request's block table from its first block on.
        loaded_from: first token that was loaded or computed for it; what a failure spoils begins here.
        is_last: with this op the request's KV is complete.
        select: what to compute besides, once `runs` are computed.
    """

    request_id: str
    runs: list[tuple[int, int]]
    first_token: int
    tokens: bytes
    block_ids: list[int]
    loaded_from: int
    is_last: bool
    select: Selection | None = None


class CheckOp(msgspec.Struct, frozen=True, kw_only=True):
    """Compute tokens of a blended prompt again, in place: see `BlendGuard`.

    Attributes:
        request_id: vLLM's id.
        start: position of the first of `tokens`.
        tokens: to compute, little-endian int32.
        block_ids: the request's block table from its first block on.
        answer: what the last of them, the prompt's last one, tells of the next token: "blended" or "full", which is
            then compared with the former; empty: it is not the last one.
    """

    request_id: str
    start: int
    tokens: bytes
    block_ids: list[int]
    answer: str


class Verdict(NamedTuple):
    """What a check has found: the divergence of the full distribution from the blended one, in nats, and whether both
    have the same most likely token."""

    kl: float
    agrees: bool


class StepPlan(msgspec.Struct, kw_only=True):
    """What the workers do in one step.

    Attributes:
        step: its number, which the workers send back with the step's output.
        socket_path: the server's socket, empty while there is none.
        stores_before: from blocks that vLLM has already taken back: before the step's forward pass overwrites them.
        stores_after: from blocks that this step's forward pass completes.
        loads: started in the background.
        blends: computed in this step, together, on all ranks in this order.
        check: computed in this step on all ranks.
        preempted: requests whose blocks are others' from now on; no store that is still queued may read them.
        finished: requests whose chains are no longer needed.
        held: those of `finished` whose blocks vLLM keeps until every worker has reported that it reads them no more.
    """

    step: int = 0
    socket_path: str = ""
    stores_before: list[StoreOp] = []
    stores_after: list[StoreOp] = []
    loads: list[LoadOp] = []
    blends: list[BlendOp] = []
    check: CheckOp | None = None
    preempted: list[str] = []
    finished: list[str] = []
    held: list[str] = []


def tokens_to_bytes(tokens: Iterable[int]) -> bytes:
    """Return `tokens` as little-endian int32 (the byte order of every machine that vLLM runs on)."""
    packed = array("i", tokens)
    assert packed.itemsize == TOKEN_BYTES
    return packed.tobytes()


def loadable_end(num_held_chunks: int, chunk_tokens: int, num_tokens: int) -> int:
    """Return up to which token a hit can be loaded: never the last token, whose logits the engine must compute."""
    return max(0, min(num_held_chunks * chunk_tokens, num_tokens - 1))


def chunks_to_load(reply: MatchReply, start: int, end: int, chunk_tokens: int) -> tuple[int, HeldChunks]:
    """Return the position of the first chunk that tokens `[start, end)` touch, and where these chunks lie."""
    first, last = start // chunk_tokens, -(-end // chunk_tokens)
    sizes = [len(tiling) for tiling in reply.tilings]
    skip = sum(reply.tiling_of.count(tiling, 0, first) * size for tiling, size in enumerate(sizes))
    until = sum(reply.tiling_of.count(tiling, 0, last) * size for tiling, size in enumerate(sizes))
    return first, HeldChunks(
        reply.keys[first * KEY_BYTES : last * KEY_BYTES],
        reply.tiling_of[first:last],
        reply.frames[skip:until],
        reply.checksums[skip:until],
        reply.pool_of[first:last],
        reply.pool_frames[first:last],
        reply.segment_of[first:last],
    )


def split_by_tier(reply: MatchReply, start: int, end: int, chunk_tokens: int) -> dict[int, int]:
    """Return how many of the tokens `[start, end)` come from which tier; what is not held yet will be in memory."""
    if start >= end:
        return {}
    first, last = start // chunk_tokens, -(-end // chunk_tokens)
    tiers = reply.tiers[first:last].ljust(last - first, bytes([TIER_HOST]))
    counts = {tier: tiers.count(tier) * chunk_tokens for tier in set(tiers)}
    counts[tiers[0]] -= start - first * chunk_tokens
    counts[tiers[-1]] -= last * chunk_tokens - end
    return counts


def first_failed_token(block_ids: Sequence[int], bad_blocks: set[int], block_tokens: int) -> int | None:
    """Return the token at which the first of `bad_blocks` in the block table starts, or None if none is in it."""
    return next((index * block_tokens for index, block in enumerate(block_ids) if block in bad_blocks), None)


def extras_of(inputs: Iterable[tuple[str, int, int]], chunk_tokens: int) -> list[tuple[int, bytes]]:
    """Return the multimodal digests of the chunks that hold placeholders.

    Args:
        inputs: (hash of the input, first placeholder token, number of placeholder tokens) of every input.
        chunk_tokens: tokens a chunk.

    Returns:
        (chunk number, digest of every input in it and of where it stands in it), ascending.
    """
    hashers: dict[int, Any] = {}
    for digest, offset, length in sorted(inputs, key=lambda item: item[1]):
        for chunk in range(offset // chunk_tokens, -(-(offset + length) // chunk_tokens)):
            hasher = hashers.setdefault(chunk, xxhash.xxh3_128())
            hasher.update(f"{digest}@{offset - chunk * chunk_tokens}+{length};".encode())
    return [(chunk, hashers[chunk].digest()) for chunk in sorted(hashers)]


def tiling_for(num_layers: int, num_kv_heads: int, num_tp: int, layer_ranges: Sequence[tuple[int, int]]) -> list[Shard]:
    """Return how an engine with `num_tp` tensor-parallel ranks cuts a chunk, pipeline stage by pipeline stage.

    Where there are more ranks than heads, several ranks hold the same head and share one shard.
    """
    assert layer_ranges[-1][1] == num_layers
    num_shards = min(num_tp, num_kv_heads)
    heads = num_kv_heads // num_shards
    return [
        Shard(part * heads, (part + 1) * heads, first, end) for first, end in layer_ranges for part in range(num_shards)
    ]


def shard_of_rank(num_kv_heads: int, num_tp: int, tp_rank: int, pp_rank: int) -> tuple[int, bool]:
    """Return which shard of the engine's tiling a rank holds, and whether it is the rank that stores it."""
    num_shards = min(num_tp, num_kv_heads)
    replicas = num_tp // num_shards
    return pp_rank * num_shards + tp_rank // replicas, tp_rank % replicas == 0
