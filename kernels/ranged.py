"""Triton: attention in which each query sees one range of rows (window, compressed tokens), forward and backward.

A tile's rows are the R query heads of a KV head's group over neighbouring queries, so that they share keys and
values. The backward has two kernels, each of which computes the scores again: one goes over keys for a tile of
queries (dq), one over queries for a tile of keys (dk, dv). No atomics: the sums have one order.

Products are taken in the inputs' type, sums in float32. A head size is loaded in two pieces that are powers of
two (192 = 128 + 64), masked at the end. Suffixes as in `tiled`; M rows of a tile of queries, N keys of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_dist.kernels.tiled import Ranges
from nsa_dist.kernels.tuning import check_launch, count_launch, pieces, precision, tuned

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptr, offset_M, mask_M, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """[M, WIDTH]: elements START … of rows at `offset_M`; 0 outside the mask and beyond D."""
    at = START + tl.arange(0, WIDTH)
    if START + WIDTH <= D:
        return tl.load(ptr + offset_M[:, None] + at[None, :], mask=mask_M[:, None], other=0.0)
    return tl.load(ptr + offset_M[:, None] + at[None, :], mask=mask_M[:, None] & (at[None, :] < D), other=0.0)


@triton.jit
def store_rows(ptr, offset_M, mask_M, value, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    at = START + tl.arange(0, WIDTH)
    value = value.to(ptr.dtype.element_ty)
    tl.store(ptr + offset_M[:, None] + at[None, :], value, mask=mask_M[:, None] & (at[None, :] < D))


@triton.jit
def add_rows(
    ptr, offset_M, mask_M, value, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr
):
    """Stores, or adds to what is there."""
    if ADD:
        value += load_rows(ptr, offset_M, mask_M, D, START, WIDTH).to(tl.float32)
    store_rows(ptr, offset_M, mask_M, value, D, START, WIDTH)


@triton.jit
def _forward_span(
    q1, q2, o1, o2, top, total, lo_M, hi_M, k_ptr, v_ptr, k_row, v_row, start, end, scale2,
    DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        here = n < end
        k_at = n.to(tl.int64) * k_row
        v_at = n.to(tl.int64) * v_row
        s = tl.dot(q1, tl.trans(load_rows(k_ptr, k_at, here, DK, 0, DK1)), input_precision=PREC)
        if DK2 > 0:
            s = tl.dot(q2, tl.trans(load_rows(k_ptr, k_at, here, DK, DK1, DK2)), s, input_precision=PREC)
        s *= scale2
        if MASKED:
            s = tl.where((n[None, :] >= lo_M[:, None]) & (n[None, :] < hi_M[:, None]), s, float("-inf"))
        above = tl.maximum(top, tl.max(s, 1))
        safe = above
        if MASKED:
            safe = tl.where(above == float("-inf"), 0.0, above)  # -inf - (-inf) would be NaN
        p = tl.exp2(s - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(p, 1)
        top = above
        v1 = load_rows(v_ptr, v_at, here, DV, 0, DV1)
        o1 = tl.dot(p.to(v1.dtype), v1, o1 * shrink[:, None], input_precision=PREC)
        if DV2 > 0:
            v2 = load_rows(v_ptr, v_at, here, DV, DV1, DV2)
            o2 = tl.dot(p.to(v2.dtype), v2, o2 * shrink[:, None], input_precision=PREC)
    return o1, o2, top, total


@triton.jit
def range_forward_kernel(
    q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, o_ptr, lse_ptr, queries, heads, k_row, k_head, v_row, v_head, scale,
    R: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)  # late queries see most: first
    s = m // R
    here = s < queries
    row = s.to(tl.int64) * heads + g * R + m % R
    lo = tl.load(lo_ptr + s, mask=here, other=0).to(tl.int32)
    hi = tl.load(hi_ptr + s, mask=here, other=0).to(tl.int32)
    start = tl.min(tl.where(here, lo, 2147483647))
    inner = tl.max(tl.where(here, lo, 0))
    outer = tl.min(tl.where(here, hi, 2147483647))
    end = tl.max(tl.where(here, hi, 0))
    k_ptr += g.to(tl.int64) * k_head
    v_ptr += g.to(tl.int64) * v_head
    q1 = load_rows(q_ptr, row * DK, here, DK, 0, DK1)
    q2 = q1
    if DK2 > 0:
        q2 = load_rows(q_ptr, row * DK, here, DK, DK1, DK2)
    o1 = tl.zeros([BM, DV1], tl.float32)
    o2 = tl.zeros([BM, DV2 if DV2 > 0 else 1], tl.float32)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    scale2 = scale * LOG2E
    # Rows that some queries see, rows that all see, rows that some see: [start, a), [a, b), [b, end).
    a = tl.minimum(start + tl.cdiv(tl.maximum(inner - start, 0), BN) * BN, end)
    b = a + tl.maximum(outer - a, 0) // BN * BN
    o1, o2, top, total = _forward_span(
        q1, q2, o1, o2, top, total, lo, hi, k_ptr, v_ptr, k_row, v_row, start, a, scale2,
        DK, DK1, DK2, DV, DV1, DV2, BN, True, PREC)  # fmt: skip
    o1, o2, top, total = _forward_span(
        q1, q2, o1, o2, top, total, lo, hi, k_ptr, v_ptr, k_row, v_row, a, b, scale2,
        DK, DK1, DK2, DV, DV1, DV2, BN, False, PREC)  # fmt: skip
    o1, o2, top, total = _forward_span(
        q1, q2, o1, o2, top, total, lo, hi, k_ptr, v_ptr, k_row, v_row, b, end, scale2,
        DK, DK1, DK2, DV, DV1, DV2, BN, True, PREC)  # fmt: skip
    divide = 1.0 / tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (top + tl.log2(total)) / LOG2E, float("-inf"))
    tl.store(lse_ptr + row, lse, mask=here)
    store_rows(o_ptr, row * DV, here, o1 * divide[:, None], DV, 0, DV1)
    if DV2 > 0:
        store_rows(o_ptr, row * DV, here, o2 * divide[:, None], DV, DV1, DV2)


@triton.jit
def delta_kernel(do_ptr, o_ptr, delta_ptr, rows, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = m < rows
    do = load_rows(do_ptr, m * D, here, D, 0, WIDTH).to(tl.float32)
    o = load_rows(o_ptr, m * D, here, D, 0, WIDTH).to(tl.float32)
    tl.store(delta_ptr + m, tl.sum(do * o, 1), mask=here)


@triton.jit
def _dq_span(
    q1, q2, do1, do2, dq1, dq2, lse2, delta, gate, lo_M, hi_M, k_ptr, v_ptr, k_row, v_row, start, end, scale2,
    DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr,
    BN: tl.constexpr, MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    for n0 in range(start, end, BN):
        n = n0 + tl.arange(0, BN)
        here = n < end
        k_at = n.to(tl.int64) * k_row
        v_at = n.to(tl.int64) * v_row
        k1 = load_rows(k_ptr, k_at, here, DK, 0, DK1)
        s = tl.dot(q1, tl.trans(k1), input_precision=PREC)
        if DK2 > 0:
            k2 = load_rows(k_ptr, k_at, here, DK, DK1, DK2)
            s = tl.dot(q2, tl.trans(k2), s, input_precision=PREC)
        dp = tl.dot(do1, tl.trans(load_rows(v_ptr, v_at, here, DV, 0, DV1)), input_precision=PREC)
        if DV2 > 0:
            dp = tl.dot(do2, tl.trans(load_rows(v_ptr, v_at, here, DV, DV1, DV2)), dp, input_precision=PREC)
        p = tl.exp2(s * scale2 - lse2[:, None])
        if MASKED:
            p = tl.where((n[None, :] >= lo_M[:, None]) & (n[None, :] < hi_M[:, None]), p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k1.dtype)
        dq1 = tl.dot(ds, k1, dq1, input_precision=PREC)
        if DK2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PREC)
    return dq1, dq2


@triton.jit
def range_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, gate_ptr, lo_ptr, hi_ptr, dq_ptr, queries, heads, gate_step,
    delta_step, k_row, k_head, v_row, v_head, scale,
    R: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM + tl.arange(0, BM)
    s = m // R
    here = s < queries
    row = s.to(tl.int64) * heads + g * R + m % R
    lo = tl.load(lo_ptr + s, mask=here, other=0).to(tl.int32)
    hi = tl.load(hi_ptr + s, mask=here, other=0).to(tl.int32)
    start = tl.min(tl.where(here, lo, 2147483647))
    inner = tl.max(tl.where(here, lo, 0))
    outer = tl.min(tl.where(here, hi, 2147483647))
    end = tl.max(tl.where(here, hi, 0))
    k_ptr += g.to(tl.int64) * k_head
    v_ptr += g.to(tl.int64) * v_head
    q1 = load_rows(q_ptr, row * DK, here, DK, 0, DK1)
    do1 = load_rows(do_ptr, row * DV, here, DV, 0, DV1)
    q2, do2 = q1, do1
    if DK2 > 0:
        q2 = load_rows(q_ptr, row * DK, here, DK, DK1, DK2)
    if DV2 > 0:
        do2 = load_rows(do_ptr, row * DV, here, DV, DV1, DV2)
    lse2 = tl.load(lse_ptr + row, mask=here, other=0.0) * LOG2E
    lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)
    delta = tl.load(delta_ptr + row * delta_step, mask=here, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_step, mask=here, other=0.0).to(tl.float32)
    dq1 = tl.zeros([BM, DK1], tl.float32)
    dq2 = tl.zeros([BM, DK2 if DK2 > 0 else 1], tl.float32)
    a = tl.minimum(start + tl.cdiv(tl.maximum(inner - start, 0), BN) * BN, end)
    b = a + tl.maximum(outer - a, 0) // BN * BN
    dq1, dq2 = _dq_span(
        q1, q2, do1, do2, dq1, dq2, lse2, delta, gate, lo, hi, k_ptr, v_ptr, k_row, v_row, start, a, scale * LOG2E,
        DK, DK1, DK2, DV, DV1, DV2, BN, True, PREC)  # fmt: skip
    dq1, dq2 = _dq_span(
        q1, q2, do1, do2, dq1, dq2, lse2, delta, gate, lo, hi, k_ptr, v_ptr, k_row, v_row, a, b, scale * LOG2E,
        DK, DK1, DK2, DV, DV1, DV2, BN, False, PREC)  # fmt: skip
    dq1, dq2 = _dq_span(
        q1, q2, do1, do2, dq1, dq2, lse2, delta, gate, lo, hi, k_ptr, v_ptr, k_row, v_row, b, end, scale * LOG2E,
        DK, DK1, DK2, DV, DV1, DV2, BN, True, PREC)  # fmt: skip
    factor = (gate * scale)[:, None]
    add_rows(dq_ptr, row * DK, here, dq1 * factor, DK, 0, DK1, ADD)
    if DK2 > 0:
        add_rows(dq_ptr, row * DK, here, dq2 * factor, DK, DK1, DK2, ADD)


@triton.jit
def range_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, gate_ptr, lo_ptr, hi_ptr, from_ptr, until_ptr, dk_ptr, dv_ptr,
    keys, groups, heads, split_queries, gate_step, delta_step, k_row, k_head, v_row, v_head, scale,
    R: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk, dv of a tile of keys from the queries [split * split_queries, …) that see it; S^T = K Q^T."""
    g = tl.program_id(1)
    split = tl.program_id(2)
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    key_here = n < keys
    last = tl.minimum(n0 + BN, keys) - 1
    first_query = tl.maximum(tl.load(from_ptr + n0).to(tl.int32), split * split_queries)
    end_query = tl.minimum(tl.load(until_ptr + last).to(tl.int32), (split + 1) * split_queries)
    k_at = n.to(tl.int64) * k_row + g.to(tl.int64) * k_head
    v_at = n.to(tl.int64) * v_row + g.to(tl.int64) * v_head
    k1 = load_rows(k_ptr, k_at, key_here, DK, 0, DK1)
    v1 = load_rows(v_ptr, v_at, key_here, DV, 0, DV1)
    k2, v2 = k1, v1
    if DK2 > 0:
        k2 = load_rows(k_ptr, k_at, key_here, DK, DK1, DK2)
    if DV2 > 0:
        v2 = load_rows(v_ptr, v_at, key_here, DV, DV1, DV2)
    dk1 = tl.zeros([BN, DK1], tl.float32)
    dk2 = tl.zeros([BN, DK2 if DK2 > 0 else 1], tl.float32)
    dv1 = tl.zeros([BN, DV1], tl.float32)
    dv2 = tl.zeros([BN, DV2 if DV2 > 0 else 1], tl.float32)
    for m0 in range(first_query * R, end_query * R, BM):
        m = m0 + tl.arange(0, BM)
        s_M = m // R
        here = s_M < end_query
        row = s_M.to(tl.int64) * heads + g * R + m % R
        lo = tl.load(lo_ptr + s_M, mask=here, other=0).to(tl.int32)
        hi = tl.load(hi_ptr + s_M, mask=here, other=0).to(tl.int32)
        lse2 = tl.load(lse_ptr + row, mask=here, other=0.0) * LOG2E
        lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)
        delta = tl.load(delta_ptr + row * delta_step, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_step, mask=here, other=0.0).to(tl.float32)
        q1 = load_rows(q_ptr, row * DK, here, DK, 0, DK1)
        do1 = load_rows(do_ptr, row * DV, here, DV, 0, DV1)
        s = tl.dot(k1, tl.trans(q1), input_precision=PREC)
        if DK2 > 0:
            q2 = load_rows(q_ptr, row * DK, here, DK, DK1, DK2)
            s = tl.dot(k2, tl.trans(q2), s, input_precision=PREC)
        dp = tl.dot(v1, tl.trans(do1), input_precision=PREC)
        if DV2 > 0:
            do2 = load_rows(do_ptr, row * DV, here, DV, DV1, DV2)
            dp = tl.dot(v2, tl.trans(do2), dp, input_precision=PREC)
        seen = (n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :])
        p = tl.where(seen, tl.exp2(s * (scale * LOG2E) - lse2[None, :]), 0.0) * gate[None, :]
        ds = (p * (dp - delta[None, :])).to(k1.dtype)
        p_low = p.to(v1.dtype)
        dv1 = tl.dot(p_low, do1, dv1, input_precision=PREC)
        if DV2 > 0:
            dv2 = tl.dot(p_low, do2, dv2, input_precision=PREC)
        dk1 = tl.dot(ds, q1, dk1, input_precision=PREC)
        if DK2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PREC)
    at = (split.to(tl.int64) * keys + n) * groups + g
    store_rows(dk_ptr, at * DK, key_here, dk1 * scale, DK, 0, DK1)
    store_rows(dv_ptr, at * DV, key_here, dv1, DV, 0, DV1)
    if DK2 > 0:
        store_rows(dk_ptr, at * DK, key_here, dk2 * scale, DK, DK1, DK2)
    if DV2 > 0:
        store_rows(dv_ptr, at * DV, key_here, dv2, DV, DV1, DV2)


def range_forward(q_SHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, ranges: Ranges, scale: float) -> tuple[Tensor, Tensor]:
    """As `tiled.range_forward`: output [S, H, Dv] in q's type, log-sum-exp [S, H] in float32."""
    q, k, v = q_SHD.contiguous(), rows_contiguous(k_NGD), rows_contiguous(v_NGD)
    check_launch(q, k, v)
    (s, h, dk), (_, groups, dv) = q.shape, v.shape
    o, lse = q.new_empty(s, h, dv), q.new_empty(s, h, dtype=torch.float32)
    if s == 0:
        return o, lse
    meta = tuned("range_forward", q, dk, dv)
    tiles = triton.cdiv(s * (h // groups), meta["BM"])
    count_launch("range_forward")
    range_forward_kernel[(tiles, groups)](
        q, k, v, ranges.lo_S, ranges.hi_S, o, lse, s, h, k.stride(0), k.stride(1), v.stride(0), v.stride(1), scale,
        R=h // groups, **pieces(dk, dv), PREC=precision(q), **meta)  # fmt: skip
    return o, lse


def row_delta(do_SHD: Tensor, o_SHD: Tensor) -> Tensor:
    """[S, H] float32: the sum over a row of do times o."""
    do, o = do_SHD.contiguous(), o_SHD.contiguous()
    delta = do.new_empty(do.shape[:2], dtype=torch.float32)
    if delta.numel():
        count_launch("delta")
        width, rows = triton.next_power_of_2(do.shape[2]), delta.numel()
        delta_kernel[(triton.cdiv(rows, 32),)](do, o, delta, rows, D=do.shape[2], WIDTH=width, BM=32)
    return delta


def range_backward(
    do_SHD: Tensor,
    q_SHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    lse_SH: Tensor,
    delta_SH: Tensor,
    gate_SH: Tensor,
    ranges: Ranges,
    scale: float,
    dq_SHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (in q's type; added to `dq_SHD` where given), k, v (float32).

    `do` is the gradient of gate times branch; `delta` the row sum of do times the branch's output, without
    the gate: the gate's own gradient. `delta_SH`, `gate_SH` may be strided views [S, H] with H-contiguous rows.
    """
    do, q = do_SHD.to(q_SHD.dtype).contiguous(), q_SHD.contiguous()
    k, v = rows_contiguous(k_NGD), rows_contiguous(v_NGD)
    check_launch(q, k, v, do)
    (s, h, dk), (keys, groups, dv) = q.shape, v.shape
    add = dq_SHD is not None
    dq = torch.empty_like(q) if dq_SHD is None else dq_SHD
    splits, split_queries = _splits(s, keys, ranges)
    d_k = k.new_empty(splits, keys, groups, dk, dtype=torch.float32)
    d_v = v.new_empty(splits, keys, groups, dv, dtype=torch.float32)
    if s:
        meta = tuned("range_dq", q, dk, dv)
        shared = (k.stride(0), k.stride(1), v.stride(0), v.stride(1), scale)
        sizes = {"R": h // groups, "PREC": precision(q), **pieces(dk, dv)}
        steps = gate_SH.stride(1), delta_SH.stride(1)
        count_launch("range_dq")
        range_dq_kernel[(triton.cdiv(s * (h // groups), meta["BM"]), groups)](
            do, q, k, v, lse_SH, delta_SH, gate_SH, ranges.lo_S, ranges.hi_S, dq, s, h, *steps, *shared,
            ADD=add, **sizes, **meta)  # fmt: skip
    if keys and s:
        meta = tuned("range_dkv", q, dk, dv)
        count_launch("range_dkv")
        range_dkv_kernel[(triton.cdiv(keys, meta["BN"]), groups, splits)](
            do, q, k, v, lse_SH, delta_SH, gate_SH, ranges.lo_S, ranges.hi_S, *ranges.seen_by(keys), d_k, d_v,
            keys, groups, h, split_queries, *steps, *shared, **sizes, **meta)  # fmt: skip
        return dq, sum_splits(d_k), sum_splits(d_v)
    return dq, d_k.new_zeros(d_k.shape[1:]), d_v.new_zeros(d_v.shape[1:])


def _splits(queries: int, keys: int, ranges: Ranges) -> tuple[int, int]:
    """Parts into which the queries are cut for dk and dv, and queries of a part.

    Few keys that very many queries see (compressed tokens) would leave most of a GPU idle; a window's keys are
    seen by few. The cut depends on the sizes alone: the same sums on every device.
    """
    if ranges.widest * 4 < keys:
        return 1, max(queries, 1)
    splits = min(8, max(1, queries // 4096))
    return splits, -(-max(queries, 1) // splits)


def sum_splits(x: Tensor) -> Tensor:
    """The sum over the first dim, one after the other."""
    if len(x) == 1:
        return x[0]
    total = x[0]
    for part in x[1:]:
        total += part
    return total


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
