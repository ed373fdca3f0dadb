"""Ulysses (arXiv 2309.14509): from a cut by tokens to a cut by heads and back, for NSA and full attention.

Each rank takes whole KV heads with their query heads, so there are at most G ranks.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.attention import LocalViews, local_views, nsa_backward, nsa_forward
from nsa_dist.kernels.packing import Ints, on_device
from nsa_dist.parallel.exchange import exchange
from nsa_dist.parallel.layout import Layout
from nsa_dist.parallel.operator import Operation
from nsa_dist.parallel.rivals.full import part_backward, part_forward, rectangles, start_state
from nsa_dist.parallel.sequence import ShardedSequence


class Heads:
    """Moves items [rows, heads, D] of a layout from a cut by rows to a cut by heads, and back."""

    def __init__(self, sequence: ShardedSequence, layout: Layout) -> None:
        self.axis = sequence.axis
        counts = [len(layout.own(r)) for r in range(layout.ranks)]
        self.counts: Ints = np.array(counts, np.int64)
        arrival = np.concatenate([layout.own(r) for r in range(layout.ranks)])
        self.order = on_device(np.argsort(arrival, kind="stable"), sequence.device)

    def gather(self, x_SHD: Tensor, phase: str, dtype: torch.dtype) -> Tensor:
        """[S, heads, D] to [T, heads / P, D], rows in the sequence's order."""
        size = self.axis.size
        s, heads, d = x_SHD.shape
        parts = x_SHD.to(dtype).view(s, size, heads // size, d).transpose(0, 1).flatten(0, 1)
        send = np.full(size, s, np.int64)
        return exchange(self.axis, parts, send, self.counts, "ulysses", phase).wait()[self.order]

    def scatter(self, x_THD: Tensor, phase: str, dtype: torch.dtype) -> Tensor:
        """[T, heads / P, D] to [S, heads, D]."""
        size, own = self.axis.size, int(self.counts[self.axis.rank])
        by_owner = torch.empty_like(x_THD, dtype=dtype)
        by_owner[self.order] = x_THD.to(dtype)
        receive = np.full(size, own, np.int64)
        got = exchange(self.axis, by_owner, self.counts, receive, "ulysses", phase).wait()
        return got.view(size, own, *x_THD.shape[1:]).transpose(0, 1).flatten(1, 2)


class NSAUlysses(Operation):
    """NSA of one layer, inputs as those of `NSAExchange`: q, gates, output and every branch's KV move."""

    def __init__(self, sequence: ShardedSequence, scale: float) -> None:
        self.sequence, self.scale = sequence, scale
        tokens, compressed = Heads(sequence, sequence.layout), Heads(sequence, sequence.cmp_layout)
        self.movers = [tokens, compressed, compressed, tokens, tokens, tokens, tokens, tokens]

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        moved = self._gather(inputs, "forward")
        spec = self.sequence.packing.spec
        out, *saved = nsa_forward(self._views(moved), spec, self.scale, moved)
        home = self.movers[0].scatter(out, "forward", out.dtype)
        return [home, *moved, out, *saved]

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        moved, saved = outputs[1:9], outputs[9:]
        dtype = self.sequence.grad_dtype
        do = self.movers[0].gather(grad, "backward", dtype).to(grad.dtype)
        grads = nsa_backward(self._views(moved), self.scale, moved, saved, do)
        return [m.scatter(g, "backward", dtype) for m, g in zip(self.movers, grads, strict=True)]

    def _gather(self, inputs: Sequence[Tensor], phase: str) -> list[Tensor]:
        return [m.gather(x, phase, x.dtype) for m, x in zip(self.movers, inputs, strict=True)]

    def _views(self, moved: Sequence[Tensor]) -> LocalViews:
        return local_views(self.sequence.packing, self.sequence.device, moved[3].shape[1])


class FullUlysses(Operation):
    """Full attention by Ulysses. Inputs q, k, v."""

    def __init__(self, sequence: ShardedSequence, scale: float) -> None:
        self.sequence, self.scale = sequence, scale
        self.heads = Heads(sequence, sequence.layout)
        whole = np.array([[0, sequence.packing.tokens]], np.int64)
        self.parts = rectangles(sequence.packing, whole, whole)

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = moved = [self.heads.gather(x, "forward", x.dtype) for x in inputs]
        o, lse = start_state(q, v)
        part_forward((o, lse), q, k, v, self.parts, self.scale)
        out = o.to(q.dtype)
        return [self.heads.scatter(out, "forward", out.dtype), *moved, out, lse]

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        _, q, k, v, o, lse = outputs
        dtype = self.sequence.grad_dtype
        do = self.heads.gather(grad, "backward", dtype).to(grad.dtype)
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        part_backward((dq, dk, dv), (do, q, o, lse), k, v, self.parts, self.scale)
        return [self.heads.scatter(g, "backward", dtype) for g in (dq, dk, dv)]
