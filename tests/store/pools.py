"""Device memory of engines, played with dictionaries: what a rank wrote into which frame of its part of a pool."""

from dataclasses import dataclass, field

from cachetier.core.keys import KEY_BYTES
from cachetier.core.messages import MatchReply
from cachetier.core.pool_messages import POOL_FILL, POOL_NONE, CommitPool, OfferPool
from tests.store.chunks import CHUNK_TOKENS
from tests.store.engines import Engine

FRAMES = 4


@dataclass
class Memory:
    """All device memory of a node: the key of the chunk in each frame, by handle; a killed process takes its own."""

    parts: dict[bytes, dict[int, bytes]] = field(default_factory=dict)
    num_made: int = 0

    def allocate(self) -> bytes:
        """Return the handle of new memory."""
        self.num_made += 1
        handle = b"memory %d" % self.num_made
        self.parts[handle] = {}
        return handle


class Pooled(Engine):
    """An engine whose ranks have pools."""

    def give_pools(self, memory: Memory, num_frames: int = FRAMES) -> None:
        """Allocate and offer the parts of all ranks."""
        self.memory, self.num_frames = memory, num_frames
        self.handles = [memory.allocate() for _ in range(self.num_ranks)]
        for rank in range(self.num_ranks):
            self.offer(rank)

    def offer(self, rank: int) -> None:
        """Offer one rank's part."""
        self.store.offer_pool(
            OfferPool(
                session=self.sessions[rank],
                tiling=self.tiling,
                shard=rank,
                object_bytes=self.layout.object_bytes(self.tiling[rank], CHUNK_TOKENS),
                num_frames=self.num_frames,
                device=f"GPU-{rank}",
                handle=self.handles[rank],
            )
        )

    def ask(self, tokens: bytes, **settings: object) -> MatchReply:
        """Match as an engine that can use pools."""
        return self.match(tokens, reads_pools=True, **settings)

    def write(self, reply: MatchReply, rank: int) -> None:
        """Copy the chunks that a match lists for it into one rank's part."""
        for key, frame in fills_of(reply):
            self.memory.parts[self.handles[rank]][frame] = key

    def commit_fill(self, reply: MatchReply, rank: int, frames: list[int] | None = None) -> None:
        """Commit what was written, or only `frames` of it."""
        good = [frame for _, frame in fills_of(reply)] if frames is None else frames
        self.store.commit_pool(CommitPool(session=self.sessions[rank], fill=reply.fill, frames=good))

    def warm(self, tokens: bytes) -> MatchReply:
        """Match a prompt, copy what is listed with all ranks and release; return the reply."""
        reply = self.ask(tokens)
        for rank in range(self.num_ranks):
            self.write(reply, rank)
            self.commit_fill(reply, rank)
        self.release(reply, host_tokens=1)
        return reply


def fills_of(reply: MatchReply) -> list[tuple[bytes, int]]:
    """Return key and frame of the chunks that the engine is to copy."""
    return [
        (reply.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES], frame)
        for number, (pool, frame) in enumerate(zip(reply.pool_of, reply.pool_frames, strict=True))
        if pool == POOL_FILL
    ]


def num_copies(reply: MatchReply, memory: Memory) -> int:
    """Return how many copies a match names, after looking into those whose memory still stands."""
    count = 0
    for number, (pool, frame) in enumerate(zip(reply.pool_of, reply.pool_frames, strict=True)):
        if pool in (POOL_NONE, POOL_FILL):
            continue
        count += 1
        for part in reply.pools[pool - 1].parts:
            if part.handle in memory.parts:
                key = reply.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
                assert memory.parts[part.handle].get(frame) == key, "a copy is not the chunk's"
    return count
