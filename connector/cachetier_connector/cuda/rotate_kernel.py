"""Triton: keys of one position made keys of another, on their way to paged blocks.

Numbers of all types are widened and rounded by integer arithmetic: Triton's compiler has no e4m3 before compute
capability 8.9, and its interpreter truncates. A type's bits are the upper ones of a float32 whose exponent has another
bias: the magnitude, shifted `up`, is a float32 that is too small by the factor `scale`, also where it is subnormal.
"""

import triton
import triton.language as tl


@triton.jit
def widened(units, unit: tl.constexpr, up: tl.constexpr, scale: tl.constexpr):
    """Return numbers as float32. Infinity and NaN of float16 and of eight bits become numbers beyond the largest."""
    num_bits: tl.constexpr = unit.primitive_bitwidth
    # Shifted to the top and back, since the units are signed.
    top = units.to(tl.uint32) << (32 - num_bits)
    magnitude = ((top << 1) >> (33 - num_bits)) << up
    return ((top & 0x80000000) | magnitude).to(tl.float32, bitcast=True) * scale


@triton.jit
def narrowed(values, unit: tl.constexpr, up: tl.constexpr, scale: tl.constexpr, largest: tl.constexpr):
    """Return float32 as numbers, rounded to nearest, ties to even; what does not fit becomes `largest`."""
    num_bits: tl.constexpr = unit.primitive_bitwidth
    bits = (values * (1 / scale)).to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if up:
        magnitude = (magnitude + ((1 << (up - 1)) - 1) + ((magnitude >> up) & 1)) >> up
    return (((bits >> 31) << (num_bits - 1)) | tl.minimum(magnitude, largest)).to(unit)


@triton.jit
def rotated(
    units,
    start,
    index,
    column,
    is_wanted,
    table,
    unit: tl.constexpr,
    first_dim: tl.constexpr,
    half: tl.constexpr,
    is_interleaved: tl.constexpr,
    up: tl.constexpr,
    scale: tl.constexpr,
    largest: tl.constexpr,
):
    """Return units of rows, one a number, with those that the model rotates turned by the angles of `table`.

    `units` were read at `index` from the address `start` on, and stand in `column` of their rows. The other number of
    each pair is read from there again, which the caches have.
    """
    place = column - first_dim
    is_turned = is_wanted & (place >= 0) & (place < 2 * half)
    if is_interleaved:
        pair, is_second, step = place // 2, place % 2 == 1, 1
    else:
        pair, is_second, step = place % half, place >= half, half
    other = tl.load(start.to(tl.pointer_type(unit)) + index + tl.where(is_second, -step, step), mask=is_turned, other=0)
    cos = tl.load(table + pair, mask=is_turned, other=0)
    sin = tl.load(table + half + pair, mask=is_turned, other=0)
    sin = tl.where(is_second, sin, -sin)
    turned = widened(units, unit, up, scale) * cos + widened(other, unit, up, scale) * sin
    return tl.where(is_turned, narrowed(turned, unit, up, scale, largest), units)
