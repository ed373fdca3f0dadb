"""Gluon, Hopper: attention over ranges, with products computed while others are reduced.

Plain Triton waits for each product before it goes on: the matrix units idle during the exponentials. Here the next
tile's scores are computed while this tile's probabilities are made of those before (FlashAttention-3, arXiv
2407.08608, section 3.2), and all that is read comes by the copy engine. The same function as in `ranged.py`, for
16-bit types, head sizes that are sums of two powers of two and groups of a power of two of heads.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa_dist.kernels.tile_ops import LOG2E
from nsa_dist.kernels.tiled import Ranges
from nsa_dist.kernels.tuning import count_launch, head_sizes, pieces, programs, tuned

# Their names in Triton 3.9, and before.
_copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

ROWS = 128  # of a tile of queries
_SHARED = 232448  # bytes of shared memory that a program has


@gluon.jit
def as_tiles(x, TILES: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, like):
    """The same shared memory, all of it, as tiles [TILES, ROWS, WIDTH], laid out as those of `like`."""
    gl.static_assert(x.numel == TILES * ROWS * WIDTH)  # Triton 3.8 refuses it, others don't
    if _PUBLIC:
        tiles = x.reinterpret(x.dtype, [TILES, ROWS, WIDTH], like.layout)
    else:
        tiles = x._reinterpret(x.dtype, [TILES, ROWS, WIDTH], like.layout)
    return tiles


@gluon.jit
def slot_barriers(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """Of so many slots two barriers each: filled by the copy engine, emptied by all its readers."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit
def _fetch(desc1, desc2, n, column, bar, to1, to2, D1: gl.constexpr, D2: gl.constexpr, BN: gl.constexpr):
    """Starts copying BN rows of one KV head, in two pieces."""
    mbarrier.expect(bar, BN * (D1 + D2) * 2)
    _copy_tile(desc1, [n, column], bar, to1)
    if D2 > 0:
        _copy_tile(desc2, [n, column + D1], bar, to2)


@gluon.jit
def _row_tile(
    item, queries, lo_ptr, hi_ptr, R: gl.constexpr, GROUPS: gl.constexpr, BN: gl.constexpr
):  # fmt: skip
    """A tile of 128 rows: its first row, its KV head, and what its queries see.

    Some see of the keys from start on, `tiles` tiles; all see [inner, outer): lo and hi never fall.
    """
    m_begin = item // GROUPS * 128
    first, last = m_begin // R, gl.minimum((m_begin + 127) // R, queries - 1)
    start = gl.load(lo_ptr + first).to(gl.int32)
    inner = gl.load(lo_ptr + last).to(gl.int32)
    outer = gl.load(hi_ptr + first).to(gl.int32)
    end = gl.load(hi_ptr + last).to(gl.int32)
    return m_begin, item % GROUPS, start, inner, outer, (gl.maximum(end - start, 0) + BN - 1) // BN


@gluon.jit
def _feed(
    q1_desc, q2_desc, k1_desc, k2_desc, v1_desc, v2_desc, q1, q2, k1, k2, v1, v2, q_full, q_empty, k_full, k_empty,
    v_full, v_empty, lo_ptr, hi_ptr, item, step, queries, k_head, v_head,
    R: gl.constexpr, GROUPS: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, DV1: gl.constexpr, DV2: gl.constexpr,
    BN: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The warp that keeps the buffers full: of keys and values across the ends of tiles, of rows a tile ahead."""
    turn, n = 0, 0  # tiles of rows, and of keys, that have been asked for
    while item >= 0:
        m_begin, g, start, _, _, tiles = _row_tile(item, queries, lo_ptr, hi_ptr, R, GROUPS, BN)
        for j in range(tiles):
            slot, phase = n % STAGES, ((n // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            _fetch(k1_desc, k2_desc, start + j * BN, g * k_head, k_full.index(slot), k1.index(slot), k2.index(slot),
                   DK1, DK2, BN)  # fmt: skip
            if j == 0:  # after the keys, which find room sooner where there is one slot
                for half in gl.static_range(2):
                    at, m = turn % SLOTS * 2 + half, m_begin + half * 64
                    mbarrier.wait(q_empty.index(at), ((turn // SLOTS) & 1) ^ 1)
                    mbarrier.expect(q_full.index(at), 64 * (DK1 + DK2) * 2)
                    _copy_tile(q1_desc, [m // R, g * R + m % R, 0], q_full.index(at), q1.index(at))
                    if DK2 > 0:
                        _copy_tile(q2_desc, [m // R, g * R + m % R, DK1], q_full.index(at), q2.index(at))
            mbarrier.wait(v_empty.index(slot), phase)
            _fetch(v1_desc, v2_desc, start + j * BN, g * v_head, v_full.index(slot), v1.index(slot), v2.index(slot),
                   DV1, DV2, BN)  # fmt: skip
            n += 1
        if tiles > 0:
            turn += 1
        item -= step


@gluon.jit
def _attend(
    half, q1, q2, k1, k2, v1, v2, q_full, q_empty, k_full, k_empty, v_full, v_empty, lo_ptr, hi_ptr, o_ptr, lse_ptr,
    item, step, queries, scale,
    R: gl.constexpr, GROUPS: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, DV: gl.constexpr, DV1: gl.constexpr,
    DV2: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A warp group: 64 rows of each tile. Scores of keys j and output of keys j - 1 are under way together."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    out1: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV1, 16])
    out2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV2 if DV2 > 0 else 16, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    left1: gl.constexpr = gl.DotOperandLayout(0, out1, 2)
    dtype: gl.constexpr = k1.dtype
    q1 = as_tiles(q1, 2 * SLOTS, 64, DK1, k1)
    if DK2 > 0:
        q2 = as_tiles(q2, 2 * SLOTS, 64, DK2, k2)
    factor = scale * LOG2E
    turn, n = 0, 0  # tiles of rows, and of keys, that are done
    while item >= 0:
        m_begin, g, start, inner, outer, tiles = _row_tile(item, queries, lo_ptr, hi_ptr, R, GROUPS, BN)
        m_begin += half * 64
        m = m_begin + gl.arange(0, 64, rows)
        here = m // R < queries
        lo = gl.load(lo_ptr + m // R, mask=here, other=0).to(gl.int32)
        hi = gl.load(hi_ptr + m // R, mask=here, other=0).to(gl.int32)
        o1 = gl.zeros([64, DV1], gl.float32, out1)
        o2 = gl.zeros([64, DV2 if DV2 > 0 else 16], gl.float32, out2)
        top = gl.full([64], float("-inf"), gl.float32, rows)
        total = gl.zeros([64], gl.float32, rows)
        if tiles > 0:
            at, slot = turn % SLOTS * 2 + half, n % STAGES
            mbarrier.wait(q_full.index(at), (turn // SLOTS) & 1)
            mbarrier.wait(k_full.index(slot), (n // STAGES) & 1)
            s = start_products(q1.index(at), q2.index(at), k1.index(slot), k2.index(slot), DK2 > 0, 64, BN, scores)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            if tiles == 1:
                mbarrier.arrive(q_empty.index(at), count=1)
            s, top, total, _ = _weigh(s, start, inner, outer, lo, hi, top, total, factor, BN, scores)
            p = gl.convert_layout(s.to(dtype), left1)
            for j in range(1, tiles):
                before, slot = slot, (n + j) % STAGES
                mbarrier.wait(k_full.index(slot), ((n + j) // STAGES) & 1)
                s = start_products(
                    q1.index(at), q2.index(at), k1.index(slot), k2.index(slot), DK2 > 0, 64, BN, scores
                )
                mbarrier.wait(v_full.index(before), ((n + j - 1) // STAGES) & 1)
                o1 = warpgroup_mma(p, v1.index(before), o1, is_async=True)
                if DV2 > 0:
                    o2 = warpgroup_mma(p, v2.index(before), o2, is_async=True)
                    s = warpgroup_mma_wait(2, deps=[s])
                else:
                    s = warpgroup_mma_wait(1, deps=[s])
                mbarrier.arrive(k_empty.index(slot), count=1)
                if j == tiles - 1:
                    mbarrier.arrive(q_empty.index(at), count=1)
                s, top, total, shrink = _weigh(
                    s, start + j * BN, inner, outer, lo, hi, top, total, factor, BN, scores
                )
                if DV2 > 0:
                    o1, o2, p = warpgroup_mma_wait(0, deps=[o1, o2, p])
                    o2 = o2 * gl.convert_layout(shrink, gl.SliceLayout(1, out2))[:, None]
                else:
                    o1, p = warpgroup_mma_wait(0, deps=[o1, p])
                mbarrier.arrive(v_empty.index(before), count=1)
                o1 = o1 * gl.convert_layout(shrink, gl.SliceLayout(1, out1))[:, None]
                p = gl.convert_layout(s.to(dtype), left1)
            mbarrier.wait(v_full.index(slot), ((n + tiles - 1) // STAGES) & 1)
            o1 = warpgroup_mma(p, v1.index(slot), o1, is_async=True)
            if DV2 > 0:
                o2 = warpgroup_mma(p, v2.index(slot), o2, is_async=True)
                o1, o2, p = warpgroup_mma_wait(0, deps=[o1, o2, p])
            else:
                o1, p = warpgroup_mma_wait(0, deps=[o1, p])
            mbarrier.arrive(v_empty.index(slot), count=1)
            turn += 1
            n += tiles
        safe = gl.where(total > 0, total, 1.0)
        lse = gl.where(total > 0, (top + gl.log2(safe)) / LOG2E, float("-inf"))
        gl.store(lse_ptr + (m // R).to(gl.int64) * (R * GROUPS) + g * R + m % R, lse, mask=here)
        store_rows(o_ptr, o1, 1.0 / safe, m_begin, queries, R * GROUPS, g, R, DV, 0, DV1, False, out1)
        if DV2 > 0:
            store_rows(o_ptr, o2, 1.0 / safe, m_begin, queries, R * GROUPS, g, R, DV, DV1, DV2, False, out2)
        item -= step


@gluon.jit
def start_products(
    a1, a2, b1, b2, TWO: gl.constexpr, M: gl.constexpr, N: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """Starts A B^T, of rows in two pieces where TWO."""
    s = gl.zeros([M, N], gl.float32, layout)
    s = warpgroup_mma(a1, b1.permute((1, 0)), s, use_acc=False, is_async=True)
    if TWO:
        s = warpgroup_mma(a2, b2.permute((1, 0)), s, is_async=True)
    return s


@gluon.jit
def _weigh(s, n0, inner, outer, lo, hi, top, total, factor, BN: gl.constexpr, layout: gl.constexpr):
    """A step of the online softmax: weights, largest exponent, sum, factor of the output so far."""
    if (n0 < inner) | (n0 + BN > outer):
        n = n0 + gl.arange(0, BN, gl.SliceLayout(0, layout))
        s = gl.where((n[None, :] >= lo[:, None]) & (n[None, :] < hi[:, None]), s, float("-inf"))
    above = gl.maximum(top, gl.max(s, 1) * factor)
    safe = gl.where(above == float("-inf"), 0.0, above)  # -inf - (-inf) would be NaN
    s = gl.exp2(s * factor - safe[:, None])
    shrink = gl.exp2(top - safe)
    return s, above, total * shrink + gl.sum(s, 1), shrink


@gluon.jit
def range_forward_kernel(
    q1_desc, q2_desc, k1_desc, k2_desc, v1_desc, v2_desc, lo_ptr, hi_ptr, o_ptr, lse_ptr, items, queries,
    k_head, v_head, scale,
    R: gl.constexpr, GROUPS: gl.constexpr, DK: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr,
    DV: gl.constexpr, DV1: gl.constexpr, DV2: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """Tile after tile of 128 rows: two warp groups of 64 rows, and a warp that loads for both.

    The next tile's rows, keys and values come while one ends. KV heads alternate: neighbouring programs have
    neighbouring queries, which see the same keys.
    """
    dtype: gl.constexpr = k1_desc.dtype
    item, step = items - 1 - gl.program_id(0), gl.num_programs(0)  # late queries see most: first
    k1 = gl.allocate_shared_memory(dtype, [STAGES, BN, DK1], k1_desc.layout)
    k2 = gl.allocate_shared_memory(dtype, [STAGES, BN if DK2 > 0 else 8, DK2 if DK2 > 0 else 64], k2_desc.layout)
    v1 = gl.allocate_shared_memory(dtype, [STAGES, BN, DV1], v1_desc.layout)
    v2 = gl.allocate_shared_memory(dtype, [STAGES, BN if DV2 > 0 else 8, DV2 if DV2 > 0 else 64], v2_desc.layout)
    q1 = gl.allocate_shared_memory(dtype, [2 * SLOTS, 64 // R, R, DK1], q1_desc.layout)
    q2 = q1
    if DK2 > 0:
        q2 = gl.allocate_shared_memory(dtype, [2 * SLOTS, 64 // R, R, DK2], q2_desc.layout)
    q_full, q_empty = slot_barriers(2 * SLOTS, 1)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_attend, (0, q1, q2, k1, k2, v1, v2, q_full, q_empty, k_full, k_empty, v_full, v_empty, lo_ptr, hi_ptr,
                       o_ptr, lse_ptr, item, step, queries, scale, R, GROUPS, DK1, DK2, DV, DV1,
                       DV2, BN, STAGES, SLOTS)),
            (_attend, (1, q1, q2, k1, k2, v1, v2, q_full, q_empty, k_full, k_empty, v_full, v_empty, lo_ptr, hi_ptr,
                       o_ptr, lse_ptr, item, step, queries, scale, R, GROUPS, DK1, DK2, DV, DV1,
                       DV2, BN, STAGES, SLOTS)),
            (_feed, (q1_desc, q2_desc, k1_desc, k2_desc, v1_desc, v2_desc, q1, q2, k1, k2, v1, v2, q_full, q_empty,
                     k_full, k_empty, v_full, v_empty, lo_ptr, hi_ptr, item, step, queries,
                     k_head, v_head, R, GROUPS, DK1, DK2, DV1, DV2, BN, STAGES, SLOTS)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def store_rows(
    ptr, x, factor, m_begin, queries, heads, g,
    R: gl.constexpr, D: gl.constexpr, START: gl.constexpr, WIDTH: gl.constexpr, ADD: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """64 rows of a tile, each times its factor; ADD: to what is there."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    x = x * gl.convert_layout(factor, gl.SliceLayout(1, layout))[:, None]
    if not ADD:
        x = x.to(ptr.dtype.element_ty)
    x = gl.convert_layout(x, wide)
    m = m_begin + gl.arange(0, 64, gl.SliceLayout(1, wide))
    row = (m // R).to(gl.int64) * heads + g * R + m % R
    d = START + gl.arange(0, WIDTH, gl.SliceLayout(0, wide))
    mask = (m // R < queries)[:, None]
    to = ptr + row[:, None] * D + d[None, :]
    if ADD:
        x += gl.load(to, mask=mask, other=0.0).to(gl.float32)
    gl.store(to, x.to(ptr.dtype.element_ty), mask=mask)


def descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """x, seen as of this shape, for tiles `block` as products take them."""
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    layout: Any = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, shape, strides, block, layout)


def piece_descriptors(x: Tensor, shape: list[int], strides: list[int], rows: list[int]) -> list[TensorDescriptor]:
    """For tiles of these rows of x's last size, in two pieces."""
    parts = pieces("", x.shape[-1])
    return [descriptor(x, shape, strides, [*rows, width]) for width in (parts["D1"], parts["D2"] or parts["D1"])]


def descriptors(x_NGD: Tensor, rows: int) -> list[TensorDescriptor]:
    """For tiles of `rows` rows of one head, in two pieces; the head is a column."""
    columns = (x_NGD.shape[1] - 1) * x_NGD.stride(1) + x_NGD.shape[2]
    return piece_descriptors(x_NGD, [len(x_NGD), columns], [x_NGD.stride(0), 1], [rows])


def row_descriptors(x_SHD: Tensor, r: int, rows: int) -> list[TensorDescriptor]:
    """For tiles of so many rows, the r heads of neighbouring queries, in two pieces; x is contiguous."""
    _, h, size = x_SHD.shape
    strides = [h * size, size, 1]  # torch's own may be anything where a size is 1
    return piece_descriptors(x_SHD, list(x_SHD.shape), strides, [max(1, rows // r), min(r, rows)])


def range_forward(q: Tensor, k: Tensor, v: Tensor, ranges: Ranges, scale: float, o: Tensor, lse: Tensor) -> None:
    """`ranged.range_forward` into o and lse, where `ranged._by_gluon`."""
    (s, _, dk), (_, groups, dv), r = q.shape, v.shape, q.shape[1] // v.shape[1]
    meta, slots = _forward_tiles(q, dk, dv)
    bn, items = meta["BN"], triton.cdiv(s * r, ROWS) * groups
    count_launch("range_forward")
    range_forward_kernel[(programs(items, ranges.longest, q.device),)](
        *row_descriptors(q, r, ROWS // 2), *descriptors(k, bn), *descriptors(v, bn), ranges.lo_S, ranges.hi_S, o,
        lse, items, s, k.stride(1), v.stride(1), scale, R=r, GROUPS=groups, **head_sizes(dk, dv), BN=bn,
        STAGES=meta["num_stages"], SLOTS=slots, num_warps=4)  # fmt: skip


def _forward_tiles(q: Tensor, dk: int, dv: int) -> tuple[dict[str, int], int]:
    """Tile sizes, of half as many keys where they don't fit (192/192), and the tiles whose rows fit beside them."""
    meta = tuned("hopper_forward", q, dk, dv)
    rows, keys = ROWS * dk * 2, meta["num_stages"] * (dk + dv) * 2
    left = _SHARED - 4096
    if rows + keys * meta["BN"] > left:
        meta["BN"] //= 2
    return meta, min(2, (left - keys * meta["BN"]) // rows)
