"""What a run shows: progress lines, in place on a terminal, and messages."""

import os
import shutil
import sys
from typing import Any, TextIO


class Console:
    """Writes to `stream`. On a terminal the newest progress line replaces the one before."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._in_place = self._stream.isatty()
        self._open_line = False  # a progress line is on the screen, without its end of line

    def report(self, event: dict[str, Any]) -> bool:
        """Shows an event of the trainer's: `step` (a progress line) or `say`; heartbeats pass unseen."""
        if event["kind"] == "step":
            self.step(event["line"])
        elif event["kind"] == "say":
            self.say(event["text"])
        return False  # it never asks the run to stop

    def step(self, line: str) -> None:
        if not self._in_place:
            self._write(line + "\n")
            return
        width = shutil.get_terminal_size().columns - 1  # a full row would scroll
        self._write(f"\r\x1b[K{line[:width]}")
        self._open_line = True

    def say(self, text: str) -> None:
        self.end_line()
        self._write(text + "\n")

    def end_line(self) -> None:
        """Leaves the progress line on the screen; what follows starts below it."""
        if self._open_line:
            self._write("\n")
        self._open_line = False

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:  # `| head` has seen enough: training goes on, metrics.jsonl tells of it
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # else Python complains once more at its end
            os.close(nowhere)
