"""Gluon, Hopper: dk and dv of attention over ranges, from probabilities that never leave the registers.

The same sums as in `ranged.range_dkv_kernel`. Two warp groups of 64 keys each, and a warp that brings both the same
tiles of queries by the copy engine, with their log-sum-exps, deltas and gates. A group's products with the keys give
S^T and dP^T, whose registers are the left operands of those for dv and dk: no barrier but those of the tiles, so that
one group's exponentials are computed while the other's products are.
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

from nsa_dist.kernels.hopper import _copy_tile, as_tiles, descriptors, row_descriptors, slot_barriers, start_products
from nsa_dist.kernels.tile_ops import LOG2E
from nsa_dist.kernels.tiled import Ranges
from nsa_dist.kernels.tuning import count_launch, head_sizes

_STAGES = 4  # tiles of queries that are there or under way


def _tile_rows(dk: int) -> int:
    """Rows of a tile of queries: as many as leave registers for dk and dv."""
    return 64 if dk <= 128 else 32


@gluon.jit
def _feed(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, q1, q2, do, k1, k2, v, vectors, full, empty, kv_full,
    lse_ptr, delta_ptr, gate_ptr, n0, k_column, v_column, first, stop, heads, g,
    R: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that brings the keys and values once, then tile after tile of queries."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.expect(kv_full, 128 * (DK1 + DK2 + DV) * 2)
    for half in gl.static_range(2):
        _copy_tile(k1_desc, [n0 + half * 64, k_column], kv_full, k1.index(half))
        if DK2 > 0:
            _copy_tile(k2_desc, [n0 + half * 64, k_column + DK1], kv_full, k2.index(half))
        _copy_tile(v_desc, [n0 + half * 64, v_column], kv_full, v.index(half))
    tiles = ((stop - first) * R + BM - 1) // BM
    for j in range(tiles):
        slot, m0 = j % STAGES, first * R + j * BM
        m = m0 + gl.arange(0, BM, lanes)
        here = m // R < stop
        row = (m // R).to(gl.int64) * heads + g * R + m % R
        lse2 = gl.load(lse_ptr + row, mask=here, other=float("inf")) * LOG2E  # beyond the last query: p = 0
        lse2 = gl.where(lse2 == float("-inf"), float("inf"), lse2)  # of who sees nothing too
        delta = gl.load(delta_ptr + row, mask=here, other=0.0)
        gate = gl.load(gate_ptr + row, mask=here, other=0.0)
        mbarrier.wait(empty.index(slot), ((j // STAGES) & 1) ^ 1)
        vectors.index(slot * 3).store(lse2)
        vectors.index(slot * 3 + 1).store(delta)
        vectors.index(slot * 3 + 2).store(gate)
        mbarrier.expect(full.index(slot), BM * (DK1 + DK2 + DV) * 2)
        s, head = m0 // R, g * R + m0 % R
        _copy_tile(q1_desc, [s, head, 0], full.index(slot), q1.index(slot))
        if DK2 > 0:
            _copy_tile(q2_desc, [s, head, DK1], full.index(slot), q2.index(slot))
        _copy_tile(do_desc, [s, head, 0], full.index(slot), do.index(slot))


@gluon.jit
def _differentiate(
    half, q1, q2, do, k1, k2, v, vectors, full, empty, kv_full, lo_ptr, hi_ptr, dk_ptr, dv_ptr, n0, keys, groups, g,
    split, first, stop, inner, outer, scale,
    R: gl.constexpr, DK: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """A warp group: 64 keys. Queries [inner, outer) see all keys of the program."""
    W2: gl.constexpr = DK2 if DK2 > 0 else 16
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    wide1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK1, 16])
    wide2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W2, 16])
    wide_v: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    columns: gl.constexpr = gl.SliceLayout(0, scores)
    dtype: gl.constexpr = k1.dtype
    k1, k2, v = k1.index(half), k2.index(half), v.index(half)
    q1 = as_tiles(q1, STAGES, BM, DK1, k1)
    if DK2 > 0:
        q2 = as_tiles(q2, STAGES, BM, DK2, k2)
    do = as_tiles(do, STAGES, BM, DV, v)
    dk1 = gl.zeros([64, DK1], gl.float32, wide1)
    dk2 = gl.zeros([64, W2], gl.float32, wide2)
    dv = gl.zeros([64, DV], gl.float32, wide_v)
    n = n0 + half * 64 + gl.arange(0, 64, gl.SliceLayout(1, scores))
    factor = scale * LOG2E
    tiles = ((stop - first) * R + BM - 1) // BM
    mbarrier.wait(kv_full, 0)
    for j in range(tiles):
        slot, m0 = j % STAGES, first * R + j * BM
        mbarrier.wait(full.index(slot), (j // STAGES) & 1)
        s = start_products(k1, k2, q1.index(slot), q2.index(slot), DK2 > 0, 64, BM, scores)
        dp = start_products(v, v, do.index(slot), do.index(slot), False, 64, BM, scores)
        lse2 = vectors.index(slot * 3).load(columns)
        s = warpgroup_mma_wait(1, deps=[s])
        if (m0 < inner * R) | (m0 + BM > outer * R):
            m = m0 + gl.arange(0, BM, columns)
            here = m // R < stop
            lo = gl.load(lo_ptr + m // R, mask=here, other=0).to(gl.int32)
            hi = gl.load(hi_ptr + m // R, mask=here, other=0).to(gl.int32)
            s = gl.where((n[:, None] >= lo[None, :]) & (n[:, None] < hi[None, :]), s, float("-inf"))
        p = gl.exp2(s * factor - lse2[None, :])
        p = p * vectors.index(slot * 3 + 2).load(columns)[None, :]
        left = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, wide_v, 2))
        dv = warpgroup_mma(left, do.index(slot), dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        ds = (p * (dp - vectors.index(slot * 3 + 1).load(columns)[None, :])).to(dtype)
        left1 = gl.convert_layout(ds, gl.DotOperandLayout(0, wide1, 2))
        dk1 = warpgroup_mma(left1, q1.index(slot), dk1, is_async=True)
        if DK2 > 0:
            left2 = gl.convert_layout(ds, gl.DotOperandLayout(0, wide2, 2))
            dk2 = warpgroup_mma(left2, q2.index(slot), dk2, is_async=True)
            dv, dk1, dk2, left, left1, left2 = warpgroup_mma_wait(0, deps=[dv, dk1, dk2, left, left1, left2])
        else:
            dv, dk1, left, left1 = warpgroup_mma_wait(0, deps=[dv, dk1, left, left1])
        mbarrier.arrive(empty.index(slot), count=1)
    first_key = n0 + half * 64
    _store_keys(dk_ptr, dk1 * scale, first_key, keys, groups, g, split, DK, 0, DK1, wide1)
    if DK2 > 0:
        _store_keys(dk_ptr, dk2 * scale, first_key, keys, groups, g, split, DK, DK1, DK2, wide2)
    _store_keys(dv_ptr, dv, first_key, keys, groups, g, split, DV, 0, DV, wide_v)


@gluon.jit
def _store_keys(
    ptr, x, first_key, keys, groups, g, split, D: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    n = first_key + gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = START + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    row = (split.to(gl.int64) * keys + n) * groups + g
    gl.store(ptr + row[:, None] * D + d[None, :], x, mask=(n < keys)[:, None])


@gluon.jit
def range_dkv_kernel(
    q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, lse_ptr, delta_ptr, gate_ptr, lo_ptr, hi_ptr, from_ptr,
    until_ptr, dk_ptr, dv_ptr, keys, groups, heads, split_queries, k_head, v_head, scale,
    R: gl.constexpr, DK: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As `ranged.range_dkv_kernel`."""
    g, split = gl.program_id(1), gl.program_id(2)
    n0 = gl.program_id(0) * 128
    last = gl.minimum(n0 + 128, keys) - 1
    low, high = split * split_queries, (split + 1) * split_queries
    first = gl.maximum(gl.load(from_ptr + n0).to(gl.int32), low)
    stop = gl.maximum(gl.minimum(gl.load(until_ptr + last).to(gl.int32), high), first)
    inner = gl.load(from_ptr + last).to(gl.int32)
    outer = gl.minimum(gl.load(until_ptr + n0).to(gl.int32), stop)
    HEADS: gl.constexpr = R if R < BM else BM
    dtype: gl.constexpr = k1_desc.dtype
    q1 = gl.allocate_shared_memory(dtype, [STAGES, BM // HEADS, HEADS, DK1], q1_desc.layout)
    do = gl.allocate_shared_memory(dtype, [STAGES, BM // HEADS, HEADS, DV], do_desc.layout)
    k1 = gl.allocate_shared_memory(dtype, [2, 64, DK1], k1_desc.layout)
    q2, k2 = q1, k1  # of one piece: not used
    if DK2 > 0:
        q2 = gl.allocate_shared_memory(dtype, [STAGES, BM // HEADS, HEADS, DK2], q2_desc.layout)
        k2 = gl.allocate_shared_memory(dtype, [2, 64, DK2], k2_desc.layout)
    v = gl.allocate_shared_memory(dtype, [2, 64, DV], v_desc.layout)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    vectors = gl.allocate_shared_memory(gl.float32, [3 * STAGES, BM], plain)
    full, empty = slot_barriers(STAGES, 2)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_differentiate, (0, q1, q2, do, k1, k2, v, vectors, full, empty, kv_full, lo_ptr, hi_ptr, dk_ptr, dv_ptr,
                              n0, keys, groups, g, split, first, stop, inner, outer, scale, R, DK, DK1, DK2, DV, BM,
                              STAGES)),
            (_differentiate, (1, q1, q2, do, k1, k2, v, vectors, full, empty, kv_full, lo_ptr, hi_ptr, dk_ptr, dv_ptr,
                              n0, keys, groups, g, split, first, stop, inner, outer, scale, R, DK, DK1, DK2, DV, BM,
                              STAGES)),
            (_feed, (q1_desc, q2_desc, do_desc, k1_desc, k2_desc, v_desc, q1, q2, do, k1, k2, v, vectors, full, empty,
                     kv_full, lse_ptr, delta_ptr, gate_ptr, n0, g * k_head, g * v_head, first, stop, heads, g, R, DK1,
                     DK2, DV, BM, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def range_dkv(
    q: Tensor, do: Tensor, k: Tensor, v: Tensor, rows: tuple[Tensor, ...], ranges: Ranges, scale: float, d_k: Tensor,
    d_v: Tensor, split_queries: int,
) -> None:  # fmt: skip
    """Writes d_k and d_v [splits, keys, G, D] where `ranged._by_gluon`; rows: log-sum-exps, deltas, gates."""
    (_, h, dk), (keys, groups, dv), r = q.shape, v.shape, q.shape[1] // v.shape[1]
    sizes, bm = head_sizes(dk, dv), _tile_rows(dk)
    descs = *row_descriptors(q, r, bm), row_descriptors(do, r, bm)[0], *descriptors(k, 64), descriptors(v, 64)[0]
    count_launch("range_dkv")
    range_dkv_kernel[(triton.cdiv(keys, 128), groups, len(d_k))](
        *descs, *rows, ranges.lo_S, ranges.hi_S, *ranges.seen_by(keys), d_k, d_v, keys, groups, h, split_queries,
        k.stride(1), v.stride(1), scale, R=r, DK=dk, DK1=sizes["DK1"], DK2=sizes["DK2"], DV=dv, BM=bm,
        STAGES=_STAGES, num_warps=4)  # fmt: skip
