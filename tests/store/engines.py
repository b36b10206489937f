"""A stand-in for engines: it stores and loads prompts through a `Store` and checks every byte it gets back."""

import functools
import random
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

from cachetier.core.arena_format import STATE_BAD, STATE_READY
from cachetier.core.checksum import checksum_of, digests_match, page_digests
from cachetier.core.config import ServerConfig
from cachetier.core.keys import KEY_BYTES, ModelIdentity
from cachetier.core.layout import KVLayout, Shard, digests_offset, frame_bytes, num_pages
from cachetier.core.messages import (
    RESERVE_FILL,
    Commit,
    LeaseUse,
    Match,
    MatchReply,
    OpenSession,
    ReadsDirectly,
    RegisterNamespace,
    Release,
    Reserve,
    ReserveReply,
)
from cachetier.store.store import Store
from tests.store.chunks import CHUNK_TOKENS, LAYOUT

MIB = 1 << 20


def make_config(folder: object, **settings: object) -> ServerConfig:
    """Return a small configuration with its data directory in `folder`."""
    values = {"host_bytes": 4 * MIB, "disk_bytes": 32 * MIB, "chunk_tokens": CHUNK_TOKENS, "segment_bytes": MIB}
    return ServerConfig(data_dir=f"{folder}/data", socket="/tmp/unused.sock", **(values | settings))  # type: ignore[arg-type]


def tokens_of(*numbers: int) -> bytes:
    """Return one chunk of tokens for each number."""
    return b"".join(struct.pack("<i", number) * CHUNK_TOKENS for number in numbers)


@functools.lru_cache(1024)
def payload_of(key: bytes, shard: Shard, size: int) -> bytes:
    """Return the bytes that belong into the object `shard` of chunk `key`, whoever stores it."""
    return random.Random(xxhash.xxh64_intdigest(key + shard.pack())).randbytes(size)


def tiling_of(num_ranks: int, layout: KVLayout = LAYOUT) -> list[Shard]:
    """Return the tiling of an engine with tensor parallelism `num_ranks`."""
    step = layout.num_kv_heads // num_ranks
    return [Shard(n * step, (n + 1) * step, 0, layout.num_layers) for n in range(num_ranks)]


@dataclass
class Filled:
    """A reserve whose frames are filled and not yet committed."""

    session: int
    reply: ReserveReply
    checksums: list[int | None]


@dataclass
class Engine:
    """Ranks of one engine, with a session each. Not thread-safe."""

    store: Store
    name: str = "engine"
    num_ranks: int = 1
    model: str = "model"
    layout: KVLayout = LAYOUT
    sessions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tiling = tiling_of(self.num_ranks, self.layout)
        identity = ModelIdentity(
            model=self.model, weights="w", kv_dtype="bfloat16", attention="full", num_layers=4, num_kv_heads=2,
            k_head_size=8, v_head_size=8,
        )  # fmt: skip
        for rank in range(self.num_ranks):
            opened = self.store.open_session(OpenSession(client=f"worker {rank}", engine=self.name, pid=rank))
            self.sessions.append(opened.session)
        register = RegisterNamespace(session=self.sessions[0], identity=identity, layouts=[self.layout])
        self.namespace = self.store.register_namespace(register).namespace

    def frame(self, offset: int, size: int) -> memoryview:
        """Return a frame's bytes as an engine sees them."""
        return self.store._arena.frame(offset, size)

    def reserve(self, tokens: bytes, rank: int = 0, **settings: object) -> ReserveReply:
        """Reserve frames for one rank."""
        return self.store.reserve(
            Reserve(
                session=self.sessions[rank], namespace=self.namespace, tokens=tokens, tiling=self.tiling, shard=rank,
                **settings,  # type: ignore[arg-type]
            )
        )  # fmt: skip

    def fill(self, tokens: bytes, rank: int = 0, **settings: object) -> Filled:
        """Reserve and fill; `commit` makes it count."""
        reply = self.reserve(tokens, rank, **settings)
        keys = [reply.keys[at : at + KEY_BYTES] for at in range(0, len(reply.keys), KEY_BYTES)]
        keys = keys[len(keys) - len(reply.outcomes) :]
        to_fill = [key for key, outcome in zip(keys, reply.outcomes, strict=True) if outcome == RESERVE_FILL]
        shard = self.tiling[rank]
        size = self.layout.object_bytes(shard, CHUNK_TOKENS)
        checksums: list[int | None] = []
        for key, offset in zip(to_fill, reply.frames, strict=True):
            checksums.append(write_frame(self.frame(offset, frame_bytes(size)), payload_of(key, shard, size)))
        return Filled(self.sessions[rank], reply, checksums)

    def commit(self, filled: Filled) -> int:
        """Commit what `fill` filled."""
        if not filled.reply.lease:
            return 0
        commit = Commit(session=filled.session, lease=filled.reply.lease, checksums=filled.checksums)
        return self.store.commit(commit).accepted

    def put(self, tokens: bytes, **settings: object) -> ReserveReply:
        """Store a prompt with all ranks; return the first rank's reply."""
        filled = [self.fill(tokens, rank, **settings) for rank in range(self.num_ranks)]
        for one in filled:
            self.commit(one)
        return filled[0].reply

    def read_directly(self, bytes_per_s: float = 1e9) -> None:
        """Have all ranks say that they read segment files themselves (0: that they do not)."""
        for session in self.sessions:
            said = ReadsDirectly(session=session, num_workers=self.num_ranks, bytes_per_s=bytes_per_s)
            self.store.reads_directly(said)

    def match(self, tokens: bytes, **settings: object) -> MatchReply:
        """Match a prompt."""
        message = Match(session=self.sessions[0], namespace=self.namespace, tokens=tokens, **settings)  # type: ignore[arg-type]
        return self.store.match(message)

    def check(self, reply: MatchReply, *, wait: bool = True) -> list[bool]:
        """Return which held chunks arrived; those that did must have the bytes that were stored."""
        frames, checksums = iter(reply.frames), iter(reply.checksums)
        arrived = []
        for number in range(reply.num_chunks):
            key = reply.keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
            is_there = True
            file = reply.segments[reply.segment_of[number] - 1] if reply.segments and reply.segment_of[number] else ""
            for shard in reply.tilings[reply.tiling_of[number]]:
                offset, checksum = next(frames), next(checksums)
                if not file:
                    is_there &= self.await_frame(offset) if wait else self.store._arena.state(offset) == STATE_READY
                if is_there:
                    size = self.layout.object_bytes(shard, CHUNK_TOKENS)
                    frame = frame_in(file, offset, size) if file else self.frame(offset, frame_bytes(size))
                    assert read_frame(frame, size, checksum) == payload_of(key, shard, size), (
                        "the bytes are not those that were stored"
                    )
            arrived.append(is_there)
        return arrived

    def await_frame(self, offset: int) -> bool:
        """Wait until a frame is filled; False: filling it failed."""
        deadline = time.monotonic() + 20
        while (state := self.store._arena.state(offset)) not in (STATE_READY, STATE_BAD):
            assert time.monotonic() < deadline, "a frame was never filled"
            time.sleep(0.0002)
        return state == STATE_READY

    def release(self, reply: MatchReply | ReserveReply, **tokens: int) -> None:
        """Give a lease back; `tokens` as in `LeaseUse`."""
        use = LeaseUse(lease=reply.lease, **tokens)
        self.store.release(Release(session=self.sessions[0], uses=[use]))

    def load(self, tokens: bytes, **settings: object) -> int:
        """Match, check and release; return how many chunks arrived."""
        reply = self.match(tokens, **settings)
        arrived = self.check(reply)
        self.release(reply)
        return arrived.index(False) if False in arrived else len(arrived)

    def close(self) -> None:
        """Close the sessions of all ranks."""
        for session in self.sessions:
            self.store.close_session(session)


def frame_in(path: str, offset: int, size: int) -> memoryview:
    """Return the frame of an object of `size` bytes that stands in a segment file."""
    with open(path, "rb") as file:
        file.seek(offset)
        return memoryview(file.read(frame_bytes(size)))


@functools.lru_cache(1024)
def digests_of(payload: bytes) -> bytes:
    """Return the page digests of an object."""
    return page_digests(memoryview(payload))


def write_frame(frame: memoryview, payload: bytes) -> int:
    """Write an object and its digests; return its checksum."""
    digests = digests_of(payload)
    start = digests_offset(len(payload))
    frame[: len(payload)] = payload
    frame[start : start + len(digests)] = digests
    return checksum_of(digests)


def read_frame(frame: memoryview, size: int, checksum: int) -> bytes | None:
    """Return the object in a frame, or None if it does not match its checksum."""
    start = digests_offset(size)
    digests = frame[start : start + num_pages(size) * 8]
    payload = bytes(frame[:size])
    is_good = digests_match(digests, size, checksum) and page_digests(memoryview(payload)) == digests
    return payload if is_good else None


def keys_of(reply: MatchReply | ReserveReply) -> Sequence[bytes]:
    """Return the chain keys of a reply."""
    return [reply.keys[at : at + KEY_BYTES] for at in range(0, len(reply.keys), KEY_BYTES)]
