"""The index: where on disk each chunk lies, and what is known of it, in a hash table of checksummed pages.

Why not LMDB: it maps its file and follows the offsets in it. Of 1,000 bits flipped in the structure of an LMDB file,
two ended the process that used it with a signal, and 47 gave rows other bytes than were put (bench/index_faults.py). A
checksum in each row would notice the latter; the only check of a file against the former (`lmdb.verify`) reads all of
it. As many flips in the structure of this index did neither. Every lookup verifies the one page it reads; nothing has
to be checked, replayed or rebuilt at open; and a lookup costs the same at any size.

A key has two possible pages; it stands in the first unless that was getting full when it came. A row names its segment
by sequence number; a row whose segment is gone is dead, is never returned, and makes room for the next row in its page.
When a page is full of living rows, those of the oldest segments go: a cache may forget.

    page 0               settings: u32 format version, u64 bytes of this file at most, u64 bytes of a segment,
                         u32 segments, u32 tokens a chunk
    pages 1 to t         the segment table (169 entries a page of 4 KiB): u64 sequence number (0: free), u64 tail in
                         bytes, u64 living rows
    pages t+1 and later  buckets: u32 number of rows n; n chain keys of 16 bytes; n times u32 end of the row, counted
                         from the start of the first; the rows: u64 sequence number, u64 offset of the record in its
                         segment, body (records.py)

Locking: `find` and `rows` run on any thread; all else on one thread at a time (DiskTier's write lock).
"""

import struct
from collections.abc import Container, Iterator

import msgspec

from cachetier.core.errors import FormatError
from cachetier.core.keys import FORMAT_VERSION, KEY_BYTES, ChainKey
from cachetier.core.layout import PAGE_BYTES
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.pages import PAYLOAD_OFFSET, PageFile
from cachetier.storage.records import DiskChunk, unpack_body

_SETTINGS = struct.Struct("<IQQII")
_ENTRY = struct.Struct("<QQQ")
_ROW = struct.Struct("<QQ")
_COUNT = struct.Struct("<I")
_TWO_ENDS = struct.Struct("<II")
_FULL = 0.7  # share of a page from which on its rows' other pages are tried
_KEYS_AT = PAYLOAD_OFFSET + _COUNT.size


class IndexSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of an index file, fixed when it is made."""

    limit_bytes: int
    segment_bytes: int
    num_segments: int
    chunk_tokens: int

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: about ten rows fit."""
        return PAGE_BYTES * max(1, self.chunk_tokens // 64)

    @property
    def num_pages(self) -> int:
        """Pages of the file; each takes its size twice."""
        return self.limit_bytes // (2 * self.page_bytes)

    @property
    def entries_per_page(self) -> int:
        """Segments that one page of the segment table describes."""
        return (self.page_bytes - PAYLOAD_OFFSET) // _ENTRY.size

    @property
    def first_bucket(self) -> int:
        """Number of the first page that is a bucket."""
        return 1 + -(-self.num_segments // self.entries_per_page)

    def pack(self) -> bytes:
        """Return the payload of page 0."""
        return _SETTINGS.pack(
            FORMAT_VERSION, self.limit_bytes, self.segment_bytes, self.num_segments, self.chunk_tokens
        )


class SegmentEntry(msgspec.Struct):
    """What the segment table says about one segment file."""

    sequence: int = 0
    tail: int = 0
    num_rows: int = 0


class Location(msgspec.Struct, frozen=True):
    """A row: where a chunk's record lies, and the body that describes the chunk."""

    sequence: int
    offset: int
    body: bytes

    @property
    def chunk(self) -> DiskChunk:
        """The chunk, decoded anew."""
        return unpack_body(self.body, 0)


class Index:
    """Rows by chain key, and the segment table."""

    def __init__(self, path: str, settings: IndexSettings, files: FileLayer) -> None:
        """Open the index at `path`, which has this shape (`read_settings`), or make an empty one.

        Raises:
            OSError: the disk is full or fails.
        """
        self.settings = settings
        self._pages = PageFile(path, settings.num_pages, settings.page_bytes, files)
        self._first_bucket = settings.first_bucket
        self._num_buckets = settings.num_pages - settings.first_bucket
        self._capacity = settings.page_bytes - _KEYS_AT
        self._displaced: list[ChainKey] = []
        if self._pages.num_copies(0) == 0:
            for _ in range(2):  # both slots hold the settings: a flipped bit loses neither shape nor version
                self._pages.stage(0, settings.pack())
                self._pages.commit()

    @property
    def num_bad_pages(self) -> int:
        """Page slots that were found damaged since the index was opened."""
        return self._pages.num_bad

    @property
    def is_settled(self) -> bool:
        """Whether nothing is staged."""
        return self._pages.num_staged == 0

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.settings.num_pages * 2 * self.settings.page_bytes

    def find(self, key: bytes) -> Location | None:
        """Return the row of `key`, dead or alive.

        Raises:
            OSError: the disk fails.
        """
        first = self._first_page(key)
        image = self._pages.read(first)
        start, end = _find_row(image, key)
        if not start:
            image = self._pages.read(self._second_page(key, first))
            start, end = _find_row(image, key)
            if not start:
                return None
        sequence, offset = _ROW.unpack_from(image, start)
        return Location(sequence, offset, image[start + _ROW.size : end])

    def place(self, key: bytes) -> int | None:
        """Return the sequence number in the row of `key`, staged or not; pages are kept for the `put` that follows.

        Raises:
            OSError: the disk fails.
        """
        for page in self._pages_of(key):
            image = self._pages.staged(page)
            start, _ = _find_row(image, key)
            if start:
                return int(_ROW.unpack_from(image, start)[0])
        return None

    def put(self, key: bytes, sequence: int, offset: int, body: bytes, alive: Container[int]) -> list[int] | None:
        """Stage the row of `key`; return the sequence numbers of the living rows that it replaces, one each.

        None: the row is too large for a page.
        """
        row = _ROW.pack(sequence, offset) + body
        if KEY_BYTES + 4 + len(row) > self._capacity:
            return None
        pages = self._pages_of(key)
        image = self._pages.staged(pages[0])
        if not any(_find_row(self._pages.staged(page), key)[0] for page in pages):
            payload = _with_row(image, key, row)
            if len(payload) - _COUNT.size <= self._capacity * _FULL:  # nothing has to make room
                self._pages.stage(pages[0], payload)
                return []
        held = [_rows(self._pages.staged(page)) for page in pages]
        alive_rows = [{k: r for k, r in rows.items() if k != key and _sequence(r) in alive} for rows in held]
        replaced = [_sequence(rows[key]) for rows in held if key in rows]
        number = self._choose([key in rows for rows in held], [self._used_bytes(rows) for rows in alive_rows])
        rows = alive_rows[number]
        gone = [sequence for sequence in replaced if sequence in alive]
        while self._used_bytes({**rows, key: row}) > self._capacity:
            oldest = min(rows, key=lambda k: _sequence(rows[k]))
            gone.append(_sequence(rows.pop(oldest)))
            self._displaced.append(ChainKey(oldest))
        self._stage(pages[number], {**rows, key: row})
        return gone

    def take_displaced(self) -> list[ChainKey]:
        """Return the keys of the living rows that gave way to others in full pages since the last call."""
        displaced, self._displaced = self._displaced, []
        return displaced

    def remove(self, key: bytes) -> int | None:
        """Stage the removal of `key`; return the sequence number its row had, if there was one."""
        for page in self._pages_of(key):
            image = self._pages.staged(page)
            if _find_row(image, key)[0]:
                rows = _rows(image)
                row = rows.pop(key)
                self._stage(page, rows)
                return _sequence(row)
        return None

    def read_table(self) -> list[SegmentEntry]:
        """Return the segment table, free entries included."""
        count, per_page = self.settings.num_segments, self.settings.entries_per_page
        images = [self._pages.read(page) for page in range(1, self.settings.first_bucket)]
        return [
            SegmentEntry(*_ENTRY.unpack_from(images[slot // per_page], PAYLOAD_OFFSET + slot % per_page * _ENTRY.size))
            for slot in range(count)
        ]

    def stage_table(self, table: list[SegmentEntry], changed: set[int]) -> None:
        """Stage the pages of the segment table that describe the slots in `changed`."""
        per_page = self.settings.entries_per_page
        for number in {slot // per_page for slot in changed}:
            entries = table[number * per_page : (number + 1) * per_page]
            self._pages.stage(1 + number, b"".join(_ENTRY.pack(e.sequence, e.tail, e.num_rows) for e in entries))

    def commit(self) -> None:
        """Make everything staged durable, then visible.

        Raises:
            OSError: the disk fails; nothing becomes visible, and everything stays staged for the next commit.
        """
        self._pages.commit()

    def rows(self) -> Iterator[Location]:
        """Return all rows, dead ones included, page by page."""
        for page in range(self.settings.first_bucket, self.settings.num_pages):
            image = self._pages.read(page)
            for row in _rows(image).values():
                sequence, offset = _ROW.unpack_from(row)
                yield Location(sequence, offset, row[_ROW.size :])

    def damaged_pages(self) -> list[int]:
        """Read both slots of every page; return the pages of which one is neither intact nor blank."""
        return [page for page in range(self.settings.num_pages) if self._pages.damaged_slots(page)]

    def repair_page(self, page: int) -> None:
        """Replace both slots of a damaged page by its intact image, or by a blank one.

        Raises:
            OSError: the disk fails.
        """
        for _ in range(2):
            self._pages.stage(page, self._pages.read(page)[PAYLOAD_OFFSET:])
            self._pages.commit()

    def close(self) -> None:
        """Close the file."""
        self._pages.close()

    def _first_page(self, key: bytes) -> int:
        return self._first_bucket + int.from_bytes(key[:8], "little") % self._num_buckets

    def _second_page(self, key: bytes, first: int) -> int:
        page = self._first_bucket + int.from_bytes(key[8:], "little") % self._num_buckets
        return page if page != first else self._first_bucket + (page - self._first_bucket + 1) % self._num_buckets

    def _pages_of(self, key: bytes) -> tuple[int, int]:
        first = self._first_page(key)
        return first, self._second_page(key, first)

    def _choose(self, is_there: list[bool], used_bytes: list[int]) -> int:
        """Return which of a key's two pages takes its row.

        A row never moves: a crash between the two writes would lose it. Otherwise the first page, which is looked into
        first, unless it is getting full and the other is emptier.
        """
        if any(is_there):
            return is_there.index(True)
        return int(used_bytes[0] > self._capacity * _FULL and used_bytes[1] < used_bytes[0])

    def _used_bytes(self, rows: dict[bytes, bytes]) -> int:
        return sum(map(len, rows.values())) + (KEY_BYTES + 4) * len(rows)

    def _stage(self, page: int, rows: dict[bytes, bytes]) -> None:
        ends, end = [], 0
        for row in rows.values():
            end += len(row)
            ends.append(end)
        parts = [_COUNT.pack(len(rows)), *rows, struct.pack(f"<{len(ends)}I", *ends), *rows.values()]
        self._pages.stage(page, b"".join(parts))


def read_settings(path: str, chunk_tokens: int, files: FileLayer) -> IndexSettings | None:
    """Return the shape of the index at `path`; None: both copies of its settings are damaged.

    Raises:
        FormatError: another version made it.
        OSError: the disk fails.
    """
    shape = IndexSettings(limit_bytes=0, segment_bytes=0, num_segments=0, chunk_tokens=chunk_tokens)
    pages = PageFile(path, 1, shape.page_bytes, files)
    try:
        version, *found = _SETTINGS.unpack_from(pages.read(0), PAYLOAD_OFFSET)
    finally:
        pages.close()
    if version not in {0, FORMAT_VERSION}:
        raise FormatError(f"{path} has format version {version}; this program reads and writes {FORMAT_VERSION}")
    return IndexSettings(**dict(zip(IndexSettings.__struct_fields__, found, strict=True))) if version else None


def _find_row(image: bytes, key: bytes) -> tuple[int, int]:
    """Return where in the bucket `image` the row of `key` starts and ends; (0, 0): it is not there."""
    (count,) = _COUNT.unpack_from(image, PAYLOAD_OFFSET)
    ends_at = _KEYS_AT + KEY_BYTES * count
    found = image.find(key, _KEYS_AT, ends_at)
    while found >= 0 and (found - _KEYS_AT) % KEY_BYTES:
        found = image.find(key, found + 1, ends_at)
    if found < 0:
        return 0, 0
    number = (found - _KEYS_AT) // KEY_BYTES
    rows_at = ends_at + 4 * count
    if not number:
        return rows_at, rows_at + int(_COUNT.unpack_from(image, ends_at)[0])
    start, end = _TWO_ENDS.unpack_from(image, ends_at + 4 * (number - 1))
    return rows_at + start, rows_at + end


def _with_row(image: bytes, key: bytes, row: bytes) -> bytes:
    """Return the payload of the bucket `image` with a row added."""
    (count,) = _COUNT.unpack_from(image, PAYLOAD_OFFSET)
    ends_at = _KEYS_AT + KEY_BYTES * count
    rows_at = ends_at + 4 * count
    end = _COUNT.unpack_from(image, rows_at - 4)[0] if count else 0
    keys, ends, rows = image[_KEYS_AT:ends_at], image[ends_at:rows_at], image[rows_at : rows_at + end]
    return b"".join((_COUNT.pack(count + 1), keys, key, ends, _COUNT.pack(end + len(row)), rows, row))


def _rows(image: bytes) -> dict[bytes, bytes]:
    (count,) = _COUNT.unpack_from(image, PAYLOAD_OFFSET)
    ends_at = _KEYS_AT + KEY_BYTES * count
    rows_at = ends_at + 4 * count
    ends = struct.unpack_from(f"<{count}I", image, ends_at)
    starts = (0, *ends)[:-1]
    return {
        image[_KEYS_AT + KEY_BYTES * n : _KEYS_AT + KEY_BYTES * (n + 1)]: image[rows_at + start : rows_at + end]
        for n, (start, end) in enumerate(zip(starts, ends, strict=True))
    }


def _sequence(row: bytes) -> int:
    return int.from_bytes(row[:8], "little")
