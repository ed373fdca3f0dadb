"""The drill as a user starts it, with one of its failures; its words; the straggler's arithmetic."""

import json
from pathlib import Path

import pytest

from nsa_dist.cli import main
from nsa_dist.launch.straggler import Stragglers
from tests.launch.test_recover import configure, recipe

__all__ = ["recipe"]  # a fixture


def test_the_drill_recovers_from_a_head_that_is_killed_and_starts_again(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = configure(recipe, tmp_path / "run")
    file = tmp_path / "rows.json"
    assert main(["drill", *words, "--only", "restarted-head", "--json", str(file)]) == 0
    (row,) = json.loads(file.read_text())
    assert (row["failure"], row["losses_equal"]) == ("restarted-head", True)
    assert row["steps_lost"] <= 6 and row["training_again_s"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_unknown_failures_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drill", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert len(names) == 15 and "lost-node" in names
    assert main(["drill", "--only", "lost-nod"]) == 2
    assert "nearest: lost-node" in capsys.readouterr().err


def test_the_rank_for_which_others_wait_is_told_once() -> None:
    found, watch = [], Stragglers(3)
    for step in range(40):
        for rank in range(3):
            slow = rank == 1 and step >= 5
            told = watch.beat(rank, 0.1 if slow or step < 5 else 0.6, now=float(step))
            found += [told] if told else []
    assert [(rank, round(step_s, 3)) for rank, _, step_s in found] == [(1, 1.0)]
    assert 0.3 < found[0][1] <= 0.5
    even = Stragglers(2)
    assert not any(even.beat(rank, 0.2 + 0.1 * rank, now=float(step)) for step in range(40) for rank in range(2))
