"""The work of the copy engine that runs on the device: gather, scatter, digests. One launch each.

Each function enqueues on a stream of the current device, which must be the tensors', and does not wait: the caller
keeps every tensor and address alive and unchanged until the stream has passed. Nothing is checked on the
device: block numbers, addresses and sizes must be right. Addresses are multiples of 16, of memory of the device or of
registered host memory. With TRITON_INTERPRET=1 set before this is imported, everything runs on CPU tensors.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from cachetier_blend.rotation import Rotary
from cachetier_connector.cuda.copy_kernels import gather_kernel, scatter_kernel
from cachetier_connector.cuda.digest_kernel import PAGES_A_WARP, digest_kernel, digest_paged_kernel
from cachetier_connector.cuda.launch import Launch
from cachetier_connector.cuda.paged_layers import PagedLayers

TILE_UNITS_MAX = 2048  # 16 KiB in 16 accesses a thread: enough in flight to fill the memory's pipe
COPY_WARPS = 4
DIGEST_WARPS = 1
WORD_BYTES = 8
UNITS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}

# How types differ from float32, as `rotate_kernel` has it: up, scale, largest. Eight bits saturate, others overflow.
NUMBERS = {
    torch.float32: (0, 1.0, 0x7F800000),
    torch.bfloat16: (16, 1.0, 0x7F80),
    torch.float16: (13, 2.0**112, 0x7C00),
    torch.float8_e5m2: (21, 2.0**112, 0x7B),
    torch.float8_e4m3fn: (20, 2.0**120, 0x7E),
}
NOT_ROTATED = (0, 0, False, 0, 1.0, 0)


class Digests(NamedTuple):
    """What to digest of staged chunks, and where to.

    Attributes:
        page_bytes: int32 `[pages]` on the device: the length of each page, the same for all chunks; multiples of 32
            from 32 to 4096. Page `p` starts at `sources[c] + p * 4096` also after a shorter one.
        target: int64 `[num_chunks, pages]`, contiguous, on the device or in pinned memory: where the digests go (their
            bits).
    """

    page_bytes: torch.Tensor
    target: torch.Tensor


class Rotation(NamedTuple):
    """How to turn K on its way to paged blocks.

    Attributes:
        rotary: how the model rotates keys; K is the first part of a row.
        dtype: of the numbers of a row, one of `NUMBERS`; a cache of eight-bit numbers may call itself uint8.
        table: float32 on the device, the cosines and then the sines of `cachetier_blend.rotation.cos_sin`.
    """

    rotary: Rotary
    dtype: torch.dtype
    table: torch.Tensor


def gather(
    layers: PagedLayers,
    blocks: torch.Tensor,
    first_token: int,
    num_chunks: int,
    chunk_tokens: int,
    targets: torch.Tensor,
    stream: int | None = None,
    num_programs: int | None = None,
) -> None:
    """Copy consecutive chunks out of paged blocks.

    Args:
        layers: the paged caches.
        blocks: int64 `[n]` on the device, consecutive blocks of one request.
        first_token: where the first chunk starts, counted from the start of the first block.
        num_chunks: how many chunks, at least 1.
        chunk_tokens: tokens a chunk.
        targets: int64 `[num_chunks]` on the device: the address each chunk goes to, `layers.shard_bytes(chunk_tokens)`
            bytes in the canonical layout.
        stream: the driver's handle; the current stream without it.
        num_programs: how many programs share the work; without it, as many as there are tiles.
    """
    launch, num_tiles = _copy_launch(layers, gather_kernel, chunk_tokens, layers.unit_bytes)
    grid = (num_programs or num_tiles * num_chunks, 1, 1)
    launch(grid, layers.layer_ptrs, blocks, targets, first_token, num_chunks, stream=stream)


def scatter(
    layers: PagedLayers,
    blocks: torch.Tensor,
    first_token: int,
    num_tokens: int,
    skip_tokens: int,
    chunk_tokens: int,
    sources: torch.Tensor,
    unit_offsets: torch.Tensor,
    stream: int | None = None,
    rotation: Rotation | None = None,
    digests: Digests | None = None,
) -> None:
    """Copy tokens of consecutive chunks into paged blocks. No byte of any other slot is touched.

    Args:
        layers: the paged caches.
        blocks: int64 `[n]` on the device, consecutive blocks of one request.
        first_token: where the first wanted token goes, counted from the start of the first block.
        num_tokens: how many tokens to write, at least 1.
        skip_tokens: tokens at the start of the first chunk that are not wanted.
        chunk_tokens: tokens a chunk.
        sources: int64 `[num_chunks]` on the device: the address of each chunk's staged bytes; as many chunks as
            `skip_tokens + num_tokens` reach into.
        unit_offsets: int64 `[num_heads * num_layers]` on the device, multiples of the row's bytes: token `t` of
            `(head, layer)` of chunk `c` is at `sources[c] + unit_offsets[head * num_layers + layer] + t * row_bytes`.
        stream: the driver's handle; the current stream without it.
        rotation: turn K by the same angles for all tokens.
        digests: do also what `digest_pages` does, at the same time.
    """
    num_chunks = -(-(skip_tokens + num_tokens) // chunk_tokens)
    if rotation is None:
        unit_bytes, table, how = layers.unit_bytes, unit_offsets, NOT_ROTATED  # a table that is not read
    else:
        rotary, dtype, table = rotation
        unit_bytes, half = dtype.itemsize, rotary.rotary_dim // 2
        how = (rotary.first_dim, half, rotary.is_interleaved, *NUMBERS[dtype])
    pages_a_program = PAGES_A_WARP * COPY_WARPS
    launch, num_tiles = _copy_launch(layers, scatter_kernel, chunk_tokens, unit_bytes, pages_a_program, *how)
    page_bytes, target, num_pages = unit_offsets, unit_offsets, 0  # not read
    if digests is not None:
        page_bytes, target = digests
        num_pages = target.shape[1]
        num_tiles += -(-num_pages // pages_a_program)
    launch(
        (num_tiles, num_chunks, 1),
        layers.layer_ptrs,
        blocks,
        sources,
        unit_offsets,
        table,
        page_bytes,
        target,
        first_token,
        num_tokens,
        skip_tokens,
        num_pages,
        stream=stream,
    )


def digest_pages(sources: torch.Tensor, digests: Digests, stream: int | None = None) -> None:
    """Compute XXH64 (seed 0) of the 4 KiB pages of staged chunks, bit for bit what xxhash computes.

    Args:
        sources: int64 `[num_chunks]` on the device: the address of each chunk's staged bytes.
        digests: of what, and where to.
        stream: the driver's handle; the current stream without it.
    """
    num_chunks, num_pages = digests.target.shape
    grid = (-(-num_pages // (PAGES_A_WARP * DIGEST_WARPS)), num_chunks, 1)
    _digest_launch(sources.device)(grid, sources, *digests, num_pages, stream=stream)


def digest_paged(
    layers: PagedLayers,
    blocks: torch.Tensor,
    first_token: int,
    chunk_tokens: int,
    digests: Digests,
    stream: int | None = None,
) -> None:
    """Compute the digests of consecutive chunks that stand in paged blocks, as `digest_pages` would of them gathered.

    Args:
        layers: the paged caches; their `unit_bytes` must be 8.
        blocks: int64 `[n]` on the device, consecutive blocks of one request.
        first_token: where the first chunk starts, counted from the start of the first block.
        chunk_tokens: tokens a chunk.
        digests: of what, and where to; the pages are those of `layers.shard_bytes(chunk_tokens)` bytes.
        stream: the driver's handle; the current stream without it.
    """
    num_chunks, num_pages = digests.target.shape
    key = ("digest_paged", chunk_tokens)
    if key not in layers.launches:
        assert layers.unit_bytes == WORD_BYTES, "digests are of words of eight bytes"
        constants = (
            PAGES_A_WARP * DIGEST_WARPS,
            chunk_tokens,
            layers.num_layers,
            layers.row_bytes // WORD_BYTES,
            layers.block_tokens,
            layers.block_stride,
            layers.head_stride,
            layers.token_stride,
        )
        layers.launches[key] = Launch(digest_paged_kernel, constants, DIGEST_WARPS), 0
    launch, _ = layers.launches[key]
    grid = (-(-num_pages // (PAGES_A_WARP * DIGEST_WARPS)), num_chunks, 1)
    launch(grid, layers.layer_ptrs, blocks, *digests, first_token, num_pages, stream=stream)


def _copy_launch(
    layers: PagedLayers, kernel: Any, chunk_tokens: int, unit_bytes: int, *more: Any
) -> tuple[Launch, int]:
    """Return the launch that moves units of `unit_bytes`, and how many tiles a chunk has."""
    key = (kernel.__name__, chunk_tokens, *more)
    found = layers.launches.get(key)
    if found is None:
        row_units, scale = layers.row_bytes // unit_bytes, layers.unit_bytes // unit_bytes
        num_units = chunk_tokens * row_units
        tile_units = min(TILE_UNITS_MAX, int(triton.next_power_of_2(num_units)))
        constants = (
            chunk_tokens,
            layers.num_layers,
            layers.num_heads,
            row_units,
            tile_units,
            UNITS[unit_bytes],
            layers.align_bytes,
            layers.block_tokens,
            layers.block_stride * scale,
            layers.head_stride * scale,
            layers.token_stride * scale,
            *more,
        )
        num_tiles = layers.num_heads * layers.num_layers * -(-num_units // tile_units)
        found = layers.launches[key] = Launch(kernel, constants, COPY_WARPS), num_tiles
    return found


@cache
def _digest_launch(device: torch.device) -> Launch:
    """Return the launch for `device`: a compiled kernel belongs to one."""
    return Launch(digest_kernel, (PAGES_A_WARP * DIGEST_WARPS,), DIGEST_WARPS)
