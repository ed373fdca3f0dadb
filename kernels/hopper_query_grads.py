"""Gluon, Hopper: dq of attention over ranges, from probabilities that never leave the registers.

The same sums as in `ranged.range_dq_kernel`. Two warp groups of 64 rows each, and a warp that brings both the same
keys and values by the copy engine. A group's scores and dP become dS, the left operand of the product with the keys,
in its own registers. A program goes from tile to tile of 128 rows of queries; the next tile's rows and the first keys
that it sees come while this one's last products are computed.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa_dist.kernels.hopper import (
    ROWS,
    _copy_tile,
    _row_tile,
    as_tiles,
    descriptors,
    row_descriptors,
    slot_barriers,
    start_products,
    store_rows,
)
from nsa_dist.kernels.tile_ops import LOG2E
from nsa_dist.kernels.tiled import Ranges
from nsa_dist.kernels.tuning import count_launch, head_sizes, programs

_STAGES = 3  # tiles of keys that are there or under way


@gluon.jit
def _fetch_keys(
    k1_desc, k2_desc, v_desc, k1, k2, v, full, empty, count, n0, k_column, v_column,
    DK1: gl.constexpr, DK2: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    slot = count % STAGES
    mbarrier.wait(empty.index(slot), ((count // STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(slot), BN * (DK1 + DK2 + DV) * 2)
    _copy_tile(k1_desc, [n0, k_column], full.index(slot), k1.index(slot))
    if DK2 > 0:
        _copy_tile(k2_desc, [n0, k_column + DK1], full.index(slot), k2.index(slot))
    _copy_tile(v_desc, [n0, v_column], full.index(slot), v.index(slot))


@gluon.jit
def _feed(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, q1, q2, do, k1, k2, v, rows_full, rows_empty, full, empty,
    lo_ptr, hi_ptr, queries, items, k_head, v_head,
    R: gl.constexpr, GROUPS: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, DV: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that brings the rows of tile after tile of queries, and the keys and values that each sees."""
    count = 0
    for t in range(gl.program_id(0), items, gl.num_programs(0)):  # late queries see most: first
        m0, g, start, _, _, key_tiles = _row_tile(items - 1 - t, queries, lo_ptr, hi_ptr, R, GROUPS, BN)
        if key_tiles > 0:  # the first keys before the rows, for which the tile before must be done
            _fetch_keys(k1_desc, k2_desc, v_desc, k1, k2, v, full, empty, count, start, g * k_head, g * v_head, DK1,
                        DK2, DV, BN, STAGES)  # fmt: skip
        for half in gl.static_range(2):
            m, to = m0 + half * 64, rows_full.index(half)
            mbarrier.wait(rows_empty.index(half), ((t // gl.num_programs(0)) & 1) ^ 1)
            mbarrier.expect(to, 64 * (DK1 + DK2 + DV) * 2)
            _copy_tile(q1_desc, [m // R, g * R + m % R, 0], to, q1.index(half))
            if DK2 > 0:
                _copy_tile(q2_desc, [m // R, g * R + m % R, DK1], to, q2.index(half))
            _copy_tile(do_desc, [m // R, g * R + m % R, 0], to, do.index(half))
        for j in range(1, key_tiles):
            _fetch_keys(k1_desc, k2_desc, v_desc, k1, k2, v, full, empty, count + j, start + j * BN, g * k_head,
                        g * v_head, DK1, DK2, DV, BN, STAGES)  # fmt: skip
        count += key_tiles


@gluon.jit
def _differentiate(
    half, q1, q2, do, k1, k2, v, rows_full, rows_empty, full, empty, lse_ptr, delta_ptr, gate_ptr, lo_ptr, hi_ptr,
    dq_ptr, queries, items, scale,
    R: gl.constexpr, GROUPS: gl.constexpr, DK: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, DV: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """A warp group: 64 rows of each tile."""
    W2: gl.constexpr = DK2 if DK2 > 0 else 16
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK1, 16])
    wide2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W2, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    dtype: gl.constexpr = k1.dtype
    q1 = as_tiles(q1, 2, 64, DK1, k1).index(half)
    if DK2 > 0:
        q2 = as_tiles(q2, 2, 64, DK2, k2).index(half)
    do = as_tiles(do, 2, 64, DV, v).index(half)
    factor = scale * LOG2E
    count = 0
    for t in range(gl.program_id(0), items, gl.num_programs(0)):  # late queries see most: first
        m0, g, start, inner, outer, key_tiles = _row_tile(items - 1 - t, queries, lo_ptr, hi_ptr, R, GROUPS, BN)
        m = m0 + half * 64 + gl.arange(0, 64, rows)
        here = m // R < queries
        row = (m // R).to(gl.int64) * (R * GROUPS) + g * R + m % R
        lse2 = gl.load(lse_ptr + row, mask=here, other=float("inf")) * LOG2E
        delta = gl.load(delta_ptr + row, mask=here, other=0.0)
        lo = gl.load(lo_ptr + m // R, mask=here, other=0).to(gl.int32)
        hi = gl.load(hi_ptr + m // R, mask=here, other=0).to(gl.int32)
        dq1 = gl.zeros([64, DK1], gl.float32, wide1)
        dq2 = gl.zeros([64, W2], gl.float32, wide2)
        mbarrier.wait(rows_full.index(half), (t // gl.num_programs(0)) & 1)
        mbarrier.arrive(rows_empty.index(half), count=1, pred=key_tiles == 0)
        for j in range(key_tiles):
            slot, n0 = count % STAGES, start + j * BN
            mbarrier.wait(full.index(slot), (count // STAGES) & 1)
            s = start_products(q1, q2, k1.index(slot), k2.index(slot), DK2 > 0, 64, BN, scores)
            dp = start_products(do, do, v.index(slot), v.index(slot), False, 64, BN, scores)
            s = warpgroup_mma_wait(1, deps=[s])
            p = gl.exp2(s * factor - lse2[:, None])
            if (n0 < inner) | (n0 + BN > outer):
                n = n0 + gl.arange(0, BN, gl.SliceLayout(0, scores))
                p = gl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), p, 0.0)
            dp = warpgroup_mma_wait(0, deps=[dp])
            mbarrier.arrive(rows_empty.index(half), count=1, pred=j == key_tiles - 1)
            ds = (p * (dp - delta[:, None])).to(dtype)
            left1 = gl.convert_layout(ds, gl.DotOperandLayout(0, wide1, 2))
            dq1 = warpgroup_mma(left1, k1.index(slot), dq1, is_async=True)
            if DK2 > 0:
                left2 = gl.convert_layout(ds, gl.DotOperandLayout(0, wide2, 2))
                dq2 = warpgroup_mma(left2, k2.index(slot), dq2, is_async=True)
                dq1, dq2, left1, left2 = warpgroup_mma_wait(0, deps=[dq1, dq2, left1, left2])
            else:
                dq1, left1 = warpgroup_mma_wait(0, deps=[dq1, left1])
            mbarrier.arrive(empty.index(slot), count=1)
            count += 1
        times = gl.load(gate_ptr + row, mask=here, other=0.0) * scale
        store_rows(dq_ptr, dq1, times, m0 + half * 64, queries, R * GROUPS, g, R, DK, 0, DK1, ADD, wide1)
        if DK2 > 0:
            store_rows(dq_ptr, dq2, times, m0 + half * 64, queries, R * GROUPS, g, R, DK, DK1, DK2, ADD, wide2)


@gluon.jit
def range_dq_kernel(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, lse_ptr, delta_ptr, gate_ptr, lo_ptr, hi_ptr, dq_ptr,
    queries, items, k_head, v_head, scale,
    R: gl.constexpr, GROUPS: gl.constexpr, DK: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, DV: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """As `ranged.range_dq_kernel`; items: tiles of 128 rows of a KV head."""
    dtype: gl.constexpr = k1_desc.dtype
    q1 = gl.allocate_shared_memory(dtype, [2, 64 // R, R, DK1], q1_desc.layout)
    do = gl.allocate_shared_memory(dtype, [2, 64 // R, R, DV], do_desc.layout)
    k1 = gl.allocate_shared_memory(dtype, [STAGES, BN, DK1], k1_desc.layout)
    q2, k2 = q1, k1  # of one piece: not used
    if DK2 > 0:
        q2 = gl.allocate_shared_memory(dtype, [2, 64 // R, R, DK2], q2_desc.layout)
        k2 = gl.allocate_shared_memory(dtype, [STAGES, BN, DK2], k2_desc.layout)
    v = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], v_desc.layout)
    rows_full, rows_empty = slot_barriers(2, 1)
    full, empty = slot_barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_differentiate, (0, q1, q2, do, k1, k2, v, rows_full, rows_empty, full, empty, lse_ptr, delta_ptr,
                              gate_ptr, lo_ptr, hi_ptr, dq_ptr, queries, items, scale, R, GROUPS, DK, DK1, DK2, DV,
                              BN, STAGES, ADD)),
            (_differentiate, (1, q1, q2, do, k1, k2, v, rows_full, rows_empty, full, empty, lse_ptr, delta_ptr,
                              gate_ptr, lo_ptr, hi_ptr, dq_ptr, queries, items, scale, R, GROUPS, DK, DK1, DK2, DV,
                              BN, STAGES, ADD)),
            (_feed, (q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, q1, q2, do, k1, k2, v, rows_full,
                     rows_empty, full, empty, lo_ptr, hi_ptr, queries, items, k_head, v_head, R, GROUPS, DK1, DK2, DV,
                     BN, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def range_dq(
    q: Tensor, do: Tensor, k: Tensor, v: Tensor, rows: tuple[Tensor, ...], ranges: Ranges, scale: float, dq: Tensor,
    add: bool,
) -> None:  # fmt: skip
    """Writes dq, or adds to it, where `ranged._by_gluon`."""
    (s, _, dk), (groups, dv), r = q.shape, v.shape[1:], q.shape[1] // v.shape[1]
    sizes, items = head_sizes(dk, dv), triton.cdiv(s * r, ROWS) * groups
    descs = *row_descriptors(q, r, 64), row_descriptors(do, r, 64)[0], *descriptors(k, 64), descriptors(v, 64)[0]
    count_launch("range_dq")
    range_dq_kernel[(programs(items, ranges.longest, q.device),)](
        *descs, *rows, ranges.lo_S, ranges.hi_S, dq, s, items, k.stride(1), v.stride(1), scale, R=r, GROUPS=groups,
        DK=dk, DK1=sizes["DK1"], DK2=sizes["DK2"], DV=dv, BN=64, STAGES=_STAGES, ADD=add, num_warps=4)  # fmt: skip
