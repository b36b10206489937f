"""Verification of a data directory that no server uses: every index page, every record header, every payload page."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from cachetier.core.checksum import checksum_of, page_digests
from cachetier.core.errors import StorageError
from cachetier.core.layout import DIGEST_BYTES, digests_offset, frame_bytes, num_pages
from cachetier.storage.data_dir import lock_existing
from cachetier.storage.file_layer import FileLayer
from cachetier.storage.index import Index, Location, read_settings
from cachetier.storage.recovery import INDEX_FILE, recover_table
from cachetier.storage.segments import SegmentFiles, aligned_buffer

_DETAILS_MAX = 100


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        records: chunks that the index names.
        bad: chunks and index pages that do not match their checksums.
        bytes: bytes of the records that were read.
        details: one line for each bad thing, the first hundred.
    """

    records: int = 0
    bad: int = 0
    bytes: int = 0
    details: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Count a bad thing."""
        self.bad += 1
        if len(self.details) < _DETAILS_MAX:
            self.details.append(text)


def verify(
    data_dir: str, repair: bool = False, progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None
) -> VerifyReport:
    """Compare everything stored in `data_dir` with its checksums; with `repair`, drop what is bad.

    Raises:
        InUseError: a server holds the directory.
        StorageError: it is no data directory, or it cannot be read.
        FormatError: another version made it.
    """
    report, files = VerifyReport(), FileLayer()
    with lock_existing(data_dir) as (path, chunk_tokens):
        index_path = os.path.join(path, "index", INDEX_FILE)
        if not os.path.exists(index_path):
            return report
        try:
            settings = read_settings(index_path, chunk_tokens, files)
            if settings is None:
                raise StorageError(
                    f"{index_path}: both copies of its settings are damaged; remove the file to rebuild it"
                )
            segments = SegmentFiles(os.path.join(path, "segments"), settings.segment_bytes, files)
            segments.open_existing(settings.num_segments)
            index = Index(index_path, settings, files)
            _Verification(index, segments, report, repair, progress).run()
            index.close()
            segments.close()
        except OSError as error:
            raise StorageError(f"the data directory {path} cannot be read: {error}") from error
    return report


class _Verification:
    """One walk through an index and what it names."""

    def __init__(
        self,
        index: Index,
        segments: SegmentFiles,
        report: VerifyReport,
        repair: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        self._index, self._segments, self._report = index, segments, report
        self._repair, self._progress = repair, progress
        self._table = recover_table(index, segments)
        self._slot_of = {entry.sequence: slot for slot, entry in enumerate(self._table) if entry.sequence}

    def run(self) -> None:
        """Check everything; drop what is bad if asked to."""
        for page in self._index.damaged_pages():
            self._report.note(f"index page {page} is damaged")
            if self._repair:
                self._index.repair_page(page)
        total = sum(entry.tail for entry in self._table)
        bad, good = [], Counter[int]()
        for row in self._index.rows():
            if row.sequence not in self._slot_of:
                continue
            self._report.records += 1
            fault = self._check(row)
            good[row.sequence] += not fault
            if fault:
                bad.append(row)
                self._report.note(f"chunk {row.chunk.key.hex()} in segment {self._slot_of[row.sequence] + 1}: {fault}")
            self._progress(self._report.bytes, max(total, self._report.bytes))
        if self._repair:
            for row in bad:
                self._index.remove(row.chunk.key)
            for entry in self._table:
                entry.num_rows = good[entry.sequence]
            self._index.stage_table(self._table, set(range(len(self._table))))
            self._index.commit()

    def _check(self, row: Location) -> str:
        """Return what is wrong with the record that `row` names, or nothing."""
        slot = self._slot_of[row.sequence]
        try:
            header = self._segments.read_header(slot, row.offset)
            if header is None or header.sequence != row.sequence or header.chunk != row.chunk:
                return "its header is damaged"
            self._report.bytes += header.record_bytes
            payload = aligned_buffer(header.record_bytes - header.header_bytes)
            self._segments.read(slot, [payload], row.offset + header.header_bytes)
        except OSError as error:
            return str(error)
        start = 0
        for number, size in enumerate(row.chunk.object_bytes):
            frame = payload[start : start + frame_bytes(size)]
            start += len(frame)
            digests = frame[digests_offset(size) : digests_offset(size) + num_pages(size) * DIGEST_BYTES]
            if checksum_of(digests) != row.chunk.checksums[number] or page_digests(frame[:size]) != digests:
                return f"object {number} is damaged"
        return ""
