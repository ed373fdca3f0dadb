"""Triton: attention in which each query sees one range of rows (window, compressed tokens), forward and backward.

A tile's rows are the R query heads of a KV head's group over neighbouring queries, so that they share keys and
values. The backward has two kernels, each of which computes the scores again: one goes over keys for a tile of
queries (dq), one over queries for a tile of keys (dk, dv). No atomics: the sums have one order.

Products are taken in the inputs' type, sums in float32. Each loop has three parts, so that only a tile at an
edge is masked: rows that some see, that all see, that some see.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.tile_ops import (
    LOG2E,
    add_dkv,
    add_products,
    load_two,
    products,
    row_vectors,
    softmax_end,
    softmax_step,
    store_two,
    zeros_two,
)
from nsa_dist.kernels.tiled import Ranges
from nsa_dist.kernels.tuning import check_launch, count_launch, head_sizes, on_hopper, precision, tuned


@triton.jit
def _query_tile(lo_ptr, hi_ptr, queries, heads, g, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """A tile's rows, and the keys that some of them see: [start, end), of which all see [a, b)."""
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
    a = tl.minimum(start + tl.cdiv(tl.maximum(inner - start, 0), BN) * BN, end)
    b = a + tl.maximum(outer - a, 0) // BN * BN
    return row, here, lo, hi, start, a, b, end


@triton.jit
def _part(part: tl.constexpr, start, a, b, end):
    """The part of [start, end) that a loop goes over: before a, from a to b, from b on."""
    if part == 0:
        return start, a
    if part == 1:
        return a, b
    return b, end


@triton.jit
def range_forward_kernel(
    q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr, o_ptr, lse_ptr, queries, heads, k_row, k_head, v_row, v_head, scale,
    R: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    row, here, lo, hi, start, a, b, end = _query_tile(lo_ptr, hi_ptr, queries, heads, g, R, BM, BN)
    k_ptr += g.to(tl.int64) * k_head
    v_ptr += g.to(tl.int64) * v_head
    q1, q2 = load_two(q_ptr, row * DK, here, DK, DK1, DK2)
    o1, o2 = zeros_two(BM, DV1, DV2)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for part in tl.static_range(3):
        first, stop = _part(part, start, a, b, end)
        for n0 in range(first, stop, BN):
            n = n0 + tl.arange(0, BN)
            n_here = n < stop
            k1, k2 = load_two(k_ptr, n.to(tl.int64) * k_row, n_here, DK, DK1, DK2)
            s = products(q1, q2, k1, k2, DK2, PREC) * (scale * LOG2E)
            if part != 1:
                seen = (n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]) & n_here[None, :]
                s = tl.where(seen, s, float("-inf"))
            v1, v2 = load_two(v_ptr, n.to(tl.int64) * v_row, n_here, DV, DV1, DV2)
            o1, o2, top, total = softmax_step(s, v1, v2, o1, o2, top, total, part != 1, DV2, PREC)
    o1, o2, lse = softmax_end(o1, o2, top, total)
    tl.store(lse_ptr + row, lse, mask=here)
    store_two(o_ptr, row * DV, here, o1, o2, DV, DV1, DV2)


@triton.jit
def range_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, gate_ptr, lo_ptr, hi_ptr, dq_ptr, queries, heads,
    k_row, k_head, v_row, v_head, scale,
    R: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    row, here, lo, hi, start, a, b, end = _query_tile(lo_ptr, hi_ptr, queries, heads, g, R, BM, BN)
    k_ptr += g.to(tl.int64) * k_head
    v_ptr += g.to(tl.int64) * v_head
    q1, q2 = load_two(q_ptr, row * DK, here, DK, DK1, DK2)
    do1, do2 = load_two(do_ptr, row * DV, here, DV, DV1, DV2)
    lse2, delta, gate = row_vectors(lse_ptr, delta_ptr, gate_ptr, row, here)
    dq1, dq2 = zeros_two(BM, DK1, DK2)
    for part in tl.static_range(3):
        first, stop = _part(part, start, a, b, end)
        for n0 in range(first, stop, BN):
            n = n0 + tl.arange(0, BN)
            n_here = n < stop
            k1, k2 = load_two(k_ptr, n.to(tl.int64) * k_row, n_here, DK, DK1, DK2)
            v1, v2 = load_two(v_ptr, n.to(tl.int64) * v_row, n_here, DV, DV1, DV2)
            p = tl.exp2(products(q1, q2, k1, k2, DK2, PREC) * (scale * LOG2E) - lse2[:, None])
            if part != 1:
                seen = (n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]) & n_here[None, :]
                p = tl.where(seen, p, 0.0)
            ds = p * (products(do1, do2, v1, v2, DV2, PREC) - delta[:, None])
            dq1, dq2 = add_products(ds, k1, k2, dq1, dq2, DK2, PREC)
    factor = (gate * scale)[:, None]
    store_two(dq_ptr, row * DK, here, dq1 * factor, dq2 * factor, DK, DK1, DK2, ADD)


@triton.jit
def range_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, gate_ptr, lo_ptr, hi_ptr, from_ptr, until_ptr, dk_ptr, dv_ptr,
    keys, groups, heads, split_queries,  k_row, k_head, v_row, v_head, scale,
    R: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """dk, dv of a tile of keys from the queries [split * split_queries, …) that see it; S^T = K Q^T."""
    g = tl.program_id(1)
    split = tl.program_id(2)
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    n_here = n < keys
    last = tl.minimum(n0 + BN, keys) - 1
    low, high = split * split_queries, (split + 1) * split_queries
    start = tl.maximum(tl.load(from_ptr + n0).to(tl.int32), low)
    end = tl.maximum(tl.minimum(tl.load(until_ptr + last).to(tl.int32), high), start)
    a = tl.minimum(tl.maximum(tl.load(from_ptr + last).to(tl.int32), start), end)
    b = tl.maximum(tl.minimum(tl.load(until_ptr + n0).to(tl.int32), end), a)
    if NARROW:  # few queries see a tile: one masked loop, not three short ones
        a, b = start, start
    k1, k2 = load_two(k_ptr, n.to(tl.int64) * k_row + g.to(tl.int64) * k_head, n_here, DK, DK1, DK2)
    v1, v2 = load_two(v_ptr, n.to(tl.int64) * v_row + g.to(tl.int64) * v_head, n_here, DV, DV1, DV2)
    dk1, dk2 = zeros_two(BN, DK1, DK2)
    dv1, dv2 = zeros_two(BN, DV1, DV2)
    for part in tl.static_range(3):
        first, stop = _part(part, start, a, b, end)
        for m0 in range(first * R, stop * R, BM):
            m = m0 + tl.arange(0, BM)
            s_M = m // R
            here = s_M < stop
            row = s_M.to(tl.int64) * heads + g * R + m % R
            q1, q2 = load_two(q_ptr, row * DK, here, DK, DK1, DK2)
            do1, do2 = load_two(do_ptr, row * DV, here, DV, DV1, DV2)
            lse2, delta, gate = row_vectors(lse_ptr, delta_ptr, gate_ptr, row, here)  # 0 beyond the part
            p = tl.exp2(products(k1, k2, q1, q2, DK2, PREC) * (scale * LOG2E) - lse2[None, :])
            if part != 1:
                lo = tl.load(lo_ptr + s_M, mask=here, other=0).to(tl.int32)
                hi = tl.load(hi_ptr + s_M, mask=here, other=0).to(tl.int32)
                p = tl.where((n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :]), p, 0.0)
            _, dk1, dk2, dv1, dv2 = add_dkv(
                p, gate, delta, v1, v2, do1, do2, q1, q2, dk1, dk2, dv1, dv2, DK2, DV2, PREC
            )
    at = (split.to(tl.int64) * keys + n) * groups + g
    store_two(dk_ptr, at * DK, n_here, dk1 * scale, dk2 * scale, DK, DK1, DK2)
    store_two(dv_ptr, at * DV, n_here, dv1, dv2, DV, DV1, DV2)


def range_forward(q_SHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, ranges: Ranges, scale: float) -> tuple[Tensor, Tensor]:
    """As `tiled.range_forward`: output [S, H, Dv] in q's type, log-sum-exp [S, H] in float32."""
    q, k, v = q_SHD.contiguous(), rows_contiguous(k_NGD), rows_contiguous(v_NGD)
    check_launch(q, k, v)
    (s, h, dk), (_, groups, dv) = q.shape, v.shape
    o, lse = q.new_empty(s, h, dv), q.new_empty(s, h, dtype=torch.float32)
    if s == 0:
        return o, lse
    if _by_gluon(k, v, q):
        from nsa_dist.kernels import hopper

        hopper.range_forward(q, k, v, ranges, scale, o, lse)
        return o, lse
    meta = tuned("range_forward", q, dk, dv)
    tiles = triton.cdiv(s * (h // groups), meta["BM"])
    count_launch("range_forward")
    range_forward_kernel[(tiles, groups)](
        q, k, v, ranges.lo_S, ranges.hi_S, o, lse, s, h, k.stride(0), k.stride(1), v.stride(0), v.stride(1), scale,
        R=h // groups, **head_sizes(dk, dv), PREC=precision(q), **meta)  # fmt: skip
    return o, lse


def range_backward(
    branch: BranchGrad,
    q_SHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    ranges: Ranges,
    scale: float,
    dq_SHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `tiled.range_backward`, but dq is in q's type."""
    q, k, v = q_SHD.contiguous(), rows_contiguous(k_NGD), rows_contiguous(v_NGD)
    do = branch.do_SHD.to(q.dtype).contiguous()
    rows = branch.rows()
    check_launch(q, k, v, do)
    (s, h, dk), (keys, groups, dv) = q.shape, v.shape
    add = dq_SHD is not None
    dq = torch.empty_like(q) if dq_SHD is None else dq_SHD
    narrow = ranges.widest * 4 < keys
    splits, split_queries = _splits(s, keys, groups, narrow)
    d_k = k.new_empty(splits, keys, groups, dk, dtype=torch.float32)
    d_v = v.new_empty(splits, keys, groups, dv, dtype=torch.float32)
    by_gluon = s > 0 and _by_gluon(k, v, q, do) and dk <= 192 and dv in (64, 128)  # what the registers hold
    shared = (k.stride(0), k.stride(1), v.stride(0), v.stride(1), scale)
    sizes = {"R": h // groups, "PREC": precision(q), **head_sizes(dk, dv)}
    if by_gluon:
        from nsa_dist.kernels import hopper_query_grads, hopper_range_grads

        hopper_query_grads.range_dq(q, do, k, v, rows, ranges, scale, dq, add)
        hopper_range_grads.range_dkv(q, do, k, v, rows, ranges, scale, d_k, d_v, split_queries)
    elif s:
        meta = tuned("range_dq", q, dk, dv)
        count_launch("range_dq")
        range_dq_kernel[(triton.cdiv(s * (h // groups), meta["BM"]), groups)](
            do, q, k, v, *rows, ranges.lo_S, ranges.hi_S, dq, s, h, *shared,
            ADD=add, **sizes, **meta)  # fmt: skip
    if not keys or not s:
        return dq, d_k.new_zeros(d_k.shape[1:]), d_v.new_zeros(d_v.shape[1:])
    if not by_gluon:
        meta = tuned("range_dkv", q, dk, dv)
        count_launch("range_dkv")
        range_dkv_kernel[(triton.cdiv(keys, meta["BN"]), groups, splits)](
            do, q, k, v, *rows, ranges.lo_S, ranges.hi_S, *ranges.seen_by(keys), d_k, d_v,
            keys, groups, h, split_queries, *shared, NARROW=narrow,
            **sizes, **meta)  # fmt: skip
    return (dq, d_k[0], d_v[0]) if splits == 1 else (dq, d_k.sum(0), d_v.sum(0))


def _by_gluon(k: Tensor, v: Tensor, *rows: Tensor) -> bool:
    """Whether Hopper's kernels compute it: the copy engine brings tiles of rows of a power of two of heads."""
    r = rows[0].shape[1] // k.shape[1]
    aligned = all(x.data_ptr() % 16 == 0 for x in rows)
    return aligned and r in (1, 2, 4, 8, 16, 32, 64) and on_hopper(rows[0], k, v)


def _splits(queries: int, keys: int, groups: int, narrow: bool) -> tuple[int, int]:
    """Parts into which the queries are cut for dk and dv, and queries of a part.

    Few keys that very many queries see (compressed tokens) would leave most of a GPU idle; a window's keys are
    seen by few. The cut depends on the sizes alone: the same sums on every device.
    """
    tiles = max(1, -(-keys // 128) * groups)
    splits = 1 if narrow else max(1, min(-(-1024 // tiles), queries // 128))
    return splits, -(-max(queries, 1) // splits)


def rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
