"""Attention of tiles of queries over contiguous ranges of keys, in plain torch operations.

Any device, any floating type (16-bit inputs are computed in float32). Serves the window, the compressed
branch and, through its tile functions, the selected one. Never holds more than a tile's scores. On a CPU a
tile is computed by the FlashAttention behind torch's SDPA (called where it takes a mask and returns the
log-sum-exp): half the time of separate operations.

Shapes: S queries, N key rows, H query heads, G KV heads, R = H // G, M queries of a tile.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.branch import BranchGrad, group_queries, work_dtype
from nsa_dist.kernels.packing import Ints, Packing, on_device

TILE = 128  # queries of a tile


@dataclass(frozen=True)
class Ranges:
    """The key rows [lo, hi) that each query sees, and the tiles in which queries are taken."""

    lo: Ints  # [S]
    hi: Ints  # [S]
    bounds: Ints  # [tiles, 2], queries of each tile
    lo_S: Tensor  # the same on the device
    hi_S: Tensor

    @cached_property
    def widest(self) -> int:
        """The most queries that see one row."""
        begin, end = self._seen
        return int((end - begin).max(initial=0))

    @cached_property
    def longest(self) -> int:
        """The most rows that a query sees."""
        return int((self.hi - self.lo).max(initial=0))

    def seen_by(self, rows: int) -> tuple[Tensor, Tensor]:
        """For each of the buffer's rows the queries [first, end) among which are those that see it, on the device.

        lo and hi never fall from one query to the next, and so don't first and end from one row to the next: a
        tile of rows is seen by the queries from its first row's `first` to its last row's `end`. Rows that nobody
        sees may follow the last that is seen (compressed tokens that end on the next rank).
        """
        if rows not in self._seen_by:
            begin, end = self._seen
            parts = np.full(rows, len(self.lo)), np.full(rows, len(self.lo))
            parts[0][: len(begin)], parts[1][: len(end)] = begin[:rows], end[:rows]
            first, last = (on_device(x, self.lo_S.device) for x in parts)
            self._seen_by[rows] = first, last
        return self._seen_by[rows]

    def tiles_on_device(self, tile: int) -> Tensor:
        """`bounds` cut into tiles of at most `tile` queries, [tiles, 2], on the device."""
        if tile not in self._tiles:
            bounds = tile_bounds(len(self.lo), self.bounds[:, 0], tile)
            self._tiles[tile] = on_device(bounds, self.lo_S.device)
        return self._tiles[tile]

    @cached_property
    def _seen(self) -> tuple[Ints, Ints]:
        rows = np.arange(self.hi.max(initial=0))
        return np.searchsorted(self.hi, rows, side="right"), np.searchsorted(self.lo, rows, side="right")

    @cached_property
    def _seen_by(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _tiles(self) -> dict[int, Tensor]:
        return {}

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """(queries, key rows, mask [M, N] or None where every query sees all rows) of each tile."""
        for a, b in self.bounds.tolist():
            first, end = int(self.lo[a:b].min()), int(self.hi[a:b].max())
            end = max(first, end)
            if (self.lo[a:b] == first).all() and (self.hi[a:b] == end).all():
                yield slice(a, b), slice(first, end), None
                continue
            rows = torch.arange(first, end, device=self.lo_S.device)
            mask = (rows >= self.lo_S[a:b, None]) & (rows < self.hi_S[a:b, None])
            yield slice(a, b), slice(first, end), mask


def make_ranges(lo: Ints, hi: Ints, breaks: Ints, device: torch.device, tile: int = TILE) -> Ranges:
    """Ranges whose tiles end at `breaks` (query numbers at which a tile must start) and after `tile` queries."""
    bounds = tile_bounds(len(lo), breaks, tile)
    return Ranges(lo, hi, bounds, on_device(lo, device), on_device(hi, device))


def query_breaks(packing: Packing, queries: Ints) -> Ints:
    """Where a run of neighbouring tokens of one document ends: across it, tiles would see far apart rows."""
    same = np.diff(packing.document(queries)) == 0
    return np.flatnonzero(~(same & (np.diff(queries) == 1))) + 1


def window_ranges(packing: Packing, queries: Ints, rows: Ints, window: int, device: torch.device) -> Ranges:
    """Rows of a buffer of tokens `rows` (ascending) in the window of `window` tokens, the query's own included.

    The buffer must hold every token of the windows. A window of `packing.tokens` is full causal attention.
    """
    start = np.maximum(queries - window + 1, packing.cu[packing.document(queries)])
    lo, hi = np.searchsorted(rows, start), np.searchsorted(rows, queries, side="right")
    return make_ranges(lo, hi, query_breaks(packing, queries), device)


def tile_bounds(queries: int, breaks: Ints, tile: int = TILE) -> Ints:
    """[tiles, 2]: runs of at most `tile` queries that no break lies inside."""
    edges = np.unique(np.concatenate([[0, queries], breaks[(breaks > 0) & (breaks < queries)]]))
    starts = [np.arange(a, b, tile) for a, b in itertools.pairwise(edges)]
    first = np.concatenate(starts) if starts else np.zeros(0, np.int64)
    end = np.append(first[1:], queries)[: len(first)]
    return np.stack([first, end], axis=1).astype(np.int64)


def group_keys(k_NGD: Tensor) -> Tensor:
    """[N, G, D] to [G, N, D] in the working type."""
    return k_NGD.to(work_dtype(k_NGD)).transpose(0, 1).contiguous()


def tile_scores(q_GMRD: Tensor, k_GND: Tensor, mask_MN: Tensor | None, scale: float) -> Tensor:
    """[G, M, R, N]: scaled products, -inf where a query does not see a row; the mask may be [G, M, N] too."""
    g, m, r, d = q_GMRD.shape
    s = torch.bmm((q_GMRD * scale).reshape(g, m * r, d), k_GND.transpose(1, 2)).view(g, m, r, -1)
    if mask_MN is not None:
        s.masked_fill_(~mask_MN.unsqueeze(-2), -torch.inf)
    return s


def tile_softmax(
    q_GMRD: Tensor, k_GND: Tensor, v_GND: Tensor, mask_MN: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [G, M, R, Dv], log-sum-exp [G, M, R] and probabilities [G, M, R, N] of a tile.

    A query that sees no row gets output 0, log-sum-exp -inf and probabilities 0.
    """
    g, m, r, _ = q_GMRD.shape
    if k_GND.shape[1] == 0:
        lse = q_GMRD.new_full((g, m, r), -torch.inf)
        return q_GMRD.new_zeros(g, m, r, v_GND.shape[2]), lse, q_GMRD.new_zeros(g, m, r, 0)
    s = tile_scores(q_GMRD, k_GND, mask_MN, scale)
    top = s.amax(-1, keepdim=True)
    top.masked_fill_(top == -torch.inf, 0)  # -inf - (-inf) would be NaN
    p = s.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    lse = (total.log() + top).squeeze(-1)
    p.div_(total.masked_fill(total == 0, 1))
    o = torch.bmm(p.view(g, m * r, -1), v_GND).view(g, m, r, -1)
    return o, lse, p


def tile_forward(
    q_GMRD: Tensor, k_GND: Tensor, v_GND: Tensor, mask_MN: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """`tile_softmax` without the probabilities."""
    if q_GMRD.device.type != "cpu" or k_GND.shape[1] == 0:
        return tile_softmax(q_GMRD, k_GND, v_GND, mask_MN, scale)[:2]
    q, k, v = _heads_first(q_GMRD, k_GND, v_GND)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    o, lse = flash(q, k, v, attn_mask=_bias(mask_MN, q.dtype), scale=scale)
    if mask_MN is not None:
        lse = lse.masked_fill(~mask_MN.any(-1), -torch.inf)  # there it says 0
    return o.transpose(1, 2)[..., : v_GND.shape[2]], lse.transpose(1, 2)


def tile_backward(
    do_GMRD: Tensor,
    q_GMRD: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    o_GMRD: Tensor,
    lse_GMR: Tensor,
    mask_MN: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a tile's q [G, M, R, Dk], k [G, N, Dk], v [G, N, Dv].

    `o` and `lse` may be those of a softmax over more rows than these (FlashAttention-2, arXiv 2307.08691,
    algorithm 2): so parts that were computed apart are differentiated apart.
    """
    lse = lse_GMR.masked_fill(lse_GMR == -torch.inf, 0)  # such a query's scores are all -inf
    if q_GMRD.device.type != "cpu":
        delta = (do_GMRD * o_GMRD).sum(-1)
        return tile_softmax_backward(do_GMRD, q_GMRD, k_GND, v_GND, delta, lse, mask_MN, scale)
    q, k, v, o, do = _heads_first(q_GMRD, k_GND, v_GND, o_GMRD, do_GMRD)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    bias = _bias(mask_MN, q.dtype)
    dq, dk, dv = flash(do, q, k, v, o, lse.transpose(1, 2).contiguous(), 0.0, False, attn_mask=bias, scale=scale)
    dk_size, dv_size = k_GND.shape[2], v_GND.shape[2]
    return dq.transpose(1, 2)[..., :dk_size], dk.sum(1)[..., :dk_size], dv.sum(1)[..., :dv_size]


def tile_softmax_backward(
    do_GMRD: Tensor,
    q_GMRD: Tensor,
    k_GND: Tensor,
    v_GND: Tensor,
    delta_GMR: Tensor,
    lse_GMR: Tensor,
    mask_MN: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile_backward` in separate operations; lse is finite, delta the sum over a row of do times o."""
    g, m, r, d = q_GMRD.shape
    s = tile_scores(q_GMRD, k_GND, mask_MN, scale)
    p = s.sub_(lse_GMR.unsqueeze(-1)).exp_().view(g, m * r, -1)
    do = do_GMRD.reshape(g, m * r, -1)
    dv = torch.bmm(p.transpose(1, 2), do)
    ds = torch.bmm(do, v_GND.transpose(1, 2)).sub_(delta_GMR.reshape(g, m * r, 1)).mul_(p).mul_(scale)
    dq = torch.bmm(ds, k_GND).view(g, m, r, d)
    dk = torch.bmm(ds.transpose(1, 2), q_GMRD.reshape(g, m * r, d))
    return dq, dk, dv


def _heads_first(q_GMRD: Tensor, k_GND: Tensor, v_GND: Tensor, *more_GMRD: Tensor) -> list[Tensor]:
    """[G, R, M or N, D], the KV heads repeated without a copy, with the one head size that FlashAttention takes:
    zeros change neither products nor outputs."""
    width, r = max(k_GND.shape[2], v_GND.shape[2]), q_GMRD.shape[2]
    kv = [x.unsqueeze(1).expand(-1, r, -1, -1) for x in (k_GND, v_GND)]
    every = [q_GMRD.transpose(1, 2), *kv, *(x.transpose(1, 2) for x in more_GMRD)]
    return [torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in every]


def _bias(mask_MN: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as numbers to add to the scores."""
    return None if mask_MN is None else torch.where(mask_MN, 0.0, -torch.inf).to(dtype)


def range_forward(q_SHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, ranges: Ranges, scale: float) -> tuple[Tensor, Tensor]:
    """Each query's attention over its range of rows: output [S, H, Dv] and log-sum-exp [S, H]."""
    q, k, v = group_queries(q_SHD, k_NGD.shape[1]), group_keys(k_NGD), group_keys(v_NGD)
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    lse = q.new_full(q.shape[:3], -torch.inf)
    for queries, rows, mask in ranges.tiles():
        o[:, queries], lse[:, queries] = tile_forward(q[:, queries], k[:, rows], v[:, rows], mask, scale)
    return ungroup(o).to(q_SHD.dtype), ungroup(lse)


def range_backward(
    branch: BranchGrad,
    q_SHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    ranges: Ranges,
    scale: float,
    dq_SHD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q (added in place to `dq_SHD` where given), k, v, in the working type (at least float32)."""
    groups = k_NGD.shape[1]
    q, k, v = group_queries(q_SHD, groups), group_keys(k_NGD), group_keys(v_NGD)
    do, o, lse = branch.grouped(groups)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for at, rows, mask in ranges.tiles():
        if rows.start == rows.stop:
            continue
        parts = tile_backward(do[:, at], q[:, at], k[:, rows], v[:, rows], o[:, at], lse[:, at], mask, scale)
        dq[:, at] = parts[0]
        dk[:, rows] += parts[1]
        dv[:, rows] += parts[2]
    return add_dq(dq, dq_SHD), dk.transpose(0, 1), dv.transpose(0, 1)


def add_dq(dq_GSRD: Tensor, dq_SHD: Tensor | None) -> Tensor:
    dq = ungroup(dq_GSRD)
    return dq if dq_SHD is None else dq_SHD.add_(dq)


def ungroup(x_GSR: Tensor) -> Tensor:
    """[G, S, R, ...] to [S, H, ...]."""
    return x_GSR.transpose(0, 1).flatten(1, 2)
