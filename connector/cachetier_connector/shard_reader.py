"""Reads a rank's shard of a chunk out of the arena through the CPU: copied first, and verified in the copy.

A frame whose lease has expired may change under the reader's eyes, and must then be a miss and never wrong KV: so no
byte of the arena is used but through a private copy that was verified. Runs on one load thread.
"""

from collections.abc import Sequence

from cachetier.client import ArenaView
from cachetier.core.checksum import digests_match, pages_match
from cachetier.core.layout import DIGEST_BYTES, PAGE_BYTES, KVLayout, Piece, Shard, digests_offset, num_pages
from cachetier_connector.plan import ChunkSource


class ShardReader:
    """Copies a rank's shard of a chunk out of the arena, however the chunk was cut when it was stored."""

    def __init__(
        self, arena: ArenaView, layout: KVLayout, wanted: Shard, tilings: Sequence[Sequence[Shard]], chunk_tokens: int
    ) -> None:
        self._arena = arena
        self._cuts: list[list[tuple[int, list[Piece]]]] = [
            [
                (layout.object_bytes(stored, chunk_tokens), layout.pieces(stored, wanted, chunk_tokens))
                for stored in tiling
            ]
            for tiling in tilings
        ]

    def read(self, chunk: ChunkSource, into: memoryview) -> bool:
        """Fill `into` with the wanted shard; tell whether all bytes used match the chunk's checksums."""
        cuts = self._cuts[chunk.tiling]
        return all(
            not pieces or self._read_object(frame, size, checksum, pieces, into)
            for frame, checksum, (size, pieces) in zip(chunk.frames, chunk.checksums, cuts, strict=True)
        )

    def _read_object(self, frame: int, size: int, checksum: int, pieces: list[Piece], into: memoryview) -> bool:
        digests = bytes(self._arena.frame(frame + digests_offset(size), num_pages(size) * DIGEST_BYTES))
        if not digests_match(digests, size, checksum):
            return False
        return all(self._read_piece(frame, size, digests, piece, into) for piece in pieces)

    def _read_piece(self, frame: int, size: int, digests: bytes, piece: Piece, into: memoryview) -> bool:
        first_page, end_page = piece.object_offset // PAGE_BYTES, num_pages(piece.object_offset + piece.length_bytes)
        start, end = first_page * PAGE_BYTES, min(end_page * PAGE_BYTES, size)
        target = into[piece.wanted_offset : piece.wanted_offset + piece.length_bytes]
        source = self._arena.frame(frame + start, end - start)
        if len(source) == len(target):
            copy = target
            copy[:] = source
        else:  # the piece starts or ends within a page, and only whole pages can be verified
            copy = memoryview(bytes(source))
            skip = piece.object_offset - start
            target[:] = copy[skip : skip + piece.length_bytes]
        return pages_match(copy, digests, first_page)
