"""A rank killed in the middle of a training run under torchrun, and what becomes of the run."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from nsa_dist.bench_rows import Row
from nsa_dist.metrics import FILE
from nsa_dist.process import RunFailed

STEPS, EVERY = 40, 10  # steps of the run, and from one checkpoint to the next
AFTER = 15  # the rank is killed when this step is done


def recovery(ranks: int, device: str, words: list[str], limit_s: float) -> Row:
    """Trains, kills the last rank with SIGKILL, and waits until the run that torchrun starts again has ended.

    The row's `fine`: the steps that were done twice gave the same losses to the bit. Raises RunFailed where the run
    doesn't end well or not in time; every process has ended then.
    """
    with tempfile.TemporaryDirectory(prefix="nsa-recovery-") as folder:
        run, log = Path(folder) / "run", Path(tempfile.gettempdir()) / f"nsa-recovery-{os.getpid()}.txt"
        words = [*words, f"parallel.cp={ranks}", f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}"]
        words += [
            "train.validate_every=0",
            "train.validation_sequences=0",
            f"run.dir={run}",
            f"launch.device={device}",
        ]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        # The agent looks after its processes every so many seconds: that is part of a recovery's time.
        command = [*torchrun, "--max-restarts=1", "--monitor-interval=0.2", "-m", "nsa_dist", "train", *words]
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        try:
            return _follow(process, run, ranks, log, time.monotonic() + limit_s)
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def _follow(process: subprocess.Popen[bytes], run: Path, ranks: int, log: Path, end: float) -> Row:
    def until(done: Any, what: str) -> None:
        while not done():
            if process.poll() is not None or time.monotonic() > end:
                why = f"torchrun ended with status {process.poll()}" if process.poll() is not None else "no time left"
                raise RunFailed(ranks - 1, f"{why} before {what}", log)
            time.sleep(0.02)

    until(lambda: len(_losses(run)) >= AFTER, f"step {AFTER}")
    victim = _children(process.pid)[-1]
    os.kill(victim, signal.SIGKILL)
    killed, before = time.monotonic(), _losses(run)
    until(lambda: len(_starts(run)) >= 2, "the run went on")
    until(lambda: _starts(run)[-1] < len(before) and len(_losses(run)) > _starts(run)[-1], "its first step")
    seconds = time.monotonic() - killed
    until(lambda: process.poll() is not None, "its end")
    after, first = _losses(run), _starts(run)[-1]
    if process.returncode != 0 or len(after) != STEPS:
        raise RunFailed(ranks - 1, f"torchrun ended with status {process.returncode} at step {len(after)}", log)
    log.unlink()
    return {
        "part": "recovery",
        "ranks": ranks,
        "killed_rank": ranks - 1,
        "killed_after_step": len(before),
        "resumed_from_step": first,
        "recovery_s": seconds,
        "steps": len(after),
        "launcher": "torchrun --max-restarts=1",
        "fine": before[first:] == after[first : len(before)],
    }


def _losses(run: Path) -> list[float]:
    """Of each whole line."""
    try:
        lines = (run / FILE).read_text().split("\n")[:-1]
        return [json.loads(line)["loss"] for line in lines]
    except (OSError, ValueError):
        return []


def _starts(run: Path) -> list[int]:
    """From which step training began, each time."""
    try:
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().split("\n")[:-1]]
    except (OSError, ValueError):
        return []
    return [event["step"] for event in events if event["kind"] == "training"]


def _children(pid: int) -> list[int]:
    """Its child processes, in the order in which they started (on Linux)."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]
