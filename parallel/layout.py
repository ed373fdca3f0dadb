"""Who owns which items of a sequence: tokens, or what is derived from them in the same order."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nsa_dist.kernels.packing import Ints

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Layout:
    """Segment i is items [cuts[i], cuts[i + 1]) and belongs to rank owner[i]. A segment may be empty.

    A rank holds its items in ascending order.
    """

    cuts: Ints  # [segments + 1], from 0, not falling
    owner: Ints  # [segments]
    ranks: int

    @property
    def items(self) -> int:
        return int(self.cuts[-1])

    @cached_property
    def _base(self) -> Ints:
        """The row, on its owner, of each segment's first item."""
        base = np.zeros(len(self.owner), np.int64)
        for rank in range(self.ranks):
            mine = self.owner == rank
            base[mine] = np.cumsum(np.diff(self.cuts)[mine]) - np.diff(self.cuts)[mine]
        return base

    def segments(self, rank: int) -> Ints:
        """[n, 2]: the rank's segments that hold items."""
        both = np.stack([self.cuts[:-1], self.cuts[1:]], axis=1)[self.owner == rank]
        return both[both[:, 1] > both[:, 0]]

    def own(self, rank: int) -> Ints:
        """The rank's items."""
        return expand(self.segments(rank))

    def owner_of(self, items: Ints) -> Ints:
        return self.owner[np.searchsorted(self.cuts, items, side="right") - 1]

    def row_of(self, items: Ints) -> Ints:
        """Each item's row on its owner."""
        segment = np.searchsorted(self.cuts, items, side="right") - 1
        return items - self.cuts[segment] + self._base[segment]

    def mapped(self, starts: Ints) -> "Layout":
        """The layout of derived items: each belongs to the owner of the token `starts[i]` (ascending)."""
        return Layout(np.searchsorted(starts, self.cuts).astype(np.int64), self.owner, self.ranks)


def make_layout(kind: str, tokens: int, ranks: int, block: int) -> Layout:
    """Equal segments of whole blocks: one for each rank, or with `zigzag` two, rank r owning r and 2P - 1 - r.

    The last segments may be shorter, or empty: tokens that would only pad are not kept at all.
    """
    segments = ranks * (2 if kind == "zigzag" else 1)
    blocks = -(-tokens // block)
    size = -(-blocks // segments) * block
    cuts = np.minimum(np.arange(segments + 1, dtype=np.int64) * size, tokens)
    owner = np.arange(segments, dtype=np.int64)
    return Layout(cuts, np.minimum(owner, segments - 1 - owner) if kind == "zigzag" else owner, ranks)


def union(intervals: Ints) -> Ints:
    """The same items as disjoint intervals in ascending order; empty ones are dropped."""
    intervals = intervals[intervals[:, 1] > intervals[:, 0]]
    if len(intervals) < 2:
        return intervals
    intervals = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(intervals[:, 1])
    first = np.concatenate([[True], intervals[1:, 0] > reach[:-1]])
    last = np.append(np.flatnonzero(first)[1:] - 1, len(intervals) - 1)
    return np.stack([intervals[first, 0], reach[last]], axis=1)


def expand(intervals: Ints) -> Ints:
    """The items of intervals [n, 2], one interval after the other."""
    length = intervals[:, 1] - intervals[:, 0]
    shift = intervals[:, 0] - (np.cumsum(length) - length)
    return np.arange(length.sum(), dtype=np.int64) + np.repeat(shift, length)


def clip(intervals: Ints, first: int, end: int) -> Ints:
    """What of disjoint intervals lies in [first, end)."""
    cut = np.stack([np.maximum(intervals[:, 0], first), np.minimum(intervals[:, 1], end)], axis=1)
    return cut[cut[:, 1] > cut[:, 0]]


def count_below(intervals: Ints, points: Ints) -> Ints:
    """How many items of disjoint ascending intervals lie below each point."""
    length = intervals[:, 1] - intervals[:, 0]
    total = np.concatenate([[0], np.cumsum(length)])
    at = np.searchsorted(intervals[:, 0], points, side="right")
    inside = np.zeros(len(points), np.int64)
    some = at > 0
    inside[some] = np.minimum(points[some] - intervals[at[some] - 1, 0], length[at[some] - 1])
    return total[np.maximum(at - 1, 0)] * some + inside
