"""A run that was started in processes of its own, and followed by what its folder says."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_dist.metrics import FILE
from nsa_dist.rundir import EVENTS


class DrillError(RuntimeError):
    """A run in which a failure was made didn't get where it had to, in one line."""


class StartedRun:
    """folder: the run's. out: what it says is appended there. limit_s: of each wait; none goes beyond `end`, on
    time.monotonic's clock. Times in its files are in s since 1970."""

    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path, out: Path, limit_s: float, end: float = math.inf) -> None:
        self.dir, self.out = folder, out
        self._limit_s, self._end = limit_s, end

    def python(self, *words: str, **more: Any) -> None:
        """Starts `python words`, leader of a session; once more after its end."""
        with self.out.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, *words], stdout=out, stderr=out, start_new_session=True, **more
            )

    def records(self) -> dict[int, dict[str, Any]]:
        """Of each step that is written."""
        return {row["step"]: row for row in self._rows(FILE)}

    def losses(self) -> dict[int, float]:
        """Of each step that is written."""
        return {step: row["loss"] for step, row in self.records().items()}

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Of these kinds."""
        return [row for row in self._rows(EVENTS) if row["kind"] in kinds]

    def _rows(self, file: str) -> list[dict[str, Any]]:
        """Of each whole line."""
        try:
            return [json.loads(line) for line in (self.dir / file).read_text().split("\n")[:-1]]
        except (OSError, ValueError):
            return []

    def pid(self, rank: int) -> int:
        """Of the rank that runs now; where Ray has started it."""
        return int(self.events("ranks")[-1]["ranks"][rank]["pid"])

    def until(self, true: Callable[[], Any], what: str) -> None:
        """Raises DrillError where that doesn't come true."""
        end = min(time.monotonic() + self._limit_s, self._end)
        while not true():
            if self.process.poll() is not None or time.monotonic() > end:
                why = "no time is left" if self.process.poll() is None else f"status {self.process.returncode}"
                raise DrillError(f"{why} before {what}; {self.last_words()}")
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Raises DrillError where that step isn't reached."""
        self.until(lambda: max(self.losses(), default=0) >= step, f"step {step}")

    def finish(self, status: int = 0) -> None:
        """Waits for its end. Raises DrillError for another exit status."""
        limit_s = max(0.0, min(self._limit_s, self._end - time.monotonic()))
        try:
            found = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise DrillError(f"no end in {limit_s:.0f} s; {self.last_words()}") from None
        if found != status:
            raise DrillError(f"ended with status {found}; {self.last_words()}")

    def lines(self) -> list[str]:
        """What it has said."""
        return self.out.read_text(errors="replace").strip().splitlines()

    def last_words(self) -> str:
        """The last line with a word."""
        return next((line.strip() for line in reversed(self.lines()) if any(map(str.isalnum, line))), "no word")
