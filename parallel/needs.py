"""What each rank needs of the others' items, from the layout and the documents alone.

Each function returns, for every rank, disjoint ascending intervals [n, 2] of items; a rank's own items may be
among them (the plan leaves them out). Every rank computes the same lists.
"""

import numpy as np

from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.parallel.layout import Layout, union

Needs = list[Ints]


def compress_halo(layout: Layout, packing: Packing) -> Needs:
    """Tokens after a segment that its last compressed token is made of: at most l - 1."""

    def halo(segments: Ints) -> Ints:
        last = np.searchsorted(packing.cmp_start, segments[:, 1]) - 1
        starts = np.append(packing.cmp_start, 0)[last]  # [-1] is the 0 put behind: no compressed token at all
        owned = (last >= 0) & (starts >= segments[:, 0])
        end = np.where(owned, starts + packing.spec.compress_block, 0)
        return np.stack([segments[:, 1], np.maximum(end, segments[:, 1])], axis=1)

    return [union(halo(layout.segments(rank))) for rank in range(layout.ranks)]


def window_halo(layout: Layout, packing: Packing) -> Needs:
    """The w - 1 tokens before a segment, as far as its first document reaches."""

    def halo(segments: Ints) -> Ints:
        start = packing.cu[packing.document(segments[:, 0])]
        return np.stack([np.maximum(segments[:, 0] - packing.spec.window + 1, start), segments[:, 0]], axis=1)

    return [union(halo(layout.segments(rank))) for rank in range(layout.ranks)]


def causal(layout: Layout, packing: Packing) -> Needs:
    """Every token that one of the rank's queries may see: the group cast."""
    return [union(_document_starts(layout.segments(rank), packing)) for rank in range(layout.ranks)]


def everything(layout: Layout) -> Needs:
    """All tokens: the all-gather."""
    return [np.array([[0, layout.items]], np.int64) for _ in range(layout.ranks)]


def compressed(layout: Layout, packing: Packing) -> Needs:
    """Compressed tokens (numbered over all documents) that one of the rank's queries sees."""

    def seen(segments: Ints) -> Ints:
        # In each document that a segment touches, its last query there sees most.
        spans = document_spans(segments, packing)
        first, end = packing.visible_compressed(spans[:, 1] - 1)
        return np.stack([first, end], axis=1)

    return [union(seen(layout.segments(rank))) for rank in range(layout.ranks)]


def document_spans(segments: Ints, packing: Packing) -> Ints:
    """Segments cut at documents' edges: [n, 2]."""
    edges = [packing.cu[(packing.cu > a) & (packing.cu < b)] for a, b in segments.tolist()]
    starts = [np.concatenate([[a], e]) for (a, _), e in zip(segments.tolist(), edges, strict=True)]
    ends = [np.concatenate([e, [b]]) for (_, b), e in zip(segments.tolist(), edges, strict=True)]
    if not starts:
        return np.zeros((0, 2), np.int64)
    return np.stack([np.concatenate(starts), np.concatenate(ends)], axis=1).astype(np.int64)


def _document_starts(segments: Ints, packing: Packing) -> Ints:
    """For each segment, from the start of its first document to its end."""
    if not len(segments):
        return segments
    return np.stack([packing.cu[packing.document(segments[:, 0])], segments[:, 1]], axis=1)
