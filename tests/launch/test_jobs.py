"""Jobs as a user has them, on a cluster of two nodes: a node lost, the run stopped."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nsa_dist.metrics import read_metrics
from nsa_dist.processes import kill_tree
from tests.launch.test_recover import configure, events, recipe, undisturbed

__all__ = ["recipe"]  # a fixture


def test_a_job_survives_a_lost_node_and_stops_with_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}

    def ask(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "nsa_dist", *words], env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout

    run_dir = tmp_path / "run"
    _, words = configure(recipe, run_dir, "parallel.cp=auto", "train.steps=40")
    ask("cluster", "up", "--nodes", "2", "--cpus", "1")
    try:
        assert "checked: 2 nodes have python" in ask("submit", *words)
        until(lambda: steps(run_dir) >= 7)
        kill_tree(json.loads((tmp_path / "nsa-dist" / "cluster.json").read_text())["nodes"][1])
        until(lambda: bool(events(run_dir, "recovery")))
        said = ask("logs", "-f", "run")
        assert "failure: rank 1 on node-1, after step" in said and "node node-1 was lost" in said
        assert "Traceback" not in said
        (lost,) = events(run_dir, "recovery")
        assert (lost["failure"], lost["node"], lost["ranks"]) == ("lost", "node-1", 1)
        losses = [record["loss"] for record in read_metrics(run_dir)]
        # To rounding: on one rank instead of two.
        assert losses == pytest.approx(undisturbed(recipe, tmp_path / "other"), rel=1e-5)

        ask("submit", *words, "train.steps=100000")  # the same run goes on
        until(lambda: steps(run_dir) >= 43)
        assert json.loads(ask("stop", "run", "--json"))["state"] == "STOPPED"
        last = read_metrics(run_dir)[-1]["step"]
        assert (run_dir / "checkpoints" / f"step-{last}").is_dir()
        assert events(run_dir, "stopped")
        first, second = json.loads(ask("list", "--json"))
        assert (first["job"], first["state"], first["exit_status"]) == ("run-1", "SUCCEEDED", 0)
        assert (second["job"], second["state"]) == ("run-2", "STOPPED")
    finally:
        ask("cluster", "down")


def steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
