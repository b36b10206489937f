"""Reading records: which of them stand one after the other, and whether what came is what was wanted.

A disk gives large reads faster than small ones, so the records of chunks that follow each other in a prompt, which a
flush wrote one after the other, are read at once: their headers into scratch memory, their frames where they belong.

Pure but for `read_run`, which reads on its caller's thread.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cachetier.storage.index import Location
from cachetier.storage.records import frame_sizes, header_bytes_of, is_header_of
from cachetier.storage.segments import SegmentFiles

BUFFERS_MAX = 1000  # of one preadv or pwritev; Linux takes 1024


class PlacedRead(NamedTuple):
    """A chunk to read: its number among those wanted, where its record lies, and the frames to fill."""

    number: int
    location: Location
    frames: Sequence[memoryview]

    @property
    def header_bytes(self) -> int:
        """Bytes of the record before its first frame."""
        return header_bytes_of(len(self.location.body))

    @property
    def end(self) -> int:
        """Offset behind the record, in its segment."""
        return self.location.offset + self.header_bytes + sum(map(len, self.frames))


class HeldRecord(NamedTuple):
    """Where the frames of a record lie that an engine may read: in which file, from which offset on."""

    slot: int
    path: str
    offset: int


Run = list[PlacedRead]  # records of one segment, one behind the other


def extend_runs(runs: list[Run], read: PlacedRead) -> None:
    """Add `read` to the last run if it continues it, else as a run of its own."""
    last = runs[-1][-1] if runs else None
    is_next = last is not None and (last.location.sequence, last.end) == (read.location.sequence, read.location.offset)
    if is_next and sum(1 + len(each.frames) for each in (*runs[-1], read)) <= BUFFERS_MAX:
        runs[-1].append(read)
    else:
        runs.append([read])


def read_run(segments: SegmentFiles, slot: int, run: Run) -> list[bool]:
    """Fill the frames of `run`, whose segment lies in `slot`; return which records are the ones looked for.

    Raises:
        OSError: the disk fails; nothing is known of any frame.
        ValueError: frames do not have the sizes of the chunk's objects.
    """
    for read in run:
        if [len(frame) for frame in read.frames] != frame_sizes(read.location.body):
            raise ValueError(f"the frames do not have the sizes of the objects of {read.location.chunk}")
    headers = segments.header_scratch(sum(read.header_bytes for read in run))
    buffers: list[memoryview] = []
    parts, start = [], 0
    for read in run:
        parts.append(headers[start : start + read.header_bytes])
        buffers += [parts[-1], *read.frames]
        start += read.header_bytes
    segments.read(slot, buffers, run[0].location.offset)
    return [
        is_header_of(part, read.location.body, read.location.sequence) for part, read in zip(parts, run, strict=True)
    ]
