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
    BT: tl.constexpr, BN: tl.constexpr, PART: tl.constexpr, ZEROS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Sums over a group's heads of the probabilities of PART compressed tokens, for BT queries of one document.

    A query's R heads have RP places, a power of two. S^T = K Q^T, so that a sum stays inside four lanes. ZEROS more
    sums than the last query sees are written, as far as its block goes.
    """
    tile, g = tl.program_id(0), tl.program_id(1)
    begin = tl.load(bounds_ptr + 2 * (first_tile + tile)).to(tl.int32)
    stop = tl.load(bounds_ptr + 2 * (first_tile + tile) + 1).to(tl.int32)
    low = tl.load(lo_ptr + begin).to(tl.int32)  # of the document's first compressed token
    all_see = tl.load(hi_ptr + begin).to(tl.int32) - low
    end = tl.load(hi_ptr + stop - 1).to(tl.int32) - low
    first = tl.program_id(2) * PART
    last = tl.minimum(end + ZEROS, first + PART)
    edge = tl.maximum(first, tl.minimum(first + (all_see - first) // BN * BN, end))
    column = tl.arange(0, BT * RP)
    s_M = begin + column // RP
    here = (s_M < tl.where(first < last, stop, begin)) & (column % RP < R)
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
            here_from, here_to = edge, last
        for n0 in range(here_from, here_to, BN):
            n = n0 + tl.arange(0, BN)
            k1, k2 = load_two(k_at, n.to(tl.int64) * k_row, n < end, DK, DK1, DK2)
            p = tl.exp2(products(k1, k2, q1, q2, DK2, PREC) * (scale * LOG2E) - lse2[None, :])
            if part == 1:
                p = tl.where(n[:, None] < seen_M[None, :], p, 0.0)
            u = tl.sum(tl.reshape(p, [BN, BT, RP]), 2)
            tl.store(to_T[None, :] + n[:, None], u, mask=(n < last)[:, None])


@triton.jit
def places(taken, CB: tl.constexpr, TOP: tl.constexpr):
    """The place of each that is taken among all that are, and their number.

    A row of 32 is counted in one byte of a word: one scan over a warp instead of one for each row.
    """
    if CB > 256 or TOP > 64:
        at = tl.cumsum(taken.to(tl.int32)) - 1
        total = tl.sum(taken.to(tl.int32))
    else:
        ROWS: tl.constexpr = CB // 32
        shift = 8 * tl.arange(0, ROWS)[:, None]
        word = tl.sum(tl.reshape(taken, [ROWS, 32]).to(tl.int64) << shift, 0)
        every = tl.sum(word) * 0x0101010101010101
        total = (every >> 56).to(tl.int32)
        upto = tl.cumsum(word, 0)[None, :] + (every << 8)
        at = tl.reshape(((upto >> shift) & 255).to(tl.int32) - 1, [CB])
    return at, total


@triton.jit
def choose_kernel(
    sums_ptr, own_ptr, first_ptr, bounds_ptr, weight_ptr, keep_ptr, picks_ptr, first_tile, groups, width,
    initial, local, count,
    BT: tl.constexpr, CB: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr, BEFORE: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """One query: the blocks with the highest scores, weighted sums of its row, ties to the lower index.

    The lowest score that is taken is found by halving and counting: no sort. Blocks come in chunks; those taken of
    the chunks before are the first of the next, in their order, so that what is kept ascends: scores and numbers.
    """
    tile, t, g = tl.program_id(0) // BT, tl.program_id(0) % BT, tl.program_id(1)
    begin = tl.load(bounds_ptr + 2 * (first_tile + tile)).to(tl.int32)
    stop = tl.load(bounds_ptr + 2 * (first_tile + tile) + 1).to(tl.int32)
    if begin + t < stop:
        own = tl.load(own_ptr + begin + t).to(tl.int32)
        row_ptr = sums_ptr + ((tile.to(tl.int64) * groups + g) * BT + t) * width
        keep_ptr += (tl.program_id(0).to(tl.int64) * groups + g) * TOP
        to_ptr = picks_ptr + ((begin + t).to(tl.int64) * groups + g) * count
        e, i, total, lowest = tl.arange(0, CB), tl.arange(0, WIDTH), 0, 0
        own_weights = tl.load(weight_ptr + BEFORE + i, mask=i < STRIDE, other=0.0)
        for j0 in range(0, own + 1, CB - TOP):
            j = j0 + e - TOP
            new = (e >= TOP) & (j <= own)
            n = (j * STRIDE)[:, None] + i[None, :]
            u = tl.load(row_ptr + n, mask=new[:, None] & (i < STRIDE)[None, :], other=0.0)
            score = tl.sum(u * own_weights[None, :], 1)
            for o in tl.static_range(BEFORE):  # tokens that begin before the block
                n = j * STRIDE + (o - BEFORE)
                weight = tl.load(weight_ptr + o)
                score += weight * tl.load(row_ptr + n, mask=new & (n >= 0), other=0.0)
            key = score.to(tl.int32, bitcast=True)  # not negative: the bits' order is the numbers'
            key = tl.where((j < initial) | (j > own - local), 2147483647, key)
            old = (e < TOP) & (e < total)  # the index hides that they are neighbours: one layout for all
            kept = tl.load(keep_ptr + tl.where(old, e, 0), mask=old, other=-1)
            key = tl.where(new, key, (kept >> 32).to(tl.int32))
            j = tl.where(new, j, kept.to(tl.int32))
            # The highest number that `count` keys reach, or any that exactly so many reach: between the last chunk's
            # and one above the highest key that isn't always taken, whose successor is negative.
            least = tl.min(key.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)
            lowest, high, many = tl.maximum(lowest, least), tl.max(key + 1), 0
            high = tl.where(own < count, lowest, high)  # so few blocks are all taken
            while (lowest < high) & (many != count):
                middle = high - ((high - lowest) >> 1)
                reach = CB - tl.sum((key - middle).to(tl.uint32, bitcast=True) >> 31).to(tl.int32)
                many = tl.where(reach >= count, reach, many)
                lowest = tl.where(reach >= count, middle, lowest)
                high = tl.where(reach >= count, high, middle - 1)
            taken = key >= lowest
            if many != count:  # ties at the cut, or fewer
                spare = count - tl.sum((key > lowest).to(tl.int32))
                taken = (key > lowest) | ((key == lowest) & (tl.cumsum((key == lowest).to(tl.int32)) <= spare))
            at, total = places(taken, CB, TOP)
            tl.debug_barrier()
            tl.store(keep_ptr + at, (key.to(tl.int64) << 32) | j, mask=taken)
            tl.debug_barrier()
        slot = tl.arange(0, TOP)
        block = tl.load(keep_ptr + slot, mask=slot < total, other=-1).to(tl.int32)
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
    stride, before = spec.select_block // spec.compress_stride, spec.compress_block // spec.compress_stride - 1
    zeros = stride + before  # sums of tokens that aren't seen, up to the end of a query's block
    width, part = triton.cdiv(view.ranges.longest + zeros, 16) * 16, _PART_TILES * meta["BN"]
    at_once = 3 if small else max(1, _SUMS_BYTES // (4 * groups * tile * width))
    at_once = min(at_once, len(bounds))
    sums = q.new_empty(at_once * groups * tile * width, dtype=torch.float32)
    keep = q.new_empty(at_once * groups * tile * top, dtype=torch.int64)
    blocks = width * spec.compress_stride // spec.select_block + 2
    chunk = max(32, 2 * top, 0 if small else min(_CHUNK, triton.next_power_of_2(blocks + top)))
    lo, hi, weights = view.ranges.lo_S, view.ranges.hi_S, _weights(spec, q.device)
    count_launch("scores")
    sizes = {"R": r, "RP": rp, **pieces("K", dk), "BT": tile, "BN": meta["BN"], "PART": part, "ZEROS": zeros}
    for first in range(0, len(bounds), at_once):
        tiles = min(at_once, len(bounds) - first)
        if by_gluon:
            from nsa_dist.kernels import hopper_scores

            hopper_scores.score_sums(q, k, lse_SH, view.ranges, bounds, sums, first, tiles, width, part, zeros, scale)
        else:
            score_sums_kernel[(tiles, groups, triton.cdiv(width, part))](
                q, k, lse_SH, lo, hi, bounds, sums, first, h, groups, k.stride(0), k.stride(1), width, scale,
                PREC=precision(q), num_warps=meta["num_warps"], num_stages=meta["num_stages"], **sizes)  # fmt: skip
        choose_kernel[(tiles * tile, groups)](
            sums, view.own_S, view.first_S, bounds, weights, keep, picks, first, groups, width,
            spec.initial_blocks, spec.local_blocks, spec.select_count,
            BT=tile, CB=chunk, STRIDE=stride, WIDTH=triton.next_power_of_2(stride),
            BEFORE=before, TOP=top, num_warps=1)  # fmt: skip
    return picks


@cache
def _weights(spec: NSASpec, device: torch.device) -> Tensor:
    return torch.tensor(overlap_weights(spec), dtype=torch.float32, device=device)
