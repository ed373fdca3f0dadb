"""The span rule over ranks: who owns a pool's queries adds up their scores, who needs the sums gets them.

The sums are integers (`kernels/span.py`): added in any order, over any number of ranks, they are the same.
"""

from functools import cached_property

import numpy as np
from torch import Tensor

from nsa_dist.kernels.compressed import CompressedView
from nsa_dist.kernels.packing import Ints, Packing, on_device
from nsa_dist.kernels.select import Admitted
from nsa_dist.kernels.span import SpanView, admit, make_spans, make_units, needed_units, span_view, unit_sums
from nsa_dist.parallel.exchange import exchange
from nsa_dist.parallel.layout import Layout, count_below, expand
from nsa_dist.parallel.mesh import Axis
from nsa_dist.parallel.plan import Bools


class SpanPlan:
    """Which sums each rank makes and needs: of a layout and documents alone. packing.spec.span is not 0."""

    def __init__(self, packing: Packing, layout: Layout) -> None:
        spans = make_spans(packing)
        self.layout, self.units = layout, make_units(spans, packing.spec.span_pool)
        segments = [layout.segments(r) for r in range(layout.ranks)]
        ends = [(count_below(s, self.units.lo), count_below(s, self.units.hi)) for s in segments]
        self.made_PN = np.stack([hi > lo for lo, hi in ends])
        self.needed_PN = np.stack([needed_units(spans, self.units, expand(s)) for s in segments])

    def counts(self) -> Ints:
        """[receiver, owner]: sums of one KV head that travel."""
        counts = (self.needed_PN * self.units.width).astype(np.int64) @ self.made_PN.T.astype(np.int64)
        np.fill_diagonal(counts, 0)
        return counts


class SpanRule:
    """The rule on one rank of an axis. `view`: its queries on the compressed tokens that they see."""

    def __init__(self, packing: Packing, layout: Layout, axis: Axis, view: CompressedView) -> None:
        self.packing, self.axis, self.compressed_view = packing, axis, view
        self.tokens, self.plan = layout.own(axis.rank), SpanPlan(packing, layout)

    @cached_property
    def _view(self) -> SpanView:
        return span_view(self.packing, self.tokens, self.compressed_view.own_S.device)

    def admitted(self, q_SHD: Tensor, k_CGD: Tensor, scale: float) -> Admitted:
        """What is admitted to the rank's queries. k_CGD: the compressed keys that they see. A collective."""
        plan, rank, spec = self.plan, self.axis.rank, self.packing.spec
        made = np.flatnonzero(plan.made_PN[rank] & plan.needed_PN.any(0))
        sums = unit_sums(q_SHD, k_CGD, self.tokens, self.compressed_view, spec, scale, plan.units.at(made))
        counts = plan.counts()
        there = [self._rows(made, plan.needed_PN[r] & (r != rank)) for r in range(self.axis.size)]
        sent = sums[on_device(np.concatenate(there), sums.device)]
        got = exchange(self.axis, sent, counts[:, rank], counts[rank], "span", "forward").wait()
        needed = np.flatnonzero(plan.needed_PN[rank])
        total = sums.new_zeros(int(plan.units.width[needed].sum()), sums.shape[1])
        parts = list(got.split(counts[rank].tolist()))
        parts[rank] = sums[on_device(self._rows(made, plan.needed_PN[rank]), sums.device)]
        for owner, part in enumerate(parts):
            rows = self._rows(needed, plan.made_PN[owner])
            total.index_add_(0, on_device(rows, total.device), part)
        return admit(total, self._view, spec)

    def _rows(self, held: Ints, wanted_N: Bools) -> Ints:
        """The rows of the wanted units among those of the units that are held."""
        width = self.plan.units.width[held]
        begin = np.cumsum(width) - width
        return expand(np.stack([begin, begin + width], axis=1)[wanted_N[held]])
