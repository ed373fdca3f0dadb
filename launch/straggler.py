"""Finds the rank for which the others wait, step after step."""

import statistics
import time
from collections import deque

_STEPS = 10  # in a row
_SHARE = 0.3  # of their time that the others wait longer than it


class Stragglers:
    """Takes each rank's heartbeats; tells of a rank once, and again only after it has been as quick as the others.

    The time that a rank stands still in collectives is measured on CPUs; on GPUs it is 0, and nothing is found.
    """

    def __init__(self, ranks: int) -> None:
        self._waits: dict[int, deque[float]] = {rank: deque(maxlen=_STEPS) for rank in range(ranks)}
        self._ends: dict[int, deque[float]] = {rank: deque(maxlen=_STEPS + 1) for rank in range(ranks)}
        self._told: int | None = None

    def beat(self, rank: int, waited_s: float, now: float | None = None) -> tuple[int, float, float] | None:
        """The rank, for how long the others wait for it in a step, and how long a step is (s); or None."""
        self._waits[rank].append(waited_s)
        self._ends[rank].append(time.monotonic() if now is None else now)
        if len(self._waits) < 2 or any(len(ends) <= _STEPS for ends in self._ends.values()):
            return None
        waits = {rank: statistics.mean(values) for rank, values in self._waits.items()}
        step_s = statistics.mean((ends[-1] - ends[0]) / _STEPS for ends in self._ends.values())
        slow = min(waits, key=waits.__getitem__)
        lag = statistics.median(wait for other, wait in waits.items() if other != slow) - waits[slow]
        if lag < _SHARE * step_s:
            self._told = None if lag < _SHARE * step_s / 2 else self._told
            return None
        if self._told == slow:
            return None
        self._told = slow
        return slow, lag, step_s
