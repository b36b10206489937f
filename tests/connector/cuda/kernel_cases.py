"""What the kernels must do, in plain index arithmetic, for paged caches of any form on any device.

Caches and staging lie in byte buffers that are compared as a whole, so a byte written elsewhere is seen.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from cachetier.core.checksum import page_digests
from cachetier.core.layout import PAGE_BYTES, round_up
from cachetier_blend.rotation import Rotary, cos_sin, read_rotary, rotate
from cachetier_connector.cuda.kernels import Digests, Rotation, digest_paged, digest_pages, gather, scatter
from cachetier_connector.cuda.paged_layers import PagedLayers
from cachetier_connector.cuda.stage_plan import STRIPE_BYTES

# Each makes the layers' views `[blocks, heads, tokens, row]` from what lies in memory, and says how it lies there.
Form = Callable[["Case", "Flat"], list[torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """One layout and one transfer."""

    form: str
    dtype: torch.dtype
    row: int
    block_tokens: int
    chunk_tokens: int
    num_chunks: int = 2
    num_layers: int = 2
    num_heads: int = 2
    first_token: int = 0
    skip_tokens: int = 0
    drop_tokens: int = 0
    seed: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens to write: all of the chunks but some at the start and at the end."""
        return self.num_chunks * self.chunk_tokens - self.skip_tokens - self.drop_tokens

    @property
    def num_blocks(self) -> int:
        """Blocks that the tokens of all chunks reach into."""
        return -(-(self.first_token + self.num_chunks * self.chunk_tokens) // self.block_tokens)


class Turn(NamedTuple):
    """How the keys of a case are turned on their way; `dtype` is what the numbers are, whatever the caches say."""

    rotary: Rotary
    dtype: torch.dtype
    shift: int

    @classmethod
    def of(cls, dtype: torch.dtype, is_interleaved: bool, rotary_dim: int, shift: int, first_dim: int = 0) -> "Turn":
        """Turn by the frequencies of Llama 2."""
        sizes: dict[str, int] = {"head_size": rotary_dim, "rotary_dim": rotary_dim, "max_positions": 4096}
        return cls(replace(read_rotary({}, is_interleaved=is_interleaved, **sizes), first_dim=first_dim), dtype, shift)


class Flat:
    """A buffer of random bytes, which views are taken from."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.seed = device, seed
        self.bytes = torch.empty(0, dtype=torch.uint8, device=device)

    def of(self, dtype: torch.dtype, shape: Sequence[int], start_bytes: int = 0) -> torch.Tensor:
        """Return a tensor from byte `start_bytes` on."""
        size = start_bytes + torch.Size(shape).numel() * dtype.itemsize
        generator = torch.Generator().manual_seed(self.seed)
        numbers = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        self.bytes = numbers.to(self.device)
        return self.bytes[start_bytes:].view(dtype).view(shape)


def nhd(case: Case, flat: Flat) -> list[torch.Tensor]:
    """vLLM's default: the heads of a token together."""
    shape = (case.num_layers, case.num_blocks + 3, case.block_tokens, case.num_heads, case.row)
    return list(flat.of(case.dtype, shape).transpose(2, 3))


def hnd(case: Case, flat: Flat) -> list[torch.Tensor]:
    """The tokens of a head together."""
    shape = (case.num_layers, case.num_blocks + 3, case.num_heads, case.block_tokens, case.row)
    return list(flat.of(case.dtype, shape))


def mla(case: Case, flat: Flat) -> list[torch.Tensor]:
    """No heads."""
    return list(flat.of(case.dtype, (case.num_layers, case.num_blocks + 3, case.block_tokens, case.row)))


def mixed(case: Case, flat: Flat) -> list[torch.Tensor]:
    """All layers of a block together."""
    shape = (case.num_blocks + 3, case.num_layers, case.block_tokens, case.num_heads, case.row)
    return list(flat.of(case.dtype, shape).transpose(2, 3).unbind(1))


def gaps(case: Case, flat: Flat) -> list[torch.Tensor]:
    """Something else behind each row, token and block, and an odd start."""
    shape = (case.num_layers, case.num_blocks + 3, case.block_tokens + 1, case.num_heads + 1, case.row + 3)
    whole = flat.of(case.dtype, shape, start_bytes=case.dtype.itemsize)
    return list(whole[:, :, : case.block_tokens, : case.num_heads, : case.row].transpose(2, 3))


FORMS: dict[str, Form] = {form.__name__: form for form in (nhd, hnd, mla, mixed, gaps)}


class Paged:
    """The paged caches of a case."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.flat = Flat(device, case.seed)
        self.caches = FORMS[case.form](case, self.flat)
        self.layers = PagedLayers.of(self.caches)
        self.blocks = random.Random(case.seed).sample(range(len(self.caches[0])), case.num_blocks)

    def row_of_heads(self, layer: int, slot: int) -> torch.Tensor:
        """Return a view of bytes, `[heads, row]`, of the token at `slot`."""
        block, token = self.blocks[slot // self.case.block_tokens], slot % self.case.block_tokens
        cache = self.caches[layer]
        return (cache[block, None, token] if cache.dim() == 3 else cache[block, :, token]).view(torch.uint8)

    def canonical(self) -> torch.Tensor:
        """Return all chunks in the canonical layout: uint8 `[chunks, heads, layers, tokens, row]`."""
        case, layers = self.case, self.layers
        shape = (case.num_chunks, layers.num_heads, case.num_layers, case.chunk_tokens, layers.row_bytes)
        chunks = torch.empty(shape, dtype=torch.uint8)
        for number in range(case.num_chunks * case.chunk_tokens):
            chunk, token = divmod(number, case.chunk_tokens)
            for layer in range(case.num_layers):
                chunks[chunk, :, layer, token] = self.row_of_heads(layer, case.first_token + number)
        return chunks

    def write(self, chunks: torch.Tensor) -> None:
        """Write the wanted tokens of `chunks`, as `canonical` returns them."""
        case = self.case
        for number in range(case.num_tokens):
            chunk, token = divmod(case.skip_tokens + number, case.chunk_tokens)
            for layer in range(case.num_layers):
                self.row_of_heads(layer, case.first_token + number).copy_(chunks[chunk, :, layer, token])


def numbers_on(device: torch.device, values: Sequence[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Return `values` on the device, at an address that is no multiple of 16."""
    return torch.tensor([0, *values], dtype=dtype, device=device)[1:]


def places(case: Case, count: int, size_bytes: int) -> tuple[list[int], int]:
    """Return `count` offsets in no order, multiples of 16 with gaps between them, and where the last gap ends."""
    step = round_up(size_bytes, 16) + 48
    return [number * step for number in random.Random(case.seed).sample(range(count + 1), count)], (count + 1) * step


def programs_of(case: Case) -> int | None:
    """Return how many programs share the work of a case: one for each tile, or a few."""
    return (None, 1, 3)[case.seed % 3]


def check_gather(case: Case, device: torch.device) -> None:
    """Gather and compare all of the staging buffer."""
    expected, paged = Paged(case, torch.device("cpu")), Paged(case, device)
    size_bytes = paged.layers.shard_bytes(case.chunk_tokens)
    offsets, end = places(case, case.num_chunks, size_bytes)
    staged = Flat(device, case.seed + 1).of(torch.uint8, (end,))
    wanted = staged.cpu().clone()
    for offset, chunk in zip(offsets, expected.canonical(), strict=True):
        wanted[offset : offset + size_bytes] = chunk.flatten()
    targets = numbers_on(device, [staged.data_ptr() + offset for offset in offsets])
    blocks = numbers_on(device, paged.blocks)
    where = (case.first_token, case.num_chunks, case.chunk_tokens)
    gather(paged.layers, blocks, *where, targets, num_programs=programs_of(case))
    assert torch.equal(staged.cpu(), wanted)
    assert torch.equal(paged.flat.bytes.cpu(), expected.flat.bytes)


def check_scatter(case: Case, device: torch.device, turn: Turn | None = None) -> None:
    """Scatter chunks whose units are staged in no order, and compare all of the caches' memory.

    Of cases with an even seed, what is staged is digested by the same kernel.
    """
    expected, paged = Paged(case, torch.device("cpu")), Paged(case, device)
    source = Paged(replace(case, seed=case.seed + 2), torch.device("cpu")).canonical()
    if turn is not None:  # random bytes are no good numbers
        source = numbers_like(source, turn.dtype, case.seed)
    unit_bytes = case.chunk_tokens * paged.layers.row_bytes
    num_units = paged.layers.num_heads * case.num_layers
    order = random.Random(case.seed).sample(range(num_units + 1), num_units)
    unit_offsets = [number * unit_bytes for number in order]
    offsets, end = places(case, case.num_chunks, (num_units + 1) * unit_bytes)
    staged = Flat(torch.device("cpu"), case.seed + 1).of(torch.uint8, (end,))
    for offset, chunk in zip(offsets, source, strict=True):
        for unit_offset, unit in zip(unit_offsets, chunk.flatten(0, 1), strict=True):
            staged[offset + unit_offset :][:unit_bytes] = unit.flatten()
    on_device = staged.to(device)
    whole, rest = divmod((num_units + 1) * unit_bytes // STRIPE_BYTES * STRIPE_BYTES, PAGE_BYTES)
    page_bytes = [PAGE_BYTES] * whole + [rest] * (rest > 0)
    target = torch.zeros(case.num_chunks, len(page_bytes), dtype=torch.int64, device=device)
    is_digested = case.seed % 2 == 0 and len(page_bytes) > 0
    scatter(
        paged.layers,
        numbers_on(device, paged.blocks),
        case.first_token,
        case.num_tokens,
        case.skip_tokens,
        case.chunk_tokens,
        numbers_on(device, [on_device.data_ptr() + offset for offset in offsets]),
        numbers_on(device, unit_offsets),
        rotation=turn and Rotation(turn.rotary, turn.dtype, torch.cat(cos_sin(turn.shift, turn.rotary)).to(device)),
        digests=Digests(numbers_on(device, page_bytes, torch.int32), target) if is_digested else None,
    )
    expected.write(
        source if turn is None else rotate(source.view(turn.dtype), turn.shift, turn.rotary).view(torch.uint8)
    )
    if turn is not None:
        check_turned(paged, expected, turn)
    assert torch.equal(paged.flat.bytes.cpu(), expected.flat.bytes)
    assert torch.equal(on_device.cpu(), staged)
    for row, offset in zip(target.cpu() if is_digested else [], offsets, strict=False):
        chunk = memoryview(staged[offset : offset + sum(page_bytes)].numpy())
        assert row.numpy().tobytes() == page_digests(chunk)


def numbers_like(chunks: torch.Tensor, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return the bytes of numbers for `chunks`, from subnormal ones to the largest."""
    shape = (*chunks.shape[:-1], chunks.shape[-1] // dtype.itemsize)
    generator, largest = torch.Generator().manual_seed(seed), min(torch.finfo(dtype).max, 1e4)
    numbers = torch.randn(shape, generator=generator) * largest ** torch.empty(shape).uniform_(
        -1, 1, generator=generator
    )
    return numbers.clamp(-largest, largest).to(dtype).view(torch.uint8)


def check_turned(paged: Paged, expected: Paged, turn: Turn) -> None:
    """Compare the numbers of the wanted tokens, then forget them: float32 may end on the other side of a half."""
    tokens = [each.canonical().permute(0, 3, 1, 2, 4).flatten(0, 1) for each in (paged, expected)]
    found, wanted = (each[: expected.case.num_tokens].contiguous().view(turn.dtype).float() for each in tokens)
    limits, pair = torch.finfo(turn.dtype), 1e-6 * found.abs().amax(dim=-1, keepdim=True)
    assert ((found - wanted).abs() <= limits.eps * wanted.abs().clamp(min=limits.smallest_normal) + pair).all()
    rotated = slice(turn.rotary.first_dim, turn.rotary.first_dim + turn.rotary.rotary_dim)
    if limits.bits < 32:
        assert (found != wanted)[..., rotated].float().mean() < 0.01
    found[..., rotated], wanted[..., rotated] = 0, 0
    assert torch.equal(found, wanted)
    for each in (paged, expected):
        each.write(torch.zeros_like(each.canonical()))


def check_round_trip(case: Case, device: torch.device) -> None:
    """Gather, lose the blocks, scatter to other blocks, gather again."""
    paged = Paged(case, device)
    size_bytes = paged.layers.shard_bytes(case.chunk_tokens)
    staged = torch.zeros(2, case.num_chunks, round_up(size_bytes, 16), dtype=torch.uint8, device=device)
    first, second = (numbers_on(device, [chunk.data_ptr() for chunk in half]) for half in staged)
    layers, num_tokens = paged.layers, case.num_chunks * case.chunk_tokens
    offsets = range(0, size_bytes, case.chunk_tokens * layers.row_bytes)
    blocks, others = (numbers_on(device, numbers) for numbers in (paged.blocks, paged.blocks[::-1]))
    gather(layers, blocks, case.first_token, case.num_chunks, case.chunk_tokens, first)
    paged.flat.bytes.zero_()
    scatter(layers, others, 0, num_tokens, 0, case.chunk_tokens, first, numbers_on(device, offsets))
    gather(layers, others, 0, case.num_chunks, case.chunk_tokens, second)
    assert staged[0].any()
    assert torch.equal(staged[0], staged[1])


def check_paged_digests(case: Case, device: torch.device) -> None:
    """Digest chunks in paged blocks and compare with what xxhash computes of them in the canonical layout."""
    expected, paged = Paged(case, torch.device("cpu")), Paged(case, device)
    whole, rest = divmod(paged.layers.shard_bytes(case.chunk_tokens), PAGE_BYTES)
    page_bytes = [PAGE_BYTES] * whole + [rest] * (rest > 0)
    target = torch.full((case.num_chunks + 2, len(page_bytes)), -7, dtype=torch.int64, device=device)
    digests = Digests(numbers_on(device, page_bytes, torch.int32), target[1:-1])
    digest_paged(paged.layers, numbers_on(device, paged.blocks), case.first_token, case.chunk_tokens, digests)
    found = target.cpu()
    for row, chunk in zip(found[1:-1], expected.canonical(), strict=True):
        assert row.numpy().tobytes() == page_digests(memoryview(chunk.flatten().numpy()))
    assert found[[0, -1]].eq(-7).all()
    assert torch.equal(paged.flat.bytes.cpu(), expected.flat.bytes)


def check_digests(page_bytes: Sequence[int], num_chunks: int, device: torch.device, seed: int = 0) -> None:
    """Digest pages of the given lengths and compare with what xxhash computes."""
    pages = Flat(torch.device("cpu"), seed).of(torch.uint8, (num_chunks + 1, len(page_bytes) + 1, PAGE_BYTES))
    on_device = pages.to(device)
    digests = torch.full((num_chunks + 2, len(page_bytes)), -7, dtype=torch.int64, device=device)
    order = random.Random(seed).sample(range(num_chunks + 1), num_chunks)
    sources = numbers_on(device, [on_device[number].data_ptr() for number in order])
    digest_pages(sources, Digests(numbers_on(device, page_bytes, torch.int32), digests[1:-1]))
    found = digests.cpu()
    for row, number in zip(found[1:-1], order, strict=True):
        parts = [page[:length].numpy() for page, length in zip(pages[number], page_bytes, strict=False)]
        wanted = b"".join(page_digests(memoryview(part.tobytes())) for part in parts)
        assert row.numpy().tobytes() == wanted
    assert found[0].eq(-7).all()
    assert found[-1].eq(-7).all()
