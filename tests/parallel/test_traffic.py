"""Traffic of one document in equal contiguous parts, against formulas that know nothing of plans."""

import numpy as np
import pytest

from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.traffic import Sizes, TrafficModel

L, D, BLOCK = 32, 16, 64
SIZES = Sizes(heads=8, groups=2, dk=24, dv=16, element_bytes=2, grad_bytes=4)
KV = 2 * (24 + 16)  # numbers of a token


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 50, 512])  # the last: longer than a part
def test_an_aligned_cut_sends_what_the_formulas_say(ranks: int, window: int) -> None:
    part = 4 * BLOCK
    packing = Packing(np.array([0, ranks * part]), NSASpec(window=window))
    model = TrafficModel(packing, make_layout("contiguous", packing.tokens, ranks, BLOCK), SIZES)
    needs = np.zeros((ranks, 2, packing.blocks), bool)
    needs[:, 0, 0] = True  # every rank selects block 0 for KV head 0, and nothing else
    before = np.arange(ranks) * part
    rows = {
        "window_halo": np.minimum(before, window - 1),
        "compress_halo": np.where(np.arange(ranks) < ranks - 1, L - D, 0),
        # Those that start in earlier parts: one every D tokens.
        "compressed": before // D,
    }
    selected = {
        "nsa": np.where(before > 0, BLOCK / 2, 0),  # one of two KV heads
        "groupcast": before,
        "allgather": np.full(ranks, (ranks - 1) * part),
    }
    for exchange, fetched in selected.items():
        traffic = model.nsa(exchange, needs)
        for kind, received in (rows | {"selected": fetched}).items():
            assert traffic[kind, "forward"][1].tolist() == (received * KV * 2).tolist(), (exchange, kind)
            assert traffic[kind, "backward"][0].tolist() == (received * KV * 4).tolist(), (exchange, kind)
            for sent, got, *_ in (traffic[kind, "forward"], traffic[kind, "backward"]):
                assert sent.sum() == got.sum()
    around = np.full(ranks, (ranks - 1) * part * KV * 2)
    for exchange in ("ring", "allgather"):
        assert model.full(exchange)["full_kv", "forward"][1].tolist() == around.tolist()
    assert model.full("groupcast")["full_kv", "forward"][1].tolist() == (before * KV * 2).tolist()
    if SIZES.groups % ranks == 0:  # Ulysses: q, k, v to heads and o back, all but 1 / P of it
        moved = part * (ranks - 1) // ranks * (8 + 2) * (24 + 16) * 2
        assert model.full("ulysses")["ulysses", "forward"][0].tolist() == [moved] * ranks
