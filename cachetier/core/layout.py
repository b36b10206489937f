"""The canonical layout of KV bytes, and the arithmetic between what is stored and what a rank needs.

An object is `[kv_head][layer][token][K row | V row]`, contiguous. Heads come first, so the heads of any
tensor-parallel rank are one byte range of an object, whoever stored it. In a frame (and in a record) an object is
followed by the digests of its pages, so that a rank which reads a part of it can verify just that part:

    [object, zero-padded to 4 KiB][XXH64 of each page, 8 bytes little-endian each, zero-padded to 4 KiB]
"""

import struct
from typing import NamedTuple

import msgspec

PAGE_BYTES = 4096
DIGEST_BYTES = 8


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


class Shard(msgspec.Struct, frozen=True, array_like=True, order=True):
    """The part of a chunk's KV that one rank holds: KV heads times layers, half-open ranges of the whole model."""

    head_start: int
    head_end: int
    layer_start: int
    layer_end: int

    _FORMAT = struct.Struct("<4H")

    def pack(self) -> bytes:
        """Return 8 bytes: the four numbers as little-endian uint16."""
        return self._FORMAT.pack(self.head_start, self.head_end, self.layer_start, self.layer_end)

    @classmethod
    def unpack(cls, data: bytes) -> "Shard":
        """Reverse `pack`."""
        return cls(*cls._FORMAT.unpack(data))


class Piece(NamedTuple):
    """A byte range that an object and a wanted shard have in common."""

    object_offset: int
    wanted_offset: int
    length_bytes: int


class KVLayout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shape of one KV cache group's chunk over the whole model.

    Attributes:
        num_layers: layers of the group.
        num_kv_heads: KV heads of the whole model (1 for MLA).
        row_bytes: bytes of one K row and one V row together, of one head, layer and token.
        group: number of the KV cache group.
    """

    num_layers: int
    num_kv_heads: int
    row_bytes: int
    group: int = 0

    def whole(self) -> Shard:
        """Return the shard of an engine with one rank."""
        return Shard(0, self.num_kv_heads, 0, self.num_layers)

    def object_bytes(self, shard: Shard, chunk_tokens: int) -> int:
        """Return the size of the object that holds `shard` of one chunk."""
        heads, layers = shard.head_end - shard.head_start, shard.layer_end - shard.layer_start
        return heads * layers * chunk_tokens * self.row_bytes

    def check_tiling(self, tiling: list[Shard]) -> bool:
        """Tell whether `tiling` covers every head and layer exactly once."""
        num_cells = self.num_kv_heads * self.num_layers
        is_inside = all(
            0 <= s.head_start < s.head_end <= self.num_kv_heads and 0 <= s.layer_start < s.layer_end <= self.num_layers
            for s in tiling
        )
        # Areas first: numbers from a hostile message must not decide how many cells are listed below.
        areas = ((s.head_end - s.head_start) * (s.layer_end - s.layer_start) for s in tiling)
        if not is_inside or sum(areas) != num_cells:
            return False
        cells = {
            (head, layer)
            for s in tiling
            for head in range(s.head_start, s.head_end)
            for layer in range(s.layer_start, s.layer_end)
        }
        return len(cells) == num_cells

    def pieces(self, stored: Shard, wanted: Shard, chunk_tokens: int) -> list[Piece]:
        """Return the byte ranges of object `stored` that belong to `wanted`, as few and as long as possible.

        `wanted_offset` counts in the canonical layout of `wanted`.
        """
        head_start, head_end = max(stored.head_start, wanted.head_start), min(stored.head_end, wanted.head_end)
        layer_start = max(stored.layer_start, wanted.layer_start)
        layer_end = min(stored.layer_end, wanted.layer_end)
        if head_start >= head_end or layer_start >= layer_end:
            return []
        unit = chunk_tokens * self.row_bytes
        from_layers, to_layers = stored.layer_end - stored.layer_start, wanted.layer_end - wanted.layer_start
        length = (layer_end - layer_start) * unit
        pieces: list[Piece] = []
        for head in range(head_start, head_end):
            source = ((head - stored.head_start) * from_layers + layer_start - stored.layer_start) * unit
            target = ((head - wanted.head_start) * to_layers + layer_start - wanted.layer_start) * unit
            last = pieces[-1] if pieces else None
            if last and (source, target) == (last[0] + last[2], last[1] + last[2]):
                pieces[-1] = Piece(last[0], last[1], last[2] + length)
            else:
                pieces.append(Piece(source, target, length))
        return pieces


def num_pages(object_bytes: int) -> int:
    """Return how many 4 KiB pages an object touches; the last may be shorter."""
    return -(-object_bytes // PAGE_BYTES)


def digests_offset(object_bytes: int) -> int:
    """Return where in a frame the page digests start."""
    return round_up(object_bytes, PAGE_BYTES)


def pool_frame_bytes(object_bytes: int) -> int:
    """Return the size of a frame of a pool in device memory, which holds an object and no digests."""
    return round_up(object_bytes, PAGE_BYTES)


def frame_bytes(object_bytes: int) -> int:
    """Return the size of the frame that holds an object and the digests of its pages."""
    return digests_offset(object_bytes) + round_up(num_pages(object_bytes) * DIGEST_BYTES, PAGE_BYTES)
