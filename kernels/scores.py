"""Triton: from the compressed branch's log-sum-exps to the blocks that each query selects (equations 8 to 11).

Neither probabilities nor scores of a whole query reach memory: a program goes over its queries' compressed
tokens in chunks, adds the probabilities of a group's heads, and keeps the n best blocks so far. The scratch
memory in which a chunk's sums are shifted against each other has a size independent of T.
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
from nsa_dist.kernels.tuning import check_launch, count_launch, pieces, precision, target, tuned

_CHUNK = 64  # blocks


@triton.jit
def select_kernel(
    q_ptr, k_ptr, lse_ptr, lo_ptr, hi_ptr, own_ptr, first_ptr, bounds_ptr, weight_ptr, scratch_ptr, picks_ptr,
    tiles, heads, groups, k_row, k_head, scale, initial, local, count,
    R: tl.constexpr, RP: tl.constexpr, DK: tl.constexpr, DK1: tl.constexpr, DK2: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, CB: tl.constexpr, STRIDE: tl.constexpr, BEFORE: tl.constexpr,
    WEIGHTS: tl.constexpr, HALO: tl.constexpr, TOP: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One tile: BT queries of one document, RP (a power of two) places for the R heads of each."""
    WIDTH: tl.constexpr = BEFORE + CB * STRIDE
    scratch_ptr += tl.program_id(0).to(tl.int64) * BT * WIDTH
    t = tl.arange(0, BT)
    column = tl.arange(0, BT * RP)
    for work in range(tl.program_id(0), tiles * groups, tl.num_programs(0)):
        tile = tiles - 1 - work % tiles
        g = work // tiles
        begin = tl.load(bounds_ptr + 2 * tile).to(tl.int32)
        stop = tl.load(bounds_ptr + 2 * tile + 1).to(tl.int32)
        here_t = begin + t < stop
        s_M = begin + column // RP
        here = (s_M < stop) & (column % RP < R)
        row = s_M.to(tl.int64) * heads + g * R + column % RP
        q1, q2 = load_two(q_ptr, row * DK, here, DK, DK1, DK2)
        lse2 = tl.load(lse_ptr + row, mask=here, other=float("inf")) * LOG2E
        lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)
        low = tl.load(lo_ptr + begin).to(tl.int32)  # of the document's first compressed token
        seen_M = tl.load(hi_ptr + s_M, mask=here, other=0).to(tl.int32) - low
        end = tl.load(hi_ptr + stop - 1).to(tl.int32) - low
        own = tl.load(own_ptr + begin + t, mask=here_t, other=0).to(tl.int32)
        blocks = tl.load(own_ptr + stop - 1).to(tl.int32) + 1
        k_at = k_ptr + g.to(tl.int64) * k_head + low.to(tl.int64) * k_row
        best = tl.full([BT, TOP], -1, tl.int64)
        if BEFORE > 0:
            edge = tl.arange(0, HALO)
            at = scratch_ptr + t[:, None] * WIDTH + edge[None, :]
            tl.store(at, tl.zeros([BT, HALO], scratch_ptr.dtype.element_ty), mask=edge[None, :] < BEFORE)
        for j0 in range(0, blocks, CB):
            for c0 in range(0, tl.minimum(CB, blocks - j0) * STRIDE, BN):
                n = j0 * STRIDE + c0 + tl.arange(0, BN)
                k1, k2 = load_two(k_at, n.to(tl.int64) * k_row, n < end, DK, DK1, DK2)
                s = products(k1, k2, q1, q2, DK2, PREC)
                p = tl.exp2(s * (scale * LOG2E) - lse2[None, :])
                p = tl.where(n[:, None] < seen_M[None, :], p, 0.0)
                u = tl.sum(tl.reshape(p, [BN, BT, RP]), 2)
                place = BEFORE + c0 + tl.arange(0, BN)
                tl.store(scratch_ptr + t[None, :] * WIDTH + place[:, None], u, mask=place[:, None] < WIDTH)
            tl.debug_barrier()
            j = j0 + tl.arange(0, CB)
            score = tl.zeros([BT, CB], tl.float32)
            line = scratch_ptr + t[:, None] * WIDTH + (tl.arange(0, CB) * STRIDE)[None, :]
            for o in tl.static_range(WEIGHTS):
                weight = tl.load(weight_ptr + o)
                score += weight * tl.load(line + o, mask=(j < blocks)[None, :], other=0.0)
            key = score.to(tl.int32, bitcast=True).to(tl.int64)
            forced = (j[None, :] < initial) | (j[None, :] > own[:, None] - local)
            key = tl.where(forced, 2147483647, key) * 4294967296 + (4294967295 - j.to(tl.int64))[None, :]
            key = tl.where(j[None, :] <= own[:, None], key, -1)
            if CB > TOP:
                key = tl.topk(key, TOP, 1)
            both = tl.reshape(tl.join(best, key), [BT, 2 * TOP])
            best = tl.topk(both, TOP, 1)
            if BEFORE > 0:
                edge = tl.arange(0, HALO)
                at = scratch_ptr + t[:, None] * WIDTH + edge[None, :]
                keep = tl.load(at + CB * STRIDE, mask=edge[None, :] < BEFORE, other=0.0)
                tl.debug_barrier()
                tl.store(at, keep, mask=edge[None, :] < BEFORE)
            tl.debug_barrier()
        slot = tl.arange(0, TOP)
        block = (4294967295 - (best & 4294967295)).to(tl.int32)
        block = tl.where((best < 0) | (slot[None, :] >= count), 2147483647, block)
        block = tl.sort(block, 1)
        first = tl.load(first_ptr + begin).to(tl.int32)
        block = tl.where(block == 2147483647, -1, block + first)
        to = ((begin + t).to(tl.int64) * groups + g) * count
        tl.store(picks_ptr + to[:, None] + slot[None, :], block, mask=here_t[:, None] & (slot[None, :] < count))


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
    small = target(q.device) == "interpreter"
    # Queries of a tile: some 128 rows of a group's heads, fewer where float32 of the largest heads wouldn't fit.
    rows = 32 if small else 64 if q.element_size() * dk > 768 else 128
    tile = max(1, min(32, rows // triton.next_power_of_2(h // groups)))
    bounds = view.ranges.tiles_on_device(tile)
    stride, before = spec.select_block // spec.compress_stride, spec.compress_block // spec.compress_stride - 1
    top = max(2, triton.next_power_of_2(spec.select_count))
    chunk = max(16 if small else _CHUNK, top)
    programs = min(len(bounds) * groups, _programs(q.device))
    scratch = q.new_empty(programs, tile, before + chunk * stride, dtype=torch.float32)
    weights = _weights(spec, q.device)
    count_launch("scores")
    select_kernel[(programs,)](
        q, k, lse_SH, view.ranges.lo_S, view.ranges.hi_S, view.own_S, view.first_S, bounds, weights, scratch, picks,
        len(bounds), h, groups, k.stride(0), k.stride(1), scale, spec.initial_blocks, spec.local_blocks,
        spec.select_count, R=h // groups, RP=triton.next_power_of_2(h // groups),
        **pieces("K", dk),
        BT=tile, BN=meta["BN"], CB=chunk, STRIDE=stride, BEFORE=before, WEIGHTS=len(weights),
        HALO=triton.next_power_of_2(max(before, 1)), TOP=top, PREC=precision(q),
        num_warps=meta["num_warps"], num_stages=meta["num_stages"])  # fmt: skip
    return picks


@cache
def _weights(spec: NSASpec, device: torch.device) -> Tensor:
    return torch.tensor(overlap_weights(spec), dtype=torch.float32, device=device)


@cache
def _programs(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
