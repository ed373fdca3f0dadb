"""A rank killed in the middle of a training run, and what becomes of the run: under Ray, and under torchrun."""

import os
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from nsa_dist.bench_rows import Row
from nsa_dist.process import RunFailed
from nsa_dist.processes import children, kill_tree
from nsa_dist.started import DrillError, StartedRun

STEPS, EVERY = 40, 10  # steps of the run, and from one checkpoint to the next
AFTER = 15  # the rank is killed when this step is done
RAY, TORCHRUN = "ray", "torchrun --max-restarts=1"
_END_S = 45.0  # torchrun itself gives its ranks 30 s


def launchers() -> list[str]:
    """Those that are here: a machine that only runs benchmarks needs no Ray."""
    return [RAY, TORCHRUN] if find_spec("ray") else [TORCHRUN]


def recovery(launcher: str, ranks: int, device: str, words: list[str], limit_s: float) -> Row:
    """Trains, kills the last rank with SIGKILL, and waits until the run that `launcher` starts again has ended.

    The row's `recovery_s`: from the blow until a step was done after it; `fine`: the steps that were done twice gave
    the same losses to the bit. Raises RunFailed where the run doesn't end well or not in time; every process has
    ended then.
    """
    log = Path(tempfile.gettempdir()) / f"nsa-recovery-{launcher.split()[0]}-{os.getpid()}.txt"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="nsa-recovery-") as folder:
        run = StartedRun(Path(folder) / "run", log, limit_s, time.monotonic() + limit_s)
        run.python(*_program(launcher, ranks), *words, *_settings(run, ranks, device))
        try:
            row = _strike(run, launcher, ranks)
        except DrillError as error:
            raise RunFailed(ranks - 1, str(error), log) from None
        finally:
            _end(run)
    log.unlink()
    return row


def _program(launcher: str, ranks: int) -> list[str]:
    train = ["-m", "nsa_dist", "train"]
    if launcher == RAY:
        return train
    # The agent looks after its processes every so many seconds: that is part of a recovery's time.
    agent = ["--standalone", f"--nproc-per-node={ranks}", "--max-restarts=1", "--monitor-interval=0.2"]
    return ["-m", "torch.distributed.run", *agent, *train]


def _settings(run: StartedRun, ranks: int, device: str) -> list[str]:
    words = [f"parallel.cp={ranks}", f"launch.device={device}", f"run.dir={run.dir}"]
    words += [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}"]
    return [*words, "train.validate_every=0", "train.validation_sequences=0"]


def _strike(run: StartedRun, launcher: str, ranks: int) -> Row:
    run.until_step(AFTER)
    os.kill(run.pid(ranks - 1) if launcher == RAY else children(run.process.pid)[-1], signal.SIGKILL)
    killed, before = time.monotonic(), run.records()
    run.until(lambda: len(run.events("training")) >= 2, "it was started again")
    first = run.events("training")[-1]["step"]
    old = before.get(first + 1)  # until it is done again, with other times
    run.until(lambda: run.records().get(first + 1, old) != old, "it trained again")
    seconds = time.monotonic() - killed
    run.finish()
    losses = run.losses()
    if len(losses) != STEPS:
        raise DrillError(f"ended with {len(losses)} of {STEPS} steps; {run.last_words()}")
    return {
        "part": "recovery",
        "ranks": ranks,
        "killed_rank": ranks - 1,
        "killed_after_step": max(before),
        "resumed_from_step": first,
        "recovery_s": seconds,
        "steps": len(losses),
        "launcher": launcher,
        "fine": all(before[step]["loss"] == losses[step] for step in before if step > first),
    }


def _end(run: StartedRun) -> None:
    """As a user ends it, and by force where that doesn't do."""
    if run.process.poll() is None:
        run.process.terminate()
        try:
            run.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            kill_tree(run.process.pid)
            run.process.wait()
