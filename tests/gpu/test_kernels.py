"""The kernels on a real device: the cases of tests/connector/cuda, larger, and what no interpreter shows."""

import random
from dataclasses import replace

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU: the kernels are compiled here", allow_module_level=True)

from cachetier.core.layout import PAGE_BYTES
from cachetier_connector.cuda.copy_kernels import gather_kernel
from cachetier_connector.cuda.kernels import NUMBERS, gather, scatter
from cachetier_connector.cuda.paged_layers import PagedLayers
from tests.connector.cuda.kernel_cases import (
    FORMS,
    Case,
    Paged,
    Turn,
    check_digests,
    check_gather,
    check_round_trip,
    check_scatter,
    numbers_on,
)

pytestmark = pytest.mark.gpu

GIB = 1 << 30
DEVICE = torch.device("cuda", 0)
BFLOAT16, BYTES = torch.bfloat16, torch.uint8
LLAMA = Case("nhd", BFLOAT16, 256, 16, 64, num_chunks=4, num_layers=32, num_heads=8)
MLA = Case("mla", BFLOAT16, 576, 64, 64, num_chunks=2, num_layers=61)
LARGE = {
    "llama": LLAMA,
    "llama in the middle": replace(LLAMA, first_token=7, skip_tokens=5, drop_tokens=9),
    "llama, heads first": replace(LLAMA, form="hnd", first_token=16, skip_tokens=16),
    "llama in fp8": replace(LLAMA, dtype=BYTES, first_token=3),
    "llama, layers of a block together": replace(LLAMA, form="mixed", num_chunks=16),
    "head size 80": replace(LLAMA, row=160, block_tokens=48, chunk_tokens=40, first_token=11),
    "MLA": MLA,
    "MLA in the middle": replace(MLA, first_token=33, skip_tokens=21, drop_tokens=1),
    "MLA in fp8 with scales": replace(MLA, dtype=BYTES, row=656, skip_tokens=1),
    "512 chunks": Case("nhd", BFLOAT16, 16, 16, 16, num_chunks=512, num_layers=4, first_token=5, skip_tokens=3),
    "chunks of 4096 tokens": Case("hnd", BFLOAT16, 32, 32, 4096, num_layers=3, num_heads=3, first_token=1),
}


def any_case(seed: int) -> Case:
    """Return a small case with borders anywhere."""
    draw = random.Random(seed)
    chunk_tokens = draw.choice([1, 3, 16, 24, 64, 100])
    skip_tokens = draw.randrange(chunk_tokens)
    num_chunks = draw.randint(1, 9)
    return Case(
        draw.choice(list(FORMS)),
        draw.choice([BFLOAT16, BYTES]),
        draw.choice([6, 7, 12, 16, 64, 100, 576, 656]),
        block_tokens=draw.choice([1, 5, 16, 128]),
        chunk_tokens=chunk_tokens,
        num_chunks=num_chunks,
        num_layers=draw.randint(1, 5),
        num_heads=draw.randint(1, 5),
        first_token=draw.randrange(200),
        skip_tokens=skip_tokens,
        drop_tokens=draw.randrange(chunk_tokens - (skip_tokens if num_chunks == 1 else 0)),
        seed=seed,
    )


CASES = [pytest.param(case, id=name) for name, case in LARGE.items()]
CASES += [pytest.param(any_case(seed), id=f"any {seed}") for seed in range(16)]


@pytest.mark.parametrize("case", CASES)
class TestCopies:
    def test_gather_writes_canonical_chunks_and_nothing_else(self, case):
        check_gather(case, DEVICE)

    def test_scatter_writes_the_wanted_tokens_and_no_other_byte(self, case):
        check_scatter(case, DEVICE)


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("dtype", NUMBERS)
def test_keys_are_turned_on_their_way(dtype, is_interleaved):
    case = replace(LLAMA, dtype=BYTES if dtype.itemsize == 1 else dtype, first_token=7, skip_tokens=5, drop_tokens=9)
    check_scatter(case, DEVICE, Turn.of(dtype, is_interleaved, 128, 31_000))


@pytest.mark.parametrize("form", FORMS)
def test_what_was_gathered_is_scattered_back_the_same(form):
    check_round_trip(Case(form, BFLOAT16, 256, 16, 64, num_chunks=8, num_layers=8, num_heads=8), DEVICE)


@pytest.mark.parametrize(
    ("page_bytes", "num_chunks"),
    [([PAGE_BYTES] * 2048, 2), ([PAGE_BYTES] * 33, 512), ([32 * length for length in range(1, 129)], 3), ([32], 1)],
)
def test_digests_are_xxhashs(page_bytes, num_chunks):
    check_digests(page_bytes, num_chunks, DEVICE)


@pytest.mark.parametrize(("row_bytes", "size_bytes"), [(7, 3 * GIB), (512, 20 * GIB)])
def test_blocks_beyond_what_32_bits_count_are_reached(row_bytes, size_bytes):
    if torch.cuda.mem_get_info(DEVICE)[0] < size_bytes + GIB:
        pytest.skip(f"needs {size_bytes} bytes of device memory")
    num_blocks = size_bytes // (16 * row_bytes)
    cache = torch.empty(num_blocks * 16 * row_bytes, dtype=BYTES, device=DEVICE).view(num_blocks, 16, row_bytes)
    layers = PagedLayers.of([cache])
    assert num_blocks * layers.block_stride > 1 << 31
    kv = torch.randint(0, 256, (2, 64, row_bytes), dtype=BYTES, device=DEVICE)
    numbers = [num_blocks - 1, 0, num_blocks - 5, num_blocks // 2]
    blocks, offsets = numbers_on(DEVICE, numbers), numbers_on(DEVICE, [0])
    scatter(layers, blocks, 0, 64, 0, 64, numbers_on(DEVICE, [kv[0].data_ptr()]), offsets)
    assert torch.equal(cache[numbers].flatten(0, 1), kv[0])
    gather(layers, blocks, 0, 1, 64, numbers_on(DEVICE, [kv[1].data_ptr()]))
    assert torch.equal(kv[1], kv[0])


def test_one_compiled_kernel_serves_every_number_and_address():
    """Triton would compile for 1 and for multiples of 16 anew, in the middle of a request."""
    case = Case("nhd", BFLOAT16, 16, 16, 16, num_chunks=1, num_layers=7)
    layers = Paged(case, DEVICE).layers
    num_compiled = []
    for first_token, is_aligned in [(16, True), (1, False), (0, False), (7, True)]:
        paged = Paged(replace(case, first_token=first_token), DEVICE)
        layers.layer_ptrs.copy_(paged.layers.layer_ptrs)
        layers.launches.clear()  # or Triton would not look at the arguments again
        staged = torch.zeros(layers.shard_bytes(16), dtype=BYTES, device=DEVICE)
        blocks, targets = (numbers_on(DEVICE, each) for each in (paged.blocks, [staged.data_ptr()]))
        if is_aligned:
            blocks, targets = blocks.clone(), targets.clone()
        gather(layers, blocks, first_token, 1, 16, targets)
        num_compiled.append(len(gather_kernel.device_caches[DEVICE.index][0]))
        expected = Paged(replace(case, first_token=first_token), torch.device("cpu")).canonical()
        assert torch.equal(staged.cpu(), expected.flatten())
    assert num_compiled == num_compiled[:1] * 4


def test_work_stands_in_the_current_stream():
    case = Case("nhd", BFLOAT16, 16, 16, 16, num_chunks=1)
    paged, side = Paged(case, DEVICE), torch.cuda.Stream(DEVICE)
    expected = Paged(case, torch.device("cpu")).canonical()
    staged = torch.zeros(paged.layers.shard_bytes(16), dtype=BYTES, device=DEVICE)
    blocks, targets = numbers_on(DEVICE, paged.blocks), numbers_on(DEVICE, [staged.data_ptr()])
    torch.cuda.synchronize(DEVICE)
    for _ in range(2):  # the first launch compiles
        staged.zero_()
        torch.cuda.synchronize(DEVICE)
        with torch.cuda.stream(side):
            torch.cuda._sleep(1_000_000_000)
            gather(paged.layers, blocks, 0, 1, 16, targets)
        was_empty = not staged.any()
        side.synchronize()
        assert torch.equal(staged.cpu(), expected.flatten())
    assert was_empty
