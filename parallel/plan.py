"""Exchange plans: which rows go from which rank to which. Pure functions; every rank makes the same plan.

A row plan moves whole items (halos, compressed tokens, dense KV). A block plan moves the pieces of selected
blocks, one KV head at a time.
"""

from dataclasses import dataclass
from functools import cached_property

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

    @cached_property
    def parts(self) -> list[Ints]:
        """The rows sent to each rank."""
        return np.split(self.send_rows, np.cumsum(self.send_counts)[:-1])


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


def make_pieces(layout: Layout, packing: Packing, causal: Needs) -> Pieces:
    """Blocks cut at the segments' edges. A piece is visible to a rank wholly or not at all."""
    edges = np.unique(np.concatenate([packing.blk_start, packing.blk_end, layout.cuts]))
    start, end = edges[:-1], edges[1:]
    block = np.searchsorted(packing.blk_start, start, side="right") - 1
    visible = np.stack([count_below(iv, end) > count_below(iv, start) for iv in causal])
    return Pieces(start, end, block, layout.owner_of(start), visible)


def selected_pieces(pieces: Pieces, needs_PGB: Bools) -> Bools:
    """[P, G, N]: pieces that each rank fetches for each KV head: of its selected blocks, those it may see.

    That is never more than the causal dense exchange. Where all visible pieces of an owner are selected, the
    set is a dense range and costs the same; where none is, nothing.
    """
    return needs_PGB[:, :, pieces.block] & _foreign(pieces)[:, None] & pieces.visible[:, None]


def dense_pieces(pieces: Pieces, groups: int, causal: bool) -> Bools:
    """[P, G, N]: the same for the group cast (causally visible pieces) and the all-gather (all pieces)."""
    need = _foreign(pieces) & (pieces.visible | (not causal))
    return np.repeat(need[:, None], groups, axis=1)


def piece_counts(pieces: Pieces, need_PGN: Bools, ranks: int) -> Ints:
    """[receiver, owner]: rows of single KV heads that a block plan moves."""
    rows = need_PGN.sum(1) * (pieces.end - pieces.start)
    return np.stack([rows[:, pieces.owner == owner].sum(1) for owner in range(ranks)], axis=1).astype(np.int64)


def piece_rounds(pieces: Pieces, need_PGN: Bools, max_rows: int) -> list[Bools]:
    """Splits a plan into rounds in which no rank receives more than `max_rows` rows (0: one round).

    Each rank's pieces are taken in order, KV head by KV head, and a round ends before the piece that would
    exceed the bound; there are as many rounds as the rank with most pieces needs.
    """
    length = pieces.end - pieces.start
    if not max_rows or (need_PGN.sum(1) * length).sum(1).max(initial=0) <= max_rows:
        return [need_PGN]
    number = np.zeros(need_PGN.shape, np.int64)
    for rank in range(len(need_PGN)):
        taken = np.flatnonzero(need_PGN[rank])
        ends = np.cumsum(np.broadcast_to(length, need_PGN.shape[1:]).reshape(-1)[taken])
        done, start, current = 0, 0, 0
        while start < len(taken):
            stop = max(int(np.searchsorted(ends, done + max_rows, side="right")), start + 1)
            number[rank].reshape(-1)[taken[start:stop]] = current
            done, start, current = int(ends[stop - 1]), stop, current + 1
    return [need_PGN & (number == i) for i in range(int(number[need_PGN].max()) + 1)]


@dataclass(frozen=True)
class BlockPlan:
    """One rank's side of one round. Rows are those of single KV heads: row * G + head of the local [S, G, D]."""

    rows: RowPlan
    order: Ints  # arrival order to buffer order: KV head after KV head, tokens ascending
    tokens: list[Ints]  # of each KV head in the buffer


def block_plan(layout: Layout, pieces: Pieces, need_PGN: Bools, rank: int) -> BlockPlan:
    """The rank's side of sending every rank the pieces that it needs, packed by (receiver, KV head, token)."""
    groups = need_PGN.shape[1]
    mine = np.flatnonzero(pieces.owner == rank)
    receiver, head, at = np.nonzero(need_PGN[:, :, mine])
    tokens, head_of, receiver_of = _piece_rows(pieces, mine[at], head, receiver)
    send_counts = np.bincount(receiver_of, minlength=layout.ranks).astype(np.int64)

    head, at = np.nonzero(need_PGN[rank])
    by_owner = np.argsort(pieces.owner[at], kind="stable")
    head, at = head[by_owner], at[by_owner]
    arriving, arriving_head, owner = _piece_rows(pieces, at, head, pieces.owner[at])
    order = np.lexsort((arriving, arriving_head))
    heads = np.searchsorted(arriving_head[order], np.arange(1, groups))
    plan = RowPlan(
        layout.row_of(tokens) * groups + head_of,
        send_counts,
        np.bincount(owner, minlength=layout.ranks).astype(np.int64),
        arriving,
    )
    return BlockPlan(plan, order, np.split(arriving[order], heads))


def _foreign(pieces: Pieces) -> Bools:
    return pieces.owner[None] != np.arange(len(pieces.visible))[:, None]


def _piece_rows(pieces: Pieces, at: Ints, *labels: Ints) -> list[Ints]:
    """The tokens of the pieces `at`, and each label repeated for them."""
    intervals = np.stack([pieces.start[at], pieces.end[at]], axis=1)
    length = intervals[:, 1] - intervals[:, 0]
    return [expand(intervals), *(np.repeat(label, length) for label in labels)]


def _lengths(parts: list[Ints]) -> Ints:
    return np.array([len(p) for p in parts], np.int64)
