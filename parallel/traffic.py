"""Traffic computed from the layout alone: of every exchange, whether or not a run uses it.

The same plans that the exchanges follow, counted. A test holds the ledger of real runs against it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.parallel import block_plan, needs
from nsa_dist.parallel.layout import Layout
from nsa_dist.parallel.plan import Bools, Floats, Pieces, make_pieces, row_counts
from nsa_dist.parallel.span import SpanPlan

Traffic = dict[tuple[str, str], Ints]  # (kind, phase): bytes [fields of the ledger, P]


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
    """What one layer of a cut sequence sends under each exchange. nodes [P]: the node of each rank (one for all)."""

    def __init__(self, packing: Packing, layout: Layout, sizes: Sizes, nodes: Ints | None = None) -> None:
        self.packing, self.layout, self.sizes = packing, layout, sizes
        self.nodes = np.zeros(layout.ranks, np.int64) if nodes is None else nodes
        self.causal = needs.causal(layout, packing)

    @cached_property
    def rows(self) -> Ints:
        """[P]: tokens that each rank holds."""
        return self._counts(self.layout)

    @cached_property
    def pieces(self) -> Pieces:
        return make_pieces(self.layout, self.packing, self.causal)

    @cached_property
    def causal_counts(self) -> Ints:
        """[receiver, owner]: tokens of others that a rank may see."""
        return row_counts(self.layout, self.causal)

    def nsa(
        self, exchange: str, needs_PGB: Bools | None = None, refetch: bool = False, share_P: Floats | None = None
    ) -> Traffic:
        """Of an NSA layer. `nsa` takes the bitmaps [P, G, NB], which blocks each rank's queries selected; or which
        share of what it may see of others each rank fetches."""
        if exchange == "ulysses":
            return self._ulysses(branches=2)
        if exchange == "ring":  # of full attention over one branch's KV, for comparison
            return self.full("ring")
        traffic = self.compress_halo() | self.window() | self.compressed() | self._span()
        if exchange == "nsa":
            traffic |= self._bitmap()
        counts = self._selected_counts(exchange, needs_PGB, share_P)
        traffic |= self._both("selected", counts, self.sizes.dk + self.sizes.dv)
        if refetch or exchange == "allgather_heads":
            traffic["refetch", "backward"] = traffic["selected", "forward"]
        return traffic

    def compressed(self) -> Traffic:
        cmp_layout = self.layout.mapped(self.packing.cmp_start)
        return self._rows("compressed", cmp_layout, needs.compressed(self.layout, self.packing))

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

    def _selected_counts(self, exchange: str, needs_PGB: Bools | None, share_P: Floats | None) -> Ints:
        """[receiver, sender]: rows of single KV heads, those that a relay sends on inside its node with them."""
        groups = self.sizes.groups
        several = len(np.unique(self.nodes)) > 1 and exchange != "allgather_heads"
        if share_P is not None or (exchange != "nsa" and not several):
            rows = groups * (self._every_row() if exchange.startswith("allgather") else self.causal_counts)
            share = np.ones(self.layout.ranks) if share_P is None or exchange != "nsa" else share_P
            counts = self._relayed(rows, share) if several else rows * share[:, None]
            return np.rint(counts).astype(np.int64)
        if exchange == "nsa":
            assert needs_PGB is not None
            wanted = block_plan.selected(needs_PGB)
        else:
            wanted = block_plan.dense(groups, causal=exchange == "groupcast")
        hops = block_plan.hop_counts(self.pieces, block_plan.whole(wanted, self.pieces), self.nodes)
        return hops[0] + hops[1]

    def _relayed(self, rows: Ints, share_P: Floats) -> Floats:
        """What is expected of shares that are chosen independently: a row that several ranks of a node want crosses
        between nodes once, and each of them is its relay equally often."""
        same = self.nodes[:, None] == self.nodes
        sharing = same.astype(np.float64) @ (rows > 0)  # [receiver, owner]: ranks of the receiver's node that may
        wanted = rows * share_P[:, None]
        once = rows * (1 - (1 - share_P[:, None]) ** sharing) / np.maximum(sharing, 1)
        direct = np.where(same, wanted, once)
        mates = same.sum(1) - 1
        onward = (wanted - direct).sum(1) / np.maximum(mates, 1)
        np.fill_diagonal(same, False)
        return direct + same * onward[:, None]

    def _every_row(self) -> Ints:
        counts = np.repeat(self.rows[None], self.layout.ranks, axis=0)
        np.fill_diagonal(counts, 0)
        return counts

    def _rows(self, kind: str, layout: Layout, wanted: needs.Needs) -> Traffic:
        return self._both(kind, row_counts(layout, wanted), self.sizes.kv)

    def _both(self, kind: str, counts: Ints, width: int) -> Traffic:
        """Rows there in the forward, their gradients back in the backward."""
        element, grad = self.sizes.element_bytes, self.sizes.grad_bytes
        return {
            (kind, "forward"): self._flow(counts * (width * element)),
            (kind, "backward"): self._flow(counts.T * (width * grad)),
        }

    def _flow(self, bytes_PP: Ints) -> Ints:
        """From bytes [receiver, sender] the ledger's fields of each rank."""
        other = bytes_PP * (self.nodes[:, None] != self.nodes)
        return np.stack([bytes_PP.sum(0), bytes_PP.sum(1), other.sum(0), other.sum(1)])

    def _span(self) -> Traffic:
        """8 bytes a sum and KV head, where the model has the span rule."""
        if not self.packing.spec.span:
            return {}
        return {("span", "forward"): self._flow(SpanPlan(self.packing, self.layout).counts() * self.sizes.groups * 8)}

    def _bitmap(self) -> Traffic:
        ranks = self.layout.ranks
        size = self.sizes.groups * -(-self.packing.blocks // 8)
        return {("bitmap", "forward"): self._flow(size * (1 - np.eye(ranks, dtype=np.int64)))}

    def _counts(self, layout: Layout) -> Ints:
        return np.bincount(layout.owner, np.diff(layout.cuts), minlength=layout.ranks).astype(np.int64)

    def _ring(self) -> Traffic:
        ranks, kv = self.layout.ranks, self.sizes.kv
        rows, rank = self.rows, np.arange(self.layout.ranks)
        element, grad = self.sizes.element_bytes, self.sizes.grad_bytes

        def round_(bytes_P: Ints) -> Ints:
            bytes_PP = np.zeros((ranks, ranks), np.int64)
            bytes_PP[rank, rank - 1] = bytes_P * (ranks > 1)
            return self._flow(bytes_PP)

        # A rank gets every part but its own; in the backward also every part's gradients, its own last.
        parts = (rows.sum() - rows) * kv * element
        around = np.full(ranks, rows.sum() * kv * grad)
        return {("full_kv", "forward"): round_(parts), ("full_kv", "backward"): round_(parts + around)}

    def _ulysses(self, branches: int) -> Traffic:
        """q, output and, for NSA (`branches` of token KV), gates and compressed KV; for full attention one KV."""
        sizes, ranks = self.sizes, self.layout.ranks
        tokens, compressed = self.rows, self._counts(self.layout.mapped(self.packing.cmp_start))
        width = sizes.heads * sizes.dk + sizes.kv * max(branches, 1) + (3 * sizes.heads if branches else 0)
        there = tokens * width + compressed * (sizes.kv if branches else 0)
        back = tokens * sizes.heads * sizes.dv

        def swap(to_heads: Ints, to_tokens: Ints, size: int) -> Ints:
            # A rank sends 1 / P of its own rows to each other one, and gets 1 / P of its own tokens' outputs.
            bytes_PP = (to_heads[None] // ranks + to_tokens[:, None] // ranks) * size
            np.fill_diagonal(bytes_PP, 0)
            return self._flow(bytes_PP)

        traffic: Traffic = {("ulysses", "forward"): swap(there, back, sizes.element_bytes)}
        # Backward: the output's gradient goes to heads, the inputs' gradients to tokens.
        traffic["ulysses", "backward"] = swap(back, there, sizes.grad_bytes)
        return traffic | (self.compress_halo() if branches else {})


def add_traffic(total: Traffic, part: Traffic, times: int = 1) -> None:
    """Adds `times` layers' traffic to a total, in place."""
    for key, flow in part.items():
        total[key] = total.get(key, 0) + flow * times
