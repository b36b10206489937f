"""Triton: rows between paged blocks and the canonical layout `[head][layer][token][row]`.

A program moves a tile of one head and layer of one chunk, which is contiguous in the canonical layout, so the tile
needs to respect no border: each of its units looks up its own token's place. Heads vary fastest over the programs,
since they are neighbours in a block. Nothing is compiled before the first launch.
"""

import triton
import triton.language as tl


@triton.jit
def paged_rows(
    layer_ptrs,
    blocks,
    layer,
    head,
    slot,
    is_wanted,
    unit: tl.constexpr,
    align_bytes: tl.constexpr,
    block_tokens: tl.constexpr,
    block_stride: tl.constexpr,
    head_stride: tl.constexpr,
    token_stride: tl.constexpr,
):
    """Return pointers to the rows at `slot` (tokens from the start of the first block) of one layer and head."""
    base = tl.multiple_of(tl.load(layer_ptrs + layer), align_bytes).to(tl.pointer_type(unit))
    block = tl.load(blocks + slot // block_tokens, mask=is_wanted, other=0)
    token = (slot % block_tokens).to(tl.int64)
    return base + head.to(tl.int64) * head_stride + (block * block_stride + token * token_stride)


@triton.jit(do_not_specialize=["layer_ptrs", "blocks", "targets", "first_token"])
def gather_kernel(
    layer_ptrs,
    blocks,
    targets,
    first_token,
    chunk_tokens: tl.constexpr,
    num_layers: tl.constexpr,
    num_heads: tl.constexpr,
    row_units: tl.constexpr,
    tile: tl.constexpr,
    unit: tl.constexpr,
    align_bytes: tl.constexpr,
    block_tokens: tl.constexpr,
    block_stride: tl.constexpr,
    head_stride: tl.constexpr,
    token_stride: tl.constexpr,
):
    """Copy rows of paged blocks to chunks in the canonical layout; programs: (layer, tile, head), chunk."""
    num_tiles: tl.constexpr = (chunk_tokens * row_units + tile - 1) // tile
    program, chunk = tl.program_id(0), tl.program_id(1)
    head, layer = program % num_heads, program // num_heads // num_tiles
    index = (program // num_heads % num_tiles) * tile + tl.arange(0, tile)
    is_wanted = index < chunk_tokens * row_units
    slot = first_token + chunk * chunk_tokens + index // row_units
    rows = paged_rows(
        layer_ptrs,
        blocks,
        layer,
        head,
        slot,
        is_wanted,
        unit,
        align_bytes,
        block_tokens,
        block_stride,
        head_stride,
        token_stride,
    )
    values = tl.load(rows + index % row_units, mask=is_wanted)
    target = tl.multiple_of(tl.load(targets + chunk), align_bytes).to(tl.pointer_type(unit))
    target += (head * num_layers + layer).to(tl.int64) * (chunk_tokens * row_units)
    tl.store(target + index, values, mask=is_wanted)


@triton.jit(
    do_not_specialize=["layer_ptrs", "blocks", "sources", "unit_offsets", "first_token", "num_tokens", "skip_tokens"]
)
def scatter_kernel(
    layer_ptrs,
    blocks,
    sources,
    unit_offsets,
    first_token,
    num_tokens,
    skip_tokens,
    chunk_tokens: tl.constexpr,
    num_layers: tl.constexpr,
    num_heads: tl.constexpr,
    row_units: tl.constexpr,
    tile: tl.constexpr,
    unit: tl.constexpr,
    align_bytes: tl.constexpr,
    block_tokens: tl.constexpr,
    block_stride: tl.constexpr,
    head_stride: tl.constexpr,
    token_stride: tl.constexpr,
):
    """Copy the wanted tokens of staged chunks to rows of paged blocks; programs: (layer, tile, head), chunk."""
    num_tiles: tl.constexpr = (chunk_tokens * row_units + tile - 1) // tile
    program, chunk = tl.program_id(0), tl.program_id(1)
    head, layer = program % num_heads, program // num_heads // num_tiles
    index = (program // num_heads % num_tiles) * tile + tl.arange(0, tile)
    number = chunk * chunk_tokens + index // row_units - skip_tokens  # counted from the first wanted token
    is_wanted = (index < chunk_tokens * row_units) & (number >= 0) & (number < num_tokens)
    rows = paged_rows(
        layer_ptrs,
        blocks,
        layer,
        head,
        first_token + number,
        is_wanted,
        unit,
        align_bytes,
        block_tokens,
        block_stride,
        head_stride,
        token_stride,
    )
    start = tl.load(sources + chunk) + tl.load(unit_offsets + head * num_layers + layer)
    source = tl.multiple_of(start, align_bytes).to(tl.pointer_type(unit))
    values = tl.load(source + index, mask=is_wanted)
    tl.store(rows + index % row_units, values, mask=is_wanted)
