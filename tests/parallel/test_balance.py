"""The cost model and the cuts that it chooses."""

import numpy as np
import pytest

from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.balance import (
    MOST_TOKENS,
    Machine,
    choose_layout,
    part_tokens,
    predict,
    token_flops,
    uneven_layout,
)
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.traffic import Sizes

SPEC = NSASpec(8, 4, 16, 5, 1, 2, 24)
SIZES = Sizes(4, 2, 6, 4, 2, 4)
FREE = Machine(1.0, np.inf)  # bytes cost nothing
PACKED = [0, 1, 32, 400, 407, 1500, 1501, 2100]


def test_operations_are_those_of_the_pairs_that_a_query_sees() -> None:
    packing = Packing(np.array([0, 5, 160]), SPEC)
    pair = 7 * 4 * (6 + 4)
    for token in (0, 4, 5, 19, 150, 159):
        position = token - (0 if token < 5 else 5)
        compressed = sum(i * 4 + 7 <= position for i in range(100))
        first_block = max(0, position // 16 - 4)  # with 5 blocks to select
        selected = position + 1 if first_block == 0 else 4 * 16 + position % 16 + 1
        nsa = pair * (min(position + 1, 24) + selected + compressed) + 2 * 4 * 6 * compressed
        found = token_flops(packing, SIZES, ["nsa", "full", "nsa"], 3.0)[token]
        assert found == 3.0 + 2 * nsa + pair * (position + 1)


@pytest.mark.parametrize("cu", [[0, 4096], PACKED, [0, 30]])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_uneven_cuts_hold_every_token_once_within_the_bound_on_memory(cu: list[int], ranks: int) -> None:
    packing = Packing(np.array(cu), SPEC)
    layout = uneven_layout(token_flops(packing, SIZES, ["full"], 0.0), ranks, 16)
    assert layout.cuts[0] == 0 and layout.items == packing.tokens and (np.diff(layout.cuts) >= 0).all()
    assert (layout.cuts[1:-1] % 16 == 0).all() or packing.tokens < 16 * ranks
    most = int(np.ceil(-(-packing.tokens // 16) / ranks * MOST_TOKENS)) * 16
    assert part_tokens(layout).max() <= most and part_tokens(layout).sum() == packing.tokens


@pytest.mark.parametrize("cu", [[0, 4096], PACKED])
def test_the_chosen_layout_is_the_fastest_and_contiguous_is_not(cu: list[int]) -> None:
    packing = Packing(np.array(cu), SPEC)
    chosen = choose_layout(packing, 4, SIZES, ["nsa"], machine=FREE)
    contiguous = predict(packing, make_layout("contiguous", packing.tokens, 4, 16), SIZES, ["nsa"], machine=FREE)
    assert chosen.kind != "contiguous"
    assert chosen.seconds < contiguous.seconds and chosen.imbalance < contiguous.imbalance
    assert chosen.compute_s.sum() == pytest.approx(contiguous.compute_s.sum())


def test_where_bytes_cost_all_contiguous_is_kept() -> None:
    """Zigzag fetches more: three quarters of the KV on average against a half, with the same maximum."""
    packing = Packing(np.array([0, 4096]), SPEC)
    assert choose_layout(packing, 4, SIZES, ["nsa"], machine=Machine(1e30, 1.0)).kind == "contiguous"


def test_linear_work_is_balanced_by_zigzag() -> None:
    packing = Packing(np.array([0, 4096]), SPEC)
    zigzag = predict(packing, make_layout("zigzag", 4096, 4, 16), SIZES, ["full"], machine=FREE)
    assert zigzag.imbalance == pytest.approx(1.0, abs=1e-3)
