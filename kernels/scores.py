"""Triton: from the compressed branch's log-sum-exps to the blocks that each query selects (equations 8 to 11).

Two kernels over as many queries at a time as a buffer of fixed size takes, so that nothing of size T x T/16
reaches memory: one adds the probabilities of a group's heads, the other weighs the sums of a query and keeps the
n best blocks so far.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_dist.kernels.compressed import CompressedView
from nsa_dist.kernels.packing import overlap_weights
from nsa_dist.kernels.ranged import rows_contiguous
from nsa_dist.kernels.spec import NSASpec
from nsa_dist.kernels.tile_ops import LOG2E, load_two, products
from nsa_dist.kernels.tuning import check_launch, count_launch, on_hopper, pieces, precision, target, tuned

_CHUNK = 256  # blocks that are compared at once
_PART_TILES = 32  # tiles of keys of a program
_SUMS_BYTES = 512 << 20


@triton.jit
def score_sums_kernel(
    q_ptr, k_ptr, lse_ptr, lo_ptr, hi_ptr, bounds_ptr, sums_ptr, first_tile, heads, groups, k_row, k_head, width,
    scale,
    R: tl.constexpr, RP: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Sums over a group's heads of the probabilities of PART compressed tokens, for BT queries of one document.

    A query's R heads have RP places, a power of two. S^T = K Q^T, so that a sum stays inside four lanes.
    """
    tile, g = tl.program_id(0), tl.program_id(1)
    begin = tl.load(bounds_ptr + 2 * (first_tile + tile)).to(tl.int32)
    stop = tl.load(bounds_ptr + 2 * (first_tile + tile) + 1).to(tl.int32)
    low = tl.load(lo_ptr + begin).to(tl.int32)  # of the document's first compressed token
    all_see = tl.load(hi_ptr + begin).to(tl.int32) - low
    end = tl.load(hi_ptr + stop - 1).to(tl.int32) - low
    first = tl.program_id(2) * PART
    end = tl.minimum(end, first + PART)
    edge = tl.maximum(first, tl.minimum(first + (all_see - first) // BN * BN, end))
    column = tl.arange(0, BT * RP)
    s_M = begin + column // RP
    here = (s_M < tl.where(first < end, stop, begin)) & (column % RP < R)
    row = s_M.to(tl.int64) * heads + g * R + column % RP
    q1, q2 = load_two(q_ptr, row * DK, here, DK, DK1, DK2)
    lse2 = tl.load(lse_ptr + row, mask=here, other=float("inf")) * LOG2E
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
    seen_M = tl.load(hi_ptr + s_M, mask=here, other=0).to(tl.int32) - low
    k_at = k_ptr + g.to(tl.int64) * k_head + low.to(tl.int64) * k_row
    to_T = sums_ptr + ((tile.to(tl.int64) * groups + g) * BT + tl.arange(0, BT)) * width
    for part in tl.static_range(2):
        here_from, here_to = first, edge
        if part == 1:
            here_from, here_to = edge, end
        for n0 in range(here_from, here_to, BN):
            n = n0 + tl.arange(0, BN)
            k1, k2 = load_two(k_at, n.to(tl.int64) * k_row, n < end, DK, DK1, DK2)
            p = tl.exp2(products(k1, k2, q1, q2, DK2, PREC) * (scale * LOG2E) - lse2[None, :])
            if part == 1:
                p = tl.where(n[:, None] < seen_M[None, :], p, 0.0)
            u = tl.sum(tl.reshape(p, [BN, BT, RP]), 2)
            tl.store(to_T[None, :] + n[:, None], u, mask=(n < end)[:, None])


@triton.jit
def choose_kernel(
    sums_ptr, lo_ptr, hi_ptr, own_ptr, first_ptr, bounds_ptr, weight_ptr, keep_ptr, picks_ptr,
    first_tile, groups, width, initial, local, count,
    BT: tl.constexpr, CB: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr, WEIGHTS: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """One query: the blocks with the highest scores, weighted sums of its row, ties to the lower index.

    The lowest score that is taken is found bit by bit, by counting: no sort. Blocks come in chunks; those taken of
    the chunks before are the first of the next, in their order, so that what is written ascends.
    """
    tile, t, g = tl.program_id(0) // BT, tl.program_id(0) % BT, tl.program_id(1)
    begin = tl.load(bounds_ptr + 2 * (first_tile + tile)).to(tl.int32)
    stop = tl.load(bounds_ptr + 2 * (first_tile + tile) + 1).to(tl.int32)
    if begin + t < stop:
        end = tl.load(hi_ptr + stop - 1).to(tl.int32) - tl.load(lo_ptr + begin).to(tl.int32)
        own = tl.load(own_ptr + begin + t).to(tl.int32)
        row_ptr = sums_ptr + ((tile.to(tl.int64) * groups + g) * BT + t) * width
        keep_ptr += (tl.program_id(0).to(tl.int64) * groups + g) * TOP
        to_ptr = picks_ptr + ((begin + t).to(tl.int64) * groups + g) * count
        e, total = tl.arange(0, CB), 0
        for j0 in range(0, own + 1, CB - TOP):
            j = j0 + e - TOP
            new = (e >= TOP) & (j <= own)
            score = tl.zeros([CB], tl.float32)
            for o in tl.static_range(WEIGHTS):
                n = j * STRIDE + (o - BEFORE)
                there = new & (n >= 0) & (n < end)
                score += tl.load(weight_ptr + o) * tl.load(row_ptr + n, mask=there, other=0.0)
            key = score.to(tl.int32, bitcast=True)  # not negative: the bits' order is the numbers'
            key = tl.where((j < initial) | (j > own - local), 2147483647, key)
            taken_before = e < total
            key = tl.where(new, key, tl.load(keep_ptr + e, mask=taken_before, other=-1))
            j = tl.where(new, j, tl.load(to_ptr + e, mask=taken_before, other=-1))
            # The highest number that `count` keys reach, bit by bit, until exactly so many do.
            # A query with no more blocks than that takes them all.
            lowest, bit, many = 0, tl.where(own < count, -1, 30), 0
            while (bit >= 0) & (many != count):
                higher = lowest + (1 << bit)
                reach = tl.sum((key >= higher).to(tl.int32))
                lowest = tl.where(reach >= count, higher, lowest)
                many = tl.where(reach >= count, reach, many)
                bit -= 1
            taken = key >= lowest
            if tl.sum(taken.to(tl.int32)) > count:  # ties at the cut
                spare = count - tl.sum((key > lowest).to(tl.int32))
                taken = (key > lowest) | ((key == lowest) & (tl.cumsum((key == lowest).to(tl.int32)) <= spare))
            at = tl.cumsum(taken.to(tl.int32)) - 1
            total = tl.sum(taken.to(tl.int32))
            tl.debug_barrier()
            tl.store(keep_ptr + at, key, mask=taken)
            tl.store(to_ptr + at, j, mask=taken)
            tl.debug_barrier()
        slot = tl.arange(0, TOP)
        block = tl.load(to_ptr + slot, mask=slot < total, other=-1)
        tl.debug_barrier()
        block = tl.where(block < 0, -1, block + tl.load(first_ptr + begin).to(tl.int32))
        tl.store(to_ptr + slot, block, mask=slot < count)


def select_blocks(
    q_SHD: Tensor, k_NGD: Tensor, lse_SH: Tensor, view: CompressedView, spec: NSASpec, scale: float
) -> Tensor:
    """[S, G, n] int32 block numbers, ascending, then -1: what `compressed.compressed_forward` returns."""
    q, k = q_SHD.contiguous(), rows_contiguous(k_NGD)
    check_launch(q, k)
    (s, h, dk), groups = q.shape, k.shape[1]
    picks = torch.empty(s, groups, spec.select_count, dtype=torch.int32, device=q.device)
    if s == 0:
        return picks
    meta = tuned("scores", q, dk, dk)
    small, r, rp = target(q.device) == "interpreter", h // groups, triton.next_power_of_2(h // groups)
    # Of fewer heads the sums are as large as the products: no faster, and registers are spilled.
    by_gluon = r in (4, 8, 16, 32, 64) and q.data_ptr() % 16 == 0 and on_hopper(q, k)
    # Queries of a tile: some 128 rows of a group's heads, half of it in float32, where sm_80 can't hold more.
    rows = 32 if small else 64 if q.element_size() == 4 else 128
    tile = max(1, min(32, rows // rp))
    bounds = view.ranges.tiles_on_device(tile)
    top = max(2, triton.next_power_of_2(spec.select_count))
    width, part = max(16, triton.cdiv(view.ranges.longest, 16) * 16), _PART_TILES * meta["BN"]
    at_once = 3 if small else max(1, _SUMS_BYTES // (4 * groups * tile * width))
    at_once = min(at_once, len(bounds))
    sums = q.new_empty(at_once * groups * tile * width, dtype=torch.float32)
    keep = q.new_empty(at_once * groups * tile * top, dtype=torch.int32)
    blocks = width * spec.compress_stride // spec.select_block + 2
    chunk = 2 * top if small else max(2 * top, min(_CHUNK, triton.next_power_of_2(blocks + top)))
    lo, hi, weights = view.ranges.lo_S, view.ranges.hi_S, _weights(spec, q.device)
    count_launch("scores")
    sizes = {"R": r, "RP": rp, **pieces("K", dk), "BT": tile, "BN": meta["BN"], "PART": part}
    for first in range(0, len(bounds), at_once):
        tiles = min(at_once, len(bounds) - first)
        if by_gluon:
            from nsa_dist.kernels import hopper_scores

            hopper_scores.score_sums(q, k, lse_SH, view.ranges, bounds, sums, first, tiles, width, part, scale)
        else:
            score_sums_kernel[(tiles, groups, triton.cdiv(width, part))](
                q, k, lse_SH, lo, hi, bounds, sums, first, h, groups, k.stride(0), k.stride(1), width, scale,
                PREC=precision(q), num_warps=meta["num_warps"], num_stages=meta["num_stages"], **sizes)  # fmt: skip
        choose_kernel[(tiles * tile, groups)](
            sums, lo, hi, view.own_S, view.first_S, bounds, weights, keep, picks,
            first, groups, width, spec.initial_blocks, spec.local_blocks, spec.select_count,
            BT=tile, CB=chunk, STRIDE=spec.select_block // spec.compress_stride,
            BEFORE=spec.compress_block // spec.compress_stride - 1, WEIGHTS=len(weights), TOP=top,
            num_warps=1)  # fmt: skip
    return picks


@cache
def _weights(spec: NSASpec, device: torch.device) -> Tensor:
    return torch.tensor(overlap_weights(spec), dtype=torch.float32, device=device)
