"""Gluon, Hopper: the scores' sums, by three warp groups and a warp that brings them rows and keys.

The same function as in `scores.py`, for 16-bit types, head sizes that are sums of two powers of two and groups of 4
to 64 heads, a power of two. A tile's columns are the queries of the first head, of the second, …: the heads of a
query are then in one thread (groups of up to 16), which adds them in their order, whatever the key: equal scores stay
equal.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from nsa_dist.kernels.hopper import (
    _SHARED,
    _copy_tile,
    _fetch,
    as_tiles,
    descriptors,
    piece_descriptors,
    slot_barriers,
    start_products,
)
from nsa_dist.kernels.tile_ops import LOG2E
from nsa_dist.kernels.tiled import Ranges
from nsa_dist.kernels.tuning import pieces, programs, tuned

_SPARE = 2048  # bytes, for the barriers
COLUMNS = gl.constexpr(128)  # of a tile: the heads of its queries
WORKERS = gl.constexpr(3)  # warp groups, which take the tiles of keys in turn
ROW_SLOTS = gl.constexpr(2)  # tiles of rows that are there or under way


@gluon.jit
def _tile(
    item, tiles, first_tile, bounds_ptr, lo_ptr, hi_ptr, GROUPS: gl.constexpr, BN: gl.constexpr, PART: gl.constexpr,
    ZEROS: gl.constexpr,
):  # fmt: skip
    """Some queries of a document, a KV head, and of the compressed tokens that the document sees `count` tiles."""
    g, tile, first = item % GROUPS, item // GROUPS % tiles, item // GROUPS // tiles * PART
    begin = gl.load(bounds_ptr + 2 * (first_tile + tile)).to(gl.int32)
    stop = gl.load(bounds_ptr + 2 * (first_tile + tile) + 1).to(gl.int32)
    low = gl.load(lo_ptr + begin).to(gl.int32)  # of the document's first compressed token
    end = gl.minimum(gl.load(hi_ptr + stop - 1).to(gl.int32) - low + ZEROS, first + PART)
    return tile, g, begin, stop, low, first, end, (gl.maximum(end - first, 0) + BN - 1) // BN


@gluon.jit
def _feed(
    q1_desc, q2_desc, k1_desc, k2_desc, q1, q2, k1, k2, q_full, q_empty, k_full, k_empty, bounds_ptr, lo_ptr, hi_ptr,
    item, step, items, tiles, first_tile, k_head,
    R: gl.constexpr, GROUPS: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, BN: gl.constexpr,
    PART: gl.constexpr, ZEROS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that keeps the buffers full, across the ends of tiles."""
    turn, n = 0, 0  # tiles of rows, and of keys, that have been asked for
    while item < items:
        _, g, begin, _, low, first, _, count = _tile(
            item, tiles, first_tile, bounds_ptr, lo_ptr, hi_ptr, GROUPS, BN, PART, ZEROS
        )
        for j in range(count):
            slot = n % STAGES
            mbarrier.wait(k_empty.index(slot), ((n // STAGES) & 1) ^ 1)
            _fetch(k1_desc, k2_desc, low + first + j * BN, g * k_head, k_full.index(slot), k1.index(slot),
                   k2.index(slot), DK1, DK2, BN)  # fmt: skip
            if j == 0:
                at = turn % ROW_SLOTS
                mbarrier.wait(q_empty.index(at), ((turn // ROW_SLOTS) & 1) ^ 1)
                mbarrier.expect(q_full.index(at), COLUMNS * (DK1 + DK2) * 2)
                _copy_tile(q1_desc, [g * R, begin, 0], q_full.index(at), q1.index(at))
                if DK2 > 0:
                    _copy_tile(q2_desc, [g * R, begin, DK1], q_full.index(at), q2.index(at))
            n += 1
        if count > 0:
            turn += 1
        item += step


@gluon.jit
def _add(
    which, q1, q2, k1, k2, q_full, q_empty, k_full, k_empty, bounds_ptr, lo_ptr, hi_ptr, lse_ptr, sums_ptr,
    item, step, items, tiles, first_tile, width, scale,
    R: gl.constexpr, GROUPS: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, BN: gl.constexpr,
    PART: gl.constexpr, ZEROS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A warp group: every third tile of keys. While it sums, the others' products are under way.

    A slot is always the same warp group's: who skips a round of a barrier can't tell that round from the next.
    """
    gl.static_assert(STAGES % WORKERS == 0)
    BM: gl.constexpr = COLUMNS
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BM, 16])
    q1 = as_tiles(q1, ROW_SLOTS, BM, DK1, k1)
    if DK2 > 0:
        q2 = as_tiles(q2, ROW_SLOTS, BM, DK2, k2)
    factor = scale * LOG2E
    turn, n = 0, 0  # tiles of rows, and of keys, that are done
    while item < items:
        tile, g, begin, stop, low, first, end, count = _tile(
            item, tiles, first_tile, bounds_ptr, lo_ptr, hi_ptr, GROUPS, BN, PART, ZEROS
        )
        if count > 0:
            column = gl.arange(0, BM, gl.SliceLayout(0, scores))
            s_M = begin + column % (BM // R)
            row = s_M.to(gl.int64) * (R * GROUPS) + g * R + column // (BM // R)
            lse2 = gl.load(lse_ptr + row, mask=s_M < stop, other=float("inf")) * LOG2E
            lse2 = gl.where(lse2 == float("-inf"), float("inf"), lse2)
            all_see = gl.load(hi_ptr + begin).to(gl.int32) - low
            to_ptr = sums_ptr + (tile.to(gl.int64) * GROUPS + g) * (BM // R) * width
            at = turn % ROW_SLOTS
            mbarrier.wait(q_full.index(at), (turn // ROW_SLOTS) & 1)
            for j in range((which + WORKERS - n % WORKERS) % WORKERS, count, WORKERS):
                slot = (n + j) % STAGES
                mbarrier.wait(k_full.index(slot), ((n + j) // STAGES) & 1)
                s = start_products(
                    k1.index(slot), k2.index(slot), q1.index(at), q2.index(at), DK2 > 0, BN, BM, scores
                )
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(k_empty.index(slot), count=1)
                _put_sums(s, first + j * BN, end, all_see, s_M, stop, low, lse2, factor, hi_ptr, to_ptr, width,
                          R, BN, BM, scores)  # fmt: skip
            mbarrier.arrive(q_empty.index(at), count=1)
            turn += 1
            n += count
        item += step


@gluon.jit
def _put_sums(
    s, n0, end, all_see, s_M, stop, low, lse2, factor, hi_ptr, to_ptr, width,
    R: gl.constexpr, BN: gl.constexpr, BM: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Of keys n0 … and the columns of BM // R queries: the probabilities, summed over a query's heads, to memory.

    Nothing is decided between exponentials and sums: so the compiler lays one between the others.
    """
    if n0 + BN > all_see:
        seen = gl.load(hi_ptr + s_M, mask=s_M < stop, other=0).to(gl.int32) - low
        n = n0 + gl.arange(0, BN, gl.SliceLayout(1, layout))
        s = gl.where(n[:, None] < seen[None, :], s, float("-inf"))
    u = gl.sum(gl.reshape(gl.exp2(s * factor - lse2[None, :]), [BN, R, BM // R]), 1)
    n = n0 + gl.arange(0, BN, gl.SliceLayout(1, u.type.layout))
    t = gl.arange(0, BM // R, gl.SliceLayout(0, u.type.layout))
    gl.store(to_ptr + t[None, :] * width + n[:, None], u, mask=(n < end)[:, None])


@gluon.jit(do_not_specialize=("items", "tiles", "first_tile"))
def score_sums_kernel(
    q1_desc, q2_desc, k1_desc, k2_desc, lse_ptr, lo_ptr, hi_ptr, bounds_ptr, sums_ptr, items, tiles, first_tile,
    k_head, width, scale,
    R: gl.constexpr, GROUPS: gl.constexpr, DK: gl.constexpr, DK1: gl.constexpr, DK2: gl.constexpr, BN: gl.constexpr,
    PART: gl.constexpr, ZEROS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `scores.score_sums_kernel`, from tile to tile."""
    BM: gl.constexpr = COLUMNS
    dtype: gl.constexpr = k1_desc.dtype
    item, step = gl.program_id(0), gl.num_programs(0)
    k1 = gl.allocate_shared_memory(dtype, [STAGES, BN, DK1], k1_desc.layout)
    k2 = gl.allocate_shared_memory(dtype, [STAGES, BN if DK2 > 0 else 8, DK2 if DK2 > 0 else 64], k2_desc.layout)
    q1 = gl.allocate_shared_memory(dtype, [ROW_SLOTS, R, BM // R, DK1], q1_desc.layout)
    q2 = q1
    if DK2 > 0:
        q2 = gl.allocate_shared_memory(dtype, [ROW_SLOTS, R, BM // R, DK2], q2_desc.layout)
    q_full, q_empty = slot_barriers(ROW_SLOTS, WORKERS)
    k_full, k_empty = slot_barriers(STAGES, 1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_add, (0, q1, q2, k1, k2, q_full, q_empty, k_full, k_empty, bounds_ptr, lo_ptr, hi_ptr, lse_ptr,
                    sums_ptr, item, step, items, tiles, first_tile, width, scale, R, GROUPS, DK1, DK2, BN, PART,
                    ZEROS, STAGES)),
            (_add, (1, q1, q2, k1, k2, q_full, q_empty, k_full, k_empty, bounds_ptr, lo_ptr, hi_ptr, lse_ptr,
                    sums_ptr, item, step, items, tiles, first_tile, width, scale, R, GROUPS, DK1, DK2, BN, PART,
                    ZEROS, STAGES)),
            (_add, (2, q1, q2, k1, k2, q_full, q_empty, k_full, k_empty, bounds_ptr, lo_ptr, hi_ptr, lse_ptr,
                    sums_ptr, item, step, items, tiles, first_tile, width, scale, R, GROUPS, DK1, DK2, BN, PART,
                    ZEROS, STAGES)),
            (_feed, (q1_desc, q2_desc, k1_desc, k2_desc, q1, q2, k1, k2, q_full, q_empty, k_full, k_empty, bounds_ptr,
                     lo_ptr, hi_ptr, item, step, items, tiles, first_tile, k_head, R, GROUPS, DK1, DK2, BN, PART,
                     ZEROS, STAGES)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )  # fmt: skip


def slots(dk: int, bn: int, most: int) -> int:
    """Tiles of keys that are there or under way, as many for each warp group."""
    left = _SHARED - _SPARE - 2 * ROW_SLOTS.value * COLUMNS.value * dk
    return min(most, left // (2 * bn * dk)) // WORKERS.value * WORKERS.value


def score_sums(
    q: Tensor, k: Tensor, lse: Tensor, ranges: Ranges, bounds: Tensor, sums: Tensor, first: int, tiles: int,
    width: int, part: int, zeros: int, scale: float,
) -> None:  # fmt: skip
    """The sums of `tiles` tiles of queries from tile `first` on, [tiles, G, queries of a tile, width]."""
    (h, dk), groups = q.shape[1:], k.shape[1]
    r, meta = h // groups, tuned("hopper_scores", q, dk, dk)
    bn = meta["BN"]
    items = tiles * groups * triton.cdiv(width, part)
    by_head = piece_descriptors(q, [h, len(q), dk], [dk, h * dk, 1], [r, COLUMNS.value // r])
    score_sums_kernel[(programs(items, min(width, part), q.device),)](
        *by_head, *descriptors(k, bn), lse, ranges.lo_S, ranges.hi_S, bounds, sums, items, tiles, first, k.stride(1),
        width, scale, R=r, GROUPS=groups, **pieces("K", dk), BN=bn, PART=part, ZEROS=zeros,
        STAGES=slots(dk, bn, meta["num_stages"]), num_warps=4)  # fmt: skip
