"""The plan of the block exchange: pieces of selected blocks, one KV head at a time. Pure functions.

Each rank makes its own side of the same plan from everybody's bitmaps. A piece that several ranks of a node want
goes from its owner, on another node, to one of them, which sends it on inside the node.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nsa_dist.kernels.packing import Ints
from nsa_dist.parallel.layout import Layout
from nsa_dist.parallel.plan import Bools, Pieces

# For ranks [R] and pieces [n]: bool [R, G, n], whether the rank fetches the piece for each KV head.
Wanted = Callable[[Ints, Ints], Bools]


def selected(pieces: Pieces, blocks_PGB: Bools) -> Wanted:
    """Of its selected blocks each rank fetches what is causally visible to it and not its own.

    That is the cheapest for each owner, receiver and KV head: never more than the causal dense exchange; where all
    visible pieces of an owner are selected, the set is its dense range; where none is, nothing.
    """

    def wanted(ranks: Ints, at: Ints) -> Bools:
        found = blocks_PGB[..., _as_slice(pieces.block[at])][ranks]
        found &= _foreign(pieces, ranks, at, causal=True)
        return found

    return wanted


def selected_bits(pieces: Pieces, bits_PGb: NDArray[np.uint8]) -> Wanted:
    """The same from bitmaps (numpy's order of bits), of which only what is asked for is read."""

    def wanted(ranks: Ints, at: Ints) -> Bools:
        index = _as_slice(pieces.block[at])
        if isinstance(index, slice):
            part = np.unpackbits(bits_PGb[..., index.start // 8 : -(-index.stop // 8)][ranks], axis=-1)
            found = part[..., index.start % 8 :][..., : index.stop - index.start]
        else:
            found = (bits_PGb[..., index >> 3][ranks] >> (7 - (index & 7)).astype(np.uint8)) & np.uint8(1)
        return found.astype(bool) & _foreign(pieces, ranks, at, causal=True)

    return wanted


def dense(pieces: Pieces, groups: int, causal: bool) -> Wanted:
    """The group cast (all causally visible pieces), or the all-gather (all pieces)."""

    def wanted(ranks: Ints, at: Ints) -> Bools:
        return np.repeat(_foreign(pieces, ranks, at, causal), groups, axis=1)

    return wanted


def given(need_PGN: Bools) -> Wanted:
    """What a whole table says."""
    heads = np.arange(need_PGN.shape[1])
    return lambda ranks, at: need_PGN[np.ix_(ranks, heads, at)]


def whole(wanted: Wanted, pieces: Pieces) -> Bools:
    """[P, G, N]: of all ranks and pieces."""
    return wanted(np.arange(len(pieces.visible)), np.arange(len(pieces.start)))


def choose_relays(wanted_KGn: Bools, at: Ints) -> Ints:
    """[G, n]: of a node's ranks that want a piece of another node the number of the one that gets it, each in its
    turn; -1 where none does."""
    ranks = len(wanted_KGn)
    turn = ((at + np.arange(wanted_KGn.shape[1])[:, None]) % ranks).astype(np.int16)
    best = np.full(turn.shape, ranks, np.int16)  # how far after its turn
    for k in range(ranks):
        after = np.where(turn > k, k + ranks - turn, k - turn).astype(np.int16)
        np.minimum(best, np.where(wanted_KGn[k], after, np.int16(ranks)), out=best)
    return np.where(best < ranks, (best + turn) % ranks, -1).astype(np.int64)


def hop_counts(pieces: Pieces, need_PGN: Bools, nodes: Ints) -> tuple[Ints, Ints]:
    """[receiver, sender] each: rows of single KV heads that go from their owners, and from a relay on."""
    ranks, every = len(need_PGN), np.arange(len(pieces.start))
    length, direct, onward = pieces.end - pieces.start, need_PGN.copy(), np.zeros((ranks, ranks), np.int64)
    for node in np.unique(nodes) if len(np.unique(nodes)) > 1 else ():
        here = np.flatnonzero(nodes == node)
        far = nodes[pieces.owner] != node
        relayed = need_PGN[here] & far
        chosen = choose_relays(relayed, every)
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


def block_plan(layout: Layout, pieces: Pieces, wanted: Wanted, rank: int, nodes: Ints) -> BlockPlan:
    """The rank's side of sending every rank the pieces that it wants. nodes [P]: the node of each rank."""
    every, length = np.arange(len(pieces.start)), pieces.end - pieces.start
    mates = np.flatnonzero(nodes == nodes[rank])
    several = len(mates) < layout.ranks
    near = wanted(mates if several else np.array([rank]), every)
    me = int(np.searchsorted(mates, rank)) if several else 0
    need = near[me]
    groups = len(need)
    place = np.zeros(need.size, np.int64)  # where each piece's rows begin in all that arrives
    at, lengths = np.tile(every, groups), np.tile(length, groups)  # of each KV head's pieces, in one row
    own = np.flatnonzero(need)
    if several:
        far = nodes[pieces.owner] != nodes[rank]
        chosen = choose_relays(near, every)
        direct = need & (~far | (chosen == me))
        first, second = np.flatnonzero(direct), np.flatnonzero(need & ~direct)
    else:
        first = own
    received = _arrive(place, first, pieces.owner[at[first]], lengths[first], layout.ranks, 0)
    relay = None
    if several:
        onward = near & ((chosen == me) & far)
        onward[me] = False
        counts = np.zeros(layout.ranks, np.int64)
        counts[mates] = (onward.sum(1) * length).sum(1)
        sent = np.flatnonzero(onward) % need.size
        senders = mates[chosen.reshape(-1)[second]]
        got = _arrive(place, second, senders, lengths[second], layout.ranks, int(received.sum()))
        relay = Hop(Runs(place[sent], lengths[sent]), counts, got)
    blocks = int(pieces.block[-1]) + 1 if len(pieces.block) else 0
    number = (np.arange(groups)[:, None] * blocks + pieces.block).reshape(-1)
    rows = np.bincount(number[own], lengths[own], minlength=groups * blocks)
    return BlockPlan(
        Hop(*_sends(layout, pieces, wanted, rank, nodes), received),
        relay,
        Runs(place[own], lengths[own]),
        Runs(pieces.start[at[own]], lengths[own]),
        rows.astype(np.int64).reshape(groups, blocks),
    )


def _sends(layout: Layout, pieces: Pieces, wanted: Wanted, rank: int, nodes: Ints) -> tuple[Runs, Ints]:
    """What the rank sends of its own: to every rank of its node that wants it, to one of every other node."""
    mine = np.flatnonzero(pieces.owner == rank)
    sent = wanted(np.arange(layout.ranks), mine)
    for node in np.unique(nodes):
        if node != nodes[rank]:
            there = nodes == node
            chosen = choose_relays(sent[there], mine)
            sent[there] &= chosen == np.arange(there.sum())[:, None, None]
    length = (pieces.end - pieces.start)[mine]
    row = np.arange(sent.shape[1])[:, None] * int(length.sum()) + layout.row_of(pieces.start[mine])
    which = np.flatnonzero(sent) % max(row.size, 1)
    runs = Runs(row.reshape(-1)[which], np.tile(length, len(row))[which])
    return runs, (sent.sum(1) * length).sum(1).astype(np.int64)


def _arrive(place: Ints, which: Ints, sender: Ints, length: Ints, ranks: int, begin: int) -> Ints:
    """Notes in `place` where the pieces `which` begin, sender after sender, from row `begin` on; rows [P] of each."""
    order = np.argsort(sender.astype(np.int16), kind="stable")
    ordered = length[order]
    place[which[order]] = begin + np.cumsum(ordered) - ordered
    return np.bincount(sender, length, minlength=ranks).astype(np.int64)


def _foreign(pieces: Pieces, ranks: Ints, at: Ints, causal: bool) -> Bools:
    """[R, 1, n]."""
    foreign = pieces.owner[at] != ranks[:, None]
    return (foreign & pieces.visible[:, _as_slice(at)][ranks] if causal else foreign)[:, None]


def _as_slice(index: Ints) -> slice | Ints:
    """Consecutive numbers as a slice: quicker to read."""
    if len(index) and (np.diff(index) == 1).all():
        return slice(int(index[0]), int(index[-1]) + 1)
    return index
