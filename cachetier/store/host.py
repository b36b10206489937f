"""The host table: every chunk that has frames in the arena, who counts for it, and what goes when room is needed.

Pure bookkeeping over the arena's allocator; the caller holds the store's lock.

Which chunk goes: the arena keeps frames of one size in slabs of their own, so only frames of the same class make room.
Chunks whose frames have the same classes form a set with an S3-FIFO of its own. When a set is older than the contents
of the emptiest slab of another class, its oldest chunk goes; when it is younger, that slab is taken over, so that
classes share the arena by age and a new model does not stay in the corner that was left when it came.

A chunk is never evicted before its resident descendants, which could not be found without it: the deepest one down
goes in its place. Whoever hit it hit its ancestors too, so it is at most as hot.
"""

import time
from collections import OrderedDict
from collections.abc import Callable

from cachetier.core.arena_format import STATE_BAD, STATE_READY
from cachetier.core.keys import ChainKey
from cachetier.core.messages import TIER_HOST
from cachetier.storage.arena import Arena
from cachetier.storage.records import DiskChunk
from cachetier.store.change_log import ChangeLog
from cachetier.store.chunk import ChunkState, HostChunk, Tiling
from cachetier.store.gpu_tier import GpuTier
from cachetier.store.s3fifo import S3Fifo

EVICTIONS_PER_FRAME_MAX = 256  # chunks of mixed classes may have to go before one frame of the right class is free
TENANT_STEPS_MAX = 2048
SLAB_EVERY = 16  # comparing slabs costs more than evicting a chunk, and ages change slowly


class Tenant:
    """What one namespace and salt hold: bytes, and its ready chunks, oldest first (kept under a quota only)."""

    __slots__ = ("chunks", "used_bytes")

    def __init__(self) -> None:
        self.used_bytes = 0
        self.chunks: OrderedDict[ChainKey, HostChunk] = OrderedDict()


class HostTable:
    """Chunks with frames.

    Conservation: every used frame of the arena belongs to exactly one chunk, in the table or gone and still pinned.
    """

    def __init__(
        self,
        arena: Arena,
        gpu: GpuTier,
        changes: ChangeLog,
        tenant_quota: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.chunks: dict[ChainKey, HostChunk] = {}
        self.num_ready = 0
        self.num_pending = 0
        self.num_host_only = 0
        self.num_evicted = 0
        self._arena = arena
        self._clock = clock
        self._gpu = gpu
        self._changes = changes
        self._quota_bytes = int(tenant_quota * arena.data_bytes) if tenant_quota < 1 else None
        self._tenants: dict[ChainKey, Tenant] = {}
        self._queues: dict[tuple[int, ...], S3Fifo] = {}
        self._children: dict[ChainKey, HostChunk] = {}
        self._owners: dict[int, tuple[HostChunk, int]] = {}
        self._ages = 0
        # The candidate of the last search and the parent of the leaf that was found: the next search for the same
        # candidate starts there, or a chain of n chunks would cost n * n / 2 steps to evict.
        self._descent: tuple[HostChunk | None, HostChunk | None] = (None, None)

    def add(self, chunk: HostChunk) -> None:
        """Enter a chunk that is about to be filled; its frames follow one by one (`allocate`)."""
        assert chunk.key not in self.chunks, "the chunk is in the table already"
        assert chunk.state in (ChunkState.PENDING, ChunkState.PROMOTING)
        self.chunks[chunk.key] = chunk
        self.num_pending += chunk.state is ChunkState.PENDING
        first = self._children.get(chunk.parent)
        chunk.next = first
        if first is not None:
            first.previous = chunk
        self._children[chunk.parent] = chunk

    def add_to_fill(
        self, row: DiskChunk, tenant: ChainKey, tiling: Tiling, *, is_remote: bool = False
    ) -> HostChunk | None:
        """Enter a PROMOTING chunk for what a slower tier says of one, with all its frames; None: there is no room."""
        chunk = HostChunk(
            row.key,
            row.parent,
            tenant=tenant,
            namespace=row.namespace,
            position=row.position,
            content=row.content,
            tiling=tiling,
            state=ChunkState.PROMOTING,
        )
        chunk.is_remote = is_remote
        chunk.checksums[:] = row.checksums
        self.add(chunk)
        for shard in range(len(tiling.shards)):
            if not self.allocate(chunk, shard):
                self.remove(chunk)
                return None
        return chunk

    def allocate(self, chunk: HostChunk, shard: int) -> bool:
        """Give the object `shard` of a chunk in the table its frame, evicting what must go; False: there is no room."""
        assert chunk.frames[shard] is None, "the object has a frame already"
        size = chunk.tiling.frame_bytes[shard]
        held = chunk.tiling.frame_classes[shard]
        if self._quota_bytes is not None and not self._make_tenant_room(chunk.tenant, held):
            return False
        offset = self._arena.allocate(size)
        for _ in range(EVICTIONS_PER_FRAME_MAX):
            if offset is not None or not self._make_room(size, held):
                break
            offset = self._arena.allocate(size)
        if offset is None:
            return False
        chunk.frames[shard] = offset
        self._owners[offset] = (chunk, held)
        tenant = self._tenants.get(chunk.tenant)
        if tenant is None:
            tenant = self._tenants[chunk.tenant] = Tenant()
        tenant.used_bytes += held
        return True

    def seal(self, chunk: HostChunk, *, is_durable: bool) -> None:
        """Make a chunk of the table READY: all its objects are there."""
        assert None not in chunk.frames, "an object has no frame"
        assert None not in chunk.checksums, "an object has no checksum"
        self.num_pending -= chunk.state is ChunkState.PENDING
        chunk.state = ChunkState.READY
        chunk.is_durable = is_durable
        self.num_ready += 1
        self.num_host_only += not is_durable
        for offset in chunk.frames:
            assert offset is not None
            self._arena.set_state(offset, STATE_READY)
        self._ages += 1
        chunk.age = self._ages
        chunk.used_at_s = self._clock()
        self._queue_of(chunk).add(chunk)
        self._changes.note_stored(chunk, TIER_HOST)
        if self._quota_bytes is not None:
            self._tenants[chunk.tenant].chunks[chunk.key] = chunk

    def set_durable(self, chunk: HostChunk, is_durable: bool) -> None:
        """Note whether the disk tier has a READY chunk."""
        assert chunk.state is ChunkState.READY
        self.num_host_only += chunk.is_durable - is_durable
        chunk.is_durable = is_durable

    def remove(self, chunk: HostChunk, *, evicted: bool = False) -> None:
        """Take a chunk out of the table; its frames are freed now, or when the last pin goes (`unpin`)."""
        del self.chunks[chunk.key]
        self._unlink(chunk)
        if chunk.state is ChunkState.READY:
            self.num_ready -= 1
            self.num_host_only -= not chunk.is_durable
            self._queue_of(chunk).remove(chunk, remember=evicted)
            self._tenants[chunk.tenant].chunks.pop(chunk.key, None)
            self._changes.note_gone(chunk.key, TIER_HOST)
        self.num_pending -= chunk.state is ChunkState.PENDING
        self.num_evicted += evicted
        chunk.state = ChunkState.GONE
        if not chunk.pins:
            self._free(chunk)

    def mark_bad(self, chunk: HostChunk) -> None:
        """Tell whoever watches the frames of a chunk that they will not be filled."""
        for offset in chunk.frames:
            if offset is not None:
                self._arena.set_state(offset, STATE_BAD)

    def unpin(self, chunk: HostChunk) -> None:
        """Give back one pin; the last one of a chunk that is gone frees its frames."""
        assert chunk.pins > 0, "a pin is given back twice"
        chunk.pins -= 1
        if not chunk.pins and chunk.state is ChunkState.GONE:
            self._free(chunk)

    def is_hot(self, key: ChainKey) -> bool:
        """Tell whether a chunk is READY here and was hit (any thread, without the lock: a guess at worst)."""
        chunk = self.chunks.get(key)
        if chunk is None or chunk.state is not ChunkState.READY:
            return False
        return chunk.hits > 0 or self._queue_of(chunk).is_main(chunk)

    def tenant_bytes(self, tenant: ChainKey) -> int:
        """Return how many bytes of frames the tenant holds."""
        known = self._tenants.get(tenant)
        return known.used_bytes if known else 0

    def with_frames(self) -> set[HostChunk]:
        """Return every chunk that has a frame, those that are gone and still pinned among them."""
        return {chunk for chunk, _ in self._owners.values()}

    def check_integrity(self) -> None:
        """Raise AssertionError if the books contradict each other or the arena."""
        ready = [chunk for chunk in self.chunks.values() if chunk.state is ChunkState.READY]
        assert len(ready) == self.num_ready == sum(len(queue) for queue in self._queues.values()), "ready chunks"
        assert sum(not chunk.is_durable for chunk in ready) == self.num_host_only, "chunks in host memory alone"
        assert sum(c.state is ChunkState.PENDING for c in self.chunks.values()) == self.num_pending, "pending chunks"
        for queue in self._queues.values():
            queue.check_integrity()
        frames = {offset for chunk in self.chunks.values() for offset in chunk.frames if offset is not None}
        gone = {chunk for chunk, _ in self._owners.values() if chunk.state is ChunkState.GONE}
        assert all(chunk.pins > 0 for chunk in gone), "a chunk is gone, unpinned and not freed"
        frames |= {offset for chunk in gone for offset in chunk.frames if offset is not None}
        assert frames == self._owners.keys(), "a frame without a chunk, or the reverse"
        assert sum(held for _, held in self._owners.values()) == self._arena.used_bytes, "bytes of frames"
        assert sum(tenant.used_bytes for tenant in self._tenants.values()) == self._arena.used_bytes, "tenants"
        self._check_children()
        self._arena.check_integrity()

    def _check_children(self) -> None:
        linked = 0
        for parent, first in self._children.items():
            assert first.previous is None, "the first child has a sibling before it"
            child: HostChunk | None = first
            while child is not None:
                assert child.parent == parent, "a child of another parent"
                assert self.chunks.get(child.key) is child, "a child that is not in the table"
                linked += 1
                child = child.next
        assert linked == len(self.chunks), "a chunk is not among its parent's children"

    def _queue_of(self, chunk: HostChunk) -> S3Fifo:
        queue = self._queues.get(chunk.tiling.classes)
        if queue is None:
            queue = self._queues[chunk.tiling.classes] = S3Fifo(self._clock)
        return queue

    def _make_room(self, size: int, held: int) -> bool:
        """Evict one chunk, or the contents of a slab, so that a frame of class `held` may become free."""
        queues = [queue for classes, queue in self._queues.items() if held in classes and len(queue)]
        queue = max(queues, key=len, default=None)
        oldest = queue.oldest() if queue else None
        is_time = oldest is None or (len(self._queues) > 1 and self.num_evicted % SLAB_EVERY == 0)
        if is_time and self._take_slab(size, oldest.age if oldest else self._ages + 1):
            return True
        victim = queue.victim(self._evictable) if queue else None
        if victim is not None:
            self.remove(victim, evicted=True)
        return victim is not None

    def _take_slab(self, size: int, age: int) -> bool:
        """Empty a slab of another class if its chunks are on average older than `age` and nobody uses them."""
        offsets = self._arena.slab_victim(size)
        if not offsets:
            return False
        chunks = {id(chunk): chunk for chunk, _ in (self._owners[offset] for offset in offsets)}.values()
        if any(chunk.pins or chunk.state is not ChunkState.READY for chunk in chunks):
            return False
        if sum(chunk.age for chunk in chunks) > age * len(chunks):
            return False
        for chunk in list(chunks):
            self.remove(chunk, evicted=True)
        return True

    def _make_tenant_room(self, tenant: ChainKey, held: int) -> bool:
        """Evict chunks of a tenant, oldest and not hit first, until `held` bytes more are within its quota."""
        assert self._quota_bytes is not None
        known = self._tenants.get(tenant)
        used = known.used_bytes if known else 0
        steps = 0
        while used + held > self._quota_bytes:
            if known is None or not known.chunks or steps >= min(4 * len(known.chunks), TENANT_STEPS_MAX):
                return False
            steps += 1
            key, chunk = next(iter(known.chunks.items()))
            known.chunks.move_to_end(key)
            if chunk.hits:
                chunk.hits -= 1
            elif (victim := self._evictable(chunk)) is not None:
                self.remove(victim, evicted=True)
                used = known.used_bytes
        return True

    def _evictable(self, chunk: HostChunk) -> HostChunk | None:
        """Return the deepest descendant of `chunk` (or itself) if it may go now."""
        if chunk.pins:
            return None
        first, start = self._descent
        leaf = chunk if first is not chunk or start is None or start.state is ChunkState.GONE else start
        while (child := self._children.get(leaf.key)) is not None:
            leaf = child
        self._descent = chunk, self.chunks.get(leaf.parent) if leaf is not chunk else None
        return None if leaf.pins or leaf.state is not ChunkState.READY else leaf

    def _unlink(self, chunk: HostChunk) -> None:
        if chunk.next is not None:
            chunk.next.previous = chunk.previous
        if chunk.previous is not None:
            chunk.previous.next = chunk.next
        elif chunk.next is not None:
            self._children[chunk.parent] = chunk.next
        else:
            del self._children[chunk.parent]
        chunk.previous = chunk.next = None

    def _free(self, chunk: HostChunk) -> None:
        self._gpu.forget(chunk)
        tenant = self._tenants[chunk.tenant] if any(f is not None for f in chunk.frames) else None
        for shard, offset in enumerate(chunk.frames):
            if offset is not None and tenant is not None:
                _, held = self._owners.pop(offset)
                self._arena.free(offset)
                tenant.used_bytes -= held
                chunk.frames[shard] = None
        if tenant is not None and not tenant.used_bytes:
            del self._tenants[chunk.tenant]
