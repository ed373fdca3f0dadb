"""Triton: what the kernels do with a tile of rows.

A head size is held in two pieces, each a power of two, the second absent where one is enough (192 = 128 + 64):
`x1`, `x2`. Rows beyond a mask and elements beyond a head size read as 0. Suffixes: M rows of a tile of queries,
N keys of a tile.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    ptr, offset_M, mask_M, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, STREAM: tl.constexpr = False
):
    """[M, WIDTH]: elements START … of rows at `offset_M`."""
    at = START + tl.arange(0, WIDTH)
    mask = mask_M[:, None]
    if START + WIDTH > D:
        mask &= at[None, :] < D
    return tl.load(
        ptr + offset_M[:, None] + at[None, :], mask=mask, other=0.0, eviction_policy="evict_first" if STREAM else ""
    )


@triton.jit
def load_two(
    ptr, offset_M, mask_M, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, STREAM: tl.constexpr = False
):
    """`STREAM`: read once, so that it displaces nothing in the cache."""
    x1 = load_rows(ptr, offset_M, mask_M, D, 0, D1, STREAM)
    x2 = x1
    if D2 > 0:
        x2 = load_rows(ptr, offset_M, mask_M, D, D1, D2, STREAM)
    return x1, x2


@triton.jit
def zeros_two(M: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    return tl.zeros([M, D1], tl.float32), tl.zeros([M, D2 if D2 > 0 else 1], tl.float32)


@triton.jit
def store_rows(
    ptr,
    offset_M,
    mask_M,
    value,
    D: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ADD: tl.constexpr,
    STREAM: tl.constexpr = False,
):
    at = START + tl.arange(0, WIDTH)
    if ADD:
        value += load_rows(ptr, offset_M, mask_M, D, START, WIDTH).to(tl.float32)
    value = value.to(ptr.dtype.element_ty)
    tl.store(
        ptr + offset_M[:, None] + at[None, :],
        value,
        mask=mask_M[:, None] & (at[None, :] < D),
        eviction_policy="evict_first" if STREAM else "",
    )


@triton.jit
def store_two(
    ptr,
    offset_M,
    mask_M,
    x1,
    x2,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ADD: tl.constexpr = False,
    STREAM: tl.constexpr = False,
):
    """`ADD`: to what is there."""
    store_rows(ptr, offset_M, mask_M, x1, D, 0, D1, ADD, STREAM)
    if D2 > 0:
        store_rows(ptr, offset_M, mask_M, x2, D, D1, D2, ADD, STREAM)


@triton.jit
def products(a1, a2, b1, b2, D2: tl.constexpr, PREC: tl.constexpr):
    """a b^T"""
    s = tl.dot(a1, tl.trans(b1), input_precision=PREC)
    if D2 > 0:
        s = tl.dot(a2, tl.trans(b2), s, input_precision=PREC)
    return s


@triton.jit
def add_products(p, b1, b2, sum1, sum2, D2: tl.constexpr, PREC: tl.constexpr):
    """sum + p b"""
    p = p.to(b1.dtype)
    sum1 = tl.dot(p, b1, sum1, input_precision=PREC)
    if D2 > 0:
        sum2 = tl.dot(p, b2, sum2, input_precision=PREC)
    return sum1, sum2


@triton.jit
def softmax_step(s, v1, v2, o1, o2, top, total, MASKED: tl.constexpr, DV2: tl.constexpr, PREC: tl.constexpr):
    """Adds keys with scores s (base 2; -inf: not seen, only where MASKED) to a running softmax."""
    above = tl.maximum(top, tl.max(s, 1))
    safe = above
    if MASKED:
        safe = tl.where(above == float("-inf"), 0.0, above)  # -inf - (-inf) would be NaN
    p = tl.exp2(s - safe[:, None])
    shrink = tl.exp2(top - safe)
    total = total * shrink + tl.sum(p, 1)
    o1 = o1 * shrink[:, None]
    if DV2 > 0:
        o2 = o2 * shrink[:, None]
    o1, o2 = add_products(p, v1, v2, o1, o2, DV2, PREC)
    return o1, o2, above, total


@triton.jit
def softmax_end(o1, o2, top, total):
    """Output and log-sum-exp (base e); 0 and -inf for a row that saw no key."""
    divide = (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    lse = tl.where(total > 0, (top + tl.log2(tl.where(total > 0, total, 1.0))) / LOG2E, float("-inf"))
    return o1 * divide, o2 * divide, lse


@triton.jit
def row_vectors(lse_ptr, delta_ptr, gate_ptr, row_M, mask_M):
    """Log-sum-exp (base 2), delta and gate; 0 outside the mask."""
    lse2 = tl.load(lse_ptr + row_M, mask=mask_M, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + row_M, mask=mask_M, other=0.0)
    return lse2, delta, tl.load(gate_ptr + row_M, mask=mask_M, other=0.0)


@triton.jit
def add_dkv(
    p_NM, gate_M, delta_M, v1, v2, do1, do2, q1, q2, dk1, dk2, dv1, dv2,
    DK2: tl.constexpr, DV2: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds a tile of queries to dk and dv; dS^T besides. dk and dS are without the scale."""
    p_NM *= gate_M[None, :]
    ds = p_NM * (products(v1, v2, do1, do2, DV2, PREC) - delta_M[None, :])
    dv1, dv2 = add_products(p_NM, do1, do2, dv1, dv2, DV2, PREC)
    dk1, dk2 = add_products(ds, q1, q2, dk1, dk2, DK2, PREC)
    return ds, dk1, dk2, dv1, dv2
