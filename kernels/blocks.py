"""Triton: selected attention, block by block, forward and backward.

Query by query each token would read 16 blocks of keys and values for 16 rows of queries: bound by L2. Here a
program holds one block and goes over the queries that picked it: a pick costs a row of q and a partial output.
The picks are sorted, stably, by (chunk, KV head, block), 4 bytes a pick; a block that many picked is cut into work
items of equal size. A second kernel adds a query's partial results in the order of its picks, a third those of a
block that was cut: no atomics, one order. A chunk bounds the memory of the partial results: of some queries, as many
as have their rows of one KV head in the cache, and of as many KV heads as fit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.gating import combine_forward, gated_sum, load_gates
from nsa_dist.kernels.ranged import rows_contiguous
from nsa_dist.kernels.selected import BlockIndex, check_picks
from nsa_dist.kernels.tile_ops import (
    LOG2E,
    add_products,
    load_two,
    products,
    softmax_end,
    softmax_step,
    store_two,
    zeros_two,
)
from nsa_dist.kernels.tuning import (
    CHUNK,
    check_launch,
    count_launch,
    head_sizes,
    on_hopper,
    pieces,
    precision,
    target,
    tuned,
)
from nsa_dist.kernels.work import make_work

_ITEM_ROWS = 2048  # queries times heads of a work item
# Of the kernels that put a query's partial results together, output and dq.
_MERGE = {"BM": 16, "UNROLL": 4, "num_warps": 4}
_CACHED_BYTES = 24 << 20  # of a chunk's rows of one KV head, each read once a pick
_CHUNK_BYTES = 3 << 29  # of partial results;
_LONG = 1 << 17  # half of it from so many queries on: there memory is scarce, and what it costs is small


@triton.jit
def _item(item_start_ptr, segment_ptr, start_ptr, chunk, segments, WIDTH: tl.constexpr):
    """This program's item: its (KV head, block), its picks [at, stop), and which of how many parts it is."""
    item = tl.load(item_start_ptr + chunk * segments) + tl.program_id(0)
    here = item < tl.load(item_start_ptr + (chunk + 1) * segments)
    segment = tl.load(segment_ptr + item, mask=here, other=0)
    first = tl.load(item_start_ptr + segment)
    part, parts = item - first, tl.load(item_start_ptr + segment + 1) - first
    at = tl.load(start_ptr + segment) + part * WIDTH
    stop = tl.minimum(at + WIDTH, tl.load(start_ptr + segment + 1))
    return here, segment, part, parts, at, tl.where(here, stop, at)


@triton.jit
def _base(g, first_head, first_query, chunk_queries, all_queries, count):
    """What a KV head's picks' numbers have above those of their partial results."""
    return (first_query + first_head * chunk_queries + g * (all_queries - chunk_queries)) * count


@triton.jit
def _picked_rows(
    order_ptr, token_ptr, at, stop, base, all_queries, count, heads, g,
    R: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """BM // RP picks with the R heads of each: rows of q, rows of the partial results, the queries' tokens."""
    head = tl.arange(0, BM) % RP
    i = at + tl.arange(0, BM) // RP
    here = (i < stop) & (head < R)
    pick = tl.load(order_ptr + i, mask=here, other=0)
    s = pick // count - g * all_queries
    row = s.to(tl.int64) * heads + g * R + head
    partial = (pick - base) * R + head  # times the head size: below 2**31, see _chunk
    token = tl.load(token_ptr + s, mask=here, other=-1).to(tl.int32)
    return here, row, partial, token


@triton.jit(do_not_specialize=CHUNK)
def block_forward_kernel(
    q_ptr, k_ptr, v_ptr, token_q_ptr, token_k_ptr, begin_ptr, end_ptr, order_ptr, start_ptr, item_start_ptr,
    segment_ptr, part_o_ptr, part_lse_ptr, chunk, first_head, first_query, segments, blocks, chunk_queries,
    all_queries, count, heads, k_row, v_row, scale,
    R: tl.constexpr, RP: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ONCE: tl.constexpr, WIDTH: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """ONCE: no block is longer than BN, so that its keys are loaded once."""
    _, segment, _, _, first, stop = _item(item_start_ptr, segment_ptr, start_ptr, chunk, segments, WIDTH)
    which = segment % segments + first_head * blocks
    g = which // blocks
    base = _base(g, first_head, first_query, chunk_queries, all_queries, count)
    begin, end = tl.load(begin_ptr + which).to(tl.int32), tl.load(end_ptr + which).to(tl.int32)
    if ONCE:
        n = begin + tl.arange(0, BN)
        k1, k2 = load_two(k_ptr, n.to(tl.int64) * k_row, n < end, DK, DK1, DK2)
        v1, v2 = load_two(v_ptr, n.to(tl.int64) * v_row, n < end, DV, DV1, DV2)
        token_N = tl.load(token_k_ptr + n, mask=n < end, other=2147483647).to(tl.int32)
    for at in range(first, stop, BM // RP):
        here, row, partial, token_M = _picked_rows(
            order_ptr, token_q_ptr, at, stop, base, all_queries, count, heads, g, R, RP, BM
        )
        q1, q2 = load_two(q_ptr, row * DK, here, DK, DK1, DK2)
        o1, o2 = zeros_two(BM, DV1, DV2)
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        if ONCE:
            s = products(q1, q2, k1, k2, DK2, PREC) * (scale * LOG2E)
            s = tl.where(token_N[None, :] <= token_M[:, None], s, float("-inf"))
            o1, o2, top, total = softmax_step(s, v1, v2, o1, o2, top, total, True, DV2, PREC)
        else:
            for n0 in range(begin, end, BN):
                n = n0 + tl.arange(0, BN)
                k1, k2 = load_two(k_ptr, n.to(tl.int64) * k_row, n < end, DK, DK1, DK2)
                v1, v2 = load_two(v_ptr, n.to(tl.int64) * v_row, n < end, DV, DV1, DV2)
                token_N = tl.load(token_k_ptr + n, mask=n < end, other=2147483647).to(tl.int32)
                s = products(q1, q2, k1, k2, DK2, PREC) * (scale * LOG2E)
                s = tl.where(token_N[None, :] <= token_M[:, None], s, float("-inf"))
                o1, o2, top, total = softmax_step(s, v1, v2, o1, o2, top, total, True, DV2, PREC)
        o1, o2, lse = softmax_end(o1, o2, top, total)
        tl.store(part_lse_ptr + partial, lse, mask=here)
        store_two(part_o_ptr, partial * DV, here, o1, o2, DV, DV1, DV2, False, True)


@triton.jit
def _slot_rows(
    first_head, first_query, queries, chunk_queries, all_queries, heads, count, R: tl.constexpr, BM: tl.constexpr
):
    """A tile of a chunk's queries of one KV head: the head, rows of q, first pick, row of its partial result."""
    g = first_head + tl.program_id(1)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    s = m // R
    here = s < queries
    row = (first_query + s).to(tl.int64) * heads + g * R + m % R
    pick = (g * all_queries + first_query + s) * count
    partial = (tl.program_id(1).to(tl.int64) * chunk_queries + s) * count * R + m % R
    return g, here, row, pick, partial


@triton.jit
def _held(picks_ptr, begin_ptr, end_ptr, pick_M, here_M, blocks, count, g, SLOTS: tl.constexpr):
    """[M, SLOTS]: where a pick is a block of which the buffer has rows."""
    slot = tl.arange(0, SLOTS)
    here = here_M[:, None] & (slot < count)[None, :]
    block = tl.load(picks_ptr + pick_M[:, None] + slot[None, :], mask=here, other=-1)
    here &= block >= 0
    begin = tl.load(begin_ptr + g * blocks + block, mask=here, other=0)
    return here & (tl.load(end_ptr + g * blocks + block, mask=here, other=0) > begin)


@triton.jit
def _of_slot(x, slot, SLOTS: tl.constexpr):
    """[M]: column `slot` of [M, SLOTS], x at least 0."""
    return tl.sum(tl.where((tl.arange(0, SLOTS) == slot)[None, :], x, 0.0), 1)


@triton.jit(do_not_specialize=CHUNK)
def merge_kernel(
    part_o_ptr, part_lse_ptr, picks_ptr, begin_ptr, end_ptr, o_ptr, lse_ptr, gates_ptr, o_cmp_ptr, o_win_ptr, out_ptr,
    first_head, first_query, queries, chunk_queries, all_queries, heads, blocks, count,
    R: tl.constexpr, DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, SLOTS: tl.constexpr, ONTO: tl.constexpr,
    GATED: tl.constexpr, BM: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """A query's output from those over its blocks, in the order of its picks; ONTO: after what is in o and lse.

    All weights are known before the first row is read, so that many rows are under way together. GATED: the sum of
    the three branches too, as `gating.combine_kernel` makes it of what is stored.
    """
    g, here, row, pick, partial = _slot_rows(
        first_head, first_query, queries, chunk_queries, all_queries, heads, count, R, BM
    )
    held = _held(picks_ptr, begin_ptr, end_ptr, pick, here, blocks, count, g, SLOTS)
    of_slot = partial[:, None] + (tl.arange(0, SLOTS) * R)[None, :]
    lse2 = tl.load(part_lse_ptr + of_slot, mask=held, other=float("-inf")) * LOG2E
    top = tl.max(lse2, 1)
    o1, o2 = zeros_two(BM, DV1, DV2)
    if ONTO:
        before = tl.load(lse_ptr + row, mask=here, other=float("-inf")) * LOG2E
        top = tl.maximum(top, before)
    safe = tl.where(top == float("-inf"), 0.0, top)  # -inf - (-inf) would be NaN
    weights = tl.exp2(lse2 - safe[:, None])
    total = tl.sum(weights, 1)
    if ONTO:
        weight = tl.exp2(before - safe)
        total += weight
        o1, o2 = load_two(o_ptr, row * DV, here, DV, DV1, DV2)
        o1 = o1.to(tl.float32) * weight[:, None]
        o2 = o2.to(tl.float32) * weight[:, None]
    for slot in tl.range(count, loop_unroll_factor=UNROLL):
        weight = _of_slot(weights, slot, SLOTS)
        x1, x2 = load_two(part_o_ptr, (partial + slot * R) * DV, weight > 0, DV, DV1, DV2, True)
        o1 += x1.to(tl.float32) * weight[:, None]
        if DV2 > 0:
            o2 += x2.to(tl.float32) * weight[:, None]
    o1, o2, lse = softmax_end(o1, o2, top, total)
    tl.store(lse_ptr + row, lse, mask=here)
    store_two(o_ptr, row * DV, here, o1, o2, DV, DV1, DV2)
    if GATED:  # read last: before the blocks' they would take a third more registers, 0.35 ms slower
        cmp1, cmp2 = load_two(o_cmp_ptr, row * DV, here, DV, DV1, DV2, True)
        win1, win2 = load_two(o_win_ptr, row * DV, here, DV, DV1, DV2, True)
        o1, o2 = o1.to(o_ptr.dtype.element_ty), o2.to(o_ptr.dtype.element_ty)
        gate1, gate2, gate3 = load_gates(gates_ptr, row, here)
        out1 = gated_sum(gate1, cmp1, gate2, o1, gate3, win1)
        out2 = out1
        if DV2 > 0:
            out2 = gated_sum(gate1, cmp2, gate2, o2, gate3, win2)
        store_two(out_ptr, row * DV, here, out1, out2, DV, DV1, DV2)


@triton.jit(do_not_specialize=CHUNK)
def block_backward_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, gate_ptr, token_q_ptr, token_k_ptr, begin_ptr, end_ptr,
    order_ptr, start_ptr, item_start_ptr, split_start_ptr, segment_ptr, part_dq_ptr, part_dk_ptr, part_dv_ptr,
    dk_ptr, dv_ptr, chunk, first_head, first_query, segments, blocks, chunk_queries, all_queries, count, heads,
    longest, k_row, v_row, scale,
    R: tl.constexpr, RP: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    DV: tl.constexpr, DV1: tl.constexpr, DV2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ONCE: tl.constexpr, WIDTH: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dk and dv of the item's block, added where the item is the whole segment, else left as a partial sum;
    dq of each pick. S^T = K Q^T, dQ^T = K^T dS^T."""
    here_item, segment, part, parts, first, stop = _item(
        item_start_ptr, segment_ptr, start_ptr, chunk, segments, WIDTH
    )
    which = segment % segments + first_head * blocks
    g = which // blocks
    base = _base(g, first_head, first_query, chunk_queries, all_queries, count)
    begin, end = tl.load(begin_ptr + which).to(tl.int32), tl.load(end_ptr + which).to(tl.int32)
    end = tl.where(here_item, end, begin)
    split = tl.load(split_start_ptr + segment) - tl.load(split_start_ptr + chunk * segments) + part
    for n0 in range(begin, end, BN):
        n = n0 + tl.arange(0, BN)
        n_here = n < end
        k1, k2 = load_two(k_ptr, n.to(tl.int64) * k_row, n_here, DK, DK1, DK2)
        v1, v2 = load_two(v_ptr, n.to(tl.int64) * v_row, n_here, DV, DV1, DV2)
        token_N = tl.load(token_k_ptr + n, mask=n_here, other=2147483647).to(tl.int32)
        dk1, dk2 = zeros_two(BN, DK1, DK2)
        dv1, dv2 = zeros_two(BN, DV1, DV2)
        for at in range(first, stop, BM // RP):
            here, row, partial, token_M = _picked_rows(
                order_ptr, token_q_ptr, at, stop, base, all_queries, count, heads, g, R, RP, BM
            )
            q1, q2 = load_two(q_ptr, row * DK, here, DK, DK1, DK2)
            do1, do2 = load_two(do_ptr, row * DV, here, DV, DV1, DV2)
            lse2 = tl.load(lse_ptr + row, mask=here, other=0.0) * LOG2E
            delta = tl.load(delta_ptr + row, mask=here, other=0.0)
            gate = tl.load(gate_ptr + row, mask=here, other=0.0)
            p = tl.exp2(products(k1, k2, q1, q2, DK2, PREC) * (scale * LOG2E) - lse2[None, :])
            p = tl.where(token_N[:, None] <= token_M[None, :], p, 0.0) * gate[None, :]
            ds = p * (products(v1, v2, do1, do2, DV2, PREC) - delta[None, :])
            dv1, dv2 = add_products(p, do1, do2, dv1, dv2, DV2, PREC)
            dk1, dk2 = add_products(ds, q1, q2, dk1, dk2, DK2, PREC)
            ds = (ds * scale).to(k1.dtype)
            to = part_dq_ptr + partial[None, :] * DK
            for piece in tl.static_range(2 if DK2 > 0 else 1):
                k, d = k1, tl.arange(0, DK1)
                if piece == 1:
                    k, d = k2, DK1 + tl.arange(0, DK2)
                dq = tl.dot(tl.trans(k), ds, input_precision=PREC)
                mask = here[None, :] & (d < DK)[:, None]
                if not ONCE:  # a long block: on top of what its rows before these left, at first 0
                    dq += tl.load(to + d[:, None], mask=mask, other=0.0).to(tl.float32)
                tl.store(
                    to + d[:, None], dq.to(part_dq_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
                )
        if parts == 1:
            store_two(dk_ptr, n.to(tl.int64) * DK, n_here, dk1 * scale, dk2 * scale, DK, DK1, DK2, True)
            store_two(dv_ptr, n.to(tl.int64) * DV, n_here, dv1, dv2, DV, DV1, DV2, True)
        else:
            to_N = split.to(tl.int64) * longest + n - begin
            store_two(part_dk_ptr, to_N * DK, n_here, dk1 * scale, dk2 * scale, DK, DK1, DK2)
            store_two(part_dv_ptr, to_N * DV, n_here, dv1, dv2, DV, DV1, DV2)
        if not ONCE:
            tl.debug_barrier()


@triton.jit(do_not_specialize=CHUNK)
def add_parts_kernel(
    part_ptr, begin_ptr, end_ptr, item_start_ptr, split_start_ptr, d_ptr, chunk, first_head, segments, blocks,
    longest, D: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Adds a block's partial sums, in order, to its gradient."""
    which = tl.program_id(0) + first_head * blocks
    segment = chunk * segments + tl.program_id(0)
    parts = tl.load(item_start_ptr + segment + 1) - tl.load(item_start_ptr + segment)
    if parts > 1:
        split = tl.load(split_start_ptr + segment) - tl.load(split_start_ptr + chunk * segments)
        begin, end = tl.load(begin_ptr + which), tl.load(end_ptr + which)
        n = begin + tl.program_id(1) * BN + tl.arange(0, BN)
        d = tl.arange(0, WIDTH)
        mask = (n < end)[:, None] & (d < D)[None, :]
        total = tl.load(d_ptr + n[:, None] * D + d[None, :], mask=mask, other=0.0)
        for part in tl.range(parts, loop_unroll_factor=8):
            at = (split + part).to(tl.int64) * longest + n - begin
            total += tl.load(part_ptr + at[:, None] * D + d[None, :], mask=mask, other=0.0)
        tl.store(d_ptr + n[:, None] * D + d[None, :], total, mask=mask)


@triton.jit(do_not_specialize=CHUNK)
def sum_dq_kernel(
    part_dq_ptr, picks_ptr, begin_ptr, end_ptr, dq_ptr, first_head, first_query, queries, chunk_queries, all_queries,
    heads, blocks, count,
    R: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr, SLOTS: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    g, here, row, pick, partial = _slot_rows(
        first_head, first_query, queries, chunk_queries, all_queries, heads, count, R, BM
    )
    held = _held(picks_ptr, begin_ptr, end_ptr, pick, here, blocks, count, g, SLOTS).to(tl.float32)
    dq1, dq2 = zeros_two(BM, DK1, DK2)
    for slot in tl.range(count, loop_unroll_factor=UNROLL):
        there = _of_slot(held, slot, SLOTS) > 0
        x1, x2 = load_two(part_dq_ptr, (partial + slot * R) * DK, there, DK, DK1, DK2, True)
        dq1 += x1.to(tl.float32)
        if DK2 > 0:
            dq2 += x2.to(tl.float32)
    store_two(dq_ptr, row * DK, here, dq1, dq2, DK, DK1, DK2, ADD)


def selected_forward(
    q_SHD: Tensor,
    k_ND: Tensor,
    v_ND: Tensor,
    picks_SGn: Tensor,
    token_S: Tensor,
    index: BlockIndex,
    scale: float,
    onto: tuple[Tensor, Tensor] | None = None,
    *,
    gated: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As `selected.selected_forward`: output [S, H, Dv] in q's type, log-sum-exp [S, H] in float32.

    gated: gates, the compressed and the window branch's outputs, and what all three's gated sum is written to.
    """
    check_picks(picks_SGn, index)
    q, k, v = q_SHD.contiguous(), rows_contiguous(k_ND), rows_contiguous(v_ND)
    picks = picks_SGn.transpose(0, 1).contiguous()
    check_launch(q, k, v)
    (s, h, dk), (groups, _, count), dv = q.shape, picks.shape, v.shape[1]
    o, lse = onto or (q.new_empty(s, h, dv), q.new_empty(s, h, dtype=torch.float32))
    if s == 0 or index.longest == 0:  # no row: no grid either
        if not onto:
            o.zero_()
            lse.fill_(-torch.inf)
        if gated:
            gates, o_cmp, o_win, out = gated
            out.copy_(combine_forward(gates, [o_cmp, o, o_win]))
        return o, lse
    sizes, meta = _launch("block_forward", q, dk, dv, h // groups)
    r, blocks = h // groups, index.begin_GB.shape[1]
    work = make_work(picks, index, *_chunk(q, blocks, r * dk, r * count * dv), _item_width(r, meta["BM"]))
    part_o = q.new_empty(work.picks * r, dv)
    part_lse = q.new_empty(len(part_o), dtype=torch.float32)
    edges = index.begin_GB, index.end_GB
    by_gluon = _by_gluon(q, k, v, r, index.longest)
    if by_gluon:
        from nsa_dist.kernels import hopper_blocks

        descriptors, constants = hopper_blocks.arguments(q, k, v, part_o, r)
    for name in ("block_forward", "combine") if gated else ("block_forward",):
        count_launch(name)
    for chunk in work.chunks:
        where = (token_S, index.token_N, *edges, work.order, work.start, work.item_start, work.segment)
        which = chunk.number, chunk.first_head, chunk.first_query, work.segments, blocks, work.queries, s, count, h
        if by_gluon:
            hopper_blocks.block_forward_kernel[(work.items,)](
                *descriptors, *where, part_lse, *which, scale,
                WIDTH=work.width, num_warps=4, **constants)  # fmt: skip
        else:
            block_forward_kernel[(work.items,)](
                q, k, v, *where, part_o, part_lse, *which, k.stride(0), v.stride(0), scale,
                ONCE=index.longest <= meta["BN"], WIDTH=work.width, **sizes, **meta)  # fmt: skip
        merge_kernel[(triton.cdiv(chunk.queries * r, _MERGE["BM"]), chunk.heads)](
            part_o, part_lse, picks, *edges, o, lse, *(gated or (o,) * 4), chunk.first_head, chunk.first_query,
            chunk.queries, work.queries, s, h, blocks, count, R=r, SLOTS=_slots(count), ONTO=onto is not None,
            GATED=gated is not None, **_MERGE, **pieces("V", dv))  # fmt: skip
    return o, lse


def selected_combined(
    gates_SH3: Tensor, o_cmp_SHD: Tensor, o_win_SHD: Tensor, *selected: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """As `selected.selected_combined`: the last kernel reads the other branches' outputs and adds all three."""
    gates, o_cmp, o_win = gates_SH3.contiguous(), o_cmp_SHD.contiguous(), o_win_SHD.contiguous()
    out = torch.empty_like(o_cmp)
    o, lse = selected_forward(*selected, gated=(gates, o_cmp, o_win, out))
    return o, lse, out


def selected_backward(
    branch: BranchGrad,
    q_SHD: Tensor,
    k_ND: Tensor,
    v_ND: Tensor,
    picks_SGn: Tensor,
    token_S: Tensor,
    index: BlockIndex,
    scale: float,
    dq_SHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `selected.selected_backward`; dq in q's type, dk and dv in float32."""
    q, k, v = q_SHD.contiguous(), rows_contiguous(k_ND), rows_contiguous(v_ND)
    picks = picks_SGn.transpose(0, 1).contiguous()
    do = branch.do_SHD.to(q.dtype).contiguous()
    rows = branch.rows()
    check_launch(q, k, v, do)
    (s, h, dk), (groups, _, count), dv = q.shape, picks.shape, v.shape[1]
    dq = torch.empty_like(q) if dq_SHD is None else dq_SHD
    d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
    if s == 0 or index.longest == 0:
        return (dq.zero_() if dq_SHD is None else dq), d_k, d_v
    sizes, meta = _launch("block_backward", q, dk, dv, h // groups)
    r, blocks, longest = h // groups, index.begin_GB.shape[1], index.longest
    width, by_gluon = _item_width(r, meta["BM"]), do.data_ptr() % 16 == 0 and _by_gluon(q, k, v, r, longest)
    if by_gluon:
        from nsa_dist.kernels import hopper_block_grads

        width = hopper_block_grads.ITEM_ROWS // r
    work = make_work(picks, index, *_chunk(q, blocks, r * (dk + dv), r * count * dk), width)
    part_dq = q.new_empty(work.picks * r, dk)
    part_dk, part_dv = (d.new_empty(work.splits * longest, d.shape[1]) for d in (d_k, d_v))
    edges, starts = (index.begin_GB, index.end_GB), (work.item_start, work.split_start)
    count_launch("block_backward")
    once = longest <= meta["BN"]
    if by_gluon:
        descriptors, constants = hopper_block_grads.arguments(q, do, k, v, part_dq, r)
    for chunk in work.chunks:
        where = (*rows, token_S, index.token_N, *edges, work.order, work.start, *starts, work.segment)
        grads = part_dk, part_dv, d_k, d_v
        which = chunk.number, chunk.first_head, chunk.first_query, work.segments, blocks, work.queries, s, count, h
        if by_gluon:
            hopper_block_grads.block_backward_kernel[(work.items,)](
                *descriptors, *where, *grads, *which, longest, scale,
                WIDTH=work.width, num_warps=8, **constants)  # fmt: skip
        else:
            if not once:
                part_dq.zero_()
            block_backward_kernel[(work.items,)](
                do, q, k, v, *where, part_dq, *grads, *which, longest, k.stride(0), v.stride(0), scale,
                ONCE=once, WIDTH=work.width, **sizes, **meta)  # fmt: skip
        for part, d in ((part_dk, d_k), (part_dv, d_v)):
            add_parts_kernel[(chunk.heads * blocks, triton.cdiv(longest, 16))](
                part, *edges, *starts, d, chunk.number, chunk.first_head, work.segments, blocks, longest,
                D=d.shape[1], WIDTH=triton.next_power_of_2(d.shape[1]), BN=16)  # fmt: skip
        sum_dq_kernel[(triton.cdiv(chunk.queries * r, _MERGE["BM"]), chunk.heads)](
            part_dq, picks, *edges, dq, chunk.first_head, chunk.first_query, chunk.queries, work.queries, s, h,
            blocks, count, R=r, SLOTS=_slots(count), ADD=dq_SHD is not None, **_MERGE, **pieces("K", dk))  # fmt: skip
    return dq, d_k, d_v


def _by_gluon(q: Tensor, k_ND: Tensor, v_ND: Tensor, r: int, longest: int) -> bool:
    """Whether `hopper_blocks.py` computes it: blocks of a tile's rows at most, a power of two of heads."""
    dk, dv = k_ND.shape[1], v_ND.shape[1]
    sizes = dk in (64, 128, 192, 256) and dv in (64, 128) and r in (8, 16, 32, 64) and longest <= 64
    return sizes and q.data_ptr() % 16 == 0 and on_hopper(q, k_ND[:, None], v_ND[:, None])


def _launch(kernel: str, q: Tensor, dk: int, dv: int, r: int) -> tuple[dict[str, int | str], dict[str, int]]:
    """Sizes that are compiled in, tile sizes."""
    meta = tuned(kernel, q, dk, dv)
    rp = triton.next_power_of_2(r)
    meta["BM"] = max(meta["BM"], rp)
    return {"R": r, "RP": rp, "PREC": precision(q), **head_sizes(dk, dv)}, meta


def _slots(count: int) -> int:
    return max(2, triton.next_power_of_2(count))


def _item_width(r: int, bm: int) -> int:
    """Picks of a work item: whole tiles."""
    rp = triton.next_power_of_2(r)
    return max(_ITEM_ROWS // rp, bm // rp)


def _chunk(q: Tensor, blocks: int, read: int, written: int) -> tuple[int, int]:
    """Queries and KV heads of a chunk, from the elements that a query's picks of one KV head read, each anew, and
    those of its partial results: fewer than 2**31 of a chunk. Many blocks want many queries, lest few share one."""
    if target(q.device) == "interpreter":
        return 48, 2
    size = q.element_size()
    bound = _CHUNK_BYTES // (2 if len(q) >= _LONG else 1) // (written * size)
    queries = max(1, min(max(_CACHED_BYTES // (read * size), 4 * blocks), bound, len(q)))
    return queries, max(1, bound // queries)
