"""The selected branch: each query attends to the blocks that its KV head's group selected, causally.

Keys and values come as rows of a buffer behind an index, so that the same functions serve a whole sequence,
a rank's own shard and a buffer of fetched blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.branch import BranchGrad, group_queries, work_dtype
from nsa_dist.kernels.combine import merge
from nsa_dist.kernels.packing import Ints, Packing, on_device
from nsa_dist.kernels.tiled import TILE, add_dq, tile_backward, tile_forward, ungroup


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
    """[N, G, D] to the rows [G * N, D] of a buffer that holds KV head after KV head."""
    return x_NGD.transpose(0, 1).reshape(-1, x_NGD.shape[-1])


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
    groups = picks_SGn.shape[1]
    q, k, v = group_queries(q_SHD, groups), k_ND.to(work_dtype(k_ND)), v_ND.to(work_dtype(v_ND))
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    lse = q.new_full(q.shape[:3], -torch.inf)
    for g, at in _tiles(groups, q.shape[1]):
        rows, mask = _rows(picks_SGn[at, g], token_S[at], index, g)
        if len(rows):
            head = slice(g, g + 1)
            o[head, at], lse[head, at] = tile_forward(q[head, at], k[None, rows], v[None, rows], mask, scale)
    found = ungroup(o).to(q_SHD.dtype), ungroup(lse)
    return merge(*onto, *found) if onto else found


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

    `branch`: its output and log-sum-exp are those of the whole branch, merged over all buffers. Each tile adds
    to rows that it names once, tiles follow one another: the sums have one order and need no atomics.
    """
    groups = picks_SGn.shape[1]
    q, k, v = group_queries(q_SHD, groups), k_ND.to(work_dtype(k_ND)), v_ND.to(work_dtype(v_ND))
    do, o, lse = branch.grouped(groups)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for g, at in _tiles(groups, q.shape[1]):
        rows, mask = _rows(picks_SGn[at, g], token_S[at], index, g)
        if not len(rows):
            continue
        head = slice(g, g + 1)
        parts = tile_backward(
            do[head, at],
            q[head, at],
            k[None, rows],
            v[None, rows],
            o[head, at],
            lse[head, at],
            mask,
            scale,
        )
        dq[head, at] = parts[0]
        dk[rows] += parts[1][0]
        dv[rows] += parts[2][0]
    return add_dq(dq, dq_SHD), dk, dv


def _tiles(groups: int, queries: int) -> list[tuple[int, slice]]:
    return [(g, slice(a, min(a + TILE, queries))) for g in range(groups) for a in range(0, queries, TILE)]


def _rows(picks_Mn: Tensor, token_M: Tensor, index: BlockIndex, g: int) -> tuple[Tensor, Tensor]:
    """The buffer's rows of every block that a tile selected, and which query sees which: [rows], [M, rows]."""
    blocks = torch.unique(picks_Mn)
    blocks = blocks[blocks >= 0].long()
    begin, end = index.begin_GB[g, blocks], index.end_GB[g, blocks]
    here = end > begin
    blocks, begin, length = blocks[here], begin[here], (end - begin)[here]
    if not len(blocks):
        return blocks, blocks.new_zeros(len(picks_Mn), 0, dtype=torch.bool)
    slot = torch.repeat_interleave(torch.arange(len(blocks), device=blocks.device), length)
    rows = torch.arange(len(slot), device=slot.device) + (begin - length.cumsum(0) + length)[slot]
    column = torch.searchsorted(blocks, picks_Mn.long()).clamp_(max=len(blocks) - 1)
    found = blocks[column] == picks_Mn
    member = torch.zeros(len(picks_Mn), len(blocks) + 1, dtype=torch.bool, device=blocks.device)
    member.scatter_(1, column.masked_fill(~found, len(blocks)), True)
    # gather: several times faster than member[:, slot]
    picked = member.gather(1, slot.expand(len(member), -1))
    return rows, picked & (index.token_N[rows] <= token_M[:, None])
