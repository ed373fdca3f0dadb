"""Triton's range attention against the vectorised one: odd sizes, groups, documents, masked head sizes."""

import numpy as np
import pytest
import torch

from nsa_dist.kernels import NSASpec, gating, ranged, tiled, tuning
from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.packing import Packing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() and not tuning.interpreted(), reason="no interpreter")

SPEC = NSASpec(8, 4, 16, 4, 1, 2, 24)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    ([0, 70, 73, 150], 6, 2, 24, 16),
    ([0, 131], 4, 4, 48, 40),
    ([0, 5], 16, 1, 16, 96),
    ([0, 1, 40], 7, 1, 80, 16),
]


@pytest.mark.parametrize("branch", ["window", "compressed"])
@pytest.mark.parametrize(("cu", "heads", "groups", "dk", "dv"), CASES)
def test_agrees_with_tiles(branch: str, cu: list[int], heads: int, groups: int, dk: int, dv: int) -> None:
    """With rows after those that some query sees, as on a rank whose compressed tokens end on the next."""
    packing = Packing(np.array(cu), SPEC)
    tokens = np.arange(packing.tokens)
    if branch == "window":
        ranges = tiled.window_ranges(packing, tokens, tokens, SPEC.window, DEVICE)
    else:
        breaks = tiled.query_breaks(packing, tokens)
        ranges = tiled.make_ranges(*packing.visible_compressed(tokens), breaks, DEVICE)
    rows = (packing.tokens if branch == "window" else packing.compressed) + 5
    generator = torch.Generator().manual_seed(rows)
    shapes = [(len(tokens), heads, dk), (rows, groups, dk), (rows, groups, dv), (len(tokens), heads, dv)]
    q, k, v, do = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    gate = torch.rand(len(tokens), heads, generator=generator).to(DEVICE)
    scale = dk**-0.5
    want_o, want_lse = tiled.range_forward(q, k, v, ranges, scale)
    delta = gating.row_deltas(do, [want_o])[..., 0]
    branch = BranchGrad(do, gate, want_o, want_lse, delta)
    want = tiled.range_backward(branch, q, k, v, ranges, scale)
    o, lse = ranged.range_forward(q, k, v, ranges, scale)
    found = ranged.range_backward(branch, q, k, v, ranges, scale)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)
    for a, b in zip((o, *found), (want_o, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    added = ranged.range_backward(branch, q, k, v, ranges, scale, found[0].clone())[0]
    torch.testing.assert_close(added, 2 * want[0], rtol=1e-4, atol=2e-5)


def test_refuses_a_head_size_without_a_kernel() -> None:
    x = torch.zeros(4, 1, 20, device=DEVICE)
    ranges = tiled.make_ranges(np.zeros(4, np.int64), np.arange(1, 5), np.zeros(0, np.int64), DEVICE)
    with pytest.raises(ValueError, match="head size 20"):
        ranged.range_forward(x, x, x, ranges, 1.0)
