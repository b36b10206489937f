"""A chunk as the store keeps it, and how a namespace's chunks are cut into objects.

Plain data without behaviour; the host table owns all `HostChunk`s and the store's lock guards them.
"""

from collections.abc import Callable
from enum import Enum

from cachetier.core.keys import ChainKey, NamespaceId
from cachetier.core.layout import KVLayout, Shard, frame_bytes

HITS_MAX = 3


class ChunkState(Enum):
    """Life of a chunk in host memory: PENDING or PROMOTING, then READY, then GONE."""

    PENDING = 1  # engines are filling its frames
    PROMOTING = 2  # its frames are being read from disk, or from the remote store
    READY = 3  # all objects are there
    GONE = 4  # in no table; its frames are freed when the last pin goes
    DIRECT = 5  # never in a table: a lease lets an engine read it on disk


class Tiling:
    """One way to cut the chunks of a namespace into objects, checked once and compared by identity.

    Attributes:
        group: number of the KV cache group.
        shards: the parts, one a rank.
        object_bytes: size of each part's object.
        frame_bytes: size of each part's frame (object and page digests).
        total_frame_bytes: their sum.
        frame_classes: what the arena rounds each of them up to.
        classes: the distinct ones among them, in order; chunks with equal `classes` compete for the same frames.
    """

    __slots__ = ("classes", "frame_bytes", "frame_classes", "group", "object_bytes", "shards", "total_frame_bytes")

    def __init__(
        self, layout: KVLayout, shards: tuple[Shard, ...], chunk_tokens: int, size_class: Callable[[int], int]
    ) -> None:
        self.group = layout.group
        self.shards = shards
        self.object_bytes = tuple(layout.object_bytes(shard, chunk_tokens) for shard in shards)
        self.frame_bytes = tuple(frame_bytes(size) for size in self.object_bytes)
        self.total_frame_bytes = sum(self.frame_bytes)
        self.frame_classes = tuple(size_class(size) for size in self.frame_bytes)
        self.classes = tuple(sorted(set(self.frame_classes)))


class PoolCopy:
    """A chunk's copy in device memory, there or under way.

    Attributes:
        chunk: whose; None when the chunk left before the copy was there.
        pool: id of the engine's pool.
        frame: number of its frame in every part of the pool.
        is_ready: whether it can be read.
        hits: matches, the one that ordered it among them, less the times it was spared; at most HITS_MAX.
    """

    __slots__ = ("chunk", "frame", "hits", "is_ready", "pool")

    def __init__(self, chunk: "HostChunk", pool: int, frame: int) -> None:
        self.chunk: HostChunk | None = chunk
        self.pool = pool
        self.frame = frame
        self.is_ready = False
        self.hits = 1


class HostChunk:
    """A chunk that has frames in the arena.

    Attributes:
        key: chain key.
        parent: chain key of the chunk before it; the root of its namespace and salt for the first.
        tenant: that root: whom the bytes are counted for.
        namespace: whose KV it is.
        position: its number in its chain.
        content: what `core.keys.contents_of` gave.
        tiling: how it is cut into objects.
        frames: arena offset of each object; None until its rank reserved it.
        checksums: checksum of each object; None until its rank committed it.
        engine: who is storing it, while PENDING.
        state: see `ChunkState`.
        pins: leases, transfers and look-ups that need its frames; above 0 it is never freed.
        hits: matches since it was last spared from eviction, at most HITS_MAX.
        age: number of its last entry into a queue; smaller is older.
        used_at_s: clock time of its last hit, or of its entry if there was none.
        is_durable: whether the disk tier has it too.
        is_offered: whether it waits to be written there.
        is_remote: while PROMOTING, whether it comes from the remote tier, and not from disk.
        queued_until_bytes: while PROMOTING, how much the promoter had been asked to read in all, up to this chunk.
        copy: its copy in the GPU tier, None while there is none.
        previous, next: its neighbours in the list of its parent's children.
    """

    __slots__ = (
        "age", "checksums", "content", "copy", "engine", "frames", "hits", "is_durable", "is_offered", "is_remote",
        "key", "namespace", "next", "parent", "pins", "position", "previous", "queued_until_bytes", "state", "tenant",
        "tiling", "used_at_s",
    )  # fmt: skip

    def __init__(
        self,
        key: ChainKey,
        parent: ChainKey,
        *,
        tenant: ChainKey,
        namespace: NamespaceId,
        position: int,
        content: bytes,
        tiling: Tiling,
        state: ChunkState,
        engine: str = "",
    ) -> None:
        self.key = key
        self.parent = parent
        self.tenant = tenant
        self.namespace = namespace
        self.position = position
        self.content = content
        self.tiling = tiling
        self.state = state
        self.engine = engine
        self.frames: list[int | None] = [None] * len(tiling.shards)
        self.checksums: list[int | None] = [None] * len(tiling.shards)
        self.pins = 0
        self.hits = 0
        self.age = 0
        self.used_at_s = 0.0
        self.is_durable = False
        self.is_offered = False
        self.is_remote = False
        self.queued_until_bytes = 0
        self.copy: PoolCopy | None = None
        self.previous: HostChunk | None = None
        self.next: HostChunk | None = None
