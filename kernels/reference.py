"""NSA by its definition (DESIGN section 2): plain torch, gradients by autograd, any floating type.

Every other implementation is held against this one. It works over all keys that a chunk of queries may see
and masks the rest, so its time is quadratic; no more than a chunk's probabilities exist at a time, in the
backward as well (they are computed again there), so its memory is linear in the tokens.

Suffixes: T tokens, Q queries of a chunk, H query heads, G KV heads, R = H // G, C compressed tokens, K keys,
B blocks, n picks, D head size. The computation is in q's type, at least float32; the result in q's type.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nsa_dist.kernels.packing import Ints, Packing, overlap_weights
from nsa_dist.kernels.spec import NSASpec

CHUNK = 64  # queries

# Of a chunk of queries: the range of keys that any of them sees; those that each sees, bool [Q, 1 or G, K].
Visible = Callable[[slice], tuple[slice, Tensor]]


def reference_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    spec: NSASpec,
    packing: Packing,
    scale: float,
) -> Tensor:
    """NSA's output [T, H, Dv] for a packed sequence.

    q [T, H, Dk]; k_cmp [C, G, Dk], v_cmp [C, G, Dv]; k_slc, k_win [T, G, Dk], v_slc, v_win [T, G, Dv];
    gates [T, H, 3]: compressed, selected, window. A branch that a query sees nothing of gives 0.
    Raises ValueError where `packing` was made for another spec.
    """
    tokens = np.arange(packing.tokens)
    picks = reference_selection(q, k_cmp, spec, packing, scale)
    compressed = _in_range(*packing.visible_compressed(tokens), q.device)
    selected = _in_picks(picks, _in_range(*_causal(packing), q.device), packing)
    window = _in_range(*_causal(packing, spec.window), q.device)

    o_cmp = _attend(q, k_cmp, v_cmp, compressed, scale)
    o_slc = _attend(q, k_slc, v_slc, selected, scale)
    o_win = _attend(q, k_win, v_win, window, scale)
    g_cmp, g_slc, g_win = gates.to(o_cmp.dtype).unsqueeze(-1).unbind(2)
    return (g_cmp * o_cmp + g_slc * o_slc + g_win * o_win).to(q.dtype)


@torch.no_grad()
def reference_selection(q: Tensor, k_cmp: Tensor, spec: NSASpec, packing: Packing, scale: float) -> Tensor:
    """The blocks that each query and KV head selects: picks [T, G, n], int64.

    Numbers of `packing`'s blocks, ascending; -1 at the end where a query has fewer than n.
    Raises ValueError where `packing` was made for another spec.
    """
    if packing.spec != spec:
        raise ValueError(f"packing: made for {packing.spec}, must be made for the same spec, {spec}")
    tokens = np.arange(packing.tokens)
    picks = q.new_full((len(tokens), k_cmp.shape[1], spec.select_count), -1, dtype=torch.int64)
    score = _scorer(q, k_cmp, packing, scale)
    chunks = _span_rule(score, packing) if spec.span else ((c, score(c), None) for c in _chunks(len(tokens)))
    for chunk, score_QGB, allowed_GB in chunks:
        best = _best(score_QGB, allowed_GB, tokens[chunk], spec, packing)
        picks[chunk, :, : best.shape[-1]] = best
    return picks


def reference_full(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scale: float) -> Tensor:
    """Causal attention inside each document: q [T, H, Dk], k [T, G, Dk], v [T, G, Dv] to [T, H, Dv]."""
    return _attend(q, k, v, _in_range(*_causal(packing), q.device), scale).to(q.dtype)


def reference_window(q: Tensor, k: Tensor, v: Tensor, packing: Packing, window: int, scale: float) -> Tensor:
    """As `reference_full`, over the last `window` tokens of the document, the query's own included."""
    return _attend(q, k, v, _in_range(*_causal(packing, window), q.device), scale).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scale: float) -> Tensor:
    """Softmax attention over the visible keys, [T, H, Dv] in the type of the computation."""

    def attend(q_QHD: Tensor, k_KGD: Tensor, v_KGD: Tensor, chunk: slice) -> Tensor:
        keys, mask = visible(chunk)
        p_QGRK = _probabilities(q_QHD, k_KGD[keys], mask, scale)
        return torch.einsum("qgrk,kgd->qgrd", p_QGRK, v_KGD[keys].to(p_QGRK.dtype)).flatten(1, 2)

    chunks = zip(q.split(CHUNK), _chunks(len(q)), strict=True)
    outputs = [
        checkpoint(attend, q_QHD, k, v, chunk, use_reentrant=False, preserve_rng_state=False)
        for q_QHD, chunk in chunks
    ]
    return torch.cat(outputs)


def _probabilities(q_QHD: Tensor, k_KGD: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax over the visible keys, [Q, G, R, K]; all 0 for a query that sees none."""
    kind = torch.promote_types(q_QHD.dtype, torch.float32)
    q_QGRD = q_QHD.to(kind).unflatten(1, (k_KGD.shape[1], -1))
    s_QGRK = torch.einsum("qgrd,kgd->qgrk", q_QGRD, k_KGD.to(kind)) * scale
    hidden = ~mask.unsqueeze(2)
    # Not -inf: a row without a visible key would be NaN, in the backward too. Its equal shares become 0.
    p_QGRK = s_QGRK.masked_fill(hidden, torch.finfo(kind).min).softmax(-1)
    return p_QGRK.masked_fill(hidden, 0)


def _scorer(q: Tensor, k_cmp: Tensor, packing: Packing, scale: float) -> Callable[[slice], Tensor]:
    """The scores [Q, G, B] of a chunk of queries, in float32."""
    compressed = _in_range(*packing.visible_compressed(np.arange(packing.tokens)), q.device)
    sources_BO = _sources(packing.spec, packing, q.device)

    def score(chunk: slice) -> Tensor:
        keys, mask = compressed(chunk)
        p_QGRK = _probabilities(q[chunk], k_cmp[keys], mask, scale)
        p_QGC = p_QGRK.new_zeros(*p_QGRK.shape[:2], packing.compressed + 1)  # the last: no such token
        for p_QGK in p_QGRK.unbind(2):  # heads first …
            p_QGC[..., keys] += p_QGK
        score_QGB = torch.zeros_like(p_QGC[..., sources_BO[:, 0]])
        for o, weight in enumerate(overlap_weights(packing.spec)):  # … then compressed tokens, ascending
            score_QGB += weight * p_QGC[..., sources_BO[:, o]]
        return score_QGB.float()

    return score


def _span_rule(score: Callable[[slice], Tensor], packing: Packing) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Groups of queries, their scores, and the blocks [G, B] among which they choose: `kernels/span.py` says which.

    One group after the other, as in generation; nothing of a group is known before it was yielded.
    """
    spec, blocks = packing.spec, torch.arange(packing.blocks)
    for document, end in itertools.pairwise(packing.cu.tolist()):
        first_block = int(packing.block(np.array([document]))[0])
        for start in range(document, end, spec.span):
            own = first_block + (start - document) // spec.select_block
            candidate = (blocks >= first_block + spec.initial_blocks) & (blocks < own)
            budget, ahead = spec.admissions(own - first_block)
            pool = range(max(document, start - spec.span_pool), start, CHUNK)
            total = sum(_whole(score(slice(t, min(t + CHUNK, start)))) for t in pool)
            groups = range(start, min(start + spec.span, end), CHUNK)
            admitted: Tensor | None = None
            for i, t in enumerate(groups):
                chunk = slice(t, min(t + CHUNK, start + spec.span, end))
                score_QGB = score(chunk)
                if admitted is None:
                    admitted = torch.zeros(score_QGB.shape[1:], dtype=torch.bool, device=score_QGB.device)
                quota = ahead + (budget - ahead) * i // max(len(groups) - 1, 1)
                for _ in range(quota - int(admitted[0].sum())):
                    free = torch.where(candidate.to(admitted.device) & ~admitted, total, -1)
                    admitted.scatter_(1, free.sort(dim=1, descending=True, stable=True).indices[:, :1], True)
                yield chunk, score_QGB, admitted | (blocks >= own).to(admitted.device)
                total = total + _whole(score_QGB)


def _whole(score_QGB: Tensor) -> Tensor:
    """Scores added over their queries, [G, B], as integers: multiples of 2**-32, in which sums are exact."""
    return (score_QGB.double() * 2.0**32).long().sum(0)


def _best(score_QGB: Tensor, allowed_GB: Tensor | None, tokens: Ints, spec: NSASpec, packing: Packing) -> Tensor:
    """Each query's blocks, ascending, then -1: [Q, G, min(n, B)] from the scores in float32."""
    if allowed_GB is not None:
        score_QGB = score_QGB.masked_fill(~allowed_GB, -math.inf)
    blocks = np.arange(packing.blocks)
    own = packing.block(tokens)[:, None]
    first = packing.blk_cu[packing.document(tokens)][:, None]
    earlier = (blocks >= first) & (blocks <= own)
    forced = (blocks < first + spec.initial_blocks) | (blocks > own - spec.local_blocks)
    forced_QB = torch.from_numpy(forced).to(score_QGB.device).unsqueeze(1)
    later_QB = torch.from_numpy(~earlier).to(score_QGB.device).unsqueeze(1)
    rank_QGB = score_QGB.masked_fill(forced_QB, math.inf).masked_fill(later_QB, -math.inf)
    value, block = rank_QGB.sort(dim=-1, descending=True, stable=True)  # stable: the lower index first
    value, block = value[..., : spec.select_count], block[..., : spec.select_count]
    block = block.masked_fill(value == -math.inf, packing.blocks).sort(dim=-1).values
    return block.masked_fill(block == packing.blocks, -1)


def _sources(spec: NSASpec, packing: Packing, device: torch.device) -> Tensor:
    """The compressed tokens that overlap each block, ascending, [B, weights]; C where there is none.

    At a document's edges a neighbour's are among them; the block's queries don't see those: p = 0.
    """
    document = packing.document(packing.blk_start)
    block = np.arange(packing.blocks) - packing.blk_cu[document]
    l, d, lp = spec.compress_block, spec.compress_stride, spec.select_block
    first = packing.cmp_cu[document] + block * (lp // d) - (l // d - 1)
    token = first[:, None] + np.arange(len(overlap_weights(spec)))
    exists = (token >= 0) & (token < packing.compressed)
    return torch.from_numpy(np.where(exists, token, packing.compressed)).to(device)


def _causal(packing: Packing, window: int | None = None) -> tuple[Ints, Ints]:
    """Of each query the tokens [first, end) of its document up to itself, at most `window` of them."""
    tokens = np.arange(packing.tokens)
    first = packing.cu[packing.document(tokens)]
    return (first if window is None else np.maximum(first, tokens - window + 1)), tokens + 1


def _in_range(first: Ints, end: Ints, device: torch.device) -> Visible:
    """Query t sees the keys [first[t], end[t])."""

    def visible(chunk: slice) -> tuple[slice, Tensor]:
        low, high = min(first[chunk].tolist(), default=0), max(end[chunk].tolist(), default=0)
        keys = np.arange(low, high)
        mask = (keys >= first[chunk, None]) & (keys < end[chunk, None])
        return slice(low, high), torch.from_numpy(mask).to(device).unsqueeze(1)

    return visible


def _in_picks(picks_TGn: Tensor, causal: Visible, packing: Packing) -> Visible:
    """Of the keys that `causal` shows, a query sees those in the blocks that it picked."""
    block_T = torch.from_numpy(packing.block(np.arange(packing.tokens))).to(picks_TGn.device)

    def visible(chunk: slice) -> tuple[slice, Tensor]:
        keys, mask = causal(chunk)
        picks = picks_TGn[chunk]
        picked_QGB = picks.new_zeros(*picks.shape[:2], packing.blocks + 1, dtype=torch.bool)
        picked_QGB.scatter_(2, picks % (packing.blocks + 1), True)  # -1 goes to a place beyond the blocks
        return keys, mask & picked_QGB[..., block_T[keys]]

    return visible


def _chunks(tokens: int) -> Iterator[slice]:
    """Slices as `Tensor.split` makes them: one, empty, where there is no token."""
    return (slice(t, min(t + CHUNK, tokens)) for t in range(0, max(tokens, 1), CHUNK))
