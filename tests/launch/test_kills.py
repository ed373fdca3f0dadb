"""Kills at random moments of one run, as the script makes fifty of them."""

import json
from pathlib import Path

import pytest

from nsa_dist.launch.kills import main
from tests.launch.test_recover import configure, recipe

__all__ = ["recipe"]  # a fixture


def test_kills_at_random_moments_change_no_loss(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = configure(recipe, tmp_path / "run", "data.seq_len=512", "launch.heartbeat_s=5")
    assert main([*words, "--kills", "4", "--seed", "4"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["losses_equal"] and facts["kills"] >= 3 and facts["recoveries"] >= 1
    assert facts["checkpoints"] >= 1
