"""The disk tier: chunks in segment files, found through the index."""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from cachetier.core.config import ServerConfig
from cachetier.core.keys import ChainKey, ModelIdentity, NamespaceId
from cachetier.core.layout import KVLayout, Shard
from cachetier.storage.file_layer import FileLayer


class DiskChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk as the index knows it.

    Attributes:
        key: its chain key.
        parent: the chain key before it.
        namespace: whose KV it is.
        position: its number in its chain.
        group: number of its KV cache group.
        content: what `core.keys.contents_of` gave.
        tiling: how the chunk is cut into objects.
        object_bytes: size of each object.
        checksums: checksum of each object.
    """

    key: ChainKey
    parent: ChainKey
    namespace: NamespaceId
    position: int
    group: int
    content: bytes
    tiling: tuple[Shard, ...]
    object_bytes: tuple[int, ...]
    checksums: tuple[int, ...]


class ChunkToWrite(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk for `append`: its description, and one whole frame (object and digests) for each shard.

    Each frame has `core.layout.frame_bytes(object_bytes)` bytes and starts at a page-aligned address.
    """

    chunk: DiskChunk
    frames: list[memoryview]


class DiskCounters(msgspec.Struct):
    """What happened since `open`."""

    write_errors: int = 0  # groups that could not be written or made durable
    read_errors: int = 0  # reads that failed or met a record that is not the one looked for
    refused: int = 0  # chunks that were given to `append` and not stored
    bad_rows: int = 0  # index rows or pages that did not match their checksum, now misses
    dropped: int = 0  # chunks given to `drop`
    carried: int = 0  # chunks that were copied out of a reclaimed segment
    evicted: int = 0  # chunks that went with a reclaimed segment
    reclaimed_segments: int = 0


class StoredNamespace(msgspec.Struct, frozen=True):
    """A namespace that the data directory remembers across restarts."""

    identity: ModelIdentity
    layouts: list[KVLayout]


class DiskTier:
    """Chunks on disk. `append` and `drop` from one thread at a time each; `lookup` and `read` from any."""

    counters: DiskCounters

    @classmethod
    def open(
        cls,
        config: ServerConfig,
        files: FileLayer | None = None,
        *,
        is_hot: Callable[[ChainKey], bool] = lambda key: False,
        is_pinned: Callable[[ChainKey], bool] = lambda key: False,
    ) -> "DiskTier":
        """Open the tier in `config.data_dir`, which the caller has locked (`DataDir.open`), and recover it.

        `append` reclaims the oldest segment when it needs room, on its caller's thread. It then asks `is_pinned`
        (a lease needs the chunk: always carried over) and `is_hot` (it was hit: carried over up to half a segment).
        Both must be safe to call from that thread and must not call the tier.
        """
        raise NotImplementedError

    def lookup(self, key: ChainKey) -> DiskChunk | None:
        """Return what is known of the chunk `key`, or None. Does not block on payloads."""
        raise NotImplementedError

    def append(self, chunks: Sequence[ChunkToWrite]) -> list[bool]:
        """Write `chunks` and return, when they are durable and visible, which of them are stored.

        A chunk that is already stored counts as stored and is not written again. Never raises for a full or failing disk.
        """
        raise NotImplementedError

    def read(self, key: ChainKey, frames: Sequence[memoryview]) -> bool:
        """Fill `frames` (one per shard, whole frames, page-aligned) with the chunk; False: gone or unreadable.

        The bytes are what the disk gave: whoever uses them verifies digests and checksum.
        """
        raise NotImplementedError

    def drop(self, keys: Iterable[ChainKey]) -> int:
        """Forget chunks, for good; return how many were held."""
        raise NotImplementedError

    def remember_namespace(self, namespace: NamespaceId, identity: ModelIdentity, layouts: list[KVLayout]) -> None:
        """Keep what is known of `namespace` across restarts."""
        raise NotImplementedError

    def namespaces(self) -> dict[NamespaceId, StoredNamespace]:
        """Return all remembered namespaces."""
        raise NotImplementedError

    @property
    def num_chunks(self) -> int:
        """Chunks that are durable and visible."""
        raise NotImplementedError

    @property
    def used_bytes(self) -> int:
        """Bytes in use on disk, the index included."""
        raise NotImplementedError

    @property
    def limit_bytes(self) -> int:
        """What `used_bytes` never passes."""
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Raise AssertionError if the books are wrong."""
        raise NotImplementedError

    def close(self) -> None:
        """Close all files."""
        raise NotImplementedError
