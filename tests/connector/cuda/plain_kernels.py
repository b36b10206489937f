"""The kernels in plain index arithmetic on CPU memory: what Triton's interpreter takes 100 ms for, in microseconds.

`test_kernels` holds the real ones to the same definition; `test_copy_cuda` runs a part of its cases with those.
"""

import ctypes

import torch

from cachetier.core.checksum import page_digests
from cachetier.core.layout import PAGE_BYTES
from cachetier_connector.cuda.paged_layers import PagedLayers


def memory_at(address: int, num_bytes: int) -> torch.Tensor:
    """Return a view of memory, uint8."""
    return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)


def places(layers: PagedLayers, blocks: torch.Tensor, first_token: int, num_tokens: int) -> tuple[torch.Tensor, ...]:
    """Return block and slot of each token."""
    slots = first_token + torch.arange(num_tokens)
    return blocks[slots // layers.block_tokens], slots % layers.block_tokens


def gather(layers, blocks, first_token, num_chunks, chunk_tokens, targets, stream=None, num_programs=None):
    if not num_chunks:
        return
    block, slot = places(layers, blocks, first_token, num_chunks * chunk_tokens)
    rows = torch.stack([cache.view(torch.int16)[block, :, slot] for cache in layers.caches])
    chunks = rows.unflatten(1, (num_chunks, chunk_tokens)).permute(1, 3, 0, 2, 4).contiguous()
    for chunk, target in zip(chunks, targets.tolist(), strict=True):
        data = chunk.view(torch.uint8).flatten()
        memory_at(target, data.numel()).copy_(data)


def scatter(
    layers,
    blocks,
    first_token,
    num_tokens,
    skip_tokens,
    chunk_tokens,
    sources,
    unit_offsets,
    stream=None,
    rotation=None,
    digests=None,
):
    if digests is not None:
        digest_pages(sources, digests)
    unit_bytes, row = chunk_tokens * layers.row_bytes, layers.row_bytes // 2
    num_chunks = -(-(skip_tokens + num_tokens) // chunk_tokens)
    assert len(sources) == num_chunks
    units = [
        memory_at(source + offset, unit_bytes).view(torch.int16).view(chunk_tokens, row)
        for source in sources.tolist()
        for offset in unit_offsets.tolist()
    ]
    staged = torch.stack(units).view(num_chunks, layers.num_heads, layers.num_layers, chunk_tokens, row)
    tokens = staged.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, skip_tokens : skip_tokens + num_tokens]
    if rotation is not None:
        tokens = turned(tokens, rotation)
    block, slot = places(layers, blocks, first_token, num_tokens)
    for cache, rows in zip(layers.caches, tokens, strict=True):
        cache.view(torch.int16)[block, :, slot] = rows


def turned(rows, rotation):
    """Return rows `[..., K | V]` with NeoX pairs of K turned by the angles of the rotation's table."""
    assert not rotation.rotary.is_interleaved
    half = rotation.rotary.rotary_dim // 2
    cos, sin = rotation.table[:half], rotation.table[half : 2 * half]
    keys, rest = rows.view(rotation.dtype).split([2 * half, rows.shape[-1] - 2 * half], dim=-1)
    first, second = keys.float().chunk(2, dim=-1)
    keys = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((keys.to(rotation.dtype), rest), dim=-1).view(rows.dtype)


def digest_pages(sources, digests, stream=None):
    for row, source in zip(digests.target, sources.tolist(), strict=True):
        parts = (memory_at(source + n * PAGE_BYTES, size) for n, size in enumerate(digests.page_bytes.tolist()))
        data = b"".join(page_digests(memoryview(part.numpy()).cast("B")) for part in parts)
        row.copy_(torch.frombuffer(bytearray(data), dtype=torch.int64))


def digest_paged(layers, blocks, first_token, chunk_tokens, digests, stream=None):
    num_chunks, size = len(digests.target), layers.shard_bytes(chunk_tokens)
    chunks = torch.empty(num_chunks, size, dtype=torch.uint8)
    targets = torch.tensor([chunk.data_ptr() for chunk in chunks])
    gather(layers, blocks, first_token, num_chunks, chunk_tokens, targets)
    assert sum(digests.page_bytes.tolist()) == size
    for row, chunk in zip(digests.target, chunks, strict=True):
        row.copy_(torch.frombuffer(bytearray(page_digests(memoryview(chunk.numpy()))), dtype=torch.int64))


def of(module):
    """Return those that stand in for kernels of `module`, by name."""
    kernels = (gather, scatter, digest_pages, digest_paged)
    return {kernel.__name__: kernel for kernel in kernels if hasattr(module, kernel.__name__)}
