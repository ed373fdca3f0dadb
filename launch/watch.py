"""Follows the ranks of one attempt until all have ended or one has failed, and names the first cause."""

import pickle
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from nsa_dist.launch.placement import Node, Placed, is_alive
from nsa_dist.launch.worker import Outcome
from nsa_dist.process import RunFailed

OnReport = Callable[[int, dict[str, Any]], object]

_POLL_S = 1.0  # a host's answer is held back so long when it has nothing to report
# The survivors' collective errors arrive before the failure that caused them: wait for it so long,
_CAUSE_S = 10.0
# or until Ray has declared a node dead that doesn't answer any more,
_NODE_S = 60.0
_SILENT_S = 3.0
# and once the cause is there, for an earlier one that is still on its way.
_EARLIER_S = 0.5
# Between two looks; where it was longer this process stood still itself, and no rank was silent.
_PAUSE_S = 20.0
_WAITING = re.compile(r"torch/distributed|/parallel/exchange\.py")  # files in which a rank waits for others


class Failed(RunFailed):
    """A rank's failure, first cause of an attempt's end.

    kind: killed, lost (its node), hang, error, not_finite; node: the rank's; step: the last that the run had done;
    at: when it was seen (s since 1970); not_finite: the step whose loss was not.
    """

    def __init__(self, rank: int, cause: str, log: Path, bad_input: bool = False) -> None:
        super().__init__(rank, cause, log, bad_input)
        self.log = log
        self.kind, self.step, self.not_finite, self.at = "error", 0, 0, time.time()
        self.node: Node | None = None


@dataclass(frozen=True)
class _Failure:
    rank: int
    at: float  # s, that machine's clock
    cause: str
    kind: str
    collective: bool = False
    bad_input: bool = False
    not_finite: int = 0


@dataclass
class _Pulse:
    """When a rank was heard last, and how long it may be silent."""

    heard: float
    busy: str = "start-up"  # with what takes as long as it takes; "" in the training loop
    step: int = 0
    longest: float = 0.0  # s between two heartbeats

    def take(self, event: dict[str, Any], now: float) -> None:
        kind = event.get("kind")
        if kind == "beat":
            if self.busy in ("", "first step"):
                self.longest = max(self.longest, now - self.heard)
            self.busy, self.step = "", event["step"]
        elif kind == "busy":
            self.busy, self.step = event["what"], event.get("step", self.step)
        self.heard = now

    def limit(self, heartbeat_s: float, timeout_s: float) -> float:
        """A step of the usual length is no hang; outside the loop the collectives' own limit goes first."""
        return timeout_s + heartbeat_s if self.busy else max(heartbeat_s, 2 * self.longest)


class Watch:
    """Made when the ranks have been started. heartbeat_s 0: silence is no failure."""

    def __init__(
        self,
        placed: list[Placed],
        on_report: OnReport,
        logs: Path,
        stop: Callable[[], bool],
        heartbeat_s: float = 0,
        timeout_s: float = 600,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._placed, self._on_report, self._logs, self._stop, self._tick = placed, on_report, logs, stop, tick
        self._heartbeat_s, self._timeout_s = heartbeat_s, timeout_s
        self._node_of = {rank: one for one in placed for rank in one.ranks}
        self._told = False  # the ranks, to stop
        self._results: dict[int, Any] = {}
        self._failures: dict[int, _Failure] = {}
        now = self._looked = time.monotonic()
        self._pulse = {rank: _Pulse(now) for rank in self._node_of}
        self._polls = {self._poll(i): i for i in range(len(placed))}
        self._answered = dict.fromkeys(range(len(placed)), now)

    def results(self) -> list[Any]:
        """Of all ranks, in their order. Raises Failed when one has failed; the others still run then."""
        while self._running() and not self._failures:
            self._look()
            self._find_hang()
            self._tick()
        if not self._failures:
            return [self._results[rank] for rank in sorted(self._results)]
        start = time.monotonic()
        while self._running() and time.monotonic() < start + self._patience_s():
            self._look()
        raise self._first_cause()

    def _running(self) -> list[int]:
        return [rank for rank in self._node_of if rank not in self._results and rank not in self._failures]

    def _patience_s(self) -> float:
        if not all(failure.collective for failure in self._failures.values()):
            return _EARLIER_S
        now = time.monotonic()
        silent = [i for i in self._polls.values() if now > self._answered[i] + _SILENT_S]
        return _NODE_S if silent else _CAUSE_S

    def _poll(self, index: int) -> Any:
        return self._placed[index].host.reports.remote(_POLL_S)

    def _look(self) -> None:
        """Takes in what arrives in the next moment."""
        if self._stop() and not self._told:  # asked each time: it raises where somebody insists
            self._told = True
            for one in self._placed:
                one.host.stop.remote()
        ready, _ = ray.wait(list(self._polls), timeout=_EARLIER_S / 2)
        for ref in ready:
            index = self._polls.pop(ref)
            try:
                events = ray.get(ref)
            except RayActorError:
                self._lost(self._placed[index])
                continue
            self._answered[index] = time.monotonic()
            for rank, event in events:
                self._take(rank, event)
            if set(self._placed[index].ranks) & set(self._running()):
                self._polls[self._poll(index)] = index

    def _take(self, rank: int, event: dict[str, Any] | Outcome) -> None:
        if isinstance(event, dict):
            self._pulse[rank].take(event, time.monotonic())
            self._on_report(rank, event)
        elif event.error:
            kind = "killed" if event.died else "not_finite" if event.not_finite else "error"
            self._failures[rank] = _Failure(
                rank, event.at, event.error, kind, event.collective, event.bad_input, event.not_finite
            )
        else:
            self._results[rank] = pickle.loads(event.result)

    def _lost(self, one: Placed) -> None:
        """The host is gone: with its node, most often."""
        deadline = time.monotonic() + _SILENT_S
        while is_alive(one.node.id) and time.monotonic() < deadline:
            time.sleep(0.1)
        alive = is_alive(one.node.id)
        cause = "its host's process died" if alive else f"node {one.node.name} was lost"
        for rank in one.ranks:
            if rank not in self._results and rank not in self._failures:
                self._failures[rank] = _Failure(rank, time.time(), cause, "killed" if alive else "lost")

    def _find_hang(self) -> None:
        now, before = time.monotonic(), self._looked
        self._looked = now
        if now > before + _PAUSE_S:
            for pulse in self._pulse.values():
                pulse.heard += now - before
        if not self._heartbeat_s or self._failures:
            return
        for rank in self._running():
            pulse = self._pulse[rank]
            limit = pulse.limit(self._heartbeat_s, self._timeout_s)
            if now > pulse.heard + limit:
                where = self._stacks()
                guilty = _guilty(where, self._pulse)
                doing = pulse.busy or f"step {pulse.step + 1}"
                cause = f"no heartbeat for {now - pulse.heard:.0f} s (limit {limit:.0f} s) in {doing}"
                cause += f"; {_place(where[guilty])}" if guilty in where else ""
                self._failures[guilty] = _Failure(guilty, time.time(), cause, "hang")
                return

    def _stacks(self) -> dict[int, str | None]:
        """Of the ranks whose hosts answer; each rank's goes into its log, too."""
        found: dict[int, str | None] = {}
        for ref in [one.host.stacks.remote() for one in self._placed]:
            try:
                found |= ray.get(ref, timeout=_SILENT_S)
            except (RayError, GetTimeoutError):
                continue
        return found

    def _first_cause(self) -> Failed:
        first = min(self._failures.values(), key=lambda failure: (failure.collective, failure.at))
        cause = first.cause
        running = self._running()
        if first.collective and running:
            rank = min(running, key=lambda rank: self._pulse[rank].heard)
            pulse = self._pulse[rank]
            step = f" (step {pulse.step})" if pulse.step else ""
            cause += f"; rank {rank} still runs and was last heard {time.monotonic() - pulse.heard:.0f} s ago{step}"
        failed = Failed(first.rank, cause, self._logs / f"rank-{first.rank}.txt", first.bad_input)
        failed.kind, failed.not_finite = first.kind, first.not_finite
        failed.node = self._node_of[first.rank].node
        failed.step = max(pulse.step for pulse in self._pulse.values())
        return failed


def _guilty(stacks: dict[int, str | None], pulses: dict[int, _Pulse]) -> int:
    """The rank for which the others wait: one that doesn't answer, else one that is in no collective."""

    def order(rank: int) -> tuple[int, int, float]:
        stack = stacks.get(rank)
        innermost = re.findall(r"\(most recent call first\):\n\s*(File .*)", stack or "")
        waiting = any(_WAITING.search(line) for line in innermost)
        return (2 if waiting else 1 if stack else 0, pulses[rank].step, pulses[rank].heard)

    return min(pulses, key=order)


def _place(stack: str | None) -> str:
    """Where a rank stands, in a few words."""
    if not stack:
        return "its process doesn't answer (stopped, or stuck in the kernel)"
    lines = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', stack)
    own = [line for line in lines if "nsa_dist" in line[0] or "/parallel/" in line[0]] or lines
    return f"in {own[0][2]}, {Path(own[0][0]).name}:{own[0][1]}" if own else "its place is in its log"
