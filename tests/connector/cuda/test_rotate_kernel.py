"""Keys that are turned on their way to paged blocks, against `cachetier_blend.rotation`; see `kernel_cases`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachetier_blend.rotation import cos_sin, rotate
from cachetier_connector.cuda.kernels import NUMBERS, Rotation, scatter
from cachetier_connector.cuda.paged_layers import PagedLayers
from tests.connector.cuda.kernel_cases import FORMS, Case, Turn, check_scatter, numbers_on

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_wanted_keys_are_turned_and_no_other_byte_is_touched(form, device, data):
    draw = data.draw
    dtype = draw(st.sampled_from(list(NUMBERS)))
    half, first_dim = draw(st.integers(1, 8)), draw(st.sampled_from([0, 0, 5]))
    row = first_dim + 2 * half + draw(st.integers(0, 20))
    chunk_tokens = draw(st.sampled_from([1, 3, 16, 24]))
    skip_tokens = draw(st.integers(0, chunk_tokens - 1))
    case = Case(
        form,
        draw(st.sampled_from([dtype, torch.uint8])) if dtype in EIGHT_BITS else dtype,
        row,
        block_tokens=draw(st.sampled_from([1, 5, 16])),
        chunk_tokens=chunk_tokens,
        first_token=draw(st.integers(0, 40)),
        skip_tokens=skip_tokens,
        drop_tokens=draw(st.integers(0, chunk_tokens - 1)),
        seed=draw(st.integers(0, 99)),
    )
    shift = draw(st.integers(-100_000, 100_000))
    check_scatter(case, device, Turn.of(dtype, draw(st.booleans()), 2 * half, shift, first_dim))


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_heads_of_128_numbers_are_turned(dtype, is_interleaved, device):
    case = Case("nhd", torch.uint8 if dtype in EIGHT_BITS else dtype, 256, 16, 64, num_layers=1, first_token=7)
    check_scatter(case, device, Turn.of(dtype, is_interleaved, 128, 1234))


def scatter_row(layers: PagedLayers, row: torch.Tensor, rotation: Rotation | None) -> torch.Tensor:
    """Return what becomes of one row, which is all that the caches hold."""
    ones = [numbers_on(row.device, numbers) for numbers in ([0], [row.data_ptr()], [0])]
    scatter(layers, ones[0], 0, 1, 0, 1, ones[1], ones[2], rotation=rotation)
    return layers.caches[0].flatten().cpu()


def test_what_was_prepared_for_one_rotation_is_not_used_for_another(device):
    layers = PagedLayers.of([torch.zeros(1, 1, 1, 16, device=device)])
    row = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(device)
    turns = [Turn.of(torch.float32, is_interleaved, 8, shift) for is_interleaved in (False, True) for shift in (1, 700)]
    turns += [Turn.of(torch.float32, False, 16, 1), Turn.of(torch.float32, False, 8, 1, first_dim=8)]
    for rotary, dtype, shift in turns:
        assert torch.equal(scatter_row(layers, row, None), row.cpu())
        found = scatter_row(layers, row, Rotation(rotary, dtype, torch.cat(cos_sin(shift, rotary)).to(device)))
        assert torch.allclose(found, rotate(row, shift, rotary).cpu(), atol=1e-6)


@pytest.mark.parametrize("dtype", [dtype for dtype in NUMBERS if dtype.itemsize < 4])
def test_numbers_in_the_middle_of_two_become_the_even_one(dtype, device):
    """Angles never lead there, so cosines are made up: 1 times them lies between two numbers of the type."""
    cos = 1 + (2 * torch.arange(8) + 1) * torch.finfo(dtype).eps / 2
    table = torch.cat([cos, torch.zeros(8)]).to(device)
    layers = PagedLayers.of([torch.zeros(1, 1, 1, 16, dtype=dtype, device=device)])
    rotation = Rotation(Turn.of(dtype, False, 16, 0).rotary, dtype, table)
    found = scatter_row(layers, torch.ones(16, device=device).to(dtype), rotation)
    assert found.float().tolist() == torch.cat([cos, cos]).to(dtype).float().tolist()
