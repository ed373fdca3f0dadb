"""Who owns what: segments of whole blocks, in the order that balances causal attention."""

import numpy as np
import pytest

from nsa_dist.parallel.layout import make_layout


def test_zigzag_pairs_early_with_late_segments() -> None:
    layout = make_layout("zigzag", 96, 3, 16)
    assert [layout.segments(rank).tolist() for rank in range(3)] == [
        [[0, 16], [80, 96]],
        [[16, 32], [64, 80]],
        [[32, 48], [48, 64]],
    ]


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize(("tokens", "ranks"), [(1, 1), (97, 2), (300, 3), (40, 6)])
def test_every_token_has_one_owner_and_one_row(kind: str, tokens: int, ranks: int) -> None:
    layout = make_layout(kind, tokens, ranks, 16)
    every = np.concatenate([layout.own(rank) for rank in range(ranks)])
    assert sorted(every) == list(range(tokens))
    for rank in range(ranks):
        own = layout.own(rank)
        assert (layout.owner_of(own) == rank).all()
        assert layout.row_of(own).tolist() == list(range(len(own)))
        assert all(start % 16 == 0 for start, _ in layout.segments(rank))
