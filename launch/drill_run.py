"""One run of the drill: the launcher as a job has it, on a cluster of this machine, with what its folder says."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nsa_dist.checkpoint import checkpoints
from nsa_dist.config import Config
from nsa_dist.launch.cluster import Cluster
from nsa_dist.launch.package import JOB, versions
from nsa_dist.launch.processes import kill_tree
from nsa_dist.metrics import FILE
from nsa_dist.rundir import EVENTS


class DrillError(RuntimeError):
    """A run of the drill didn't get where it had to, in one line."""


class DrillRun:
    """Started when made. Times are in s since 1970."""

    def __init__(
        self,
        cluster: Cluster,
        config: Config,
        not_finite: int = 0,
        limit_s: float = 300,
        program: tuple[str, ...] = ("nsa_dist", "job"),
    ) -> None:
        self.dir = Path(config.run.dir)
        self.dir.mkdir(parents=True, exist_ok=True)
        job = {"config": asdict(config), "versions": versions(), "wait": False, "not_finite": not_finite}
        (self.dir / JOB).write_text(json.dumps(job))
        self._environment, self._limit_s, self._program = cluster.environment(), limit_s, program
        self.start()

    def start(self) -> None:
        """The launcher; once more after its end."""
        with (self.dir / "out.txt").open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self._program],
                cwd=self.dir,
                env=self._environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def losses(self) -> dict[int, float]:
        """Of each step that is written."""
        try:
            rows = [json.loads(line) for line in (self.dir / FILE).read_text().split("\n")[:-1]]
        except (OSError, ValueError):
            return {}
        return {row["step"]: row["loss"] for row in rows}

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Of these kinds."""
        try:
            rows = [json.loads(line) for line in (self.dir / EVENTS).read_text().split("\n")[:-1]]
        except (OSError, ValueError):
            return []
        return [row for row in rows if row["kind"] in kinds]

    def pid(self, rank: int) -> int:
        """Of the rank that runs now."""
        return int(self.events("ranks")[-1]["ranks"][rank]["pid"])

    def launcher(self) -> int:
        """The process id of the launcher itself."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0])

    def until(self, true: Callable[[], Any], what: str) -> None:
        """Raises DrillError where that doesn't come true."""
        end = time.monotonic() + self._limit_s
        while not true():
            if self.process.poll() is not None or time.monotonic() > end:
                why = "no time is left" if self.process.poll() is None else f"status {self.process.returncode}"
                raise DrillError(f"{why} before {what}; {self.lines()[-1]}")
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Raises DrillError where that step isn't reached."""
        self.until(lambda: max(self.losses(), default=0) >= step, f"step {step}")

    def finish(self, status: int = 0) -> None:
        """Waits for its end. Raises DrillError for another exit status."""
        try:
            found = self.process.wait(self._limit_s)
        except subprocess.TimeoutExpired:
            raise DrillError(f"no end in {self._limit_s:.0f} s; {self.lines()[-1]}") from None
        if found != status:
            raise DrillError(f"ended with status {found}; {self.lines()[-1]}")

    def newest(self) -> Path:
        """Its newest checkpoint, whole or not."""
        found = checkpoints(self.dir)
        if not found:
            raise DrillError("there is no checkpoint")
        return Path(str(found[0]))  # they are in its folder

    def lines(self) -> list[str]:
        """What it has said."""
        return (self.dir / "out.txt").read_text(errors="replace").strip().splitlines() or ["no word"]

    def close(self) -> None:
        """Ends all of it."""
        kill_tree(self.process.pid)
        for row in self.events("ranks"):  # a stopped one, say
            for rank in row["ranks"]:
                with contextlib.suppress(ProcessLookupError, OSError):
                    if b"nsa_dist.launch.forker" in Path(f"/proc/{rank['pid']}/cmdline").read_bytes():
                        os.kill(rank["pid"], signal.SIGKILL)
        self.process.wait()
