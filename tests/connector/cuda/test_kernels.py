"""The kernels against plain index arithmetic and xxhash; see `kernel_cases`. tests/gpu has larger cases."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachetier.core.errors import ConfigError
from cachetier.core.layout import PAGE_BYTES, KVLayout, Shard
from cachetier_connector.cuda.kernels import gather, scatter
from cachetier_connector.cuda.paged_layers import PagedLayers
from tests.connector.cuda.kernel_cases import (
    FORMS,
    Case,
    Paged,
    check_digests,
    check_gather,
    check_paged_digests,
    check_round_trip,
    check_scatter,
    numbers_on,
)

# 8-, 4-, 2- and 1-byte units; rows that are powers of two and others, among them MLA's with scales.
ROWS = [(torch.bfloat16, 16), (torch.float16, 12), (torch.bfloat16, 6), (torch.uint8, 7), (torch.uint8, 656)]


def cases(form: str) -> st.SearchStrategy[Case]:
    """Return cases of one form: any block size, chunk size and border."""

    def case_of(draw: st.DrawFn) -> Case:
        dtype, row = draw(st.sampled_from(ROWS))
        chunk_tokens = draw(st.sampled_from([1, 3, 16, 24, 64] if row < 656 else [1, 5]))
        num_chunks = draw(st.integers(1, 3))
        skip_tokens = draw(st.integers(0, chunk_tokens - 1))
        return Case(
            form,
            dtype,
            row,
            block_tokens=draw(st.sampled_from([1, 5, 16, 128])),
            chunk_tokens=chunk_tokens,
            num_chunks=num_chunks,
            num_layers=draw(st.integers(1, 2)),
            num_heads=draw(st.integers(1, 2)),
            first_token=draw(st.integers(0, 40)),
            skip_tokens=skip_tokens,
            # the last chunk keeps a token, and the first one does
            drop_tokens=draw(st.integers(0, chunk_tokens - 1 - (skip_tokens if num_chunks == 1 else 0))),
            seed=draw(st.integers(0, 99)),
        )

    return st.composite(case_of)()


@pytest.mark.parametrize("form", FORMS)
class TestAnyLayout:
    @pytest.mark.slow
    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_gather_writes_canonical_chunks_and_nothing_else(self, form, device, data):
        check_gather(data.draw(cases(form)), device)

    @pytest.mark.slow
    @settings(max_examples=25, deadline=None)
    @given(data=st.data())
    def test_scatter_writes_the_wanted_tokens_and_no_other_byte(self, form, device, data):
        check_scatter(data.draw(cases(form)), device)

    def test_what_was_gathered_is_scattered_back_the_same(self, form, device):
        check_round_trip(Case(form, torch.bfloat16, 24, block_tokens=16, chunk_tokens=20, first_token=5), device)


@pytest.mark.parametrize(("dtype", "row"), [(torch.bfloat16, 288), (torch.uint8, 656), (torch.uint8, 1152)])
def test_a_head_and_layer_larger_than_a_tile_is_copied_whole(dtype, row, device):
    case = Case("mla", dtype, row, block_tokens=64, chunk_tokens=40, num_chunks=1, num_layers=1, first_token=33)
    check_gather(case, device)
    check_scatter(case, device)


WHOLE, HEADS_OF_ONE, LAYERS_OF_ONE = Shard(0, 4, 0, 3), Shard(2, 4, 0, 3), Shard(0, 4, 1, 3)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [(WHOLE, WHOLE), (WHOLE, HEADS_OF_ONE), (WHOLE, LAYERS_OF_ONE), (HEADS_OF_ONE, Shard(3, 4, 1, 2))],
)
def test_a_rank_scatters_its_part_of_what_another_layout_stored(stored, wanted, device):
    chunk_tokens = 8

    def paged_of(shard, seed):
        heads, layers = shard.head_end - shard.head_start, shard.layer_end - shard.layer_start
        return Paged(Case("nhd", torch.bfloat16, 8, 16, chunk_tokens, 1, layers, heads, seed=seed), device)

    source, target = paged_of(stored, 1), paged_of(wanted, 2)
    layout = KVLayout(num_layers=3, num_kv_heads=4, row_bytes=source.layers.row_bytes)
    unit_bytes = chunk_tokens * layout.row_bytes
    payload = torch.zeros(layout.object_bytes(stored, chunk_tokens), dtype=torch.uint8, device=device)
    address = numbers_on(device, [payload.data_ptr()])
    gather(source.layers, numbers_on(device, source.blocks), 0, 1, chunk_tokens, address)
    unit_offsets = {
        piece.wanted_offset + start: piece.object_offset + start
        for piece in layout.pieces(stored, wanted, chunk_tokens)
        for start in range(0, piece.length_bytes, unit_bytes)
    }
    offsets = numbers_on(device, [unit_offsets[key] for key in sorted(unit_offsets)])
    scatter(target.layers, numbers_on(device, target.blocks), 0, chunk_tokens, 0, chunk_tokens, address, offsets)
    heads = slice(wanted.head_start - stored.head_start, wanted.head_end - stored.head_start)
    layers = slice(wanted.layer_start - stored.layer_start, wanted.layer_end - stored.layer_start)
    assert torch.equal(target.canonical(), source.canonical()[:, heads, layers])


@pytest.mark.parametrize(
    ("page_bytes", "num_chunks"),
    [([PAGE_BYTES] * 9, 2), ([32], 1), ([PAGE_BYTES, 4064, 32, PAGE_BYTES, 2080], 3), ([64, 96, 128, 512, 1024], 1)],
)
def test_digests_are_xxhashs(page_bytes, num_chunks, device):
    check_digests(page_bytes, num_chunks, device)


@pytest.mark.parametrize(
    ("form", "dtype", "row", "chunk_tokens"),
    [
        ("nhd", torch.bfloat16, 64, 40),
        ("mla", torch.uint8, 656, 4),
        pytest.param("hnd", torch.bfloat16, 64, 40, marks=pytest.mark.slow),
        pytest.param("mixed", torch.uint8, 656, 4, marks=pytest.mark.slow),
    ],
)
def test_digests_of_chunks_in_paged_blocks_are_xxhashs(form, dtype, row, chunk_tokens, device):
    """Stripes, pages and the end of a chunk lie across rows, layers and heads."""
    check_paged_digests(Case(form, dtype, row, 16, chunk_tokens, num_chunks=3, first_token=9), device)


@settings(max_examples=6, deadline=None)
@given(st.lists(st.integers(1, 128), min_size=1, max_size=8), st.integers(0, 99))
def test_pages_of_any_length_have_xxhashs_digests(device, lengths, seed):
    check_digests([32 * length for length in lengths], 1, device, seed)


@pytest.mark.parametrize(
    ("row", "start_bytes", "align_bytes", "unit_bytes"),
    [(64, 0, 16, 8), (656, 0, 16, 8), (24, 0, 8, 8), (64, 8, 8, 8), (12, 0, 4, 4), (64, 6, 2, 2), (7, 0, 1, 1)],
)
def test_rows_move_as_the_widest_integers_that_fit(row, start_bytes, align_bytes, unit_bytes):
    memory = torch.zeros(4096, dtype=torch.uint8)
    cache = memory[start_bytes : start_bytes + 4 * row].view(2, 2, row)
    layers = PagedLayers.of([cache])
    assert (layers.align_bytes, layers.unit_bytes) == (align_bytes, unit_bytes)
    assert (layers.block_stride * unit_bytes, layers.token_stride * unit_bytes) == (2 * row, row)


def test_two_threads_may_launch_at_once(device):
    case = Case("nhd", torch.bfloat16, 16, block_tokens=16, chunk_tokens=16)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that they do meet
    try:
        with ThreadPoolExecutor(2) as pool:
            checks = [pool.submit(check, case, device) for check in (check_gather, check_scatter) * 3]
        assert [check.result() for check in checks] == [None] * 6
    finally:
        sys.setswitchinterval(interval_s)


@pytest.mark.parametrize(
    "shapes",
    [[(4, 2, 16, 8), (4, 2, 16, 16)], [(4, 2, 16, 8), (4, 16, 8)], [(2, 4, 2, 16, 8)], [(4, 8)], [(0, 2, 16, 8)]],
)
def test_caches_of_another_form_are_refused(shapes):
    with pytest.raises(ConfigError):
        PagedLayers.of([torch.zeros(shape) for shape in shapes])


def test_rows_that_are_not_contiguous_are_refused():
    with pytest.raises(ConfigError, match="form"):
        PagedLayers.of([torch.zeros(4, 2, 8, 16).transpose(2, 3)])
