"""The selected branch: each query attends to the blocks that its KV head's group selected, causally.

Keys and values come as rows of a buffer behind an index, so that the same functions serve a whole sequence,
a rank's own shard and a buffer of fetched blocks.

The work goes block by block: an item is some of the queries that picked one block, against the block's rows. So no
more is multiplied than was picked, however far apart the picks of neighbouring queries lie. What a pick gives is kept
apart, and a query's picks are added up afterwards, in their order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.branch import BranchGrad, work_dtype
from nsa_dist.kernels.combine import combine_forward, merge
from nsa_dist.kernels.packing import Ints, Packing, on_device
from nsa_dist.kernels.tiled import tile_softmax, tile_softmax_backward

CHUNK_BYTES = 32 << 20  # of what the picks of a chunk of queries give
_ITEM_ROWS = 128  # queries times heads of an item, at most (but one query)
_BATCH = 1 << 19  # scores of the items that are computed at once: they stay in a core's cache


@dataclass(frozen=True)
class BlockIndex:
    """Where a buffer's rows lie: rows [begin[g, j], end[g, j]) are tokens of block j for KV head g.

    `token_N`: each row's token, ascending inside a block. A block that the buffer lacks has no rows.
    """

    begin_GB: Tensor
    end_GB: Tensor
    token_N: Tensor
    longest: int  # rows of the longest block


def block_index(packing: Packing, tokens: list[Ints], device: torch.device) -> BlockIndex:
    """The index of a buffer that holds, KV head after KV head, rows of the tokens `tokens[g]` (ascending)."""
    base = np.cumsum([0] + [len(t) for t in tokens])
    begin = [b + np.searchsorted(t, packing.blk_start) for b, t in zip(base[:-1], tokens, strict=True)]
    end = [b + np.searchsorted(t, packing.blk_end) for b, t in zip(base[:-1], tokens, strict=True)]
    arrays = np.stack(begin), np.stack(end), np.concatenate(tokens)
    begin_GB, end_GB, token_N = (on_device(a, device) for a in arrays)
    longest = int((arrays[1] - arrays[0]).max(initial=0))
    return BlockIndex(begin_GB, end_GB, token_N, longest)


def head_rows(x_NGD: Tensor) -> Tensor:
    """[N, G, D] to the rows [G * N, D] of a buffer that holds KV head after KV head; not differentiable.

    In words of 8 bytes where it can be: a GPU copies 2 bytes at a time at a third of its rate.
    """
    word = 8 // x_NGD.element_size()
    sizes = (x_NGD.shape[-1], *x_NGD.stride()[:-1], x_NGD.storage_offset())
    whole = x_NGD.stride(-1) == 1 and all(n % word == 0 for n in sizes)
    x = x_NGD.detach().view(torch.int64) if whole else x_NGD.detach()
    return x.transpose(0, 1).reshape(-1, x.shape[-1]).view(x_NGD.dtype)


def check_picks(picks_SGn: Tensor, index: BlockIndex) -> None:
    """Raises ValueError for a pick that is no block; on a GPU, where asking would wait, its assertion fails."""
    blocks = index.begin_GB.shape[1]
    words = f"picks: must be block numbers from 0 to {blocks - 1}, or -1"
    fit = ((picks_SGn >= -1) & (picks_SGn < blocks)).all()
    if fit.device.type == "cuda":
        torch._assert_async(fit, words)
    elif not fit:
        wrong = picks_SGn[(picks_SGn < -1) | (picks_SGn >= blocks)]
        raise ValueError(f"{words}; {len(wrong)} aren't, the first is {int(wrong[0])}")


def selected_forward(
    q_SHD: Tensor,
    k_ND: Tensor,
    v_ND: Tensor,
    picks_SGn: Tensor,
    token_S: Tensor,
    index: BlockIndex,
    scale: float,
    onto: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [S, H, Dv] and log-sum-exp [S, H] over the selected blocks' rows in the buffer.

    `token_S`: the queries' tokens. A query with no row in the buffer gets 0 and -inf. `onto`: what another buffer
    gave, with which it is merged by log-sum-exp; it may be written over. Raises ValueError for a pick that is none.
    """
    check_picks(picks_SGn, index)
    (s, groups, n), heads = picks_SGn.shape, q_SHD.shape[1]
    k, v = k_ND.to(work_dtype(k_ND)), v_ND.to(work_dtype(v_ND))
    o, lse = q_SHD.new_zeros(s, heads, v.shape[1]), q_SHD.new_zeros(s, heads, dtype=v.dtype)
    chunks = _chunks(picks_SGn, heads * v.shape[1] * v.element_size())
    parts = _parts(chunks, picks_SGn, v, heads // groups)
    part_lses = _parts(chunks, picks_SGn, v[:, :1], heads // groups)
    for at in chunks:
        q = _query_rows(q_SHD[at], groups)
        part_o, part_lse = parts[: len(q) * n + 1].zero_(), part_lses[: len(q) * n + 1, :, 0].fill_(-torch.inf)
        for item in _items(picks_SGn[at], token_S[at], index, q.shape[1]):
            found = tile_softmax(q[item.query_IW], k[item.rows_IL], v[item.rows_IL], item.sees_IWL, scale)
            part_o[item.pick_IW], part_lse[item.pick_IW] = found[:2]
        merged = _merge(part_o[:-1].view(len(q), n, *part_o.shape[1:]), part_lse[:-1].view(len(q), n, -1))
        o[at], lse[at] = merged[0].view(-1, heads, v.shape[1]), merged[1].view(-1, heads)
    return merge(*onto, o, lse) if onto else (o, lse)


def selected_combined(
    gates_SH3: Tensor, o_cmp_SHD: Tensor, o_win_SHD: Tensor, *selected: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`selected_forward` of what follows the other branches' outputs, then the three branches' gated sum."""
    o, lse = selected_forward(*selected)
    return o, lse, combine_forward(gates_SH3, [o_cmp_SHD, o, o_win_SHD])


def selected_backward(
    branch: BranchGrad,
    q_SHD: Tensor,
    k_ND: Tensor,
    v_ND: Tensor,
    picks_SGn: Tensor,
    token_S: Tensor,
    index: BlockIndex,
    scale: float,
    dq_SHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [S, H, Dk] (added in place to `dq_SHD` where given) and of the buffer's rows [N, Dk],
    [N, Dv], in the working type.

    `branch`: its output and log-sum-exp are those of the whole branch, merged over all buffers. Every sum has one
    order, without atomics: a query's over its picks, a row's over the items of its block.
    """
    (_, groups, n), heads = picks_SGn.shape, q_SHD.shape[1]
    k, v = k_ND.to(work_dtype(k_ND)), v_ND.to(work_dtype(v_ND))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    dq = torch.zeros_like(q_SHD, dtype=k.dtype) if dq_SHD is None else dq_SHD
    gate = branch.gate_SH.to(k.dtype)
    chunks = _chunks(picks_SGn, heads * k.shape[1] * k.element_size())
    parts = _parts(chunks, picks_SGn, k, heads // groups)
    for at in chunks:
        q, do = _query_rows(q_SHD[at], groups), _query_rows(branch.do_SHD[at] * gate[at].unsqueeze(-1), groups)
        of_rows = (branch.lse_SH[at].masked_fill(branch.lse_SH[at] == -torch.inf, 0), branch.delta_SH[at] * gate[at])
        lse, delta = (x.to(k.dtype).reshape(len(q), -1) for x in of_rows)
        part_dq = parts[: len(q) * n + 1].zero_()
        for item in _items(picks_SGn[at], token_S[at], index, q.shape[1]):
            of = item.query_IW
            part_dq[item.pick_IW], dk_item, dv_item = tile_softmax_backward(
                do[of], q[of], k[item.rows_IL], v[item.rows_IL], delta[of], lse[of], item.sees_IWL, scale
            )
            _add_rows(dk, item.rows_IL, dk_item)
            _add_rows(dv, item.rows_IL, dv_item)
        dq[at] += part_dq[:-1].view(-1, n, *q.shape[1:]).sum(1).view(-1, heads, k.shape[1])
    return dq, dk, dv


@dataclass(frozen=True)
class _Items:
    """I items of W picks at most of one block each, and the block's L rows. What fills up an item sees no row:
    its query is any, its pick the number of picks; what fills up a block's rows is seen by nobody."""

    pick_IW: Tensor  # number in the chunk's picks [M, G, n]
    query_IW: Tensor  # in [M, G]
    rows_IL: Tensor  # of the buffer
    sees_IWL: Tensor


def _items(picks_MGn: Tensor, token_M: Tensor, index: BlockIndex, heads: int) -> Iterator[_Items]:
    """All of a chunk's picks of blocks that the buffer holds, block after block, in batches."""
    (_, groups, n), blocks, device = picks_MGn.shape, index.begin_GB.shape[1], picks_MGn.device
    begin, end = index.begin_GB.flatten(), index.end_GB.flatten()
    block = (picks_MGn + torch.arange(groups, device=device)[:, None] * blocks).flatten()
    pick = torch.nonzero((end > begin)[block.clamp(min=0)] & (picks_MGn >= 0).flatten()).squeeze(1)
    if not len(pick):
        return
    sorted_, order = block[pick].sort(stable=True)
    pick = torch.cat([pick[order], pick.new_tensor([picks_MGn.numel()])])
    block, count = torch.unique_consecutive(sorted_, return_counts=True)
    width = _width(len(sorted_) / len(block), heads)
    first = count.cumsum(0) - count
    parts = (count + width - 1) // width
    of = torch.repeat_interleave(torch.arange(len(block), device=device), parts)
    start = first[of] + (torch.arange(len(of), device=device) - (parts.cumsum(0) - parts)[of]) * width
    stop = torch.minimum(start + width, (first + count)[of])
    token = torch.cat([token_M.repeat_interleave(groups), token_M.new_tensor([-1])])
    batch = max(1, _BATCH // (width * heads * index.longest))
    for a, b, which in zip(start.split(batch), stop.split(batch), block[of].split(batch), strict=True):
        at = a[:, None] + torch.arange(width, device=device)
        pick_IW = pick[torch.where(at < b[:, None], at, len(sorted_))]
        rows = begin[which, None] + torch.arange(index.longest, device=device)
        here = rows < end[which, None]
        rows = torch.where(here, rows, begin[which, None])
        query = torch.div(pick_IW, n, rounding_mode="floor")  # of what fills up: one after the last
        row_token = index.token_N[rows].masked_fill(~here, torch.iinfo(torch.int64).max)
        sees = row_token[:, None] <= token[query, None]
        yield _Items(pick_IW, query.clamp_(max=len(token) - 2), rows, sees)


def _width(mean: float, heads: int) -> int:
    """Picks of an item: a power of two, little of which stays empty at so many picks of a block."""
    return 1 << (max(1, min(int(mean), _ITEM_ROWS // heads)).bit_length() - 1)


def _chunks(picks_SGn: Tensor, pick_bytes: int) -> list[slice]:
    """Queries whose picks' results, of so many bytes each, are held at a time."""
    queries = max(1, CHUNK_BYTES // max(1, pick_bytes * picks_SGn.shape[2]))
    return [slice(a, a + queries) for a in range(0, len(picks_SGn), queries)]


def _parts(chunks: list[slice], picks_SGn: Tensor, x_ND: Tensor, heads: int) -> Tensor:
    """[picks of a chunk + 1, R, D]: what the picks give, and in the last row what fills up items. For all chunks."""
    picks = max((picks_SGn[at].numel() for at in chunks), default=0)
    return x_ND.new_empty(picks + 1, heads, x_ND.shape[1])


def _query_rows(x_SHD: Tensor, groups: int) -> Tensor:
    """[S, H, D] to [S * G, R, D] in the working type."""
    s, h, d = x_SHD.shape
    return x_SHD.to(work_dtype(x_SHD)).reshape(s * groups, h // groups, d)


def _merge(o_MnRD: Tensor, lse_MnR: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of one softmax as one: `combine.merge` of n. Overwrites them."""
    lse = lse_MnR.logsumexp(1)
    weight = (lse_MnR - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(1)).exp_()
    return o_MnRD.mul_(weight.unsqueeze(-1)).sum(1), lse


def _add_rows(total_ND: Tensor, rows_IL: Tensor, x_ILD: Tensor) -> None:
    """Adds to rows, some of which are named several times, in the order in which they are named."""
    rows, x = rows_IL.flatten(), x_ILD.flatten(0, 1)
    if total_ND.device.type == "cpu":
        total_ND.index_add_(0, rows, x)
    else:  # it sorts the rows, index_add_ would use atomics there
        total_ND.index_put_((rows,), x, accumulate=True)
