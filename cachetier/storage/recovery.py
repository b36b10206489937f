"""Opening what a crash, a lost file or a changed size limit left behind."""

import os

from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import Index, IndexSettings, SegmentEntry, read_settings
from cachetier.storage.records import pack_body
from cachetier.storage.segments import SegmentFiles

INDEX_FILE = "chunks.idx"
_NEW_FILE = "chunks.new"


def open_index(folder: str, settings: IndexSettings, segments: SegmentFiles, files: FileLayer) -> Index:
    """Open the index in `folder`.

    It is made anew from the old one if its shape changed, or from the segments' record headers if it is gone.

    Raises:
        FormatError: another version wrote it.
        OSError: the disk is full or fails.
    """
    path = os.path.join(folder, INDEX_FILE)
    names = files.listdir(folder)
    if _NEW_FILE in names:
        files.unlink(os.path.join(folder, _NEW_FILE))
    found = read_settings(path, settings.chunk_tokens, files) if INDEX_FILE in names else None
    if INDEX_FILE in names and found in {None, settings}:
        return Index(path, settings, files)
    made = Index(os.path.join(folder, _NEW_FILE), settings, files)
    if found:
        old = Index(path, found, files)
        _copy(old, made)
        old.close()
    else:
        _rebuild(made, segments)
    files.rename(os.path.join(folder, _NEW_FILE), path)
    files.fsync_dir(folder)
    return made


def recover_table(index: Index, segments: SegmentFiles) -> list[SegmentEntry]:
    """Return the segment table, completed by what was written after it was.

    Raises:
        OSError: the disk fails.
    """
    table = index.read_table()
    for slot, entry in enumerate(table):
        if slot not in segments or entry.tail > segments.segment_bytes:
            table[slot] = SegmentEntry()
    slot, newest = max(enumerate(table), key=lambda pair: pair[1].sequence)
    if newest.sequence:
        _extend(index, segments, slot, newest)
    if all(entry.sequence for entry in table):  # killed while the oldest was being given up
        oldest = min(range(len(table)), key=lambda s: table[s].sequence)
        table[oldest] = SegmentEntry()
    return table


def _extend(index: Index, segments: SegmentFiles, slot: int, entry: SegmentEntry) -> None:
    for offset, header in segments.headers(slot, entry.sequence, entry.tail):
        location = index.find(header.chunk.key)
        entry.tail = offset + header.record_bytes
        entry.num_rows += location is not None and (location.sequence, location.offset) == (entry.sequence, offset)


def _copy(old: Index, made: Index) -> None:
    """Copy all living rows and the table entries that the new shape has room for."""
    table = old.read_table()[: made.settings.num_segments]
    table += [SegmentEntry()] * (made.settings.num_segments - len(table))
    alive = {entry.sequence: entry for entry in table if entry.sequence}
    for row in old.rows():
        if row.sequence in alive:
            gone = made.put(row.chunk.key, row.sequence, row.offset, pack_body(row.chunk), alive)
            for sequence in gone or ():
                alive[sequence].num_rows -= 1
    made.stage_table(table, set(range(len(table))))
    made.commit()


def _rebuild(made: Index, segments: SegmentFiles) -> None:
    """Read the record headers of all segments; of two records of one chunk the younger counts."""
    table = [SegmentEntry() for _ in range(made.settings.num_segments)]
    first = {slot: segments.read_header(slot, 0) for slot in range(len(table)) if slot in segments}
    found = sorted((header.sequence, slot) for slot, header in first.items() if header)
    alive = {sequence: table[slot] for sequence, slot in found}
    for sequence, slot in found:
        table[slot].sequence = sequence
        for offset, header in segments.headers(slot, sequence, 0):
            table[slot].tail = offset + header.record_bytes
            gone = made.put(header.chunk.key, sequence, offset, pack_body(header.chunk), alive)
            table[slot].num_rows += gone is not None
            for loser in gone or ():
                alive[loser].num_rows -= 1
    made.stage_table(table, set(range(len(table))))
    made.commit()
