"""Ranks that differ: found before they exchange anything, named rank by rank, on every rank alike."""

import numpy as np
import pytest
import torch

from nsa_dist.agree import check_data, check_same, check_step
from nsa_dist.config import Config, ConfigError, load_config
from nsa_dist.cuts import Cutter
from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.balance import imbalance
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.mesh import make_mesh
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.rundir import Resume
from nsa_dist.train import train
from tests.conftest import run_ranks


def told(rank: int, what: str) -> str:
    """What this rank is told when rank 2 differs in `what`; "" where nothing is wrong."""
    mesh = make_mesh(2, 2, 0, "cpu")
    odd = rank == 2
    cu = [0, 100, 400] if odd and what == "documents" else [0, 90, 400]
    layout = make_layout("zigzag" if odd and what == "layout" else "contiguous", 400, 2, 64)
    sequence = ShardedSequence(Packing(np.array(cu), NSASpec()), layout, mesh.cp, torch.device("cpu"), torch.float32)
    config = Config()
    config.parallel.shard = 1 if odd and what == "shard" else 2
    try:
        check_same(config)
        check_data("0123456789abcdef" if odd and what == "data" else "fedcba9876543210", 300)
        check_step(mesh, 8 if odd and what == "step" else 7, [sequence])
    except ConfigError as error:
        return str(error)
    return ""


def ranks_told(what: str) -> str:
    return told(torch.distributed.get_rank(), what)


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("", ""),
        ("step", "step 7 on ranks 0, 1, 3, 8 on rank 2: must be the same on all of them"),
        ("shard", "parallel.shard=2 on ranks 0, 1, 3, 1 on rank 2: must be the same on all of them"),
        ("data", "data.source: tokens with digest fedcba987654 on ranks 0, 1, 3, 0123456789ab on rank 2: must be"),
        ("documents", "step 7: sequences (documents and cuts) 1 of 400 tokens, digest "),
        ("layout", "step 7: sequences (documents and cuts) 1 of 400 tokens, digest "),
    ],
)
def test_every_rank_is_told_the_same_line(what: str, line: str) -> None:
    results = run_ranks(4, ranks_told, what)
    assert len(set(results)) == 1 and results[0].startswith(line) and "\n" not in results[0]
    if what in ("documents", "layout"):
        assert " on rank 2, " in results[0] and " on rank 3" in results[0]


def other_cut(config: Config) -> str:
    """Training whose ranks were started with different numbers of ranks for a copy of the parameters."""
    config.parallel.shard = 1 + torch.distributed.get_rank()
    try:
        train(config, Resume(None, True), lambda event: None)
    except ConfigError as error:
        return str(error)
    return "trained"


def test_training_ends_before_its_ranks_make_different_groups(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = load_config(None, [f"run.dir={tmp_path}", "launch.device=cpu", "parallel.cp=2"])
    results = run_ranks(2, other_cut, config)
    assert results == ["parallel.shard=1 on rank 0, 2 on rank 1: must be the same on all of them"] * 2


def test_uneven_and_auto_balance_a_long_document() -> None:
    """By the cost model; auto takes what is fastest, bytes counted too, and the same cut whenever it is asked."""
    words = ["data.seq_len=65536", "parallel.cp=4", "launch.device=cpu", "model.heads=16", "model.kv_heads=1"]
    packing = Packing(np.array([0, 65536]), NSASpec())
    found = {}
    for kind in ("contiguous", "zigzag", "uneven", "auto"):
        cutter = Cutter(load_config(None, [*words, f"parallel.layout={kind}"]), 300)
        layout = cutter.layout(packing)
        assert (layout.cuts == cutter.layout(packing).cuts).all()
        found[kind] = imbalance(cutter.work(packing, layout)), layout
    assert found["contiguous"][0] > 1.2 and found["uneven"][0] < 1.1 and found["zigzag"][0] < 1.01
    assert found["auto"][0] < 1.01
    assert not (found["uneven"][1].cuts % 64).any()
