"""`backend="triton"` against the reference in float64, output and gradients: a pairwise cover, in which every two
values of different factors meet in some case."""

from itertools import combinations
from typing import Any

import pytest
import torch

from nsa_dist.kernels import NSASpec, blocks, gating, tuning
from nsa_dist.kernels.packing import Packing
from tests.kernels.test_attention import NAMES
from tests.kernels.test_triton import DEVICE, inputs, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() and not tuning.interpreted(), reason="no interpreter")

# What computes fastest comes first: it is taken where no value makes a new pair. The factors' order is one in
# which few cases have many heads and many tokens and small tiles.
FACTORS: dict[str, tuple[Any, ...]] = {
    "sizes": ((16, 16), (24, 40), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256)),  # Dk, Dv
    "r": (1, 2, 3, 4, 8, 16, 64),  # query heads of a KV head
    "blocks": ((8, 4, 16), (32, 16, 64), (16, 16, 64), (32, 32, 64), (16, 4, 8), (4, 4, 4), (12, 4, 24)),  # l, d, lp
    "lengths": ((21,), (4, 1, 40), (30, 45), (130,)),  # of the documents
    "choice": ((4, 1, 2), (1, 0, 1), (2, 0, 1), (5, 2, 1), (16, 1, 2)),  # selected, initial, local blocks
    "tile": ((64, 64), (32, 16)),  # queries times heads, keys: under the interpreter
    "groups": (1, 2),
    "dtype": (torch.float32, torch.float16),
    "window": (24, 1, 7, 512),
}
# Of the type's, of a tensor's largest element: what results may be off.
ROUNDINGS = {torch.float32: 32, torch.float16: 2}


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Greedy: a pair that is left, then of each factor the first of the values that make most new pairs."""
    sizes = [len(values) for values in factors.values()]
    every = [[(i, value) for value in range(size)] for i, size in enumerate(sizes)]
    left = {(x, y) for xs, ys in combinations(every, 2) for x in xs for y in ys}
    cases = []
    while left:
        case = dict(min(left))
        for values in every:
            if values[0][0] not in case:
                new = [sum(tuple(sorted((x, v))) in left for x in case.items()) for v in values]
                case |= [values[new.index(max(new))]]
        left -= set(combinations(sorted(case.items()), 2))
        cases.append({name: values[case[i]] for i, (name, values) in enumerate(factors.items())})
    return cases


@pytest.mark.parametrize("case", pairwise(FACTORS), ids=lambda case: "-".join(str(x) for x in case.values()))
def test_agrees_with_the_reference(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (dk, dv), r, groups, dtype = case["sizes"], case["r"], case["groups"], case["dtype"]
    spec = NSASpec(*case["blocks"], *case["choice"], case["window"])
    cu, xs = inputs(list(case["lengths"]), r * groups, groups, dk, dv, spec)
    xs = [x.to(dtype) for x in xs]
    if DEVICE.type == "cpu":
        rows, keys = case["tile"]
        rows = max(rows, 4 * r) if rows == 64 else rows  # fewer programs: the interpreter's time goes by them
        tile = (("BM", rows), ("BN", keys), ("num_warps", 4), ("num_stages", 1))
        monkeypatch.setattr(tuning, "configuration", lambda *_: tile)
        monkeypatch.setitem(blocks._MERGE, "BM", 128)
        monkeypatch.setattr(gating, "_ROWS", 128)
    tuning.launches.clear()
    found = run(cu, [x.to(DEVICE) for x in xs], spec, "triton")
    want = run(cu, [x.double() for x in xs], spec, "reference")
    largest = [float(x.abs().max()) if x.numel() else 0.0 for x in want]
    for k in (2, 4, 6):  # dk may be no more than what is left of terms as large as dv's
        largest[k] = max(largest[k], largest[k + 1])
    for name, a, b, size in zip(("out", *NAMES), found, want, largest, strict=True):
        bound = ROUNDINGS[dtype] * torch.finfo(dtype).eps * max(1.0, size)
        torch.testing.assert_close(a.cpu().double(), b, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")
    both = {"range_forward": 2, "range_dq": 2, "range_dkv": 2 if Packing(cu.numpy(), spec).compressed else 1}
    once = dict.fromkeys(("scores", "block_forward", "block_backward", "combine", "row_deltas"), 1)
    assert tuning.launches == both | once
