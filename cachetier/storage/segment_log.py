"""The log: records appended to one segment after the other, the index rows that name them, and giving segments up.

Order of a group: payloads, `fdatasync`, index rows, `fdatasync`. What the index names is therefore on disk, and a crash
leaves at most records that nothing names. The segment table lags one group behind on purpose: at open the records
behind the newest segment's tail are read once more, at most two groups of them, and counted if the index names them.

Eviction takes the oldest segment whole. One segment file is always free: the chunks that were hit or are leased are
copied from the oldest segment into it before the oldest is given up, so at no moment is a chunk to keep not on disk.

Locking: `write`, `remove`, `close` and `check_integrity` belong to one thread at a time (DiskTier's write lock); `find`
and `read` run on any thread. `_lock` guards, for moments only, which segments are alive and how many reads are under
way in each; a segment's file is not written again while one is. Engines that read segment files themselves hold them
for longer than anybody should wait: the oldest segment that nobody holds is reclaimed, and where there is none and the
free one is held, chunks are refused.
"""

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from cachetier.core.keys import ChainKey
from cachetier.storage.disk_counters import DiskCounters
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import IndexSettings, Location, SegmentEntry
from cachetier.storage.record_reads import BUFFERS_MAX, HeldRecord, Run, read_run
from cachetier.storage.records import DiskChunk, header_bytes_of, pack_body, pack_header
from cachetier.storage.recovery import open_index, recover_table
from cachetier.storage.segments import SegmentFiles, aligned_buffer

_CARRY_BYTES = 8 << 20
_log = logging.getLogger(__name__)


class ChunkToWrite(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk for `append`: its description, and its whole frames (object and digests) in the order of its tiling.

    Frames start at page-aligned addresses; their sizes add up to `chunk.payload_bytes()`.
    """

    chunk: DiskChunk
    frames: list[memoryview]


class _Item(msgspec.Struct, frozen=True):
    """A chunk on its way to disk."""

    write: ChunkToWrite
    body: bytes
    header_bytes: int
    payload_bytes: int

    @property
    def record_bytes(self) -> int:
        return self.header_bytes + self.payload_bytes


def _make_item(write: ChunkToWrite) -> _Item:
    body = pack_body(write.chunk)
    return _Item(write, body, header_bytes_of(len(body)), write.chunk.payload_bytes())


class SegmentLog:
    """Segments, segment table and index together.

    Attributes:
        folder: of the segment files.
        num_rows: chunks that are durable and visible; a crash in the middle of a commit may leave the count off by
            the rows that the commit removed, until their segment is reclaimed.
        counters: what happened since it was opened.
    """

    def __init__(
        self,
        folder: str,
        settings: IndexSettings,
        files: FileLayer,
        is_hot: Callable[[ChainKey], bool],
        is_pinned: Callable[[ChainKey], bool],
    ) -> None:
        """Open and recover what lies in `folder`.

        Raises:
            FormatError: another version wrote it.
            OSError: the disk fails or has no room for the index.
        """
        self.counters = DiskCounters()
        self._is_hot, self._is_pinned = is_hot, is_pinned
        self.folder = os.path.join(folder, "segments")
        self._segments = SegmentFiles(self.folder, settings.segment_bytes, files)
        self._segments.open_existing(settings.num_segments)
        self._index = open_index(os.path.join(folder, "index"), settings, self._segments, files)
        self._table = recover_table(self._index, self._segments)
        self._slot_of = {entry.sequence: slot for slot, entry in enumerate(self._table) if entry.sequence}
        self._active = self._slot_of[max(self._slot_of)] if self._slot_of else None
        stored = enumerate(self._index.read_table())
        self._changed = {slot for slot, entry in stored if entry != self._table[slot]}  # the index has yet to learn it
        self._lock = threading.Condition()
        self._reading: Counter[int] = Counter()
        self._held: Counter[int] = Counter()
        self._lost: list[ChainKey] = []
        self.num_rows = self._count_rows()

    def find(self, key: ChainKey) -> Location | None:
        """Return where the chunk `key` lies; a disk that fails makes it a miss."""
        try:
            location = self._index.find(key)
        except OSError as error:
            self.counters.read_errors += 1
            _log.warning("the index cannot be read: %s", error)
            return None
        return location if location and location.sequence in self._slot_of else None

    def read_run(self, run: Run) -> list[bool | None]:
        """Fill the frames of a run's chunks; False: it cannot be read; None: its segment is gone."""
        with self._lock:
            slot = self._slot_of.get(run[0].location.sequence)
            if slot is None:
                return [None] * len(run)
            self._reading[slot] += 1
        try:
            outcomes = read_run(self._segments, slot, run)
        except OSError as error:
            if len(run) > 1:  # one bad sector must not cost its neighbours
                return [self.read_run([read])[0] for read in run]
            _log.warning("chunk %s cannot be read: %s", run[0].location.chunk.key.hex(), error)
            outcomes = [False]
        finally:
            with self._lock:
                self._reading[slot] -= 1
                if not self._reading[slot]:
                    self._lock.notify_all()
        for read, is_good in zip(run, outcomes, strict=True):
            if not is_good:
                _log.warning("the record of chunk %s is not what the index says", read.location.chunk.key.hex())
                self.counters.read_errors += 1
        return list(outcomes)

    def hold(self, location: Location) -> HeldRecord | None:
        """Say where the record at `location` lies, and let nothing be written there until `let_go`; None: it is gone.

        What is held may be reclaimed: its rows go, or move, and its bytes stay.
        """
        with self._lock:
            slot = self._slot_of.get(location.sequence)
            if slot is None:
                return None
            self._held[slot] += 1
        return HeldRecord(slot, self._segments.path(slot), location.offset + header_bytes_of(len(location.body)))

    def let_go(self, record: HeldRecord) -> None:
        """End a `hold`."""
        with self._lock:
            self._held[record.slot] -= 1

    def write(self, chunks: Sequence[ChunkToWrite]) -> list[bool]:
        """Write the chunks that are not stored yet; return which of them are durable and visible now."""
        places: dict[ChainKey, int] = {}  # sequence number of the segment where a durable row points
        batch: dict[ChainKey, _Item] = {}
        try:
            self._index.commit()  # what an earlier failure left staged is not durable yet
            held = [self._index.place(chunk.chunk.key) for chunk in chunks]
        except OSError as error:
            self.counters.write_errors += 1
            _log.warning("%d chunks were not stored: %s", len(chunks), error)
            return [False] * len(chunks)
        free = self._free_bytes()
        for chunk, place in zip(chunks, held, strict=True):
            key = chunk.chunk.key
            if place in self._slot_of:
                places[key] = place
            if key in batch or key in places:
                continue
            item = _make_item(chunk)
            if item.record_bytes > free:
                places |= self._write_batch(batch)
                batch, free = {}, self._make_room(item.record_bytes)
            if item.record_bytes <= free:
                batch[key] = item
                free -= item.record_bytes
        places |= self._write_batch(batch)
        return [places.get(chunk.chunk.key) in self._slot_of for chunk in chunks]

    def remove(self, keys: Iterable[ChainKey]) -> None:
        """Remove rows, durably.

        Raises:
            OSError: the disk fails; the rows may still be there.
        """
        for key in keys:
            sequence = self._index.remove(key)
            if sequence in self._slot_of:
                self._forget_row(sequence)
        if self._changed:
            self._index.stage_table(self._table, self._changed)
        self._index.commit()
        self._changed = set()
        self.num_rows = self._count_rows()

    def chunks(self) -> Iterator[DiskChunk]:
        """Yield all chunks that are durable and visible, on any thread; those written meanwhile perhaps."""
        return (row.chunk for row in self._index.rows() if row.sequence in self._slot_of)

    def take_lost(self) -> list[ChainKey]:
        """Return the chunks that lost their rows to newer ones since the last call; some may be stored again."""
        lost, self._lost = self._lost + self._index.take_displaced(), []
        return lost

    @property
    def num_held(self) -> int:
        """How many holds have not ended."""
        return self._held.total()

    @property
    def is_settled(self) -> bool:
        """Whether nothing that an earlier failure left waits for the next commit."""
        return self._index.is_settled

    @property
    def num_bad_pages(self) -> int:
        """Slots of index pages that did not match their checksum."""
        return self._index.num_bad_pages

    @property
    def used_bytes(self) -> int:
        """Bytes taken on disk: the index and the segment files that exist, filled or not."""
        return self._index.file_bytes + self._segments.num_files * self._segments.segment_bytes

    def check_integrity(self) -> None:
        """Raise AssertionError if rows, segment table and files contradict each other; nothing may be staged."""
        for row in self._index.rows():
            if row.sequence in self._slot_of:
                size = header_bytes_of(len(pack_body(row.chunk))) + row.chunk.payload_bytes()
                assert row.offset + size <= self._table[self._slot_of[row.sequence]].tail, f"{row} is behind its tail"
        for slot, entry in enumerate(self._table):
            assert 0 <= entry.tail <= self._segments.segment_bytes
            if entry.sequence:
                assert slot in self._segments, f"segment {slot} has no file"
                assert self._slot_of[entry.sequence] == slot
        assert any(not entry.sequence for entry in self._table), "no free segment"
        assert self.num_rows == self._count_rows()

    def close(self) -> None:
        """Write the books and close all files."""
        try:
            self._index.stage_table(self._table, self._changed)
            self._index.commit()
        except OSError as error:
            _log.warning("the segment table is not up to date: %s", error)
        self._index.close()
        self._segments.close()

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
                    self.counters.write_errors += 1
                    _log.warning("no new segment: %s", error)
                    break
        return self._free_bytes()

    def _write_batch(self, batch: dict[ChainKey, _Item]) -> dict[ChainKey, int]:
        """Write `batch`, which fits, into the active segment; return where the rows point that are durable now."""
        if not batch:
            return {}
        items = list(batch.values())
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
            self.counters.write_errors += 1
            _log.warning("%d chunks were not stored: %s", len(items), error)
            return {}
        self._changed = {slot}
        self.num_rows = self._count_rows()
        return dict.fromkeys(stored, entry.sequence)

    def _write_payloads(self, slot: int, entry: SegmentEntry, items: list[_Item]) -> None:
        headers = aligned_buffer(sum(item.header_bytes for item in items))
        buffers: list[memoryview] = []
        start, offset, length = 0, entry.tail, 0
        for item in items:
            header = pack_header(item.body, item.payload_bytes, entry.sequence)
            headers[start : start + len(header)] = header
            if len(buffers) + 1 + len(item.write.frames) > BUFFERS_MAX:
                self._segments.write(slot, buffers, offset)
                offset, length, buffers = offset + length, 0, []
            buffers += [headers[start : start + len(header)], *item.write.frames]
            start, length = start + len(header), length + item.record_bytes
        self._segments.write(slot, buffers, offset)
        self._segments.sync(slot)

    def _put_rows(self, entry: SegmentEntry, items: list[_Item]) -> list[ChainKey]:
        stored = []
        for item in items:
            gone = self._index.put(item.write.chunk.key, entry.sequence, entry.tail, item.body, self._slot_of)
            entry.tail += item.record_bytes
            if gone is not None:
                stored.append(item.write.chunk.key)
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
        slot = min(free, key=lambda s: (self._held[s] > 0, s not in self._segments))
        if self._held[slot]:  # it is no segment any more, so nobody new can hold it
            raise OSError(errno.EBUSY, "engines still read the segment that was given up last")
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
            self._index.stage_table(self._table, self._changed | {slot})  # no later commit may make it a segment
            raise
        with self._lock:
            self._slot_of = {**self._slot_of, sequence: slot}
        self._active = slot
        self._changed = {slot}
        if len(free) == 1:
            others = self._slot_of.keys() - {sequence}
            self._reclaim(self._slot_of[min(others, key=lambda s: (self._held[self._slot_of[s]] > 0, s))])

    def _reclaim(self, slot: int) -> None:
        """Carry over what is to be kept of a segment, then free it."""
        entry, there = self._table[slot], list[ChainKey]()
        try:
            self._carry_over(slot, entry, there)
        except OSError as error:
            self.counters.read_errors += 1
            _log.warning("segment %d cannot be read: %s", slot + 1, error)
        with self._lock:
            self._slot_of = {sequence: s for sequence, s in self._slot_of.items() if s != slot}
        self._lost += [key for key in there if self.find(key) is None]
        self.counters.evicted += entry.num_rows
        self.counters.reclaimed_segments += 1
        self._table[slot] = SegmentEntry()
        self._changed.add(slot)
        self.num_rows = self._count_rows()

    def _carry_over(self, slot: int, entry: SegmentEntry, there: list[ChainKey]) -> None:
        budget = self._segments.segment_bytes // 2
        batch: dict[ChainKey, _Item] = {}
        for offset, header in self._segments.headers(slot, entry.sequence, 0):
            key = header.chunk.key
            location = self.find(key)
            if location is None or (location.sequence, location.offset) != (entry.sequence, offset):
                continue
            there.append(key)
            is_kept = self._is_pinned(key) or (header.record_bytes <= budget and self._is_hot(key))
            if not is_kept or header.record_bytes > self._free_bytes() - sum(
                item.record_bytes for item in batch.values()
            ):
                continue
            budget -= header.record_bytes
            payload = aligned_buffer(header.record_bytes - header.header_bytes)
            self._segments.read(slot, [payload], offset + header.header_bytes)
            batch[key] = _make_item(ChunkToWrite(chunk=header.chunk, frames=[payload]))
            if sum(item.record_bytes for item in batch.values()) >= _CARRY_BYTES:
                self.counters.carried += len(self._write_batch(batch))
                batch = {}
        self.counters.carried += len(self._write_batch(batch))

    def _count_rows(self) -> int:
        return sum(entry.num_rows for entry in self._table if entry.sequence)
