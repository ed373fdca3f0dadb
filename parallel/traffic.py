"""Traffic computed from the layout alone: of every exchange, whether or not a run uses it.

The same plans that the exchanges follow, counted. A test holds the ledger of real runs against it.
"""

from dataclasses import dataclass

import numpy as np

from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.parallel import needs
from nsa_dist.parallel.layout import Layout
from nsa_dist.parallel.plan import Bools, dense_pieces, make_pieces, piece_counts, row_counts, selected_pieces
from nsa_dist.parallel.span import SpanPlan

Traffic = dict[tuple[str, str], tuple[Ints, Ints]]  # (kind, phase): bytes [P] sent, received


@dataclass(frozen=True)
class Sizes:
    """Of one layer: query and KV heads, head sizes, bytes of an element and of a gradient that travels."""

    heads: int
    groups: int
    dk: int
    dv: int
    element_bytes: int
    grad_bytes: int

    @property
    def kv(self) -> int:
        """Numbers of a token's keys and values."""
        return self.groups * (self.dk + self.dv)


class TrafficModel:
    """What one layer of a cut sequence sends under each exchange."""

    def __init__(self, packing: Packing, layout: Layout, sizes: Sizes) -> None:
        self.packing, self.layout, self.sizes = packing, layout, sizes
        self.causal = needs.causal(layout, packing)
        self.pieces = make_pieces(layout, packing, self.causal)

    def nsa(self, exchange: str, needs_PGB: Bools | None = None, refetch: bool = False) -> Traffic:
        """Of an NSA layer. `nsa` takes the bitmaps [P, G, NB]: which blocks each rank's queries selected."""
        if exchange == "ulysses":
            return self._ulysses(branches=2)
        if exchange == "ring":  # of full attention over one branch's KV, for comparison
            return self.full("ring")
        halo = needs.window_halo(self.layout, self.packing)
        traffic = self.compress_halo() | self._rows("window_halo", self.layout, halo)
        cmp_layout = self.layout.mapped(self.packing.cmp_start)
        traffic |= self._rows("compressed", cmp_layout, needs.compressed(self.layout, self.packing))
        traffic |= self._span()
        if exchange == "nsa":
            assert needs_PGB is not None
            need = selected_pieces(self.pieces, needs_PGB)
            traffic |= self._bitmap()
        else:
            need = dense_pieces(self.pieces, self.sizes.groups, causal=exchange == "groupcast")
        counts = piece_counts(self.pieces, need, self.layout.ranks)
        traffic |= self._both("selected", counts, self.sizes.dk + self.sizes.dv)
        if refetch or exchange == "allgather_heads":
            forward = traffic["selected", "forward"]
            traffic["refetch", "backward"] = forward
        return traffic

    def window(self) -> Traffic:
        """Of a window layer."""
        return self._rows("window_halo", self.layout, needs.window_halo(self.layout, self.packing))

    def full(self, exchange: str) -> Traffic:
        """Of a full-attention layer: ring, allgather, ulysses; groupcast for comparison."""
        if exchange == "ulysses":
            return self._ulysses(branches=0)
        if exchange == "ring":
            return self._ring()
        wanted = self.causal if exchange == "groupcast" else needs.everything(self.layout)
        return self._rows("full_kv", self.layout, wanted)

    def compress_halo(self) -> Traffic:
        return self._rows("compress_halo", self.layout, needs.compress_halo(self.layout, self.packing))

    def _rows(self, kind: str, layout: Layout, wanted: needs.Needs) -> Traffic:
        return self._both(kind, row_counts(layout, wanted), self.sizes.kv)

    def _both(self, kind: str, counts: Ints, width: int) -> Traffic:
        """Rows there in the forward, their gradients back in the backward."""
        received, sent = counts.sum(1) * width, counts.sum(0) * width
        element, grad = self.sizes.element_bytes, self.sizes.grad_bytes
        return {
            (kind, "forward"): (sent * element, received * element),
            (kind, "backward"): (received * grad, sent * grad),
        }

    def _span(self) -> Traffic:
        """8 bytes a sum and KV head, where the model has the span rule."""
        if not self.packing.spec.span:
            return {}
        counts = SpanPlan(self.packing, self.layout).counts() * self.sizes.groups * 8
        return {("span", "forward"): (counts.sum(0), counts.sum(1))}

    def _bitmap(self) -> Traffic:
        ranks = self.layout.ranks
        size = np.full(ranks, (ranks - 1) * self.sizes.groups * -(-self.packing.blocks // 8), np.int64)
        return {("bitmap", "forward"): (size, size)}

    def _counts(self, layout: Layout) -> Ints:
        return np.array([(s[:, 1] - s[:, 0]).sum() for s in map(layout.segments, range(layout.ranks))], np.int64)

    def _ring(self) -> Traffic:
        ranks, kv = self.layout.ranks, self.sizes.kv
        rows = self._counts(self.layout)
        # A rank sends on every part but the next rank's own, and gets every part but its own.
        sent, received = (rows.sum() - np.roll(rows, -1)) * kv, (rows.sum() - rows) * kv
        element, grad = self.sizes.element_bytes, self.sizes.grad_bytes
        around = np.full(ranks, rows.sum() * kv * (ranks > 1), np.int64)
        backward = (sent * element + around * grad, received * element + around * grad)
        return {
            ("full_kv", "forward"): (sent * element, received * element),
            ("full_kv", "backward"): backward,
        }

    def _ulysses(self, branches: int) -> Traffic:
        """q, output and, for NSA (`branches` of token KV), gates and compressed KV; for full attention one KV."""
        sizes, ranks = self.sizes, self.layout.ranks
        tokens, compressed = (
            self._counts(self.layout),
            self._counts(self.layout.mapped(self.packing.cmp_start)),
        )
        width = sizes.heads * sizes.dk + sizes.kv * max(branches, 1) + (3 * sizes.heads if branches else 0)
        there = tokens * width + compressed * (sizes.kv if branches else 0)
        back = tokens * sizes.heads * sizes.dv

        def swap(to_heads: Ints, to_tokens: Ints, size: int) -> tuple[Ints, Ints]:
            # Of its own rows a rank sends all but 1 / P to others, and gets 1 / P of every other rank's.
            sent = to_heads * (ranks - 1) // ranks + (to_tokens.sum() - to_tokens) // ranks
            received = (to_heads.sum() - to_heads) // ranks + to_tokens * (ranks - 1) // ranks
            return sent * size, received * size

        traffic: Traffic = {("ulysses", "forward"): swap(there, back, sizes.element_bytes)}
        # Backward: the output's gradient goes to heads, the inputs' gradients to tokens.
        traffic["ulysses", "backward"] = swap(back, there, sizes.grad_bytes)
        return traffic | (self.compress_halo() if branches else {})


def add_traffic(total: Traffic, part: Traffic, times: int = 1) -> None:
    """Adds `times` layers' traffic to a total, in place."""
    for key, (sent, received) in part.items():
        old = total.get(key, (0, 0))
        total[key] = old[0] + sent * times, old[1] + received * times
