"""What kernels of several rules compute alike: the stabilised share, magnitudes, products."""

from __future__ import annotations

from relprop.kernels.launch import INTERPRETED, jit, tl

SIGNED = tl.constexpr(0)  # z + epsilon * sign(z), sign(0) = +1; with epsilon 0 the share is 0 where z is 0


@jit
def share(relevance, z, epsilon, KIND: tl.constexpr):
    """R / stab(z). A denominator of infinity is a share of 0 that lets a NaN relevance through."""
    if KIND == SIGNED:
        denominator = z + tl.where(z >= 0, epsilon, -epsilon)
        denominator = tl.where(denominator == 0, float("inf"), denominator)
    else:
        denominator = z + epsilon
        denominator = tl.where(denominator == 0, epsilon, denominator)
        denominator = tl.where(z == 0, float("inf"), denominator)
    return relevance / denominator


@jit
def magnitude(x):
    """|x| in x's own dtype: one operation on bits for the 16-bit dtypes."""
    if x.dtype == tl.float32:
        return tl.abs(x)
    else:
        return (x.to(tl.int16, bitcast=True) & 0x7FFF).to(x.dtype, bitcast=True)


@jit
def product(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b. The interpreter multiplies 16-bit numbers exactly only as float32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@jit
def total(x, axis: tl.constexpr):
    """Sum over an axis."""
    return tl.reduce(x, axis, tl.standard._sum_combine)


@jit
def largest(x, axis: tl.constexpr):
    """Maximum over an axis."""
    return tl.reduce(x, axis, tl.standard._elementwise_max)


@jit
def tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP tiles of rows share the columns that they read."""
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    return first + within % size, within // size


@jit
def side_of(x, side: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left or the right half of a tile of 2 * COLUMNS columns."""
    left, right = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS)), (0, 2, 1)))
    return left if side == 0 else right
