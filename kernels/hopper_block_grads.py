"""Gluon, Hopper: the selected branch's backward, block by block, rows brought and taken by the copy engine.

The same work items and partial results as `blocks.block_backward_kernel`, which gathers rows through registers and
spills. Here a warp asks the copy engine for the rows of q and do of the picks to come, and eight compute: each of
their two groups holds half of the columns of every sum. A tile's dq takes the place of its q, and the loading warp
sends it from there to the picks' partial results.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_dist.kernels.hopper import _barrier, _copy_tile, as_tiles, slot_barriers, start_products
from nsa_dist.kernels.hopper_blocks import (
    bring_rows,
    flat_descriptor,
    parts_of,
    pick_row,
    picks_of,
    picks_of_item,
    piece_of,
    send_rows,
)
from nsa_dist.kernels.tile_ops import LOG2E
from nsa_dist.kernels.tuning import CHUNK

ITEM_ROWS = 4096  # queries times heads of a work item (2048: 4% slower)
_REGISTERS = 168  # of a thread when a program starts: 240 for those that compute
_SHARED = 226 << 10
_STAGES = 3  # tiles of q and do that are there or under way, if they fit


@gluon.jit
def _feed(
    q_desc, do_desc, k_desc, v_desc, dq_desc, q, q_rest, do, k, k_rest, v, full, done, kv_full, order_ptr, begin,
    first, stop, base, count, head_queries, heads, g,
    R: gl.constexpr, P1: gl.constexpr, KP: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that moves rows: the block's keys and values once, then q and do of tile after tile of picks, and dq
    of the tile that had the place before."""
    PICKS: gl.constexpr = 64 // R
    VP: gl.constexpr = DV // 64
    REST: gl.constexpr = KP - P1
    rows, rest = parts_of(q, q_rest, STAGES, P1, REST, R)
    do_rows = as_tiles(do, STAGES * VP * PICKS, R, 64, do)
    mbarrier.expect(kv_full, 64 * (64 * KP + DV) * 2)
    for piece in gl.static_range(KP):
        _copy_tile(k_desc, [begin, piece * 64], kv_full, piece_of(k, k_rest, 0, piece, 0, P1, REST, 1))
    _copy_tile(v_desc, [begin, 0], kv_full, v)
    tiles = (stop - first + PICKS - 1) // PICKS
    for j in range(tiles + STAGES):
        slot = j % STAGES
        if j >= STAGES:
            before = first + (j - STAGES) * PICKS
            mbarrier.wait(done.index(slot), (j // STAGES - 1) & 1)
            send_rows(dq_desc, rows, rest, slot, order_ptr, before, stop, base, R, KP, P1, REST)
        if j < tiles:
            mbarrier.expect(full.index(slot), 64 * (64 * KP + DV) * 2)
            for i in gl.static_range(PICKS):
                row = pick_row(order_ptr, first + j * PICKS + i, stop, count, head_queries, heads, g, R)
                bring_rows(q_desc, row, full.index(slot), rows, rest, slot, i, R, KP, P1, REST)
                bring_rows(do_desc, row, full.index(slot), do_rows, do_rows, slot, i, R, VP, VP, 0)


@gluon.jit
def _vectors(
    pick, at, stop, lse_ptr, delta_ptr, gate_ptr, token_ptr, count, head_queries, heads, g,
    R: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Of a tile's rows: log-sum-exp (base 2), delta, gate, token (-1 where there is no row)."""
    m = gl.arange(0, 64, layout)
    here = at + m // R < stop
    s = pick // count - head_queries
    row = s.to(gl.int64) * heads + g * R + m % R
    lse2 = gl.load(lse_ptr + row, mask=here, other=0.0) * LOG2E
    delta = gl.load(delta_ptr + row, mask=here, other=0.0)
    gate = gl.load(gate_ptr + row, mask=here, other=0.0)
    return lse2, delta, gate, gl.load(token_ptr + s, mask=here, other=-1).to(gl.int32)


@gluon.jit
def _store_grad(
    d_ptr, part_ptr, x, begin, end, part_row, alone, D: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Adds to the block's gradient where the item is its whole segment, else leaves a partial sum."""
    n = gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = START + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    mask = (begin + n < end)[:, None] & (d < D)[None, :]
    if alone:
        to = d_ptr + (begin + n).to(gl.int64)[:, None] * D + d[None, :]
        gl.store(to, gl.load(to, mask=mask, other=0.0) + x, mask=mask)
    else:
        gl.store(part_ptr + (part_row + n)[:, None] * D + d[None, :], x, mask=mask)


@gluon.jit
def _differentiate(
    q, q_rest, do, k, k_rest, v, p_tile, ds_tile, full, done, kv_full, order_ptr, lse_ptr, delta_ptr, gate_ptr,
    token_q_ptr,
    token_k_ptr, dk_ptr, dv_ptr, part_dk_ptr, part_dv_ptr, begin, end, first, stop, count, head_queries, heads, g,
    part_row, alone, scale,
    R: gl.constexpr, P1: gl.constexpr, KP: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """P and dS lie in shared memory as [queries, keys]; from there they are read across for dv and dk."""
    PICKS: gl.constexpr = 64 // R
    DK1: gl.constexpr = 64 * P1
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, DK1 // 2, 16])
    wide_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, DV // 2, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    dtype: gl.constexpr = q.dtype
    q1, k1, k2 = as_tiles(q, STAGES, 64, DK1, q), as_tiles(k, 1, 64, DK1, k).index(0), k_rest.index(0)
    n = begin + gl.arange(0, 64, gl.SliceLayout(0, scores))
    token_N = gl.load(token_k_ptr + n, mask=n < end, other=2147483647).to(gl.int32)
    dk1 = gl.zeros([64, DK1], gl.float32, wide)
    dk2 = gl.zeros([64, 64], gl.float32, scores)
    dv = gl.zeros([64, DV], gl.float32, wide_v)
    dq2 = gl.zeros([64, 64], gl.float32, scores)
    factor = scale * LOG2E
    tiles = (stop - first + PICKS - 1) // PICKS
    pick = picks_of(order_ptr, first, stop, R, rows)
    lse2, delta, gate, token_M = _vectors(pick, first, stop, lse_ptr, delta_ptr, gate_ptr, token_q_ptr, count,
                                          head_queries, heads, g, R, rows)  # fmt: skip
    pick = picks_of(order_ptr, first + PICKS, stop, R, rows)
    mbarrier.wait(kv_full, 0)
    for j in range(tiles):
        slot = j % STAGES
        rest = q_rest.index(slot)
        mbarrier.wait(full.index(slot), (j // STAGES) & 1)
        s = start_products(q1.index(slot), rest, k1, k2, KP > P1, 64, 64, scores)
        dp = start_products(do.index(slot), do.index(slot), v, v, False, 64, 64, scores)
        # Of the next tile, while this one is worked on; of no tile after the last.
        at = first + (j + 1) * PICKS
        next_lse2, next_delta, next_gate, next_token_M = _vectors(
            pick, at, stop, lse_ptr, delta_ptr, gate_ptr, token_q_ptr, count, head_queries, heads, g, R, rows
        )
        pick = picks_of(order_ptr, at + PICKS, stop, R, rows)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * factor - lse2[:, None])
        p = gl.where(token_N[None, :] <= token_M[:, None], p, 0.0) * gate[:, None]
        p_tile.store(p.to(dtype))
        fence_async_shared()
        _barrier()
        dv = warpgroup_mma(p_tile.permute((1, 0)), do.index(slot), dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds_tile.store((p * (dp - delta[:, None])).to(dtype))
        fence_async_shared()
        _barrier()
        dk1 = warpgroup_mma(ds_tile.permute((1, 0)), q1.index(slot), dk1, is_async=True)
        dq1 = gl.zeros([64, DK1], gl.float32, wide)
        dq1 = warpgroup_mma(ds_tile, k1, dq1, use_acc=False, is_async=True)
        if KP > P1:
            dk2 = warpgroup_mma(ds_tile.permute((1, 0)), rest, dk2, is_async=True)
            dq2 = warpgroup_mma(ds_tile, k2, dq2, use_acc=False, is_async=True)
        dv, dk1, dk2, dq1, dq2 = warpgroup_mma_wait(0, deps=[dv, dk1, dk2, dq1, dq2])
        _barrier()  # all have read q, P and dS
        q1.index(slot).store((dq1 * scale).to(dtype))
        if KP > P1:
            rest.store((dq2 * scale).to(dtype))
        fence_async_shared()
        _barrier()
        mbarrier.arrive(done.index(slot), count=1)
        lse2, delta, gate, token_M = next_lse2, next_delta, next_gate, next_token_M
    _store_grad(dk_ptr, part_dk_ptr, dk1 * scale, begin, end, part_row, alone, 64 * KP, 0, DK1, wide)
    if KP > P1:
        _store_grad(dk_ptr, part_dk_ptr, dk2 * scale, begin, end, part_row, alone, 64 * KP, DK1, 64, scores)
    _store_grad(dv_ptr, part_dv_ptr, dv, begin, end, part_row, alone, DV, 0, DV, wide_v)


@gluon.jit(do_not_specialize=CHUNK)
def block_backward_kernel(
    q_desc, do_desc, k_desc, v_desc, dq_desc, lse_ptr, delta_ptr, gate_ptr, token_q_ptr, token_k_ptr, begin_ptr,
    end_ptr, order_ptr, start_ptr, item_start_ptr, split_start_ptr, segment_ptr, part_dk_ptr, part_dv_ptr,
    dk_ptr, dv_ptr, chunk, first_head, first_query, segments, blocks, chunk_queries, all_queries, count, heads,
    longest, scale,
    R: gl.constexpr, P1: gl.constexpr, KP: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """As `blocks.block_backward_kernel`, for blocks of at most 64 rows and a power of two of heads."""
    item = gl.load(item_start_ptr + chunk * segments) + gl.program_id(0)
    if item < gl.load(item_start_ptr + (chunk + 1) * segments):
        segment = gl.load(segment_ptr + item)
        before = gl.load(item_start_ptr + segment)
        part, alone = item - before, gl.load(item_start_ptr + segment + 1) - before == 1
        split = gl.load(split_start_ptr + segment) - gl.load(split_start_ptr + chunk * segments) + part
        first, stop, g, base, begin, end = picks_of_item(
            segment, part, start_ptr, begin_ptr, end_ptr, first_head, first_query, segments, blocks, chunk_queries,
            all_queries, count, WIDTH)  # fmt: skip
        dtype: gl.constexpr = q_desc.dtype
        layout: gl.constexpr = k_desc.layout
        q = gl.allocate_shared_memory(dtype, [STAGES * P1, 64, 64], layout)
        do = gl.allocate_shared_memory(dtype, [STAGES, 64, DV], layout)
        k = gl.allocate_shared_memory(dtype, [P1, 64, 64], layout)
        q_rest, k_rest = q, k
        if KP > P1:
            q_rest = gl.allocate_shared_memory(dtype, [STAGES * (KP - P1), 64, 64], layout)
            k_rest = gl.allocate_shared_memory(dtype, [KP - P1, 64, 64], layout)
        v = gl.allocate_shared_memory(dtype, [64, DV], layout)
        p_tile = gl.allocate_shared_memory(dtype, [64, 64], layout)
        ds_tile = gl.allocate_shared_memory(dtype, [64, 64], layout)
        full, done = slot_barriers(STAGES, 1)
        kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(kv_full, count=1)
        fence_async_shared()
        head_queries = g * all_queries
        gl.warp_specialize(
            [
                (_differentiate, (q, q_rest, do, k, k_rest, v, p_tile, ds_tile, full, done, kv_full, order_ptr,
                                  lse_ptr, delta_ptr, gate_ptr, token_q_ptr, token_k_ptr, dk_ptr, dv_ptr, part_dk_ptr,
                                  part_dv_ptr, begin, end, first, stop, count, head_queries, heads, g,
                                  split.to(gl.int64) * longest, alone, scale, R, P1, KP, DV, STAGES)),
                (_feed, (q_desc, do_desc, k_desc, v_desc, dq_desc, q, q_rest, do, k, k_rest, v, full, done, kv_full,
                         order_ptr, begin, first, stop, base, count, head_queries, heads, g, R, P1, KP, DV, STAGES)),
            ],
            [1],
            [24],
        )  # fmt: skip


def arguments(
    q: Tensor, do: Tensor, k: Tensor, v: Tensor, part_dq: Tensor, r: int
) -> tuple[list[Any], dict[str, int]]:
    """Descriptors, and what is compiled in beside the work items' width."""
    dk, dv = k.shape[1], v.shape[1]
    made = [flat_descriptor(x.view(-1, x.shape[-1]), r, 64) for x in (q, do)]
    made += [flat_descriptor(k, 64, 64), flat_descriptor(v, 64, dv), flat_descriptor(part_dq, r, 64)]
    tile = 64 * (dk + dv) * q.element_size()
    stages = min(_STAGES, (_SHARED - 2 * 64 * 64 * q.element_size()) // tile - 1)
    sizes = {"R": r, "P1": 1 << (dk // 64).bit_length() - 1, "KP": dk // 64, "DV": dv, "STAGES": stages}
    return made, sizes | {"maxnreg": _REGISTERS}
