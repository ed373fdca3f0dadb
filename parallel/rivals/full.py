"""Full causal attention over a cut sequence: ring (merged by log-sum-exp) and all-gather of KV.

Both go over rectangles: queries of one segment against keys of another, in one document. The ring is that of
Ring Attention (arXiv 2310.01889).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.combine import merge
from nsa_dist.kernels.full import full_backward, full_forward
from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.parallel.attention import pack, unpack
from nsa_dist.parallel.exchange import shift
from nsa_dist.parallel.layout import Layout
from nsa_dist.parallel.needs import document_spans
from nsa_dist.parallel.operator import Operation
from nsa_dist.parallel.sequence import ShardedSequence

Rectangle = tuple[slice, slice, bool]  # query rows, key rows, causal square or all visible


@dataclass(frozen=True)
class Run:
    """Tokens [first, end) of one document in a rank's rows, from row `row` on."""

    row: int
    first: int
    end: int

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.end - self.first)


def document_runs(packing: Packing, segments: Ints) -> dict[int, list[Run]]:
    """The runs of each document that lies in segments [n, 2]."""
    spans = document_spans(segments, packing)
    rows = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
    runs: dict[int, list[Run]] = {}
    for document, row, (first, end) in zip(packing.document(spans[:, 0]), rows, spans.tolist(), strict=False):
        runs.setdefault(int(document), []).append(Run(int(row), first, end))
    return runs


def rectangles(packing: Packing, queries: Ints, keys: Ints) -> list[Rectangle]:
    """The rectangles of queries in segments `queries` against keys in segments `keys` ([n, 2] each).

    Two segments are the same or don't overlap, so that a rectangle is a causal square, or wholly visible.
    """
    key_runs = document_runs(packing, keys)
    return [
        (query.rows, key.rows, key.first == query.first)
        for document, query_runs in document_runs(packing, queries).items()
        for query in query_runs
        for key in key_runs.get(document, [])
        if key.first <= query.first
    ]


def part_forward(
    state: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, parts: Sequence[Rectangle], scale: float
) -> None:
    """Merges the rectangles' attention into (o, lse), in place."""
    o, lse = state
    for at, rows, causal in parts:
        part = full_forward(q[at], k[rows], v[rows], causal, scale)
        o[at], lse[at] = merge(o[at], lse[at], *part)


def part_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    k: Tensor,
    v: Tensor,
    parts: Sequence[Rectangle],
    scale: float,
) -> None:
    """Adds the rectangles' gradients to (dq, dk, dv), in place; saved: do, q, o, lse of the whole softmax."""
    dq, dk, dv = grads
    do, q, o, lse = saved
    for at, rows, causal in parts:
        found = full_backward(do[at], q[at], k[rows], v[rows], o[at], lse[at], causal, scale)
        dq[at] += found[0]
        dk[rows] += found[1]
        dv[rows] += found[2]


def start_state(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Nothing seen yet: output 0 (in the working type, so that merging does not round), log-sum-exp -inf."""
    work = torch.promote_types(q.dtype, torch.float32)
    o = torch.zeros(*q.shape[:2], v.shape[2], dtype=work, device=q.device)
    return o, torch.full(q.shape[:2], -torch.inf, dtype=work, device=q.device)


class FullAllGather(Operation):
    """Every rank gets all KV, then computes its queries' rectangles. Inputs q, k, v."""

    def __init__(self, sequence: ShardedSequence, scale: float) -> None:
        self.sequence, self.scale = sequence, scale
        own, every = sequence.layout.segments(sequence.axis.rank), _all_segments(sequence.layout)
        self.parts = rectangles(sequence.packing, own, every)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = inputs
        gather = self.sequence.full_kv
        got = gather.start(pack(k, v)).wait()
        o, lse = start_state(q, v)
        part_forward((o, lse), q, *unpack(gather.buffer(pack(k, v), got), k, v), self.parts, self.scale)
        return [o.to(q.dtype), lse, got]

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        (q, k, v), (o, lse, got) = inputs, outputs
        gather = self.sequence.full_kv
        k_all, v_all = unpack(gather.buffer(pack(k, v), got), k, v)
        grads = tuple(torch.zeros_like(x, dtype=lse.dtype) for x in (q, k_all, v_all))
        part_backward((grads[0], grads[1], grads[2]), (grad, q, o, lse), k_all, v_all, self.parts, self.scale)
        home = gather.finish(*gather.start_return(pack(*grads[1:])))
        return [grads[0], *unpack(home, k, v)]


class Ring(Operation):
    """KV goes round the ring, each rank sending on what it got; gradients of KV travel with it, once more
    round and home. Inputs q, k, v."""

    def __init__(self, sequence: ShardedSequence, scale: float) -> None:
        self.sequence, self.scale = sequence, scale

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = inputs
        o, lse = start_state(q, v)
        for origin, kv in self._round(pack(k, v), "forward"):
            part_forward((o, lse), q, *unpack(kv, k, v), self._parts(origin), self.scale)
        return [o.to(q.dtype), lse]

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        (q, k, v), (o, lse) = inputs, outputs
        axis, dtype = self.sequence.axis, self.sequence.grad_dtype
        dq = torch.zeros_like(q, dtype=lse.dtype)
        travelling: Tensor | None = None
        for origin, kv in self._round(pack(k, v), "backward"):
            k_part, v_part = unpack(kv, k, v)
            grads = dq, torch.zeros_like(k_part, dtype=lse.dtype), torch.zeros_like(v_part, dtype=lse.dtype)
            part_backward(grads, (grad, q, o, lse), k_part, v_part, self._parts(origin), self.scale)
            total = pack(*grads[1:])
            if travelling is not None:
                total += travelling.to(lse.dtype)
            if axis.size == 1:
                return [dq, *unpack(total, k, v)]
            result = kv.new_empty((self._rows((origin - 1) % axis.size), kv.shape[1]), dtype=dtype)
            travelling = shift(axis, total.to(dtype), result, "full_kv", "backward").wait()
        assert travelling is not None  # its last step brought home the gradients of the own part
        return [dq, *unpack(travelling, k, v)]

    def _round(self, kv: Tensor, phase: str) -> Iterator[tuple[int, Tensor]]:
        """(owner, KV) of every rank's part, the own first; the next travels while one is worked on."""
        axis = self.sequence.axis
        for step in range(axis.size):
            origin = (axis.rank - step) % axis.size
            pending = None
            if step + 1 < axis.size:
                result = kv.new_empty(self._rows((origin - 1) % axis.size), kv.shape[1])
                pending = shift(axis, kv, result, "full_kv", phase)
            yield origin, kv
            if pending is not None:
                kv = pending.wait()

    def _rows(self, rank: int) -> int:
        return len(self.sequence.layout.own(rank))

    def _parts(self, origin: int) -> list[Rectangle]:
        layout = self.sequence.layout
        own, other = layout.segments(self.sequence.axis.rank), layout.segments(origin)
        return rectangles(self.sequence.packing, own, other)


def _all_segments(layout: Layout) -> Ints:
    """All ranks' segments in the sequence's order: rows of the gathered buffer are tokens."""
    both = np.stack([layout.cuts[:-1], layout.cuts[1:]], axis=1)
    return both[both[:, 1] > both[:, 0]]
