"""Exchange plans: which rows go from which rank to which. Pure functions; every rank makes the same plan.

A row plan moves whole items (halos, compressed tokens, full KV). Block plans, of the pieces made here, are in
`block_plan.py`.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.parallel.layout import Layout, clip, count_below, expand
from nsa_dist.parallel.needs import Needs

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RowPlan:
    """One rank's side of an uneven all-to-all of rows."""

    send_rows: Ints  # own rows, receiver after receiver
    send_counts: Ints  # [P]
    recv_counts: Ints  # [P]
    recv_items: Ints  # the items that arrive, owner after owner


def row_plan(layout: Layout, needs: Needs, rank: int) -> RowPlan:
    """The rank's side of sending every rank the items of `needs` that it does not own."""

    def between(receiver: int, owner: int) -> Ints:
        if receiver == owner:
            return np.zeros(0, np.int64)
        parts = [expand(clip(needs[receiver], *s)) for s in layout.segments(owner).tolist()]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    ranks = range(layout.ranks)
    sent, received = [between(r, rank) for r in ranks], [between(rank, o) for o in ranks]
    return RowPlan(layout.row_of(np.concatenate(sent)), _lengths(sent), _lengths(received), np.concatenate(received))


def row_counts(layout: Layout, needs: Needs) -> Ints:
    """[receiver, owner]: how many rows a row plan moves."""
    counts = np.zeros((layout.ranks, layout.ranks), np.int64)
    for receiver, intervals in enumerate(needs):
        in_segment = np.diff(count_below(intervals, layout.cuts))
        np.add.at(counts[receiver], layout.owner, in_segment)
        counts[receiver, receiver] = 0
    return counts


@dataclass(frozen=True)
class Pieces:
    """The parts of blocks on one segment: the units of the block exchange. [N] each; visible [P, N]."""

    start: Ints
    end: Ints
    block: Ints
    owner: Ints
    visible: Bools  # to which rank a piece is causally visible
    sides: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # `block_plan.Side` of each rank


def make_pieces(layout: Layout, packing: Packing, causal: Needs) -> Pieces:
    """Blocks cut at the segments' edges. A piece is visible to a rank wholly or not at all."""
    edges = np.unique(np.concatenate([packing.blk_start, packing.blk_end, layout.cuts]))
    start, end = edges[:-1], edges[1:]
    block = np.searchsorted(packing.blk_start, start, side="right") - 1
    visible = np.stack([count_below(iv, end) > count_below(iv, start) for iv in causal])
    return Pieces(start, end, block, layout.owner_of(start), visible)


def _lengths(parts: list[Ints]) -> Ints:
    return np.array([len(p) for p in parts], np.int64)
