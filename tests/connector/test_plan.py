"""Plans: what a reply of the server becomes, and how engines cut chunks."""

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from cachetier.core.keys import contents_of
from cachetier.core.layout import KVLayout, Shard
from cachetier.core.messages import TIER_DISK, TIER_GPU, TIER_HOST, MatchReply
from cachetier_connector.plan import (
    chunks_to_load,
    extras_of,
    first_failed_token,
    loadable_end,
    shard_of_rank,
    split_by_tier,
    tiling_for,
    tokens_to_bytes,
)

CHUNK = 64


def reply_of(tiling_of: list[int], tilings: list[int], tiers: list[int] | None = None) -> MatchReply:
    """Return a reply in which chunk i is cut into `tilings[tiling_of[i]]` objects with numbered frames."""
    num_objects = sum(tilings[number] for number in tiling_of)
    return MatchReply(
        lease=1,
        num_chunks=len(tiling_of),
        keys=b"".join(bytes([number]) * 16 for number in range(len(tiling_of))),
        tiers=bytes(tiers or [TIER_HOST] * len(tiling_of)),
        tilings=[[Shard(part, part + 1, 0, 1) for part in range(size)] for size in tilings],
        tiling_of=bytes(tiling_of),
        frames=list(range(num_objects)),
        checksums=list(range(100, 100 + num_objects)),
        num_pending=0,
        pool_of=bytes(number % 3 for number in range(len(tiling_of))),
        pool_frames=list(range(1000, 1000 + len(tiling_of))),
        segment_of=[number % 2 for number in range(len(tiling_of))],
    )


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.data(),
)
def test_a_load_names_exactly_the_objects_of_the_chunks_it_touches(tiling_of, tilings, data):
    reply = reply_of(tiling_of, tilings)
    start = data.draw(st.integers(0, len(tiling_of) * CHUNK - 1))
    end = data.draw(st.integers(start + 1, len(tiling_of) * CHUNK))
    first, held = chunks_to_load(reply, start, end, CHUNK)
    chunks = held.unpack(reply.tilings)
    numbers = range(first, first + len(chunks))
    assert [
        number for number in range(len(tiling_of)) if number * CHUNK < end and (number + 1) * CHUNK > start
    ] == list(numbers)
    for number, chunk in zip(numbers, chunks, strict=True):
        before = sum(tilings[kind] for kind in tiling_of[:number])
        assert chunk.key == bytes([number]) * 16
        assert chunk.tiling == tiling_of[number]
        assert chunk.frames == list(range(before, before + tilings[tiling_of[number]]))
        assert chunk.checksums == [frame + 100 for frame in chunk.frames]
        assert (chunk.pool, chunk.pool_frame) == (number % 3, 1000 + number)
        assert chunk.segment == number % 2


@given(st.lists(st.sampled_from([TIER_GPU, TIER_HOST, TIER_DISK]), min_size=1, max_size=12), st.data())
def test_every_loaded_token_is_counted_for_the_tier_it_came_from(tiers, data):
    start = data.draw(st.integers(0, len(tiers) * CHUNK - 1))
    end = data.draw(st.integers(start, len(tiers) * CHUNK))
    reply = reply_of([0] * len(tiers), [1], tiers)
    of_token = [tiers[token // CHUNK] for token in range(start, end)]
    counts = split_by_tier(reply, start, end, CHUNK)
    assert {tier: count for tier, count in counts.items() if count} == {t: of_token.count(t) for t in set(of_token)}


def test_the_last_token_is_never_loaded():
    assert loadable_end(4, CHUNK, 256) == 255
    assert loadable_end(4, CHUNK, 257) == 256
    assert loadable_end(2, CHUNK, 257) == 128
    assert loadable_end(0, CHUNK, 1) == 0


def test_the_first_failed_token_is_that_of_the_first_bad_block_in_the_table():
    assert first_failed_token([7, 3, 9], {9, 3}, 32) == 32
    assert first_failed_token([7, 3, 9], {1}, 32) is None


def test_tokens_are_packed_as_little_endian_int32():
    assert tokens_to_bytes([1, 258]) == b"\1\0\0\0\2\1\0\0"


def test_an_input_marks_every_chunk_that_holds_a_placeholder_of_it():
    assert [chunk for chunk, _ in extras_of([("h", 60, 70)], CHUNK)] == [0, 1, 2]
    assert [chunk for chunk, _ in extras_of([("h", 64, 64)], CHUNK)] == [1]
    assert extras_of([], CHUNK) == []


def test_chunks_differ_with_the_input_and_with_where_it_stands():
    images = [("a", 10, 20), ("a", 11, 20), ("a", 10, 21), ("b", 10, 20)]
    assert len({extras_of([image], CHUNK)[0][1] for image in images}) == len(images)
    two = [("a", 10, 20), ("b", 30, 20)]
    swapped = [("b", 10, 20), ("a", 30, 20)]
    assert extras_of(two, CHUNK) != extras_of(swapped, CHUNK)
    assert extras_of(two, CHUNK) == extras_of(two[::-1], CHUNK)


def test_the_same_image_further_on_has_the_same_digest_if_it_stands_at_the_same_place_in_its_chunk():
    """Chunks are told apart by their chain; the digest only says what is in the chunk."""
    assert extras_of([("a", 10, 20)], CHUNK)[0][1] == extras_of([("a", 74, 20)], CHUNK)[0][1]


def test_extras_are_part_of_the_content_of_their_chunk_alone():
    tokens = tokens_to_bytes(range(3 * CHUNK))
    plain = contents_of(tokens, CHUNK, {})
    marked = contents_of(tokens, CHUNK, dict(extras_of([("a", 70, 20)], CHUNK)))
    assert [one == other for one, other in zip(plain, marked, strict=True)] == [True, False, True]


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 4))
def test_an_engine_cuts_chunks_without_gap_or_overlap_and_each_shard_has_one_storing_rank(heads, num_tp, num_pp):
    layers_of_stage = 3
    ranges = [(stage * layers_of_stage, (stage + 1) * layers_of_stage) for stage in range(num_pp)]
    layout = KVLayout(num_layers=num_pp * layers_of_stage, num_kv_heads=heads, row_bytes=128)
    tiling = tiling_for(layout.num_layers, heads, num_tp, ranges)
    assert layout.check_tiling(tiling)
    storing = []
    for pp_rank in range(num_pp):
        for tp_rank in range(num_tp):
            number, is_storing = shard_of_rank(heads, num_tp, tp_rank, pp_rank)
            shard = tiling[number]
            assert (shard.layer_start, shard.layer_end) == ranges[pp_rank]
            assert shard.head_start == tp_rank * heads // num_tp  # how vLLM gives heads to ranks
            assert shard.head_end - shard.head_start == max(1, heads // num_tp)
            storing += [number] if is_storing else []
    assert sorted(storing) == list(range(len(tiling)))


def test_planning_needs_neither_vllm_nor_torch():
    code = "import sys, cachetier_connector.plan; sys.exit(bool({'torch', 'vllm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
