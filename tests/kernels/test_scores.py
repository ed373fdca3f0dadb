"""Triton's selection against the definition's in float64, ties made on purpose included."""

import numpy as np
import pytest
import torch

from nsa_dist.kernels import NSASpec, ranged, scores, tuning
from nsa_dist.kernels.compressed import compressed_view
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import reference_selection

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() and not tuning.interpreted(), reason="no interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("cu", "heads", "groups", "dk", "spec", "ties"),
    [
        ([0, 60, 63, 110], 6, 2, 24, NSASpec(8, 4, 8, 6, 1, 2, 24), True),
        ([0, 60, 63, 110], 6, 2, 24, NSASpec(8, 4, 8, 6, 1, 2, 24), False),
        ([0, 90], 4, 4, 16, NSASpec(4, 4, 4, 5, 2, 1, 24), True),
        ([0, 5, 90], 3, 1, 16, NSASpec(12, 4, 4, 3, 0, 1, 24), True),
        ([0, 156], 16, 1, 48, NSASpec(16, 4, 8, 16, 1, 2, 24), True),
        ([0, 31, 301], 2, 1, 16, NSASpec(8, 4, 4, 5, 1, 2, 24), False),  # four chunks of blocks
        ([0, 31, 301], 2, 1, 16, NSASpec(8, 4, 4, 5, 1, 2, 24), True),
        ([0, 31, 331], 1, 1, 16, NSASpec(12, 4, 12, 3, 1, 2, 24), False),  # none to choose
        ([0, 310], 1, 1, 16, NSASpec(4, 4, 4, 70, 1, 2, 24), False),
    ],
)
def test_selects_the_same_blocks(cu: list[int], heads: int, groups: int, dk: int, spec: NSASpec, ties: bool) -> None:
    packing = Packing(np.array(cu), spec)
    tokens = np.arange(packing.tokens)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(tokens), heads, dk, generator=generator).to(DEVICE)
    k = torch.randn(packing.compressed, groups, dk, generator=generator).to(DEVICE)
    if ties:
        q.zero_()  # every probability of a query is the same, whatever the order in which products are added
    view = compressed_view(packing, tokens, np.arange(packing.compressed), DEVICE)
    wanted = reference_selection(q.double(), k.double(), spec, packing, dk**-0.5)
    _, lse = ranged.range_forward(q, k, k, view.ranges, dk**-0.5)
    found = scores.select_blocks(q, k, lse, view, spec, dk**-0.5)
    assert torch.equal(found.long(), wanted)
