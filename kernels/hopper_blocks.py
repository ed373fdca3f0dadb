"""Gluon, Hopper: the selected branch's forward, block by block, with the queries brought by the copy engine.

The same work items and partial results as in `blocks.py`. A pick's rows of q, the R heads of a group, lie together:
one warp asks the copy engine for those of the next picks while the others compute. A tile's output takes the place of
its q, and the same warp sends it from there to the picks' partial results. Plain Triton gathers rows through
registers and waits.
"""

from typing import Any

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

from nsa_dist.kernels.hopper import _barrier, _copy_tile, as_tiles, descriptor, slot_barriers
from nsa_dist.kernels.tile_ops import LOG2E
from nsa_dist.kernels.tuning import CHUNK

_copy_back = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_STAGES = 3  # tiles of q that are there or under way, where two programs with so many fit into a multiprocessor
_SHARED = 113 << 10
_REGISTERS = 96  # of a thread when a program starts (128: 4% slower)


@gluon.jit
def piece_of(wide, rest, slot, piece: gl.constexpr, i, SIDE: gl.constexpr, REST: gl.constexpr, PARTS: gl.constexpr):
    """Part i of 64 columns of a slot, all of them where PARTS is 1: a slot's first SIDE pieces lie side by side in
    `wide`, as one operand, the others in `rest`. (Triton 3.8 makes no view of a part of what is allocated.)"""
    if piece < SIDE:
        part = wide.index((slot * SIDE + piece) * PARTS + i)
    else:
        part = rest.index((slot * REST + piece - SIDE) * PARTS + i)
    return part


@gluon.jit
def parts_of(wide, rest, SLOTS: gl.constexpr, SIDE: gl.constexpr, REST: gl.constexpr, R: gl.constexpr):
    """The same memory as parts of R rows."""
    wide_rows = as_tiles(wide, SLOTS * SIDE * (64 // R), R, 64, wide)
    rest_rows = wide_rows
    if REST > 0:
        rest_rows = as_tiles(rest, SLOTS * REST * (64 // R), R, 64, rest)
    return wide_rows, rest_rows


@gluon.jit
def pick_row(order_ptr, i, stop, count, head_queries, heads, g, R: gl.constexpr):
    """The first of pick i's R rows; beyond the last pick that of the last."""
    pick = gl.load(order_ptr + gl.minimum(i, stop - 1))
    return (pick // count - head_queries) * heads + g * R


@gluon.jit
def bring_rows(
    desc, row, full, rows, rest, slot, i,
    R: gl.constexpr, PIECES: gl.constexpr, SIDE: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """Starts copying a pick's R rows to part i of a slot."""
    for piece in gl.static_range(PIECES):
        _copy_tile(desc, [row, piece * 64], full, piece_of(rows, rest, slot, piece, i, SIDE, REST, 64 // R))


@gluon.jit
def send_rows(
    desc, rows, rest, slot, order_ptr, at, stop, base,
    R: gl.constexpr, PIECES: gl.constexpr, SIDE: gl.constexpr, REST: gl.constexpr,
):  # fmt: skip
    """Copies a slot to the partial results of its picks, those from `at` on; the slot is free when it returns."""
    for i in gl.static_range(64 // R):
        if at + i < stop:
            to = (gl.load(order_ptr + at + i) - base) * R
            for piece in gl.static_range(PIECES):
                _copy_back(desc, [to, piece * 64], piece_of(rows, rest, slot, piece, i, SIDE, REST, 64 // R))
    tma.store_wait(0)


@gluon.jit
def _feed(
    q_desc, k_desc, v_desc, o_desc, q, q_rest, k, v, q_full, q_done, kv_full, order_ptr, begin, first, stop, base,
    count, head_queries, heads, g,
    R: gl.constexpr, PIECES: gl.constexpr, DV: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that moves rows: the block's keys and values once, then q of tile after tile of picks, and the output
    of the tile that had the place before."""
    PICKS: gl.constexpr = 64 // R
    VP: gl.constexpr = DV // 64
    mbarrier.expect(kv_full, 64 * (64 * PIECES + DV) * 2)
    for piece in gl.static_range(PIECES):
        _copy_tile(k_desc, [begin, piece * 64], kv_full, k.index(piece))
    _copy_tile(v_desc, [begin, 0], kv_full, v)
    rows, rest = parts_of(q, q_rest, STAGES, VP, REST, R)
    tiles = (stop - first + PICKS - 1) // PICKS
    for j in range(tiles + STAGES):
        slot = j % STAGES
        if j >= STAGES:
            before = first + (j - STAGES) * PICKS
            mbarrier.wait(q_done.index(slot), (j // STAGES - 1) & 1)
            send_rows(o_desc, rows, rest, slot, order_ptr, before, stop, base, R, VP, VP, REST)
        if j < tiles:
            mbarrier.expect(q_full.index(slot), 64 * 64 * PIECES * 2)
            for i in gl.static_range(PICKS):
                row = pick_row(order_ptr, first + j * PICKS + i, stop, count, head_queries, heads, g, R)
                bring_rows(q_desc, row, q_full.index(slot), rows, rest, slot, i, R, PIECES, VP, REST)


@gluon.jit
def picks_of(order_ptr, at, stop, R: gl.constexpr, layout: gl.constexpr):
    """Of a tile's 64 rows the picks, 0 where there is none."""
    i = at + gl.arange(0, 64, layout) // R
    return gl.load(order_ptr + i, mask=i < stop, other=0)


@gluon.jit
def _tokens(token_ptr, pick, at, stop, count, head_queries, R: gl.constexpr, layout: gl.constexpr):
    """The queries' tokens, -1 where there is no row."""
    here = at + gl.arange(0, 64, layout) // R < stop
    return gl.load(token_ptr + pick // count - head_queries, mask=here, other=-1).to(gl.int32)


@gluon.jit
def _attend(
    q, q_rest, k, v, q_full, q_done, kv_full, order_ptr, token_q_ptr, token_k_ptr, part_lse_ptr, begin, end, first,
    stop, base, count, head_queries, scale,
    R: gl.constexpr, PIECES: gl.constexpr, DV: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PICKS: gl.constexpr = 64 // R
    VP: gl.constexpr = DV // 64
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    rows: gl.constexpr = gl.SliceLayout(1, scores)
    dtype: gl.constexpr = q.dtype
    outputs = as_tiles(q, STAGES, 64, DV, q)
    n = begin + gl.arange(0, 64, gl.SliceLayout(0, scores))
    token_N = gl.load(token_k_ptr + n, mask=n < end, other=2147483647).to(gl.int32)
    factor = scale * LOG2E
    tiles = (stop - first + PICKS - 1) // PICKS
    m = gl.arange(0, 64, rows)
    pick = picks_of(order_ptr, first, stop, R, rows)
    token_M = _tokens(token_q_ptr, pick, first, stop, count, head_queries, R, rows)
    next_pick = picks_of(order_ptr, first + PICKS, stop, R, rows)
    mbarrier.wait(kv_full, 0)
    for j in range(tiles):
        slot, at = j % STAGES, first + j * PICKS
        mbarrier.wait(q_full.index(slot), (j // STAGES) & 1)
        s = gl.zeros([64, 64], gl.float32, scores)
        for piece in gl.static_range(PIECES):
            s = warpgroup_mma(piece_of(q, q_rest, slot, piece, 0, VP, REST, 1), k.index(piece).permute((1, 0)), s,
                              use_acc=piece > 0, is_async=True)  # fmt: skip
        # Of the next tiles, while this one is worked on; of no tile after the last.
        next_token_M = _tokens(token_q_ptr, next_pick, at + PICKS, stop, count, head_queries, R, rows)
        later_pick = picks_of(order_ptr, at + 2 * PICKS, stop, R, rows)
        s = warpgroup_mma_wait(0, deps=[s])
        s = gl.where(token_N[None, :] <= token_M[:, None], s * factor, float("-inf"))
        top = gl.max(s, 1)
        safe = gl.where(top == float("-inf"), 0.0, top)  # -inf - (-inf) would be NaN
        s = gl.exp2(s - safe[:, None])
        total = gl.sum(s, 1)
        o = gl.zeros([64, DV], gl.float32, out)
        p = gl.convert_layout(s.to(dtype), gl.DotOperandLayout(0, out, 2))
        o = warpgroup_mma(p, v, o, use_acc=False, is_async=True)
        divide = gl.where(total > 0, total, 1.0)
        lse = gl.where(total > 0, (top + gl.log2(divide)) / LOG2E, float("-inf"))
        gl.store(part_lse_ptr + (pick - base) * R + m % R, lse, mask=at + m // R < stop)
        o, p = warpgroup_mma_wait(0, deps=[o, p])
        _barrier()  # all have read q
        outputs.index(slot).store((o * gl.convert_layout(1.0 / divide, gl.SliceLayout(1, out))[:, None]).to(dtype))
        fence_async_shared()
        _barrier()
        mbarrier.arrive(q_done.index(slot), count=1)
        pick, next_pick, token_M = next_pick, later_pick, next_token_M


@gluon.jit
def picks_of_item(
    segment, part, start_ptr, begin_ptr, end_ptr, first_head, first_query, segments, blocks, chunk_queries,
    all_queries, count, WIDTH: gl.constexpr,
):  # fmt: skip
    """Of a segment's part: its picks [first, stop), KV head, the first of the chunk's picks, the block's rows."""
    first = gl.load(start_ptr + segment) + part * WIDTH
    stop = gl.minimum(first + WIDTH, gl.load(start_ptr + segment + 1))
    which = segment % segments + first_head * blocks
    g = which // blocks
    base = (first_query + first_head * chunk_queries + g * (all_queries - chunk_queries)) * count  # blocks._base
    return first, stop, g, base, gl.load(begin_ptr + which).to(gl.int32), gl.load(end_ptr + which).to(gl.int32)


@gluon.jit(do_not_specialize=CHUNK)
def block_forward_kernel(
    q_desc, k_desc, v_desc, o_desc, token_q_ptr, token_k_ptr, begin_ptr, end_ptr, order_ptr, start_ptr,
    item_start_ptr, segment_ptr, part_lse_ptr, chunk, first_head, first_query, segments, blocks, chunk_queries,
    all_queries, count, heads, scale,
    R: gl.constexpr, PIECES: gl.constexpr, DV: gl.constexpr, REST: gl.constexpr, STAGES: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """As `blocks.block_forward_kernel`, for blocks of at most 64 rows and a power of two of heads."""
    item = gl.load(item_start_ptr + chunk * segments) + gl.program_id(0)
    if item < gl.load(item_start_ptr + (chunk + 1) * segments):
        segment = gl.load(segment_ptr + item)
        part = item - gl.load(item_start_ptr + segment)
        first, stop, g, base, begin, end = picks_of_item(
            segment, part, start_ptr, begin_ptr, end_ptr, first_head, first_query, segments, blocks, chunk_queries,
            all_queries, count, WIDTH)  # fmt: skip
        dtype: gl.constexpr = q_desc.dtype
        q = gl.allocate_shared_memory(dtype, [STAGES * (DV // 64), 64, 64], k_desc.layout)
        q_rest = q
        if REST > 0:
            q_rest = gl.allocate_shared_memory(dtype, [STAGES * REST, 64, 64], k_desc.layout)
        k = gl.allocate_shared_memory(dtype, [PIECES, 64, 64], k_desc.layout)
        v = gl.allocate_shared_memory(dtype, [64, DV], v_desc.layout)
        q_full, q_done = slot_barriers(STAGES, 1)
        kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(kv_full, count=1)
        fence_async_shared()
        gl.warp_specialize(
            [
                (_attend, (q, q_rest, k, v, q_full, q_done, kv_full, order_ptr, token_q_ptr, token_k_ptr,
                           part_lse_ptr, begin, end, first, stop, base, count, g * all_queries, scale, R, PIECES, DV,
                           REST, STAGES)),
                (_feed, (q_desc, k_desc, v_desc, o_desc, q, q_rest, k, v, q_full, q_done, kv_full, order_ptr, begin,
                         first, stop, base, count, g * all_queries, heads, g, R, PIECES, DV, REST, STAGES)),
            ],
            [1],
            [24],
        )  # fmt: skip


def arguments(q: Tensor, k: Tensor, v: Tensor, part_o: Tensor, r: int) -> tuple[list[Any], dict[str, int]]:
    """Descriptors, and what is compiled in beside the work items' width."""
    flat, pieces, dv = q.view(-1, q.shape[-1]), k.shape[1] // 64, v.shape[1]
    made = [flat_descriptor(flat, r, 64), flat_descriptor(k, 64, 64), flat_descriptor(v, 64, dv)]
    made.append(flat_descriptor(part_o, r, 64))
    tiles = max(pieces, dv // 64)
    stages = min(_STAGES, (_SHARED - 64 * 2 * (64 * pieces + dv)) // (64 * 2 * 64 * tiles))
    return made, {
        "R": r,
        "PIECES": pieces,
        "DV": dv,
        "REST": tiles - dv // 64,
        "STAGES": stages,
        "maxnreg": _REGISTERS,
    }


def flat_descriptor(x_ND: Tensor, rows: int, width: int) -> TensorDescriptor:
    return descriptor(x_ND, list(x_ND.shape), list(x_ND.stride()), [rows, width])
