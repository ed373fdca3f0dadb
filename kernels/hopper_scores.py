"""Gluon, Hopper: the scores' sums, with the next tile's products computed while these are summed.

The same function as in `scores.py`, for 16-bit types and head sizes that are sums of two powers of two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from nsa_dist.kernels.hopper import _barrier, _fetch, start_products
from nsa_dist.kernels.tile_ops import LOG2E


@gluon.jit
def _put_rows(ptr, row_M, here_M, to, D: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr, COPY: gl.constexpr):
    """Elements START … of rows to shared memory [M, WIDTH]."""
    d = START + gl.arange(0, WIDTH, gl.SliceLayout(0, COPY))
    to.store(gl.load(ptr + row_M[:, None] * D + d[None, :], mask=here_M[:, None], other=0.0))


@gluon.jit
def score_sums_kernel(
    k1_desc, k2_desc, q_ptr, lse_ptr, lo_ptr, hi_ptr, bounds_ptr, sums_ptr, first_tile, heads, groups, k_head, width,
    scale,
    R: gl.constexpr, RP: gl.constexpr, DK: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr,
    BT: gl.constexpr, BN: gl.constexpr, PART: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """As `scores.score_sums_kernel`."""
    BM: gl.constexpr = BT * RP
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BM, 16])
    copy: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    dtype: gl.constexpr = k1_desc.dtype
    tile, g = gl.program_id(0), gl.program_id(1)
    begin = gl.load(bounds_ptr + 2 * (first_tile + tile)).to(gl.int32)
    stop = gl.load(bounds_ptr + 2 * (first_tile + tile) + 1).to(gl.int32)
    low = gl.load(lo_ptr + begin).to(gl.int32)  # of the document's first compressed token
    all_see = gl.load(hi_ptr + begin).to(gl.int32) - low
    first = gl.program_id(2) * PART
    end = gl.minimum(gl.load(hi_ptr + stop - 1).to(gl.int32) - low, first + PART)
    tiles = (end - first + BN - 1) // BN
    if tiles > 0:
        k1 = gl.allocate_shared_memory(dtype, [STAGES, BN, DK1], k1_desc.layout)
        k2 = gl.allocate_shared_memory(dtype, [STAGES, BN if DK2 > 0 else 8, DK2 if DK2 > 0 else 64], k2_desc.layout)
        bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(STAGES):
            mbarrier.init(bar.index(i), count=1)
        fence_async_shared()
        for i in gl.static_range(STAGES):
            if i < tiles:
                _fetch(k1_desc, k2_desc, low + first + i * BN, g * k_head, bar.index(i), k1.index(i), k2.index(i),
                       DK1, DK2, BN)  # fmt: skip
        q1 = gl.allocate_shared_memory(dtype, [BM, DK1], k1_desc.layout)
        q2 = gl.allocate_shared_memory(dtype, [BM if DK2 > 0 else 8, DK2 if DK2 > 0 else 64], k2_desc.layout)
        here_q, row_q, _ = _columns(begin, stop, heads, g, R, RP, BM, gl.SliceLayout(1, copy))
        _put_rows(q_ptr, row_q, here_q, q1, DK, 0, DK1, copy)
        if DK2 > 0:
            _put_rows(q_ptr, row_q, here_q, q2, DK, DK1, DK2, copy)
        fence_async_shared()
        here, row, s_M = _columns(begin, stop, heads, g, R, RP, BM, gl.SliceLayout(0, scores))
        lse2 = gl.load(lse_ptr + row, mask=here, other=float("inf")) * LOG2E
        lse2 = gl.where(lse2 == float("-inf"), float("inf"), lse2)
        seen = gl.load(hi_ptr + s_M, mask=here, other=0).to(gl.int32) - low
        to_ptr = sums_ptr + (tile.to(gl.int64) * groups + g) * BT * width
        factor = scale * LOG2E
        _barrier()

        mbarrier.wait(bar.index(0), 0)
        s = start_products(k1.index(0), k2.index(0), q1, q2, DK2 > 0, BN, BM, scores)
        s = warpgroup_mma_wait(0, deps=[s])
        for j in range(tiles):
            _barrier()  # all have read what is overwritten now
            if j + STAGES < tiles:
                slot = j % STAGES
                _fetch(k1_desc, k2_desc, low + first + (j + STAGES) * BN, g * k_head, bar.index(slot),
                       k1.index(slot), k2.index(slot), DK1, DK2, BN)  # fmt: skip
            if j + 1 < tiles:
                mbarrier.wait(bar.index((j + 1) % STAGES), ((j + 1) // STAGES) & 1)
            after = (j + 1) % STAGES
            following = start_products(k1.index(after), k2.index(after), q1, q2, DK2 > 0, BN, BM, scores)
            n0 = first + j * BN
            p = gl.exp2(s * factor - lse2[None, :])
            if n0 + BN > all_see:
                n = n0 + gl.arange(0, BN, gl.SliceLayout(1, scores))
                p = gl.where(n[:, None] < seen[None, :], p, 0.0)
            u = gl.sum(gl.reshape(p, [BN, BT, RP]), 2)
            layout: gl.constexpr = u.type.layout
            n = n0 + gl.arange(0, BN, gl.SliceLayout(1, layout))
            t = gl.arange(0, BT, gl.SliceLayout(0, layout))
            gl.store(to_ptr + t[None, :] * width + n[:, None], u, mask=(n < end)[:, None])
            s = warpgroup_mma_wait(0, deps=[following])


@gluon.jit
def _columns(
    begin, stop, heads, g, R: gl.constexpr, RP: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    column = gl.arange(0, BM, layout)
    s = begin + column // RP
    here = (s < stop) & (column % RP < R)
    return here, s.to(gl.int64) * heads + g * R + column % RP, s
