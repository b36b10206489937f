"""Triton: rows between paged blocks and the canonical layout `[head][layer][token][row]`.

A tile is of one head and layer of one chunk, which is contiguous in the canonical layout, so it needs to respect no
border: each of its units looks up its own token's place. Heads vary fastest over the tiles, since they are neighbours
in a block. As many programs as there are tiles fill the device; a few, which move one tile after the other, leave it
to the engine. Nothing is compiled before the first launch.
"""

import triton
import triton.language as tl

from cachetier_connector.cuda.digest_kernel import digest_some
from cachetier_connector.cuda.rotate_kernel import rotated


@triton.jit
def vectors(address, index, unit: tl.constexpr, align_bytes: tl.constexpr):
    """Return pointers to the units `index` from `address` on, so that a thread moves `align_bytes` at once.

    Every `align_bytes` of them are consecutive and aligned. The compiler cannot know it: the address is a number.
    """
    pointers = address.to(tl.pointer_type(unit)) + index
    run: tl.constexpr = align_bytes * 8 // unit.primitive_bitwidth
    return tl.max_contiguous(tl.multiple_of(pointers, align_bytes), run)


@triton.jit
def paged_units(
    layer_ptrs,
    blocks,
    layer,
    head,
    slot,
    column,
    is_wanted,
    unit: tl.constexpr,
    align_bytes: tl.constexpr,
    block_tokens: tl.constexpr,
    block_stride: tl.constexpr,
    head_stride: tl.constexpr,
    token_stride: tl.constexpr,
):
    """Return pointers to units of rows of one layer and head, at `slot` (tokens from the first block's start)."""
    block = tl.load(blocks + slot // block_tokens, mask=is_wanted, other=0)
    token = (slot % block_tokens).to(tl.int64)
    offset = tl.cast(head, tl.int64) * head_stride + (block * block_stride + token * token_stride) + column
    return vectors(tl.load(layer_ptrs + layer), offset, unit, align_bytes)


@triton.jit(do_not_specialize=["layer_ptrs", "blocks", "targets", "first_token", "num_chunks"])
def gather_kernel(
    layer_ptrs,
    blocks,
    targets,
    first_token,
    num_chunks,
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
    """Copy rows of paged blocks to chunks in the canonical layout; tiles: chunk, then (layer, tile, head)."""
    num_tiles: tl.constexpr = (chunk_tokens * row_units + tile - 1) // tile
    num_copies: tl.constexpr = num_layers * num_heads * num_tiles
    for work in range(tl.program_id(0), num_chunks * num_copies, tl.num_programs(0)):
        chunk, number = work // num_copies, work % num_copies
        head, layer = number % num_heads, number // num_heads // num_tiles
        index = (number // num_heads % num_tiles) * tile + tl.arange(0, tile)
        is_wanted = index < chunk_tokens * row_units
        rows = paged_units(
            layer_ptrs,
            blocks,
            layer,
            head,
            first_token + chunk * chunk_tokens + index // row_units,
            index % row_units,
            is_wanted,
            unit,
            align_bytes,
            block_tokens,
            block_stride,
            head_stride,
            token_stride,
        )
        start = tl.cast(head * num_layers + layer, tl.int64) * (chunk_tokens * row_units)
        target = vectors(tl.load(targets + chunk), start + index, unit, align_bytes)
        tl.store(target, tl.load(rows, mask=is_wanted), mask=is_wanted)


@triton.jit(
    do_not_specialize=[
        "layer_ptrs",
        "blocks",
        "sources",
        "unit_offsets",
        "table",
        "page_bytes",
        "digests",
        "first_token",
        "num_tokens",
        "skip_tokens",
        "num_pages",
    ]
)
def scatter_kernel(
    layer_ptrs,
    blocks,
    sources,
    unit_offsets,
    table,
    page_bytes,
    digests,
    first_token,
    num_tokens,
    skip_tokens,
    num_pages,
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
    pages_a_program: tl.constexpr,
    first_dim: tl.constexpr,
    half: tl.constexpr,
    is_interleaved: tl.constexpr,
    up: tl.constexpr,
    scale: tl.constexpr,
    largest: tl.constexpr,
):
    """Copy the wanted tokens of staged chunks to rows of paged blocks; programs: (layer, tile, head), chunk.

    Unless `half` is 0, a unit is a number, and those that the model rotates are turned by the angles of `table`.
    Further programs, if there are any, digest the chunks' pages.
    """
    num_copies: tl.constexpr = num_layers * num_heads * ((chunk_tokens * row_units + tile - 1) // tile)
    program, chunk = tl.program_id(0), tl.program_id(1)
    if program >= num_copies:
        digest_some(sources, page_bytes, digests, num_pages, program - num_copies, chunk, pages_a_program)
    else:
        scatter_tile(
            layer_ptrs,
            blocks,
            sources,
            unit_offsets,
            table,
            first_token,
            num_tokens,
            skip_tokens,
            program,
            chunk,
            chunk_tokens,
            num_layers,
            num_heads,
            row_units,
            tile,
            unit,
            align_bytes,
            block_tokens,
            block_stride,
            head_stride,
            token_stride,
            first_dim,
            half,
            is_interleaved,
            up,
            scale,
            largest,
        )


@triton.jit
def scatter_tile(
    layer_ptrs,
    blocks,
    sources,
    unit_offsets,
    table,
    first_token,
    num_tokens,
    skip_tokens,
    program,
    chunk,
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
    first_dim: tl.constexpr,
    half: tl.constexpr,
    is_interleaved: tl.constexpr,
    up: tl.constexpr,
    scale: tl.constexpr,
    largest: tl.constexpr,
):
    """Copy what one program copies."""
    num_tiles: tl.constexpr = (chunk_tokens * row_units + tile - 1) // tile
    head, layer = program % num_heads, program // num_heads // num_tiles
    index = (program // num_heads % num_tiles) * tile + tl.arange(0, tile)
    number = chunk * chunk_tokens + index // row_units - skip_tokens  # counted from the first wanted token
    is_wanted = (index < chunk_tokens * row_units) & (number >= 0) & (number < num_tokens)
    rows = paged_units(
        layer_ptrs,
        blocks,
        layer,
        head,
        first_token + number,
        index % row_units,
        is_wanted,
        unit,
        align_bytes,
        block_tokens,
        block_stride,
        head_stride,
        token_stride,
    )
    start = tl.load(sources + chunk) + tl.load(unit_offsets + head * num_layers + layer)
    source = vectors(start, index, unit, align_bytes)
    units = tl.load(source, mask=is_wanted)
    if half:
        column = index % row_units
        units = rotated(
            units, start, index, column, is_wanted, table, unit, first_dim, half, is_interleaved, up, scale, largest
        )
    tl.store(rows, units, mask=is_wanted)
