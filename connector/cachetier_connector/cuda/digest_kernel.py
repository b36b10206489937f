"""Triton: XXH64 (seed 0) of 4 KiB pages, https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md.

A page's four accumulators are neighbouring lanes, so the lanes of a page read one 32-byte stripe at a time, a whole
sector of memory. The stripes of a page follow one another; pages are independent. Nothing is compiled before the first
launch. Triton functions that are written in Triton themselves (`tl.sum`, `tl.zeros`) are avoided: they could only be
interpreted where Triton was imported for it, and vLLM imports it earlier than a test can ask.
"""

import triton
import triton.language as tl

PAGES_A_WARP = 8  # four lanes each
STRIPE_BYTES = tl.constexpr(32)
PAGE_STRIPES = tl.constexpr(128)
PAGE_WORDS = tl.constexpr(512)
STRIPES_AT_ONCE = tl.constexpr(16)  # loads in flight

PRIME_1 = tl.constexpr(0x9E3779B185EBCA87)
PRIME_2 = tl.constexpr(0xC2B2AE3D27D4EB4F)
PRIME_3 = tl.constexpr(0x165667B19E3779F9)
PRIME_4 = tl.constexpr(0x85EBCA77C2B2AE63)


@triton.jit
def rotated(value, count: tl.constexpr):
    """Return uint64 `value` rotated left by `count` bits."""
    return (value << count) | (value >> (64 - count))


@triton.jit
def added(one, other):
    """Return the sum, for reductions."""
    return one + other


@triton.jit
def mixed(accumulator, word):
    """Return the accumulator after one round of XXH64."""
    prime_1 = tl.full((1,), PRIME_1, tl.uint64)
    prime_2 = tl.full((1,), PRIME_2, tl.uint64)
    return rotated(accumulator + word * prime_2, 31) * prime_1


@triton.jit(do_not_specialize=["sources", "page_bytes", "digests", "num_pages"])
def digest_kernel(sources, page_bytes, digests, num_pages, pages_a_program: tl.constexpr):
    """Write the digests of all pages of all chunks; programs: pages, chunk."""
    digest_some(sources, page_bytes, digests, num_pages, tl.program_id(0), tl.program_id(1), pages_a_program)


@triton.jit
def digest_some(sources, page_bytes, digests, num_pages, program, chunk, pages_a_program: tl.constexpr):
    """Write the digests of `pages_a_program` pages of a chunk, the `program`-th of them; a warp does eight at once."""
    page = program * pages_a_program + tl.arange(0, pages_a_program)
    readable = tl.minimum(page, num_pages - 1)  # no load is masked, for that keeps few of them in flight
    length = tl.load(page_bytes + readable)
    last_stripe = (length // STRIPE_BYTES - 1)[:, None]
    lane = tl.arange(0, 4)[None, :]
    start = tl.load(sources + chunk).to(tl.pointer_type(tl.uint64))
    words = start + (readable.to(tl.int64) * PAGE_WORDS)[:, None] + lane

    accumulators = begun(lane, pages_a_program)
    for first in range(0, PAGE_STRIPES, STRIPES_AT_ONCE):
        for step in tl.static_range(STRIPES_AT_ONCE):
            stripe = first + step
            word = tl.load(words + tl.minimum(stripe, last_stripe) * 4)
            accumulators = tl.where(stripe <= last_stripe, mixed(accumulators, word), accumulators)
    digest = finished(accumulators, lane, length)
    target = digests + tl.cast(chunk, tl.int64) * num_pages + page
    tl.store(target, digest.to(tl.int64, bitcast=True), mask=page < num_pages)


@triton.jit(do_not_specialize=["layer_ptrs", "blocks", "page_bytes", "digests", "first_token", "num_pages"])
def digest_paged_kernel(
    layer_ptrs,
    blocks,
    page_bytes,
    digests,
    first_token,
    num_pages,
    pages_a_program: tl.constexpr,
    chunk_tokens: tl.constexpr,
    num_layers: tl.constexpr,
    row_words: tl.constexpr,
    block_tokens: tl.constexpr,
    block_stride: tl.constexpr,
    head_stride: tl.constexpr,
    token_stride: tl.constexpr,
):
    """Write the digests of all pages of chunks that stand in paged blocks; programs: pages, chunk.

    Words and strides are of eight bytes; a stripe may lie in two rows.
    """
    page = tl.program_id(0) * pages_a_program + tl.arange(0, pages_a_program)
    chunk = tl.program_id(1)
    readable = tl.minimum(page, num_pages - 1)
    length = tl.load(page_bytes + readable)
    last_stripe = (length // STRIPE_BYTES - 1)[:, None]
    lane = tl.arange(0, 4)[None, :]
    words = (readable * PAGE_WORDS)[:, None] + lane

    accumulators = begun(lane, pages_a_program)
    for first in range(0, PAGE_STRIPES, STRIPES_AT_ONCE):
        for step in tl.static_range(STRIPES_AT_ONCE):
            stripe = first + step
            index = words + tl.minimum(stripe, last_stripe) * 4
            row = index // row_words
            slot = first_token + chunk * chunk_tokens + row % chunk_tokens
            head, layer = row // chunk_tokens // num_layers, row // chunk_tokens % num_layers
            block = tl.load(blocks + slot // block_tokens)
            offset = block * block_stride + (slot % block_tokens).to(tl.int64) * token_stride
            offset += head.to(tl.int64) * head_stride + index % row_words
            word = tl.load(tl.load(layer_ptrs + layer).to(tl.pointer_type(tl.uint64)) + offset)
            accumulators = tl.where(stripe <= last_stripe, mixed(accumulators, word), accumulators)
    digest = finished(accumulators, lane, length)
    target = digests + chunk.to(tl.int64) * num_pages + page
    tl.store(target, digest.to(tl.int64, bitcast=True), mask=page < num_pages)


@triton.jit
def begun(lane, pages_a_program: tl.constexpr):
    """Return the four accumulators of each page, before the first stripe."""
    prime_1 = tl.full((1, 1), PRIME_1, tl.uint64)
    prime_2 = tl.full((1, 1), PRIME_2, tl.uint64)
    zero = tl.full((pages_a_program, 4), 0, tl.uint64)
    accumulators = zero + tl.where(lane == 0, prime_1, zero) - tl.where(lane == 3, prime_1, zero)
    return accumulators + tl.where(lane < 2, prime_2, zero)


@triton.jit
def finished(accumulators, lane, length):
    """Return the digests of `length` bytes, a multiple of a stripe, from the four accumulators of each page."""
    prime_1 = tl.full((1,), PRIME_1, tl.uint64)
    prime_2 = tl.full((1,), PRIME_2, tl.uint64)
    prime_3 = tl.full((1,), PRIME_3, tl.uint64)
    prime_4 = tl.full((1,), PRIME_4, tl.uint64)
    zero = tl.full(accumulators.shape, 0, tl.uint64)
    turned = tl.where(lane == 0, rotated(accumulators, 1), rotated(accumulators, 7))
    turned = tl.where(lane == 2, rotated(accumulators, 12), turned)
    turned = tl.where(lane == 3, rotated(accumulators, 18), turned)
    digest = tl.reduce(turned, 1, added)
    single = mixed(zero, accumulators)
    for number in tl.static_range(4):
        digest ^= tl.reduce(tl.where(lane == number, single, zero), 1, added)
        digest = digest * prime_1 + prime_4
    digest += length.to(tl.uint64)
    digest = (digest ^ (digest >> 33)) * prime_2
    digest = (digest ^ (digest >> 29)) * prime_3
    return digest ^ (digest >> 32)
