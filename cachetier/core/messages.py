"""The messages between engines and the server: msgpack bodies of `POST /v1/...`, one request and one reply each.

Every struct refuses unknown fields. Bulk values travel packed: tokens as little-endian int32, chain keys as 16 bytes
each, one after the other. Chunks of a message are numbered from its first chunk; `position` is a chunk's number in
its chain. Sizes are limited before decoding (`MAX_BODY_BYTES`) and after it (`MAX_CHUNKS`).
"""

from cachetier.core.keys import ModelIdentity
from cachetier.core.layout import KVLayout, Shard
from cachetier.core.message_base import Message
from cachetier.core.pool_messages import Pool

API_VERSION = 1
MAX_CHUNKS = 1 << 16
MAX_BODY_BYTES = 64 << 20

# Where a chunk of a match lies, one byte a chunk in `MatchReply.tiers`.
TIER_HOST = 1
TIER_DISK = 2
TIER_GPU = 3  # in host memory too
TIER_REMOTE = 4
LATE_TIERS = (TIER_DISK, TIER_REMOTE)  # their chunks are on their way to host memory, see `MatchReply.ready_in_s`

# What became of a chunk of a reserve, one byte a chunk in `ReserveReply.outcomes`.
RESERVE_FILL = 0  # a frame is yours: fill it, then commit
RESERVE_PRESENT = 1  # already held
RESERVE_PENDING = 2  # another engine is storing it
RESERVE_DROPPED = 3  # no room: everything is leased, or the tenant's quota is used up


class OpenSession(Message, frozen=True):
    """Introduce a process (a scheduler half, a worker half, a tool). Leases belong to its session.

    Attributes:
        client: what it is, for people: "scheduler", "worker 0", "warm".
        engine: id that all processes of one engine share.
        pid: process id, for people.
    """

    client: str
    engine: str
    pid: int


class OpenSessionReply(Message, frozen=True):
    """What a process needs to know about the server.

    Attributes:
        session: id to name in every later request.
        instance: random id of this run of the server; another one means that all leases are gone.
        version: version of the server's package.
        chunk_tokens: tokens a chunk.
        arena_path: file to map.
        arena_bytes: its size.
        lease_ttl_s: a lease that is not renewed or released for so long expires.
        segments_dir: folder of the disk tier's segment files; empty: there is no disk tier.
    """

    session: int
    instance: str
    version: str
    chunk_tokens: int
    arena_path: str
    arena_bytes: int
    lease_ttl_s: float
    segments_dir: str = ""


class RegisterNamespace(Message, frozen=True):
    """Make a model's namespace known: who it is and what its chunks look like."""

    session: int
    identity: ModelIdentity
    layouts: list[KVLayout]


class RegisterNamespaceReply(Message, frozen=True):
    """The id by which later requests name the namespace."""

    namespace: bytes


class NamespaceInfo(Message, frozen=True):
    """A known namespace, as `GET /v1/namespaces` lists them in JSON; the one registered last is the last.

    Attributes:
        namespace: its id, hexadecimal.
    """

    namespace: str
    identity: ModelIdentity


class Wait(Message, frozen=True):
    """What a match adds that waits for chunks that follow the held ones: see `AwaitChunks`.

    Attributes:
        number: what the engine calls this wait; no two of its waits at a time have the same.
        for_promised: wait for chunks that another engine has promised, not only for those being stored.
        prefill: name of the engine that computes this prompt now: its promise is waited for, for a short time, if it
            is a producer that the server knows; empty: none.
    """

    number: int
    for_promised: bool = False
    prefill: str = ""


class Match(Message, frozen=True):
    """Ask how many leading chunks of a prompt are held, and lease them.

    Attributes:
        tokens: the prompt, little-endian int32.
        extras: (chunk number, digest of the multimodal inputs in it) for chunks that have any.
        salt: vLLM's cache_salt, or empty.
        lease: False only asks: nothing is leased, promoted or counted.
        reads_pools: whether the engine can use copies in device memory; else none is named or ordered.
        promise: the engine will compute the prompt and store what of it is not held; others may wait for that.
        wait: how the engine waits for chunks that follow the held ones, None: it does not. Only with `lease`.
    """

    session: int
    namespace: bytes
    tokens: bytes
    salt: str = ""
    extras: list[tuple[int, bytes]] = []
    lease: bool = True
    reads_pools: bool = False
    promise: bool = False
    wait: Wait | None = None


class MatchReply(Message, frozen=True):
    """What is held. Frames of chunks on disk are being filled: watch their state in the arena.

    Attributes:
        lease: id of the lease, 0 when nothing is held, nor waited for.
        num_chunks: leading chunks held completely.
        keys: chain keys of all complete chunks of the prompt, held or not.
        tiers: one byte a held chunk, TIER_GPU, TIER_HOST, TIER_DISK or TIER_REMOTE.
        tilings: the distinct ways in which the held chunks are cut into objects.
        tiling_of: one byte a held chunk, an index into `tilings`.
        frames: arena offsets of the objects, chunk by chunk in the order of its tiling; for a chunk in `segments`,
            offsets of its frames in that file.
        checksums: their checksums, in the same order.
        num_pending: how many chunks after the held ones are being stored now or are promised by another engine; if
            the match waits, how many it waits for.
        ready_in_s: for each chunk of LATE_TIERS, in how many seconds it should be in its frames, by what its tier gave
            lately and what it was asked for before; empty while its speed is not known.
        segments: paths of segment files that the engine is to read itself.
        segment_of: for each held chunk the number of its file in `segments`, from 1 on, 0: it is in the arena; empty
            where all would be 0.
        pools: pools that hold copies of some of the chunks.
        pool_of: one byte a held chunk, or empty where all would be POOL_NONE: the number of the pool in `pools`, from
            1 on, that has a copy of it; POOL_FILL: its objects are to be copied to the asking engine's own pool.
        pool_frames: the copy's frame number, for every held chunk (0 where there is none); empty if `pool_of` is.
        fill: what the commits of the copies with POOL_FILL name, 0 when there are none.
        promise: id of the promise that was made, 0: none was.
    """

    lease: int
    num_chunks: int
    keys: bytes
    tiers: bytes
    tilings: list[list[Shard]]
    tiling_of: bytes
    frames: list[int]
    checksums: list[int]
    num_pending: int
    ready_in_s: list[float] = []
    segments: list[str] = []
    segment_of: list[int] = []
    pools: list[Pool] = []
    pool_of: bytes = b""
    pool_frames: list[int] = []
    fill: int = 0
    promise: int = 0


class Trim(Message, frozen=True):
    """Say that only the first `num_chunks` chunks of a match's lease are still wanted: the rest is cheaper to compute.

    What is not wanted any more is not read from disk, and not waited for. An unknown (expired) lease is ignored.
    """

    session: int
    lease: int
    num_chunks: int


class LeaseUse(Message, frozen=True):
    """The end of a match's lease, and what it was good for.

    Attributes:
        lease: its id.
        host_tokens: tokens that were loaded from chunks with TIER_HOST and used.
        disk_tokens: the same for TIER_DISK.
        gpu_tokens: the same for TIER_GPU.
        remote_tokens: the same for TIER_REMOTE.
        waited_tokens: how many of all these were not held at the match, and waited for.
    """

    lease: int
    host_tokens: int = 0
    disk_tokens: int = 0
    gpu_tokens: int = 0
    remote_tokens: int = 0
    waited_tokens: int = 0


class Release(Message, frozen=True):
    """Give leases back. Unknown (expired) leases are ignored; a fill whose lease was of no use is given up."""

    session: int
    uses: list[LeaseUse]


class Renew(Message, frozen=True):
    """Extend leases by the server's lease time; also the sign of life of an idle session."""

    session: int
    leases: list[int]


class RenewReply(Message, frozen=True):
    """The leases that no longer exist; what they protected must not be used."""

    expired: list[int]


class Reserve(Message, frozen=True):
    """Ask for frames to fill with consecutive new chunks of one shard.

    Each rank of an engine reserves and commits its own shard; a chunk becomes visible when all shards of its tiling
    are committed.

    Attributes:
        parent: chain key of the chunk before `tokens`, or empty: the chain starts here.
        position: chunk number, in the chain, of the first chunk in `tokens`.
        tokens: complete chunks, little-endian int32.
        fill_from: chunks before this number only lead the chain to the ones to fill.
        tiling: how this engine cuts chunks into objects.
        shard: index of the caller's own part in `tiling`.
    """

    session: int
    namespace: bytes
    tokens: bytes
    tiling: list[Shard]
    shard: int
    position: int = 0
    parent: bytes = b""
    fill_from: int = 0
    salt: str = ""
    extras: list[tuple[int, bytes]] = []
    group: int = 0


class ReserveReply(Message, frozen=True):
    """Attributes:

    lease: id of the lease on the frames, 0 when there is nothing to fill.
    keys: chain keys of all chunks in the request.
    outcomes: RESERVE_..., one byte for each chunk from `fill_from` on.
    frames: arena offsets for the chunks with RESERVE_FILL, in order.
    """

    lease: int
    keys: bytes
    outcomes: bytes
    frames: list[int]


class Commit(Message, frozen=True):
    """Say that frames of a reserve's lease are filled (page digests included); the lease ends.

    Attributes:
        checksums: one for each frame of the lease, in order; None: this one was not filled, drop its chunk.
    """

    session: int
    lease: int
    checksums: list[int | None]


class CommitReply(Message, frozen=True):
    """How many of the chunks count as stored by this commit or will once the other ranks committed."""

    accepted: int


class Invalidate(Message, frozen=True):
    """Report chunks whose bytes did not match their checksum: they are dropped from every tier and counted."""

    session: int
    keys: bytes


class Report(Message, frozen=True):
    """Counters that only the engine's side knows, as differences since the last report.

    Attributes:
        stores_dropped: chunks that were not stored because storing would have queued for too long.
        loads_failed: requests whose load failed or missed its deadline, and which were recomputed.
        matches_late: requests that were computed since their match was not answered in time.
        prefill_tokens_per_s: how fast the engine computes the prompts that it loads; 0: no news.
        load_tokens_per_s: how fast it loads from host memory; 0: no news.
        requests_blended: requests whose load from the middle of their prompt succeeded.
        blend_loaded_tokens: tokens that they loaded from documents.
        blend_computed_tokens: tokens before the end of their last document that they computed nevertheless.
        blends_checked: blended requests whose prompts were computed again in full.
        blends_agreed: those of them for which both choose the same token.
        blends_kl: how far the full computation's distributions of the next token are from the blended ones, as the sum
            of their Kullback-Leibler divergences in nats.
    """

    session: int
    stores_dropped: int = 0
    loads_failed: int = 0
    matches_late: int = 0
    prefill_tokens_per_s: float = 0.0
    load_tokens_per_s: float = 0.0
    requests_blended: int = 0
    blend_loaded_tokens: int = 0
    blend_computed_tokens: int = 0
    blends_checked: int = 0
    blends_agreed: int = 0
    blends_kl: float = 0.0


class ReadsDirectly(Message, frozen=True):
    """Say that this worker reads chunks from segment files faster than from the arena after a promotion.

    Once all workers of its engine have said so, the engine's matches name segment files.

    Attributes:
        num_workers: how many workers the engine has.
        bytes_per_s: how fast it reads; 0: it does not (any more).
    """

    session: int
    num_workers: int
    bytes_per_s: float


class Empty(Message, frozen=True):
    """A reply that says nothing but that it was done."""
