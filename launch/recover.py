"""Training through failures: starts ranks on what the cluster has, and again from the newest whole checkpoint."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError

from nsa_dist.auto import choose_sizes, has_auto
from nsa_dist.checkpoint import checkpoints, newest, read_trainer
from nsa_dist.config import Config, ConfigError
from nsa_dist.console import Console
from nsa_dist.launch.controller import started
from nsa_dist.launch.package import WAITING
from nsa_dist.launch.placement import Node, Placed, Places, owners
from nsa_dist.launch.straggler import Stragglers
from nsa_dist.launch.watch import Failed, Watch
from nsa_dist.process import RunFailed
from nsa_dist.rundir import EVENTS, Resume, event, own_checkpoints, store_of, write_config
from nsa_dist.store import StoreError
from nsa_dist.train import train

_HOSTS_S = 300.0  # for hosts to start
_LOOK_S = 2.0  # between two looks for more places
_LONGEST_S = 60.0  # of waiting before a start
_NODE_FAILURES, _NODE_S = 3, 24 * 3600.0  # a node with so many failures in such a time is left out


def train_through(
    config: Config,
    resume: Resume,
    console: Console,
    device: str,
    stop: Callable[[], bool],
    fn: Callable[..., bool] = train,
    first_wait_s: float = 30,
) -> None:
    """Trains as `config` says on the cluster that this process is connected to, until the end or until stop().

    A run with parallel.dp or parallel.cp=auto takes what the cluster has, after each failure and when it has more.
    first_wait_s: for places at the start; a run that ended just now frees its own with a delay.
    Raises RunFailed for what starting again can't mend.
    """
    run = _Run(config, resume, console, device, stop, fn)
    try:
        run.train(first_wait_s)
    finally:
        run.places.close()


class _Run:
    def __init__(
        self,
        config: Config,
        resume: Resume,
        console: Console,
        device: str,
        stop: Callable[[], bool],
        fn: Callable[..., bool],
    ) -> None:
        self._config, self._resume, self._console, self._stop, self._fn = config, resume, console, stop, fn
        self._device, self.places = device, Places(device)
        self._dir = Path(config.run.dir)
        self._skip = _skipped(self._dir)
        self._failures, self._progress = 0, 0
        self._progress = self._saved()
        self._skipped_at = -1  # the newest checkpoint when a batch was skipped
        self._by_node: dict[str, list[float]] = {}  # times of failures
        self._leaving: set[str] = set()  # ids of nodes that are about to go
        self._placed: list[Placed] = []
        self._world = 0
        self._start = 0  # step from which the ranks have gone on
        self._change = ""  # why the ranks were asked to end, though nobody has stopped the run
        self._again: dict[str, Any] = {}  # of the recovery under way, for its event
        self._next_look = 0.0
        self._stragglers = Stragglers(0)

    def train(self, first_wait_s: float) -> None:
        wait_s = first_wait_s
        while (choice := self._choose(wait_s)) is not None:
            wait_s = self._config.launch.wait_s
            try:
                if self._attempt(*choice) or self._stop():
                    return
            except Failed as failure:
                self._failed(failure)
            except StoreError as error:
                self._failed(self._nobody(str(error), "error"))
            except RayActorError:  # a node was lost just now
                self._failed(self._nobody("a host was lost while the ranks started", "lost"))
            except RayError as error:
                self._failed(self._nobody(f"the ranks were not started: {_last_words(error)}", "error"))
            else:
                self.places.settle()

    def _attempt(self, config: Config, nodes: list[Node], chosen: list[int]) -> bool:
        """Starts the ranks and follows them; whether they have come to the run's end."""
        launch = self._config.launch
        self._placed, self._world, self._change = self.places.placed(nodes, chosen), len(chosen), ""
        self._stragglers = Stragglers(self._world)
        placed = replace(config, launch=replace(launch, device=self._device))
        if has_auto(self._config):
            with suppress(OSError):
                write_config(config)
        fn, args = partial(self._fn, skip=frozenset(self._skip)), (placed, self._resume_from())
        logs = self._dir / "logs"
        with started(self._placed, fn, args, logs, self._device, launch.timeout_s) as pids:
            where = {rank: one.node for one in self._placed for rank in one.ranks}
            ranks = [
                {"rank": rank, "node": node.name, "host": node.machine, "pid": pids[rank]}
                for rank, node in sorted(where.items())
            ]
            self._event("ranks", dp=config.parallel.dp, cp=config.parallel.cp, ranks=ranks)
            stop = lambda: self._stop() or bool(self._change)  # noqa: E731
            watch = Watch(
                self._placed, self._report, logs, stop, launch.heartbeat_s, launch.timeout_s, self._look_for_more
            )
            return all(watch.results())

    def _resume_from(self) -> Resume:
        return own_checkpoints(self._config) if checkpoints(store_of(self._config)) else self._resume

    def _saved(self) -> int:
        """Step of the newest whole checkpoint."""
        try:
            path = newest(store_of(self._config))
            return int(read_trainer(path)["step"]) if path else 0
        except StoreError:  # an outage: no later one is known
            return self._progress

    def _report(self, rank: int, report: dict[str, Any]) -> None:
        self._console.report(report)
        if report["kind"] == "busy" and report["what"] == "first step":
            self._start = report["step"]
        elif report["kind"] == "beat":
            if self._again and not self._change and report["step"] > self._start:
                self._recovered()
            if slow := self._stragglers.beat(rank, report["waited_s"]):
                self._tell_straggler(report["step"], *slow)
        elif report["kind"] == "leaving":
            node = next(one.node for one in self._placed if rank in one.ranks)
            self._leaving.add(node.id)
            self._ask_to_end(f"rank {rank} on {node.name} was asked to end (SIGTERM)")

    def _tell_straggler(self, step: int, rank: int, lag_s: float, step_s: float) -> None:
        node = next(one.node for one in self._placed if rank in one.ranks)
        self._event("straggler", rank=rank, node=node.name, host=node.machine, step=step, lag_s=lag_s, step_s=step_s)
        self._console.say(
            f"straggler: rank {rank} on {node.name} ({node.machine}); the others wait {lag_s:.2f} s of each "
            f"{step_s:.2f} s for it"
        )

    # Failures

    def _failed(self, failure: Failed) -> None:
        """Says what has happened, makes everything ready to start again. Raises RunFailed to give up."""
        if failure.bad_input:
            raise failure
        where = f" on {failure.node.name}" if failure.node else ""
        self._console.say(f"failure: rank {failure.rank}{where}, after step {failure.step}: {failure.cause}")
        self.places.settle()
        saved = self._saved()
        if reason := self._hopeless(failure, saved):
            raise RunFailed(failure.rank, f"{failure.cause}; {reason}", failure.log)
        self._event("failure", **_facts(failure), step=failure.step, failures=self._failures)
        self._again = {"seen": failure.at, "step": failure.step, **_facts(failure)}
        self._note_node(failure)
        self._sleep(0 if self._failures == 1 else min(2.0 ** (self._failures - 1), _LONGEST_S))

    def _hopeless(self, failure: Failed, saved: int) -> str:
        """Why not to start again, or ""."""
        if failure.kind == "not_finite":
            step = failure.not_finite
            if step in self._skip or saved <= self._skipped_at:
                return f"a batch was skipped already; what is known is in {self._dir / 'not-finite'}"
            self._skip.add(step)
            self._skipped_at = saved
            self._event("batch_skipped", step=step, cause=failure.cause)
        if saved > self._progress:
            self._failures, self._progress = 0, saved
        self._failures += 1
        if self._failures > self._config.launch.max_failures:
            return f"given up after {self._failures} failures without a new checkpoint (launch.max_failures)"
        return ""

    def _note_node(self, failure: Failed) -> None:
        if failure.node is None or failure.kind in ("not_finite", "lost"):
            return
        now = time.time()
        recent = [at for at in self._by_node.get(failure.node.name, []) if at > now - _NODE_S] + [now]
        self._by_node[failure.node.name] = recent
        if len(recent) == _NODE_FAILURES:
            self._event("node_left_out", node=failure.node.name, failures=len(recent))

    def _nobody(self, cause: str, kind: str) -> Failed:
        """A failure that is no rank's."""
        failed = Failed(0, cause, self._dir / EVENTS)
        failed.kind, failed.step = kind, self._start
        return failed

    def _recovered(self) -> None:
        again, self._again = self._again, {}
        seconds = time.time() - again.pop("seen")
        lost = max(0, again.pop("step") - self._start)
        how = {"from_step": self._start, "steps_lost": lost, "seconds": round(seconds, 2), "ranks": self._world}
        self._event("recovery", **again, **how)
        self._console.say(
            f"going on from step {self._start} on {self._world} ranks, {lost} steps lost; training again after "
            f"{seconds:.1f} s"
        )

    # Places

    def _choose(self, wait_s: float) -> tuple[Config, list[Node], list[int]] | None:
        """Numbers of ranks and where they run, hosts started; waits for places. None: asked to stop meanwhile."""
        end, told = time.monotonic() + wait_s, False
        while not self._stop():
            nodes = self.places.nodes()
            there = sum(node.places for node in nodes)
            for usable in (self._usable(nodes), [node for node in nodes if node.id not in self._leaving]):
                found = self._sized(usable)
                if found and self._reserved(usable, found[1]):
                    if found[2] and len(found[1]) != self._world:
                        self._console.say(found[2])
                    return found[0], usable, found[1]
            if not told:
                told = True
                wanted = f"dp {self._config.parallel.dp} x cp {self._config.parallel.cp}"
                self._console.say(f"{WAITING}places for {wanted}; {there} are free on {len(nodes)} nodes")
            if time.monotonic() > end:
                raise RunFailed(
                    0, f"no places for the ranks within {wait_s:.0f} s (launch.wait_s)", self._dir / EVENTS
                )
            self._sleep(0.5)
        return None

    def _usable(self, nodes: list[Node]) -> list[Node]:
        now = time.time()
        failing = {
            name
            for name, times in self._by_node.items()
            if len([at for at in times if at > now - _NODE_S]) >= _NODE_FAILURES
        }
        return [node for node in nodes if node.name not in failing and node.id not in self._leaving]

    def _sized(self, nodes: list[Node]) -> tuple[Config, list[int], str] | None:
        """Configuration, each rank's node, and why; None where the places are too few."""
        places = [node.places for node in nodes]
        try:
            config, why = choose_sizes(self._config, places)
        except ConfigError:
            return None
        dp, cp = config.parallel.dp, config.parallel.cp
        return (config, owners(places, dp, cp), why) if dp * cp <= sum(places) else None

    def _reserved(self, nodes: list[Node], chosen: list[int]) -> bool:
        """Whether the hosts have started. Raises Failed with their words where they can't."""
        self.places.reserve(nodes, chosen)
        self.places.give_back({nodes[index].id for index in set(chosen)})
        try:
            return self.places.ready(_HOSTS_S)
        except RayActorError:
            self.places.settle()  # a node was lost meanwhile
            return False
        except RayError as error:
            raise RunFailed(0, _last_words(error), self._dir / EVENTS) from None

    def _look_for_more(self) -> None:
        """Where the cluster has more places, starts hosts there, and then asks the ranks to end with a checkpoint."""
        if not has_auto(self._config) or self._change or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_S
        nodes = self._usable(self.places.nodes(held_stay=True))
        found = self._sized(nodes)
        if found is None or len(found[1]) <= self._world:
            return
        try:
            self.places.reserve(nodes, found[1])
            if self.places.ready(0):
                self._ask_to_end(f"{len(found[1])} places instead of {self._world}")
        except RayError:
            self.places.give_back({one.node.id for one in self._placed})

    def _ask_to_end(self, why: str) -> None:
        """The ranks end with a checkpoint, and are started again at once."""
        self._change = why
        self._console.say(f"change: {why}; starting again from a checkpoint of this step")
        self._again = {"seen": time.time(), "step": 0, "failure": "resize", "cause": why, "rank": None, "node": None}

    def _event(self, kind: str, **fields: Any) -> None:
        with suppress(OSError):  # a full disk, say: the screen has it
            event(self._dir, kind, **fields)

    def _sleep(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._stop():
            time.sleep(min(0.1, seconds))


def _facts(failure: Failed) -> dict[str, Any]:
    node = failure.node
    return {
        "failure": failure.kind,
        "rank": failure.rank,
        "node": node.name if node else None,
        "host": node.machine if node else None,
        "cause": failure.cause,
    }


def _last_words(error: RayError) -> str:
    return (str(error).strip().splitlines() or ["no word"])[-1].removeprefix("RuntimeError: ")


def _skipped(run_dir: Path) -> set[int]:
    """Steps whose batches an earlier start of this run has skipped."""
    found = set()
    with suppress(OSError):
        for line in (run_dir / EVENTS).read_text().splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if row.get("kind") == "batch_skipped":
                    found.add(int(row["step"]))
    return found
