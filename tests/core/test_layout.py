"""Whatever layout stored a chunk, any other finds exactly its own bytes in it."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachetier.core.layout import (
    PAGE_BYTES,
    KVLayout,
    Piece,
    Shard,
    digests_offset,
    frame_bytes,
    num_pages,
    round_up,
)

CHUNK_TOKENS = 2
LAYOUT = KVLayout(num_layers=5, num_kv_heads=6, row_bytes=3)
UNIT = CHUNK_TOKENS * LAYOUT.row_bytes


def cuts(end: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    """Ways to cut [0, end) into ranges."""

    def ranges(inner: set[int]) -> list[tuple[int, int]]:
        bounds = sorted({0, *inner, end})
        return list(itertools.pairwise(bounds))

    return st.sets(st.integers(1, end - 1)).map(ranges)


tilings = st.builds(
    lambda heads, layers: [Shard(*h, *la) for h in heads for la in layers],
    cuts(LAYOUT.num_kv_heads),
    cuts(LAYOUT.num_layers),
)
shards = tilings.flatmap(st.sampled_from)


def canonical(shard: Shard) -> list[tuple[int, int, int]]:
    """Return what each byte of the object of `shard` is: (head, layer, byte in the chunk's rows), in order."""
    return [
        (head, layer, byte)
        for head in range(shard.head_start, shard.head_end)
        for layer in range(shard.layer_start, shard.layer_end)
        for byte in range(UNIT)
    ]


class TestPieces:
    @given(tilings, shards)
    def test_pieces_of_a_tiling_fill_any_wanted_shard_exactly_once(self, tiling: list[Shard], wanted: Shard) -> None:
        filled: list[list[object]] = [[] for _ in canonical(wanted)]
        for stored in tiling:
            source = canonical(stored)
            for piece in LAYOUT.pieces(stored, wanted, CHUNK_TOKENS):
                for byte in range(piece.length_bytes):
                    filled[piece.wanted_offset + byte].append(source[piece.object_offset + byte])
        assert filled == [[cell] for cell in canonical(wanted)]

    @given(shards, shards)
    def test_pieces_cannot_be_joined_and_lie_in_both_objects(self, stored: Shard, wanted: Shard) -> None:
        pieces = LAYOUT.pieces(stored, wanted, CHUNK_TOKENS)
        for piece in pieces:
            assert piece.length_bytes > 0
            assert piece.object_offset + piece.length_bytes <= LAYOUT.object_bytes(stored, CHUNK_TOKENS)
            assert piece.wanted_offset + piece.length_bytes <= LAYOUT.object_bytes(wanted, CHUNK_TOKENS)
        for left, right in itertools.pairwise(pieces):
            assert left.object_offset + left.length_bytes <= right.object_offset
            is_joint = left.object_offset + left.length_bytes == right.object_offset
            assert not (is_joint and left.wanted_offset + left.length_bytes == right.wanted_offset)

    def test_the_heads_of_a_rank_are_one_piece_of_an_object_with_all_heads(self) -> None:
        (piece,) = LAYOUT.pieces(LAYOUT.whole(), Shard(2, 5, 0, 5), CHUNK_TOKENS)
        assert piece == Piece(2 * 5 * UNIT, 0, 3 * 5 * UNIT)

    def test_shards_without_a_common_cell_have_no_pieces(self) -> None:
        assert LAYOUT.pieces(Shard(0, 2, 0, 5), Shard(2, 6, 0, 5), CHUNK_TOKENS) == []
        assert LAYOUT.pieces(Shard(0, 6, 0, 2), Shard(0, 6, 2, 5), CHUNK_TOKENS) == []


class TestTiling:
    @given(tilings)
    def test_a_tiling_covers_everything_and_its_objects_add_up(self, tiling: list[Shard]) -> None:
        assert LAYOUT.check_tiling(tiling)
        sizes = [LAYOUT.object_bytes(shard, CHUNK_TOKENS) for shard in tiling]
        assert sum(sizes) == LAYOUT.object_bytes(LAYOUT.whole(), CHUNK_TOKENS) == 6 * 5 * UNIT

    @given(tilings, st.data())
    def test_a_missing_or_doubled_shard_is_no_tiling(self, tiling: list[Shard], data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(tiling))
        assert not LAYOUT.check_tiling([other for other in tiling if other != shard])
        assert not LAYOUT.check_tiling([*tiling, shard])

    @pytest.mark.parametrize(
        "tiling",
        [
            [],
            [Shard(0, 6, 0, 6)],
            [Shard(0, 7, 0, 5)],
            [Shard(-1, 5, 0, 5)],
            [Shard(0, 6, 0, 5), Shard(3, 3, 0, 5)],
            [Shard(0, 3, 0, 5), Shard(2, 5, 0, 5)],
            [Shard(6, 0, 0, 5)],
        ],
    )
    def test_what_reaches_outside_overlaps_or_is_empty_is_no_tiling(self, tiling: list[Shard]) -> None:
        assert not LAYOUT.check_tiling(tiling)

    def test_a_hostile_tiling_is_refused_at_once(self) -> None:
        assert not LAYOUT.check_tiling([Shard(0, 1 << 40, 0, 1 << 40)])
        assert not LAYOUT.check_tiling([LAYOUT.whole()] * 10_000)


class TestFrames:
    @given(st.integers(1, 1 << 40))
    @example(PAGE_BYTES)
    @example(PAGE_BYTES + 1)
    def test_a_frame_holds_the_object_and_a_digest_of_each_page(self, object_bytes: int) -> None:
        pages = num_pages(object_bytes)
        assert (pages - 1) * PAGE_BYTES < object_bytes <= pages * PAGE_BYTES
        assert digests_offset(object_bytes) == pages * PAGE_BYTES
        assert frame_bytes(object_bytes) % PAGE_BYTES == 0
        assert 0 <= frame_bytes(object_bytes) - digests_offset(object_bytes) - 8 * pages < PAGE_BYTES

    @given(st.integers(0, 1 << 50), st.integers(1, 1 << 20))
    def test_rounding_up_gives_the_least_multiple(self, value: int, multiple: int) -> None:
        assert round_up(value, multiple) % multiple == 0
        assert 0 <= round_up(value, multiple) - value < multiple


def test_a_packed_shard_is_what_it_always_was() -> None:
    assert Shard(1, 2, 3, 4).pack().hex() == "0100020003000400"


@given(st.lists(st.integers(0, 65535), min_size=4, max_size=4))
def test_packing_a_shard_can_be_reversed(numbers: list[int]) -> None:
    assert Shard.unpack(Shard(*numbers).pack()) == Shard(*numbers)
