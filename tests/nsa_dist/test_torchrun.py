"""Signals under torchrun, as the program is started there: after a rank's death, and while all live."""

import os
import signal
from pathlib import Path

from nsa_dist.checkpoint import checkpoints
from nsa_dist.processes import children, kill_tree
from nsa_dist.started import StartedRun
from tests.nsa_dist.test_cli import recipe

__all__ = ["recipe"]  # a fixture

# The program, in whose first attempt rank 0's main thread is blocked after step 12 where no signal reaches Python.
BLOCKED = """
import ctypes, os, sys
from nsa_dist import train as training
from nsa_dist.cli import main

train = training.train

def blocked(config, resume, report, skip=()):
    def told(event):
        if (event["kind"], event.get("step"), os.environ["RANK"]) == ("beat", 12, "0"):
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
                mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
                lock(mutex)
                lock(mutex)
        return report(event)
    return train(config, resume, told, skip)

training.train = blocked
sys.exit(main(sys.argv[1:]))
"""


def started(tmp_path: Path, recipe: Path, steps: int, *program: str) -> StartedRun:
    run = StartedRun(tmp_path / "run", tmp_path / "out.txt", limit_s=200)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--monitor-interval=0.2"]
    words = [f"train.steps={steps}", "train.checkpoint_every=5", f"run.dir={run.dir}"]
    run.python(*torchrun, "--max-restarts=1", *program, "train", str(recipe), *words)
    return run


def test_a_rank_that_waits_for_a_dead_one_where_no_handler_runs_ends_before_torchrun_kills_it(
    recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "blocked.py").write_text(BLOCKED)
    run = started(tmp_path, recipe, 20, str(tmp_path / "blocked.py"))
    try:
        run.until_step(12)
        before = run.losses()
        os.kill(children(run.process.pid)[1], signal.SIGKILL)
        run.finish()
    finally:
        kill_tree(run.process.pid)
    (died,) = run.events("failure")
    assert "has died" in died["cause"]
    assert [row["step"] for row in run.events("training")] == [0, 10]
    assert len(run.losses()) == 20 and before.items() <= run.losses().items()


def test_a_sigterm_while_all_ranks_live_ends_the_run_after_its_step_with_a_checkpoint(
    recipe: Path, tmp_path: Path
) -> None:
    run = started(tmp_path, recipe, 500, "-m", "nsa_dist")
    try:
        run.until_step(2)
        run.process.terminate()
        run.process.wait(100)
    finally:
        kill_tree(run.process.pid)
    assert run.events("stopped") and not run.events("failure")
    assert checkpoints(run.dir)[0].name == f"step-{max(run.losses())}"
