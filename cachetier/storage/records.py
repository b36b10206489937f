"""What the disk says about a chunk: the body that record headers and index rows share, and the record header.

record (4 KiB-aligned):  header, padded to 4 KiB; then the frames of the chunk's objects, exactly as in the arena

header, little-endian:   0  8 bytes "CTRECORD"
                         8  u64 XXH64 of the header from byte 16 to its end, padding included
                        16  u32 format version
                        20  u32 bytes of the header, padding included
                        24  u64 bytes of the whole record
                        32  u64 sequence number of the segment
                        40  body

body:                    0  16 bytes chain key
                        16  16 bytes chain key of the parent
                        32  16 bytes namespace
                        48  u32 position in the chain
                        52  u16 KV cache group
                        54  u16 number of shards, n
                        56  u32 bytes of content, c
                        60  n times: u16 first head, u16 end head, u16 first layer, u16 end layer
                            n times: u64 bytes of the object
                            n times: u64 checksum of the object
                            c bytes: content
"""

import struct
from functools import lru_cache

import msgspec
import xxhash

from cachetier.core.keys import FORMAT_VERSION, ChainKey, NamespaceId
from cachetier.core.layout import PAGE_BYTES, Shard, frame_bytes, round_up

MAGIC = b"CTRECORD"
_HEADER = struct.Struct("<8sQIIQQ")
_CHECKED_FROM = 16
_BODY = struct.Struct("<16s16s16sIHHI")
MAX_HEADER_BYTES = 1 << 20


class DiskChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk as the disk knows it.

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

    def payload_bytes(self) -> int:
        """Return the size of all its frames together."""
        return sum(map(frame_bytes, self.object_bytes))


class RecordHeader(msgspec.Struct, frozen=True):
    """The decoded header of a record."""

    sequence: int
    header_bytes: int
    record_bytes: int
    chunk: DiskChunk


def pack_body(chunk: DiskChunk) -> bytes:
    """Return the body that describes `chunk`."""
    num = len(chunk.tiling)
    return b"".join(
        (
            _BODY.pack(chunk.key, chunk.parent, chunk.namespace, chunk.position, chunk.group, num, len(chunk.content)),
            *(shard.pack() for shard in chunk.tiling),
            struct.pack(f"<{2 * num}Q", *chunk.object_bytes, *chunk.checksums),
            chunk.content,
        )
    )


def unpack_body(data: bytes, offset: int) -> DiskChunk:
    """Reverse `pack_body`; the caller has verified the checksum over `data`."""
    key, parent, namespace, position, group, num, content_bytes = _BODY.unpack_from(data, offset)
    start = offset + _BODY.size
    checksums_at = start + 16 * num
    content_at = checksums_at + 8 * num
    tiling, object_bytes = _unpack_tiling(data[start:checksums_at])
    return DiskChunk(
        key=key,
        parent=parent,
        namespace=namespace,
        position=position,
        group=group,
        content=data[content_at : content_at + content_bytes],
        tiling=tiling,
        object_bytes=object_bytes,
        checksums=struct.unpack_from(f"<{num}Q", data, checksums_at),
    )


def frame_sizes(body: bytes) -> list[int]:
    """Return the sizes of the frames of the chunk that `body` describes."""
    num = _BODY.unpack_from(body)[5]
    _, object_bytes = _unpack_tiling(body[_BODY.size : _BODY.size + 16 * num])
    return [frame_bytes(size) for size in object_bytes]


@lru_cache(maxsize=1024)  # the few ways in which the engines of one node cut their chunks
def _unpack_tiling(data: bytes) -> tuple[tuple[Shard, ...], tuple[int, ...]]:
    num = len(data) // 16
    shards = tuple(Shard.unpack(data[start : start + 8]) for start in range(0, 8 * num, 8))
    return shards, struct.unpack_from(f"<{num}Q", data, 8 * num)


def header_bytes_of(body_bytes: int) -> int:
    """Return the size of the header around a body, padding included."""
    return round_up(_HEADER.size + body_bytes, PAGE_BYTES)


def pack_header(body: bytes, payload_bytes: int, sequence: int) -> bytes:
    """Return the header of a record whose body is `body`."""
    size = header_bytes_of(len(body))
    header = bytearray(size)
    _HEADER.pack_into(header, 0, MAGIC, 0, FORMAT_VERSION, size, size + payload_bytes, sequence)
    header[_HEADER.size : _HEADER.size + len(body)] = body
    struct.pack_into("<Q", header, 8, xxhash.xxh64_intdigest(memoryview(header)[_CHECKED_FROM:]))
    return bytes(header)


def peek_header_bytes(first_page: bytes) -> int:
    """Return the size that the header starting with `first_page` claims, or 0 if no header starts so."""
    magic, _, version, size, _, _ = _HEADER.unpack_from(first_page)
    is_possible = magic == MAGIC and version == FORMAT_VERSION and size % PAGE_BYTES == 0
    return size if is_possible and 0 < size <= MAX_HEADER_BYTES else 0


def unpack_header(data: bytes) -> RecordHeader | None:
    """Return the header in `data` (exactly its bytes), or None if its checksum does not hold."""
    magic, checksum, version, size, record_bytes, sequence = _HEADER.unpack_from(data)
    if magic != MAGIC or version != FORMAT_VERSION or size != len(data):
        return None
    if xxhash.xxh64_intdigest(memoryview(data)[_CHECKED_FROM:]) != checksum:
        return None
    return RecordHeader(sequence, size, record_bytes, unpack_body(data, _HEADER.size))


def is_header_of(data: memoryview, body: bytes, sequence: int) -> bool:
    """Tell whether `data` (exactly a header) is intact, of segment `sequence`, and describes the chunk of `body`."""
    magic, checksum, version, size, _, found = _HEADER.unpack_from(data)
    return (
        (magic, version, size, found) == (MAGIC, FORMAT_VERSION, len(data), sequence)
        and data[_HEADER.size : _HEADER.size + len(body)] == body
        and xxhash.xxh64_intdigest(data[_CHECKED_FROM:]) == checksum
    )
