"""The CPU copy engine: canonical bytes out of any packing, block size and parallel layout, and back in."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cachetier.core.errors import ConfigError
from cachetier.core.layout import KVLayout, Shard
from cachetier_blend.rotation import Rotary, rotate
from cachetier_connector.copy_cpu import CpuCopyEngine, as_integers, learn_packing
from cachetier_connector.plan import shard_of_rank, tiling_for

HEAD_SIZE, LAYERS, HEADS = 32, 4, 4
LAYOUT = KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, row_bytes=HEAD_SIZE * 2 * 2)


def rows_in_order(block_tokens: int) -> torch.Tensor:
    return torch.arange(block_tokens * HEAD_SIZE).view(block_tokens, HEAD_SIZE)


def transposed(block_tokens: int) -> torch.Tensor:
    return torch.arange(block_tokens * HEAD_SIZE).view(HEAD_SIZE, block_tokens).T.contiguous()


def in_pairs(block_tokens: int) -> torch.Tensor:
    """Two tokens' elements lie side by side, as AMX wants its second operand."""
    return (
        torch.arange(block_tokens * HEAD_SIZE)
        .view(block_tokens // 2, HEAD_SIZE, 2)
        .transpose(1, 2)
        .reshape(block_tokens, HEAD_SIZE)
    )


def at_random(block_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(block_tokens)
    return torch.randperm(block_tokens * HEAD_SIZE, generator=generator).view(block_tokens, HEAD_SIZE)


PACKINGS = [rows_in_order, transposed, in_pairs, at_random]


class Paged:
    """Paged blocks of one rank, written and read one element at a time from the definition of the packing."""

    def __init__(self, shard: Shard, block_tokens: int, packing: tuple, num_blocks: int, *, is_strided: bool = False):
        heads = shard.head_end - shard.head_start
        shape = (num_blocks, heads, block_tokens, 2 * HEAD_SIZE)
        self.shard, self.block_tokens = shard, block_tokens
        self.packing = tuple(make(block_tokens) for make in packing)
        num_layers = shard.layer_end - shard.layer_start
        if is_strided:  # all layers of a block lie together
            whole = torch.zeros(num_blocks, num_layers, *shape[1:], dtype=torch.bfloat16)
            self.caches = [whole[:, layer] for layer in range(num_layers)]
        else:
            self.caches = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(num_layers)]
        self.engine = CpuCopyEngine(self.caches, self.packing, LAYOUT, shard)

    def halves(self, layer: int) -> torch.Tensor:
        cache = as_integers(self.caches[layer])
        return cache.reshape(*cache.shape[:2], 2, -1)

    def write(self, kv: torch.Tensor, blocks: list[int]) -> None:
        """Write `kv`, int16 `[heads, layers, tokens, 2, head_size]` of the whole model."""
        for layer, head, half in itertools.product(range(len(self.caches)), range(self.caches[0].shape[1]), (0, 1)):
            cache = as_integers(self.caches[layer])
            rows = kv[self.shard.head_start + head, self.shard.layer_start + layer, :, half]
            for number, block in enumerate(blocks):
                part = rows[number * self.block_tokens : (number + 1) * self.block_tokens]
                flat = torch.zeros(self.block_tokens * HEAD_SIZE, dtype=torch.int16)
                flat[self.packing[half][: len(part)].flatten()] = part.flatten()
                cache[block, head].view(2, -1)[half] = flat

    def read(self, blocks: list[int], num_tokens: int) -> torch.Tensor:
        """Return what `write` wrote, of this rank's shard."""
        heads, layers = self.caches[0].shape[1], len(self.caches)
        kv = torch.zeros(heads, layers, len(blocks) * self.block_tokens, 2, HEAD_SIZE, dtype=torch.int16)
        for layer, head, half in itertools.product(range(layers), range(heads), (0, 1)):
            for number, block in enumerate(blocks):
                flat = as_integers(self.caches[layer])[block, head].reshape(2, -1)[half]
                start = number * self.block_tokens
                kv[head, layer, start : start + self.block_tokens, half] = flat[self.packing[half]]
        return kv[:, :, :num_tokens]


def kv_of(seed: int, num_tokens: int) -> torch.Tensor:
    """Return logical KV with every bit pattern, NaNs included."""
    numbers = np.random.default_rng(seed).integers(-(1 << 15), 1 << 15, (HEADS, LAYERS, num_tokens, 2, HEAD_SIZE))
    return torch.from_numpy(numbers.astype(np.int16))


def canonical(kv: torch.Tensor, chunk_tokens: int) -> list[bytes]:
    """Return the chunks of `kv` in the canonical layout, from its definition."""
    chunks = range(0, kv.shape[2] - chunk_tokens + 1, chunk_tokens)
    return [kv[:, :, start : start + chunk_tokens].contiguous().numpy().tobytes() for start in chunks]


def assembled(shards: dict[int, torch.Tensor], tiling: list[Shard], number: int, chunk_tokens: int) -> bytes:
    """Return chunk `number` as an engine with one rank would read it from the objects of `tiling`."""
    wanted = bytearray(LAYOUT.object_bytes(LAYOUT.whole(), chunk_tokens))
    for index, stored in enumerate(tiling):
        payload = shards[index][number].numpy().tobytes()
        for source, target, length in LAYOUT.pieces(stored, LAYOUT.whole(), chunk_tokens):
            wanted[target : target + length] = payload[source : source + length]
    return bytes(wanted)


@pytest.mark.parametrize(("num_tp", "num_pp"), [(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("block_tokens", [16, 32, 64, 128])
def test_every_parallel_layout_and_block_size_gathers_the_same_canonical_bytes(num_tp, num_pp, block_tokens):
    chunk_tokens, num_chunks = 64, 3
    kv = kv_of(1, num_chunks * chunk_tokens)
    blocks = random.Random(block_tokens).sample(range(20), -(-kv.shape[2] // block_tokens))
    tiling = tiling_for(
        LAYERS, HEADS, num_tp, [(n * LAYERS // num_pp, (n + 1) * LAYERS // num_pp) for n in range(num_pp)]
    )
    shards: dict[int, torch.Tensor] = {}
    for rank in range(num_tp * num_pp):
        number, is_storing = shard_of_rank(HEADS, num_tp, rank % num_tp, rank // num_tp)
        packing = PACKINGS[rank % 4], PACKINGS[(rank // 2 + block_tokens // 16) % 4]
        paged = Paged(tiling[number], block_tokens, packing, 20)
        paged.write(kv, blocks)
        gathered = paged.engine.gather(blocks, 0, num_chunks, chunk_tokens)
        if is_storing:
            shards[number] = gathered
        else:
            assert torch.equal(gathered, shards[number])
    expected = canonical(kv, chunk_tokens)
    assert [assembled(shards, tiling, number, chunk_tokens) for number in range(num_chunks)] == expected


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_scatter_writes_the_wanted_tokens_and_no_other_slot(data):
    draw = data.draw
    block_tokens = draw(st.sampled_from([16, 32, 64, 128]))
    chunk_tokens = draw(st.sampled_from([16, 64]))
    packing = draw(st.sampled_from(PACKINGS)), draw(st.sampled_from(PACKINGS))
    shard = draw(st.sampled_from([LAYOUT.whole(), Shard(1, 3, 0, 4), Shard(0, 4, 2, 4)]))
    num_chunks = draw(st.integers(1, 4))
    skip = draw(st.integers(0, chunk_tokens - 1))
    num_tokens = draw(st.integers(1, num_chunks * chunk_tokens - skip))
    first = draw(st.integers(0, block_tokens - 1))
    blocks = random.Random(draw(st.integers(0, 9))).sample(range(20), -(-(first + num_tokens) // block_tokens))
    paged = Paged(shard, block_tokens, packing, 20, is_strided=draw(st.booleans()))
    before = kv_of(2, len(blocks) * block_tokens)
    paged.write(before, blocks)
    others = {block: as_integers(paged.caches[0])[block].clone() for block in set(range(20)) - set(blocks)}

    new = kv_of(3, num_chunks * chunk_tokens)[shard.head_start : shard.head_end, shard.layer_start : shard.layer_end]
    objects = canonical(new, chunk_tokens)
    shards = torch.from_numpy(np.frombuffer(b"".join(objects), np.uint8).copy()).view(num_chunks, -1)
    paged.engine.scatter(shards, chunk_tokens, skip, blocks, first, num_tokens)

    expected = before[shard.head_start : shard.head_end, shard.layer_start : shard.layer_end].clone()
    expected[:, :, first : first + num_tokens] = new[:, :, skip : skip + num_tokens]
    assert torch.equal(paged.read(blocks, len(blocks) * block_tokens), expected)
    for block, content in others.items():
        assert torch.equal(as_integers(paged.caches[0])[block], content)


@pytest.mark.parametrize("first_token", [0, 16, 64, 96])
def test_gather_starts_within_a_block(first_token):
    kv = kv_of(4, 384)
    paged = Paged(LAYOUT.whole(), 128, (transposed, rows_in_order), 20)
    blocks = [7, 2, 11]
    paged.write(kv, blocks)
    gathered = paged.engine.gather(blocks, first_token, 4, 64)
    expected = canonical(kv[:, :, first_token : first_token + 256], 64)
    assert [bytes(chunk.numpy()) for chunk in gathered] == expected


@pytest.mark.parametrize("packing", list(itertools.product(PACKINGS, PACKINGS)))
@pytest.mark.parametrize("block_tokens", [16, 128])
def test_any_order_of_elements_is_learnt(packing, block_tokens):
    offsets = [make(block_tokens) for make in packing]

    def write_block(*rows):
        block = torch.zeros(1, 1, block_tokens, 2 * HEAD_SIZE, dtype=torch.bfloat16)
        for half in (0, 1):
            block.view(2, -1)[half, offsets[half].flatten()] = rows[half].flatten()
        return block

    learnt = learn_packing(write_block, block_tokens, HEAD_SIZE, torch.bfloat16)
    assert all(torch.equal(one, other) for one, other in zip(learnt, offsets, strict=True))


@pytest.mark.parametrize("isa", ["vec", "vec16", "amx"])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("block_tokens", [32, 64, 128])
@pytest.mark.parametrize("head_size", [32, 64])
def test_what_vllms_kernel_writes_is_gathered_as_rows_and_scattered_back_the_same(
    isa, kv_dtype, block_tokens, head_size
):
    ops = pytest.importorskip("vllm._custom_ops")
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX")
    if isa == "vec16" and kv_dtype == "fp8":
        pytest.skip("vLLM has no such kernel")
    cache_dtype = torch.bfloat16 if kv_dtype == "auto" else torch.uint8

    def write(keys, values, block_ids, num_blocks):
        cache = torch.zeros(num_blocks, keys.shape[1], block_tokens, 2 * head_size, dtype=cache_dtype)
        halves = cache.view(num_blocks, keys.shape[1], 2 * block_tokens, head_size).chunk(2, dim=2)
        slots = torch.tensor([b * block_tokens + slot for b in block_ids for slot in range(block_tokens)])[: len(keys)]
        ops.cpu_attn_reshape_and_cache(
            keys, values, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype=kv_dtype
        )
        return cache

    learnt = learn_packing(lambda k, v: write(k, v, [0], 1), block_tokens, head_size, torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn(192, HEADS, head_size, generator=generator).to(torch.bfloat16) for _ in range(2))
    blocks = [5, 1, 3, 0, 7, 2][: -(-192 // block_tokens)]
    cache = write(keys, values, blocks, 8)
    engine = CpuCopyEngine([cache], learnt, LAYOUT, LAYOUT.whole())
    gathered = engine.gather(blocks, 0, 3, 64)

    rows = gathered.view(torch.bfloat16 if kv_dtype == "auto" else torch.float8_e4m3fn)
    rows = rows.view(3, HEADS, 64, 2, head_size).transpose(1, 2).reshape(192, HEADS, 2, head_size)
    expected = torch.stack([keys, values], dim=2)
    if kv_dtype == "auto":
        assert torch.equal(rows, expected)
    else:
        assert torch.allclose(rows.float(), expected.float(), rtol=0.13, atol=0.002)  # it cuts off

    other = torch.zeros_like(cache)
    CpuCopyEngine([other], learnt, LAYOUT, LAYOUT.whole()).scatter(gathered, 64, 0, blocks, 0, 192)
    written = as_integers(write(keys, values, blocks, 8))
    assert torch.equal(as_integers(other), written)


def test_a_backend_that_does_more_than_reorder_is_refused():
    def doubles_the_first_row(keys, values):
        block = torch.cat([keys, values], dim=0).view(1, 1, 32, 2 * HEAD_SIZE).clone()
        block.view(2, 32, HEAD_SIZE)[0, 1] = block.view(2, 32, HEAD_SIZE)[0, 0]
        return block

    with pytest.raises(ConfigError, match="reorder"):
        learn_packing(doubles_the_first_row, 32, HEAD_SIZE, torch.bfloat16)


class TestShifts:
    """Chunks that stand elsewhere than where they were computed; loads of them are in `test_loader`."""

    CHUNK, BLOCK = 64, 32
    ROTARY = Rotary(tuple(0.5**n for n in range(HEAD_SIZE // 2)), is_interleaved=False, rotary_dim=HEAD_SIZE)

    @pytest.mark.parametrize("packing", [(transposed, rows_in_order), (at_random, at_random)])
    @pytest.mark.parametrize("shift", [1, 37, 1000, -64])
    def test_only_keys_are_turned_and_by_the_shift(self, packing, shift):
        paged = Paged(LAYOUT.whole(), self.BLOCK, packing, 4)
        paged.engine.use_rotary(self.ROTARY)
        generator = torch.Generator().manual_seed(1)
        kv = torch.randn(HEADS, LAYERS, 2 * self.CHUNK, 2, HEAD_SIZE, generator=generator).to(torch.bfloat16)
        shards = torch.stack(
            [torch.frombuffer(bytearray(chunk), dtype=torch.uint8) for chunk in canonical(as_integers(kv), self.CHUNK)]
        )
        paged.engine.rotate(shards, self.CHUNK, shift)
        found = shards.view(torch.bfloat16).view(2, HEADS, LAYERS, self.CHUNK, 2, HEAD_SIZE)
        before = kv.unflatten(2, (2, self.CHUNK)).movedim(2, 0)
        assert torch.equal(found[..., 1, :], before[..., 1, :])
        assert torch.equal(found[..., 0, :], rotate(before[..., 0, :], shift, self.ROTARY))
        assert not torch.equal(found[..., 0, :], before[..., 0, :])
