"""What happened to the disk tier since it was opened: plain numbers, changed by whoever does what they count."""

import msgspec


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
