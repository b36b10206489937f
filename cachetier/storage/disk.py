"""The disk tier: chunks in segment files, found through the index.

Order of a group: payloads, `fdatasync`, index rows, `fdatasync`. What the index names is therefore on disk, and a crash
leaves at most records that nothing names. The segment table lags one group behind on purpose: at open the records
behind the newest segment's tail are read once more, at most two groups of them, and counted if the index names them.

Eviction takes the oldest segment whole. One segment file is always free: the chunks that were hit or are leased are
copied from the oldest segment into it before the oldest is given up, so at no moment is a chunk to keep not on disk.

Locking: `_write_lock` is held by `append` and by whoever removes rows. `_lock` guards, for moments only, the living
segments and how many reads are under way in each; a segment's file is not written again while one is.
"""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import msgspec

from cachetier.core.config import ServerConfig
from cachetier.core.keys import ChainKey, ModelIdentity, NamespaceId
from cachetier.core.layout import KVLayout, frame_bytes
from cachetier.storage.data_dir import disk_shape
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import Location, SegmentEntry
from cachetier.storage.namespaces import NamespaceTable, StoredNamespace
from cachetier.storage.records import DiskChunk, header_bytes_of, pack_body, pack_header, unpack_header
from cachetier.storage.recovery import open_index, recover_table
from cachetier.storage.segments import SegmentFiles, aligned_buffer

__all__ = ["ChunkToWrite", "DiskChunk", "DiskCounters", "DiskTier", "StoredNamespace"]

_BUFFERS_MAX = 1000  # of one pwritev; Linux takes 1024
_CARRY_BYTES = 8 << 20
_log = logging.getLogger(__name__)


class ChunkToWrite(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk for `append`: its description, and its whole frames (object and digests) in the order of its tiling.

    Frames start at page-aligned addresses; their sizes add up to `chunk.payload_bytes()`.
    """

    chunk: DiskChunk
    frames: list[memoryview]


class DiskCounters(msgspec.Struct):
    """What happened since `open`."""

    write_errors: int = 0  # groups that could not be written or made durable
    read_errors: int = 0  # reads that failed or met a record that is not the one looked for
    refused: int = 0  # chunks that were given to `append` and not stored
    dropped: int = 0  # chunks forgotten by `drop` or after a failed read
    carried: int = 0  # chunks that were copied out of a reclaimed segment
    evicted: int = 0  # chunks that went with a reclaimed segment or out of a full page of the index
    reclaimed_segments: int = 0
    bad_pages: int = 0  # slots of index pages that did not match their checksum


class _Item(msgspec.Struct, frozen=True):
    """A chunk on its way to disk."""

    number: int
    write: ChunkToWrite
    body: bytes

    @property
    def record_bytes(self) -> int:
        return header_bytes_of(len(self.body)) + self.write.chunk.payload_bytes()


class DiskTier:
    """Chunks on disk. `append` belongs to one thread; everything else runs on any thread, also at the same time."""

    def __init__(
        self,
        config: ServerConfig,
        files: FileLayer,
        is_hot: Callable[[ChainKey], bool],
        is_pinned: Callable[[ChainKey], bool],
    ) -> None:
        """See `open`."""
        self._files = files
        self._is_hot, self._is_pinned = is_hot, is_pinned
        self._counters = DiskCounters()
        self._write_lock = threading.Lock()
        self._lock = threading.Condition()
        self._reading: Counter[int] = Counter()
        self._condemned: set[ChainKey] = set()
        self.limit_bytes = config.disk_bytes
        settings = disk_shape(config)
        self._namespaces = NamespaceTable(config.data_dir, files)
        folder = os.path.join(config.data_dir, "segments")
        self._segments = SegmentFiles(folder, settings.segment_bytes, files)
        self._segments.open_existing(settings.num_segments)
        self._index = open_index(os.path.join(config.data_dir, "index"), settings, self._segments, files)
        self._table = recover_table(self._index, self._segments)
        self._slot_of = {entry.sequence: slot for slot, entry in enumerate(self._table) if entry.sequence}
        self._active = self._slot_of[max(self._slot_of)] if self._slot_of else None
        self._changed = set(range(len(self._table)))
        self._num_rows = self._count_rows()

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

        Raises:
            FormatError: another version wrote the directory.
            OSError: the disk fails or has no room for the index.
        """
        return cls(config, files or FileLayer(), is_hot, is_pinned)

    def lookup(self, key: ChainKey) -> DiskChunk | None:
        """Return what is known of the chunk `key`, or None. Does not wait for writers or for payloads."""
        location = self._find(key)
        return location.chunk if location else None

    def append(self, chunks: Sequence[ChunkToWrite]) -> list[bool]:
        """Write `chunks` and return, when they are durable and visible, which of them are stored.

        A chunk that is already stored counts as stored and is not written again. Never raises for a full or failing
        disk: what it cannot store it refuses.
        """
        with self._write_lock:
            self._remove_condemned()
            stored = [self._find(write.chunk.key) is not None for write in chunks]
            fresh = {w.chunk.key: _Item(n, w, pack_body(w.chunk)) for n, w in enumerate(chunks) if not stored[n]}
            for item in self._write_all(list(fresh.values())):
                stored[item.number] = True
            self._remove_condemned()
        self._counters.refused += stored.count(False)
        return stored

    def read(self, key: ChainKey, frames: Sequence[memoryview]) -> bool:
        """Fill `frames` (one per shard, whole frames, page-aligned) with the chunk; False: gone or unreadable.

        The bytes are what the disk gave: whoever uses them verifies digests and checksum. A chunk that cannot be read
        is dropped.
        """
        location = self._find(key)
        if location is None:
            return False
        with self._lock:
            slot = self._slot_of.get(location.sequence)
            if slot is None:
                return False
            self._reading[slot] += 1
        try:
            if self._read_record(slot, location, frames):
                return True
        except OSError as error:
            _log.warning("chunk %s cannot be read: %s", key.hex(), error)
        finally:
            with self._lock:
                self._reading[slot] -= 1
                self._lock.notify_all()
        self._counters.read_errors += 1
        self.drop([key])
        return False

    def drop(self, keys: Iterable[ChainKey]) -> int:
        """Forget chunks at once, and durably as soon as no group is being written; return how many were held."""
        held = {key for key in keys if self._find(key)}
        self._condemned |= held
        self._counters.dropped += len(held)
        if held and self._write_lock.acquire(blocking=False):
            try:
                self._remove_condemned()
            finally:
                self._write_lock.release()
        return len(held)

    def remember_namespace(self, namespace: NamespaceId, identity: ModelIdentity, layouts: list[KVLayout]) -> None:
        """Keep what is known of `namespace` across restarts; a disk that fails makes it forget."""
        try:
            self._namespaces.remember(StoredNamespace(identity, layouts))
        except OSError as error:
            _log.warning("namespace %s is not remembered: %s", namespace.hex(), error)

    def namespaces(self) -> dict[NamespaceId, StoredNamespace]:
        """Return all remembered namespaces."""
        return dict(self._namespaces.known)

    @property
    def counters(self) -> DiskCounters:
        """What happened since `open`."""
        self._counters.bad_pages = self._index.num_bad_pages
        return self._counters

    @property
    def num_chunks(self) -> int:
        """Chunks that are durable and visible."""
        return self._num_rows - len(self._condemned)

    @property
    def used_bytes(self) -> int:
        """Bytes taken on disk: the index and the segment files that exist, filled or not."""
        return self._index.file_bytes + self._segments.num_files * self._segments.segment_bytes

    def check_integrity(self) -> None:
        """Raise AssertionError if rows, segment table and files contradict each other."""
        with self._write_lock:
            self._remove_condemned()
            rows = Counter(location.sequence for location in self._index.rows() if location.sequence in self._slot_of)
            for slot, entry in enumerate(self._table):
                assert 0 <= entry.tail <= self._segments.segment_bytes
                if entry.sequence:
                    assert slot in self._segments, f"segment {slot} has no file"
                    assert self._slot_of[entry.sequence] == slot
                    assert rows[entry.sequence] == entry.num_rows, f"segment {slot}: {rows} rows, {entry}"
            assert any(not entry.sequence for entry in self._table), "no free segment"
            assert self.used_bytes <= self.limit_bytes
            assert self._num_rows == sum(rows.values())

    def close(self) -> None:
        """Write the books and close all files."""
        with self._write_lock:
            try:
                self._remove_condemned()
                self._index.stage_table(self._table, self._changed)
                self._index.commit()
            except OSError as error:
                _log.warning("the index could not be brought up to date: %s", error)
            self._index.close()
            self._segments.close()

    def _find(self, key: ChainKey) -> Location | None:
        if key in self._condemned:
            return None
        try:
            location = self._index.find(key)
        except OSError as error:
            self._counters.read_errors += 1
            _log.warning("the index cannot be read: %s", error)
            return None
        return location if location and location.sequence in self._slot_of else None

    def _read_record(self, slot: int, location: Location, frames: Sequence[memoryview]) -> bool:
        chunk = location.chunk
        if [len(frame) for frame in frames] != [frame_bytes(size) for size in chunk.object_bytes]:
            raise ValueError(f"the frames do not have the sizes of the objects {chunk.object_bytes}")
        scratch = self._segments.header_scratch(header_bytes_of(len(pack_body(chunk))))
        self._segments.read(slot, [scratch, *frames], location.offset)
        header = unpack_header(bytes(scratch))
        return header is not None and header.sequence == location.sequence and header.chunk == chunk

    def _write_all(self, items: list[_Item]) -> list[_Item]:
        """Write `items` in order, rolling over to new segments; return what is stored."""
        stored: list[_Item] = []
        batch: list[_Item] = []
        free = self._free_bytes()
        for item in items:
            if item.record_bytes > free:
                stored += self._write_batch(batch)
                batch, free = [], self._make_room(item.record_bytes)
                if item.record_bytes > free:
                    continue
            batch.append(item)
            free -= item.record_bytes
        return stored + self._write_batch(batch)

    def _free_bytes(self) -> int:
        return 0 if self._active is None else self._segments.segment_bytes - self._table[self._active].tail

    def _make_room(self, record_bytes: int) -> int:
        """Roll over until a record of `record_bytes` fits; return the bytes that the active segment has left."""
        if record_bytes <= self._segments.segment_bytes:
            for _ in self._table:
                if self._free_bytes() >= record_bytes:
                    break
                try:
                    self._roll_over()
                except OSError as error:
                    self._counters.write_errors += 1
                    _log.warning("no new segment: %s", error)
                    break
        return self._free_bytes()

    def _write_batch(self, items: list[_Item]) -> list[_Item]:
        """Write `items`, which fit, into the active segment; return those that are durable and visible."""
        if not items:
            return []
        assert self._active is not None
        slot, entry = self._active, self._table[self._active]
        before = msgspec.structs.replace(entry)
        try:
            self._write_payloads(slot, entry, items)
            stored = self._put_rows(entry, items)
            lagging = [*self._table[:slot], before, *self._table[slot + 1 :]]
            self._index.stage_table(lagging, self._changed | {slot})
            self._index.commit()
        except OSError as error:
            self._counters.write_errors += 1
            _log.warning("%d chunks were not stored: %s", len(items), error)
            return []
        self._changed = {slot}
        self._num_rows = self._count_rows()
        return stored

    def _write_payloads(self, slot: int, entry: SegmentEntry, items: list[_Item]) -> None:
        headers = aligned_buffer(sum(header_bytes_of(len(item.body)) for item in items))
        buffers: list[memoryview] = []
        start, offset, length = 0, entry.tail, 0
        for item in items:
            header = pack_header(item.body, item.write.chunk.payload_bytes(), entry.sequence)
            headers[start : start + len(header)] = header
            if len(buffers) + 1 + len(item.write.frames) > _BUFFERS_MAX:
                self._segments.write(slot, buffers, offset)
                offset, length, buffers = offset + length, 0, []
            buffers += [headers[start : start + len(header)], *item.write.frames]
            start, length = start + len(header), length + item.record_bytes
        self._segments.write(slot, buffers, offset)
        self._segments.sync(slot)

    def _put_rows(self, entry: SegmentEntry, items: list[_Item]) -> list[_Item]:
        stored = []
        for item in items:
            gone = self._index.put(item.write.chunk.key, entry.sequence, entry.tail, item.body, self._slot_of)
            entry.tail += item.record_bytes
            if gone is not None:
                stored.append(item)
                entry.num_rows += 1
                for sequence in gone:
                    self._forget_row(sequence)
        return stored

    def _forget_row(self, sequence: int) -> None:
        slot = self._slot_of[sequence]
        self._table[slot].num_rows -= 1
        self._changed.add(slot)

    def _roll_over(self) -> None:
        """Make a free segment the active one, and the oldest one free if it was the last."""
        free = [slot for slot, entry in enumerate(self._table) if not entry.sequence]
        slot = min(free, key=lambda s: s not in self._segments)
        with self._lock:
            self._lock.wait_for(lambda: not self._reading[slot])
        self._segments.activate(slot)
        sequence = max(time.time_ns(), max(self._slot_of, default=0) + 1)  # never used twice, whatever was lost
        self._table[slot] = SegmentEntry(sequence)
        self._index.stage_table(self._table, self._changed | {slot})
        try:
            self._index.commit()
        except OSError:
            self._table[slot] = SegmentEntry()
            raise
        with self._lock:
            self._slot_of = {**self._slot_of, sequence: slot}
        self._active = slot
        self._changed = {slot}
        if len(free) == 1:
            self._reclaim(self._slot_of[min(self._slot_of)])

    def _reclaim(self, slot: int) -> None:
        """Carry over what is to be kept of a segment, then free it."""
        entry = self._table[slot]
        try:
            self._carry_over(slot, entry)
        except OSError as error:
            self._counters.read_errors += 1
            _log.warning("segment %d cannot be read: %s", slot + 1, error)
        with self._lock:
            self._slot_of = {sequence: s for sequence, s in self._slot_of.items() if s != slot}
        self._counters.evicted += entry.num_rows
        self._counters.reclaimed_segments += 1
        self._table[slot] = SegmentEntry()
        self._changed.add(slot)
        self._num_rows = self._count_rows()

    def _carry_over(self, slot: int, entry: SegmentEntry) -> None:
        budget = self._segments.segment_bytes // 2
        batch: list[_Item] = []
        for offset, header in self._segments.headers(slot, entry.sequence, 0):
            key = header.chunk.key
            location = self._find(key)
            if location is None or (location.sequence, location.offset) != (entry.sequence, offset):
                continue
            is_kept = self._is_pinned(key) or (header.record_bytes <= budget and self._is_hot(key))
            if not is_kept or header.record_bytes > self._free_bytes() - sum(item.record_bytes for item in batch):
                continue
            budget -= header.record_bytes
            payload = aligned_buffer(header.record_bytes - header.header_bytes)
            self._segments.read(slot, [payload], offset + header.header_bytes)
            batch.append(_Item(0, ChunkToWrite(chunk=header.chunk, frames=[payload]), pack_body(header.chunk)))
            if sum(item.record_bytes for item in batch) >= _CARRY_BYTES:
                self._counters.carried += len(self._write_batch(batch))
                batch = []
        self._counters.carried += len(self._write_batch(batch))

    def _remove_condemned(self) -> None:
        """Remove the rows of condemned chunks; the caller holds the write lock."""
        condemned = list(self._condemned)
        try:
            for key in condemned:
                sequence = self._index.remove(key)
                if sequence in self._slot_of:
                    self._forget_row(sequence)
            self._index.commit()
        except OSError as error:
            self._counters.write_errors += 1
            _log.warning("dropped chunks stay in the index for now: %s", error)
            return
        self._num_rows = self._count_rows()
        self._condemned.difference_update(condemned)

    def _count_rows(self) -> int:
        return sum(entry.num_rows for entry in self._table if entry.sequence)
