"""The plan of the block exchange: pieces of selected blocks, one KV head at a time. Pure functions.

Each rank makes its own side of the same plan from everybody's bitmaps. A piece that several ranks of a node want
goes from its owner, on another node, to one of them, which sends it on inside the node.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_dist.kernels.packing import Ints
from nsa_dist.parallel.layout import Layout
from nsa_dist.parallel.plan import Bools, Pieces


@dataclass(frozen=True)
class Part:
    """Some ranks [R] and some pieces [n], and what the layout alone says of them."""

    pieces: Pieces
    ranks: Ints
    at: Ints

    @cached_property
    def foreign(self) -> Bools:
        """[R, 1, n]: whether the piece is not the rank's own."""
        return (self.pieces.owner[self.at] != self.ranks[:, None])[:, None]

    @cached_property
    def causal(self) -> Bools:
        """[R, 1, n]: whether it is visible besides."""
        return self.foreign & self.pieces.visible[self.ranks[:, None], self.at][:, None]

    @cached_property
    def blocks(self) -> slice | Ints:
        return _as_slice(self.pieces.block[self.at])

    @cached_property
    def bits(self) -> tuple[slice | Ints, slice | Ints]:
        """Of packed bits of blocks the bytes to read, and of these bytes' bits those of the pieces."""
        block = self.pieces.block[self.at]
        bytes_ = np.unique(block >> 3)
        return _as_slice(bytes_), _as_slice(np.searchsorted(bytes_, block >> 3) * 8 + (block & 7))


# bool [R, G, n]: whether the rank fetches the piece for each KV head.
Wanted = Callable[[Part], Bools]


def selected(blocks_PGB: Bools) -> Wanted:
    """Of its selected blocks each rank fetches what is causally visible to it and not its own.

    That is the cheapest for each owner, receiver and KV head: never more than the causal dense exchange; where all
    visible pieces of an owner are selected, the set is its dense range; where none is, nothing.
    """
    return lambda part: blocks_PGB[..., part.blocks][part.ranks] & part.causal


def selected_bits(bits_PGb: NDArray[np.uint8]) -> Wanted:
    """The same from bitmaps (numpy's order of bits), of which only what is asked for is read."""

    def wanted(part: Part) -> Bools:
        bytes_, bits = part.bits
        found = np.unpackbits(bits_PGb[part.ranks][..., bytes_], axis=-1)[..., bits]
        return np.ascontiguousarray(found).view(bool) & part.causal

    return wanted


def dense(groups: int, causal: bool) -> Wanted:
    """The group cast (all causally visible pieces), or the all-gather (all pieces)."""
    return lambda part: np.repeat(part.causal if causal else part.foreign, groups, axis=1)


def given(need_PGN: Bools) -> Wanted:
    """What a whole table says."""
    heads = np.arange(need_PGN.shape[1])
    return lambda part: need_PGN[np.ix_(part.ranks, heads, part.at)]


def whole(wanted: Wanted, pieces: Pieces) -> Bools:
    """[P, G, N]: of all ranks and pieces."""
    return wanted(Part(pieces, np.arange(len(pieces.visible)), np.arange(len(pieces.start))))


@dataclass(frozen=True)
class Relays:
    """Which of a node's K ranks gets a piece of another node that some of them want: each in its turn, and where that
    one doesn't want the piece the next that does."""

    after_KGn: NDArray[Any]  # how far after its turn a rank comes
    turn_Gn: NDArray[Any]

    @classmethod
    def of(cls, at: Ints, groups: int, ranks: int) -> "Relays":
        """For the pieces numbered `at`."""
        turn = (at + np.arange(groups)[:, None]) % ranks
        after = (np.arange(ranks)[:, None, None] - turn) % ranks
        small = np.uint8 if ranks < 128 else np.uint16 if ranks < 1 << 15 else np.uint32  # the work is reading them
        return cls(after.astype(small), turn.astype(small))

    def choose(self, wanted_KGn: Bools) -> NDArray[Any]:
        """[..., G, n]: the rank's number of the K, and a higher number where none wants the piece."""
        none = np.iinfo(self.turn_Gn.dtype).max
        best = (self.after_KGn | (wanted_KGn.astype(self.turn_Gn.dtype) - 1)).min(axis=-3)  # 0 - 1: all bits
        ranks = len(self.after_KGn)
        chosen = best + self.turn_Gn
        chosen -= (chosen >= ranks) * self.turn_Gn.dtype.type(ranks)
        chosen[best == none] = none
        return chosen


def hop_counts(pieces: Pieces, need_PGN: Bools, nodes: Ints) -> tuple[Ints, Ints]:
    """[receiver, sender] each: rows of single KV heads that go from their owners, and from a relay on."""
    ranks, every = len(need_PGN), np.arange(len(pieces.start))
    length, direct, onward = pieces.end - pieces.start, need_PGN.copy(), np.zeros((ranks, ranks), np.int64)
    for node in np.unique(nodes) if len(np.unique(nodes)) > 1 else ():
        here = np.flatnonzero(nodes == node)
        far = nodes[pieces.owner] != node
        relayed = need_PGN[here] & far
        chosen = Relays.of(every, need_PGN.shape[1], len(here)).choose(relayed)
        for i, rank in enumerate(here):
            direct[rank] &= (chosen == i) | ~far
            sent = relayed & (chosen == i)
            sent[i] = False
            onward[here, rank] = (sent.sum(1) * length).sum(1)
    rows = direct.sum(1) * length
    from_owner = np.stack([rows[:, pieces.owner == owner].sum(1) for owner in range(ranks)], axis=1)
    return from_owner.astype(np.int64), onward


def piece_rounds(pieces: Pieces, need_PGN: Bools, max_rows: int) -> list[Bools]:
    """Splits a plan into rounds in which no rank receives more than `max_rows` rows (0: one round).

    Pieces are taken in order, KV head by KV head, the same ones in a round for all ranks, so that a node's ranks
    still share what they get of other nodes; a round ends before the piece that would exceed a rank's bound.
    """
    length = pieces.end - pieces.start
    done = np.cumsum((need_PGN * length).reshape(len(need_PGN), -1), axis=1)
    if not max_rows or done[:, -1:].max(initial=0) <= max_rows:
        return [need_PGN]
    rounds, start, base = [], 0, np.zeros(len(done), np.int64)
    while start < done.shape[1]:
        ends = [np.searchsorted(of, before + max_rows, side="right") for of, before in zip(done, base, strict=True)]
        stop = max(int(min(ends)), start + 1)
        these = np.zeros(done.shape[1], bool)
        these[start:stop] = True
        rounds.append(need_PGN & these.reshape(need_PGN.shape[1:]))
        start, base = stop, done[:, stop - 1]
    return rounds


@dataclass(frozen=True)
class Runs:
    """Rows start[i] … start[i] + length[i] - 1, run after run."""

    start: Ints
    length: Ints

    @property
    def rows(self) -> int:
        return int(self.length.sum())


@dataclass(frozen=True)
class Hop:
    """One rank's side of an uneven all-to-all: runs of the source's rows, receiver after receiver; rows [P] to and
    from each rank."""

    send: Runs
    send_counts: Ints
    recv_counts: Ints


@dataclass(frozen=True)
class BlockPlan:
    """One rank's side of one round. Own rows are those of single KV heads, head after head: [G * S].

    relay: a second hop inside the node, of rows that arrived in the first; None where all ranks are on one node.
    buffer: where in all that arrived (first hop, second hop) the buffer's rows lie, KV head after KV head, tokens
    ascending; tokens: theirs. rows_GB: the buffer's rows of each block.
    """

    direct: Hop
    relay: Hop | None
    buffer: Runs
    tokens: Runs
    rows_GB: Ints


class Side:
    """What the layout, the nodes and the number of KV heads alone say of one rank's plans: made once for all layers.

    Numbers of pieces of single KV heads, [G * N]: KV head after KV head.
    """

    def __init__(self, layout: Layout, pieces: Pieces, rank: int, groups: int, nodes: Ints) -> None:
        every, mine = np.arange(len(pieces.start)), np.flatnonzero(pieces.owner == rank)
        mates = np.flatnonzero(nodes == nodes[rank])
        self.several = len(mates) < layout.ranks
        self.mates: Ints = mates if self.several else np.array([rank])
        self.me = int(np.searchsorted(self.mates, rank))
        self.near, self.sent = Part(pieces, self.mates, every), Part(pieces, np.arange(layout.ranks), mine)
        self.length = np.tile(pieces.end - pieces.start, groups)
        self.token = np.tile(pieces.start, groups)
        found = np.unique(self.length)
        self.even = int(found[0]) if len(found) == 1 else 0  # rows of a piece where all have as many: most often
        self.first_piece = np.flatnonzero(np.diff(pieces.block, prepend=-1))  # of each block
        # Pieces owner after owner: in this order they arrive.
        owner = np.tile(pieces.owner, groups)
        self.by_owner = np.argsort(owner, kind="stable")
        self.owner_edge = np.searchsorted(owner[self.by_owner], np.arange(layout.ranks + 1))
        # Own pieces' lengths and first rows.
        self.sent_length = (pieces.end - pieces.start)[mine]
        row = np.arange(groups)[:, None] * int(self.sent_length.sum()) + layout.row_of(pieces.start[mine])
        self.sent_number = np.arange(row.size).reshape(row.shape)
        self.sent_row, self.sent_lengths = row.reshape(-1), np.tile(self.sent_length, groups)
        if self.several:
            self.far = nodes[pieces.owner] != nodes[rank]
            self.relays = Relays.of(every, groups, len(mates))
            others = [np.flatnonzero(nodes == node) for node in np.unique(nodes) if node != nodes[rank]]
            # The other nodes, those of one size together: [nodes, K] ranks.
            sizes = sorted({len(there) for there in others})
            by_size = [np.stack([there for there in others if len(there) == size]) for size in sizes]
            self.others = [(there, Relays.of(mine, groups, there.shape[1])) for there in by_size]

    def lengths(self, which: Ints) -> Ints:
        """Of pieces."""
        return np.full(len(which), self.even) if self.even else self.length[which]


def block_plan(layout: Layout, pieces: Pieces, wanted: Wanted, rank: int, groups: int, nodes: Ints) -> BlockPlan:
    """The rank's side of sending every rank the pieces that it wants. nodes [P]: the node of each rank."""
    key = rank, groups, nodes.tobytes()
    if key not in pieces.sides:
        pieces.sides[key] = Side(layout, pieces, rank, groups, nodes)
    side: Side = pieces.sides[key]
    near = wanted(side.near)
    need, relay = near[side.me], None
    place = np.empty(need.size, np.int64)  # where each piece's rows begin in all that arrives
    if not side.several:
        received = _from_owners(side, need, place)
    else:
        chosen = side.relays.choose(near)
        relayed = (chosen == side.me) & side.far  # to this rank, whoever wants them
        direct = need & (relayed | ~side.far)
        received = _from_owners(side, direct, place)
        relay = _relay(side, near, relayed, np.flatnonzero(need & ~direct), chosen, int(received.sum()), place)
    own = np.flatnonzero(need)
    lengths = side.lengths(own)
    rows = need * (pieces.end - pieces.start)
    if len(side.first_piece) < len(pieces.block):  # some blocks are cut
        rows = np.add.reduceat(rows, side.first_piece, axis=1)
    return BlockPlan(
        Hop(*_sends(side, wanted), received),
        relay,
        Runs(place[own], lengths),
        Runs(side.token[own], lengths),
        rows,
    )


def _from_owners(side: Side, need_GN: Bools, place: Ints) -> Ints:
    """Notes in `place` where the pieces begin that come from their owners; rows [P] of each owner."""
    which = np.flatnonzero(need_GN.reshape(-1)[side.by_owner])
    end = _notes(place, side.by_owner[which], side, 0)
    return np.diff(end[np.searchsorted(which, side.owner_edge)])


def _relay(
    side: Side, near: Bools, relayed: Bools, second: Ints, chosen: NDArray[Any], arrived: int, place: Ints
) -> Hop:
    """The second hop, after so many rows that arrived in the first: what this rank sends on to those of its node that
    want it, and what it gets, the pieces `second`, from the ones that were chosen."""
    ranks, mates = len(side.sent.ranks), side.mates
    at = np.flatnonzero(relayed)
    onward = near.reshape(len(near), -1)[:, at]
    onward[side.me] = False
    which = np.broadcast_to(at, onward.shape)[onward]
    sent, received = np.zeros(ranks, np.int64), np.zeros(ranks, np.int64)
    lengths = side.lengths(which)
    sent[mates] = onward.astype(np.float64) @ side.length[at]
    sender = chosen.reshape(-1)[second]
    end = _notes(place, second[np.argsort(sender, kind="stable")], side, arrived)
    received[mates] = np.diff(end[_ends(np.bincount(sender, minlength=len(mates)))])
    return Hop(Runs(place[which], lengths), sent, received)


def _sends(side: Side, wanted: Wanted) -> tuple[Runs, Ints]:
    """What the rank sends of its own: to every rank of its node that wants it, to one of every other node."""
    sent = wanted(side.sent)
    for there, relays in side.others if side.several else ():
        chosen = relays.choose(sent[there])
        sent[there] = chosen[:, None] == np.arange(there.shape[1])[:, None, None]
    which = np.broadcast_to(side.sent_number, sent.shape)[sent]
    counts = (sent.astype(np.float64) @ side.sent_length).sum(1)
    return Runs(side.sent_row[which], side.sent_lengths[which]), counts.astype(np.int64)


def _notes(place: Ints, which: Ints, side: Side, begin: int) -> Ints:
    """Notes in `place` where the pieces `which` begin, one after the other from row `begin` on; `_ends` of them."""
    end = np.arange(len(which) + 1) * side.even if side.even else _ends(side.length[which])
    place[which] = end[:-1] + begin
    return end


def _ends(counts: Ints) -> Ints:
    """0, the first, the sum of the first two, …"""
    end = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=end[1:])
    return end


def _as_slice(index: Ints) -> slice | Ints:
    """Consecutive numbers as a slice: quicker to read."""
    if len(index) and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index
