"""The block exchange's plan, all ranks' sides of it put together: what arrives where, over which wire, once."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel import block_plan as plans
from nsa_dist.parallel import needs
from nsa_dist.parallel.layout import Layout, expand
from nsa_dist.parallel.plan import make_pieces

SPEC = NSASpec(8, 4, 16, 4, 1, 2, 24)


@st.composite
def cases(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    """A layout of any cuts, documents, nodes, and what each rank's queries selected."""
    ranks, groups = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    unit = draw(st.sampled_from([1, 1, SPEC.select_block]))  # whole blocks alone, or any cuts
    lengths = draw(st.lists(st.integers(1, 120 // unit).map(lambda n: n * unit), min_size=1, max_size=3))
    packing = Packing(np.concatenate([[0], np.cumsum(lengths)]), SPEC)
    whole = st.integers(0, packing.tokens // unit).map(lambda n: n * unit)
    cuts = sorted(draw(st.lists(whole, max_size=8)))
    owner = draw(st.lists(st.integers(0, ranks - 1), min_size=len(cuts) + 1, max_size=len(cuts) + 1))
    layout = Layout(np.array([0, *cuts, packing.tokens]), np.array(owner), ranks)
    nodes = np.array(sorted(draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))))
    rng, density = np.random.default_rng(draw(st.integers(0, 99))), draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
    return packing, layout, nodes, rng.random((ranks, groups, packing.blocks)) < density


def rows(runs: plans.Runs) -> np.ndarray:
    return expand(np.stack([runs.start, runs.start + runs.length], axis=1))


def swap(parts: list[tuple[np.ndarray, plans.Hop]]) -> list[np.ndarray]:
    """The all-to-all: from each rank's source rows what each rank gets, sender after sender."""
    sent = [np.split(x[rows(hop.send)], np.cumsum(hop.send_counts)[:-1]) for x, hop in parts]
    got = [[sent[s][r] for s in range(len(parts))] for r in range(len(parts))]
    for r, (_, hop) in enumerate(parts):
        assert [len(part) for part in got[r]] == hop.recv_counts.tolist()
    return [np.concatenate(part) for part in got]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_needed_piece_arrives_once_and_nothing_else_does(case) -> None:  # type: ignore[no-untyped-def]
    packing, layout, nodes, blocks = case
    pieces = make_pieces(layout, packing, needs.causal(layout, packing))
    ranks, groups = range(layout.ranks), blocks.shape[1]
    packed = plans.selected_bits(np.packbits(blocks, axis=-1))
    for wanted in (plans.selected(blocks), plans.dense(groups, False), packed):
        need = plans.whole(wanted, pieces)
        if wanted is packed:
            assert (need == plans.whole(plans.selected(blocks), pieces)).all()
        made = [plans.block_plan(layout, pieces, wanted, r, groups, nodes) for r in ranks]
        # A row is its head, token; own rows head after head.
        own = [
            np.stack([np.repeat(np.arange(groups), len(t)), np.tile(t, groups)], 1) for t in map(layout.own, ranks)
        ]
        first = swap([(x, plan.direct) for x, plan in zip(own, made, strict=True)])
        arrived = first
        if len(set(nodes)) > 1:
            relays = [plan.relay for plan in made]
            assert all(relays)
            second = swap([(x, hop) for x, hop in zip(first, relays, strict=True) if hop])
            arrived = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
        for r, plan in enumerate(made):
            head, at = np.nonzero(need[r])
            spans = np.stack([pieces.start[at], pieces.end[at]], 1)
            expected = np.stack([np.repeat(head, spans[:, 1] - spans[:, 0]), expand(spans)], 1)
            assert arrived[r][rows(plan.buffer)].tolist() == expected.tolist()
            assert len(arrived[r]) == len(expected)
            assert rows(plan.tokens).tolist() == expected[:, 1].tolist()
            counted = np.zeros((groups, packing.blocks), int)
            np.add.at(counted, (expected[:, 0], np.searchsorted(packing.blk_start, expected[:, 1], "right") - 1), 1)
            assert plan.rows_GB.tolist() == counted.tolist()
        check_nodes(need, made, layout, pieces, nodes)


def check_nodes(need, made, layout, pieces, nodes) -> None:  # type: ignore[no-untyped-def]
    """A piece crosses to a node once, a second hop stays inside; the counts that traffic is computed from."""
    direct, onward = plans.hop_counts(pieces, need, nodes)
    assert [plan.direct.recv_counts.tolist() for plan in made] == direct.tolist()
    other = nodes[:, None] != nodes
    if made[0].relay is not None:
        assert [plan.relay.recv_counts.tolist() for plan in made] == onward.tolist()
    assert not onward[other].any()
    length = pieces.end - pieces.start
    for node in set(nodes):
        here = nodes == node
        crossing = need[here].any(0) & (nodes[pieces.owner] != node)
        assert direct[here][:, ~here].sum() == (crossing * length).sum()
    assert (direct + onward).sum(1).tolist() == ((need * length).sum((1, 2))).tolist()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_never_more_than_the_causal_dense_exchange(case) -> None:  # type: ignore[no-untyped-def]
    """For each receiver and owner, inside and between nodes; all of it where everything visible is selected."""
    packing, layout, nodes, blocks = case
    pieces = make_pieces(layout, packing, needs.causal(layout, packing))
    every = np.ones_like(blocks)
    own, full, causal = (
        plans.whole(wanted, pieces)
        for wanted in (
            plans.selected(blocks),
            plans.selected(every),
            plans.dense(blocks.shape[1], True),
        )
    )
    assert not (own & ~causal).any() and (full == causal).all()
    one = np.zeros_like(nodes)
    assert (plans.hop_counts(pieces, own, one)[0] <= plans.hop_counts(pieces, causal, one)[0]).all()
    other = nodes[:, None] != nodes
    between = [(plans.hop_counts(pieces, x, nodes)[0] * other).sum() for x in (own, causal)]
    assert between[0] <= between[1] <= (plans.hop_counts(pieces, causal, one)[0] * other).sum()
