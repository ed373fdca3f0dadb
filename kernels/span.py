"""The span rule: a bound on the blocks that a span of queries selects outside itself. A rule of the model, off
by default (`NSASpec.span`).

A document is cut into spans of `span` tokens. The candidates of a span are the blocks between the initial ones and
its own first block. At most `span_blocks` of them are admitted, for each KV head:

- `span_prefetch` before the span's first query: the highest sums of the scores (equation 10 of arXiv 2502.11089)
  that the `span_pool` queries before the span gave them;
- the rest evenly after each group of 64 queries of the span, by the same sums with those of the span's groups so
  far added. A query is admitted nothing by its own group or by a later one, so the rule is strictly causal.

Equal sums: the lower block first. A query takes its best n among the blocks that its position forces on it, those
of its span up to itself and those admitted by then. What a span's queries fetch is bounded, however many they are.

Scores are rounded to float32 and added as integers, multiples of 2**-32: a sum is then exact, and the same whatever
the order, the tiles or the ranks in which it was made.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsa_dist.kernels.branch import group_queries
from nsa_dist.kernels.compressed import CompressedView, add_heads
from nsa_dist.kernels.packing import Ints, Packing, on_device
from nsa_dist.kernels.select import Admitted, block_scores, select_blocks
from nsa_dist.kernels.spec import NSASpec
from nsa_dist.kernels.tiled import group_keys, tile_softmax

GROUP = 64  # queries between two admissions


@dataclass(frozen=True)
class Spans:
    """The spans of all documents, in the order of their tokens. [N] each, numpy int64.

    start, end: tokens. own: the block of the first token, inside the document. width: candidates. budget: blocks
    that may be admitted; prefetch: those of them that are before the span's first query.
    """

    start: Ints
    end: Ints
    own: Ints
    width: Ints
    budget: Ints
    prefetch: Ints
    document_start: Ints

    def of(self, tokens: Ints) -> Ints:
        """The span of each token."""
        return np.searchsorted(self.start, tokens, side="right") - 1

    def groups(self, span: int) -> int:
        return int(-(-(self.end[span] - self.start[span]) // GROUP))

    def quota(self, span: int, group: int) -> int:
        """Blocks admitted before the span's group 0, 1, … of queries; all of the budget before the last."""
        rest = int(self.budget[span] - self.prefetch[span])
        return int(self.prefetch[span]) + rest * group // max(self.groups(span) - 1, 1)


def make_spans(packing: Packing) -> Spans:
    """The spans of a packed sequence; packing.spec.span is not 0."""
    spec = packing.spec
    starts = [np.arange(a, b, spec.span) for a, b in zip(packing.cu[:-1], packing.cu[1:], strict=True)]
    start = np.concatenate([*starts, np.zeros(0, np.int64)]).astype(np.int64)
    document = packing.document(start)
    end = np.minimum(start + spec.span, packing.cu[1:][document])
    own = (start - packing.cu[document]) // spec.select_block
    width = np.maximum(own - spec.initial_blocks, 0)
    admissions = np.array([spec.admissions(n) for n in own.tolist()], np.int64).reshape(-1, 2)
    return Spans(start, end, own, width, admissions[:, 0], admissions[:, 1], packing.cu[document])


@dataclass(frozen=True)
class Units:
    """The sums that the rule needs: of a span's candidates over the queries [lo, hi). [N] each.

    step 0: the pool before the span. step k: the span's group k - 1 of queries, which decides what its group k is
    admitted; there are such only where not all is prefetched.
    """

    span: Ints
    step: Ints
    lo: Ints
    hi: Ints
    width: Ints

    def at(self, index: Ints) -> "Units":
        """Some of the units."""
        return Units(*(x[index] for x in (self.span, self.step, self.lo, self.hi, self.width)))


def make_units(spans: Spans, pool: int) -> Units:
    """The units of all spans that have candidates, span after span, step after step."""
    parts = [np.zeros((0, 5), np.int64)]
    for s in np.flatnonzero(spans.budget > 0).tolist():
        start, steps = int(spans.start[s]), spans.groups(s) if spans.budget[s] > spans.prefetch[s] else 1
        step = np.arange(steps)
        lo = np.where(step > 0, start + (step - 1) * GROUP, max(start - pool, int(spans.document_start[s])))
        hi = np.where(step > 0, start + step * GROUP, start)
        parts.append(np.stack([np.full(steps, s), step, lo, hi, np.full(steps, spans.width[s])], axis=1))
    return Units(*np.concatenate(parts).T)


def unit_sums(
    q_SHD: Tensor, k_NGD: Tensor, queries: Ints, view: CompressedView, spec: NSASpec, scale: float, units: Units
) -> Tensor:
    """[sum of the units' widths, G] int64: what the given queries (token numbers, ascending) add to the units.

    k_NGD, view: the compressed keys that they see, as in `compressed_forward`.
    """
    groups = k_NGD.shape[1]
    first, last = np.searchsorted(queries, units.lo), np.searchsorted(queries, units.hi)
    offset = np.cumsum(units.width) - units.width
    sums = torch.zeros(int(units.width.sum()), groups, dtype=torch.int64, device=q_SHD.device)
    q, k = group_queries(q_SHD, groups), group_keys(k_NGD)
    for at, rows, mask in view.ranges.tiles():
        wanted = np.flatnonzero((first < at.stop) & (last > at.start) & (last > first))
        if not len(wanted):
            continue
        blocks = int(units.width[wanted].max()) + spec.initial_blocks
        score = _scores(q[:, at], k[:, rows], mask, scale, blocks, spec)
        for u in wanted.tolist():
            a, b = max(int(first[u]) - at.start, 0), min(int(last[u]), at.stop) - at.start
            part = fixed_sum(score[:, a:b, spec.initial_blocks : spec.initial_blocks + int(units.width[u])])
            sums[offset[u] : offset[u] + units.width[u]] += part.T
    return sums


def fixed_sum(score_GMB: Tensor) -> Tensor:
    """[G, B] int64: float32 scores over their queries, in multiples of 2**-32. No order changes it."""
    return (score_GMB.double() * 2.0**32).to(torch.int64).sum(1)


@dataclass(frozen=True)
class SpanView:
    """What a set of queries needs of the rule: their spans' units, and where their spans' candidates will stand."""

    units: Units
    spans: Spans
    place_S: Tensor
    width_S: Tensor
    group_S: Tensor
    own_S: Tensor


def needed_units(spans: Spans, units: Units, queries: Ints) -> NDArray[np.bool_]:
    """[N]: the units that decide what these queries are admitted: of their spans, up to each span's last query."""
    span = spans.of(queries)
    last = np.full(len(spans.start), -1, np.int64)
    np.maximum.at(last, span, (queries - spans.start[span]) // GROUP)
    return units.step <= last[units.span]


def span_view(packing: Packing, queries: Ints, device: torch.device) -> SpanView:
    """The view of `queries` (token numbers, ascending) on the rule; packing.spec.span is not 0.

    Its units are those of the queries' spans, up to the group of the last query of each.
    """
    spans = make_spans(packing)
    units = make_units(spans, packing.spec.span_pool)
    span = spans.of(queries)
    group = (queries - spans.start[span]) // GROUP
    units = units.at(np.flatnonzero(needed_units(spans, units, queries)))
    heads = units.step == 0
    begin = np.zeros(len(spans.start), np.int64)
    begin[units.span[heads]] = np.cumsum(units.width[heads]) - units.width[heads]
    width = np.where(np.isin(np.arange(len(spans.start)), units.span[heads]), spans.width, 0)
    arrays = begin[span], width[span], group, spans.own[span]
    return SpanView(units, spans, *(on_device(a, device) for a in arrays))


def admit(sums_NG: Tensor, view: SpanView, spec: NSASpec) -> Admitted:
    """What is admitted when, from the whole sums of the view's units, [sum of their widths, G] int64."""
    units, never = view.units, 2**31 - 1
    when = []
    parts = sums_NG.split(units.width.tolist())
    for u, (span, step) in enumerate(zip(units.span.tolist(), units.step.tolist(), strict=True)):
        if step == 0:
            total = parts[u].clone()
            when.append(torch.full_like(total, never, dtype=torch.int32))
        else:
            total += parts[u]
        fresh = view.spans.quota(span, step) - (view.spans.quota(span, step - 1) if step else 0)
        if fresh:
            best = total.masked_fill(when[-1] <= step, -1).sort(dim=0, descending=True, stable=True).indices
            when[-1].scatter_(0, best[:fresh], step)
    when.append(torch.full((1, sums_NG.shape[1]), never, dtype=torch.int32, device=sums_NG.device))
    return Admitted(torch.cat(when), view.place_S, view.width_S, view.group_S, view.own_S, spec.initial_blocks)


def select_admitted(
    q_SHD: Tensor, k_NGD: Tensor, view: CompressedView, spec: NSASpec, scale: float, admitted: Admitted
) -> Tensor:
    """The selection [S, G, n], int32, as `compressed_forward` gives it, a KV head and a tile of queries at a time."""
    groups = k_NGD.shape[1]
    q, k = group_queries(q_SHD, groups), group_keys(k_NGD)
    picks = torch.full((len(q_SHD), groups, spec.select_count), -1, dtype=torch.int32, device=q.device)
    for at, rows, mask in view.ranges.tiles():
        own, first = view.own_S[at], view.first_S[at, None, None]
        allowed = admitted.allowed(at, int(own.max()) + 1)
        for g in range(groups):
            head = slice(g, g + 1)
            p = _probabilities(q[head, at], k[head, rows], mask, scale)
            pick = select_blocks(p, own, spec, allowed[head])
            picks[at, head] = torch.where(pick >= 0, pick + first, -1).to(torch.int32)
    return picks


def _scores(q_GMRD: Tensor, k_GND: Tensor, mask: Tensor | None, scale: float, blocks: int, spec: NSASpec) -> Tensor:
    """[G, M, blocks] float32, a KV head at a time."""
    heads = zip(q_GMRD.split(1), k_GND.split(1), strict=True)
    return torch.cat([block_scores(_probabilities(q, k, mask, scale), blocks, spec) for q, k in heads])


def _probabilities(q_GMRD: Tensor, k_GND: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[G, M, N], added over the group's heads."""
    return add_heads(tile_softmax(q_GMRD, k_GND, k_GND[..., :0], mask, scale)[2])
