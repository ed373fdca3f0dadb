"""The span rule on any number of ranks: outputs and gradients of the reference, the ledger the layout's figures."""

import itertools

import numpy as np
import pytest
import torch

from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import reference_selection
from nsa_dist.parallel.layout import Layout, make_layout
from nsa_dist.parallel.mesh import make_mesh
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.parallel.traffic import Sizes, TrafficModel
from tests.conftest import run_ranks
from tests.parallel.test_attention import (
    DK,
    DV,
    Case,
    G,
    H,
    Wire,
    compare,
    compare_ledger,
    inputs,
    needed_blocks,
    reference,
)

SIZES = (8, 4, 16, 5, 1, 2, 24)
CASES = {  # documents, span, bound, prefetched share, pool: spans inside ranks and over several, cuts inside groups
    "prefetch": ([0, 520], NSASpec(*SIZES, 64, 0.25, 1.0, 100)),
    "half, packed, an odd span": ([0, 31, 353, 354, 600], NSASpec(*SIZES, 133, 4, 0.5, 40)),
    "all later": ([0, 500], NSASpec(*SIZES, 201, 3, 0, 70)),
}


def make_case(cu: list[int], spec: NSASpec) -> Case:
    packing = Packing(np.array(cu), spec)
    xs = inputs(packing, len(cu))
    return packing, xs, {"nsa": reference("nsa", xs, packing)}, reference_selection(*xs[:2], spec, packing, DK**-0.5)


def run_cases(ranks: int, cases: dict[str, Case]) -> list[str]:
    """Every case on this rank; what differs, in words."""
    wrong, mesh, wire = [], make_mesh(1, ranks, 0, "cpu"), Wire()
    for name, (packing, xs, wanted, picks) in cases.items():
        cuts = np.sort(np.random.default_rng(ranks).integers(0, packing.tokens + 1, 2 * ranks))
        odd = np.concatenate([[0], cuts, [packing.tokens]])
        layouts = [Layout(odd, np.arange(2 * ranks + 1) % ranks, ranks)]
        layouts += [make_layout(kind, packing.tokens, ranks, 16) for kind in ("contiguous", "zigzag")]
        for i, layout in enumerate(layouts):
            seq = ShardedSequence(packing, layout, mesh.cp, torch.device("cpu"), torch.float64)
            model = TrafficModel(packing, layout, Sizes(H, G, DK, DV, 8, 8))
            bits = needed_blocks(picks, layout, packing.blocks)
            for exchange in ("nsa", "groupcast") if i == 0 else ("nsa",):
                label = f"{ranks} ranks, {name}, layout {i}, {exchange}"
                wire.take()
                wrong += [f"{label}: {w}" for w in compare(seq, "nsa", exchange, 0, xs, wanted["nsa"])]
                wrong += [f"{label}: {w}" for w in compare_ledger(seq, model, "nsa", exchange, 0, bits, wire)]
    return wrong


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: make_case(*case) for name, case in CASES.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_rule_is_the_same_on_any_number_of_ranks(ranks: int, cases: dict[str, Case]) -> None:
    wrong = list(itertools.chain.from_iterable(run_ranks(ranks, run_cases, ranks, cases)))
    assert not wrong, f"{len(wrong)} differences:\n" + "\n".join(wrong[:10])
