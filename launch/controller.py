"""The controller: places workers, gives them their ranks, shows their reports, names the first failure.

Works on whatever Ray this process is connected to. Why actors of our own and not Ray Train: a death is seen at
once, the order of the ranks is ours, and a failure is told in one line.
"""

import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from nsa_dist.launch.worker import Group, Outcome, Worker
from nsa_dist.process import RunFailed, cores

OnReport = Callable[[int, dict[str, Any]], object]

_POLL_S = 1.0  # a worker's answer is held back so long when it has nothing to report
_PLACE_S = 60.0  # for the cluster to reserve its places
# The survivors' collective errors arrive before the failure that caused them: wait for it so long,
_CAUSE_S = 10.0
# and once it is there, for an earlier one that is still on its way.
_EARLIER_S = 0.5


@dataclass(frozen=True)
class _Failure:
    rank: int
    at: float  # s, this machine's clock
    cause: str
    collective: bool = False
    bad_input: bool = False


def run_workers(
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    on_report: OnReport,
    logs: Path,
    device: str = "cpu",
    timeout_s: float = 600,
    stop: Callable[[], bool] = lambda: False,
) -> list[Any]:
    """Runs fn(*args, report=...) in `world_size` processes of one node; their results in the order of ranks.

    In each, torch.distributed is initialised (collectives wait timeout_s seconds at most) and output goes to
    logs/rank-N.txt. on_report(rank, event) is called here for each report(event) there; once stop() is True,
    report answers True there, which asks the function to end. All workers have ended,
    whatever happens, when this returns or raises. Raises RunFailed naming the first cause; the others are
    ended with it.
    """
    with _store() as port, _workers(world_size, device, logs) as workers:
        call = cloudpickle.dumps((fn, args))
        for rank, worker in enumerate(workers):
            worker.run.remote(Group(rank, world_size, port, device, timeout_s), call)
        return _Watch(workers, on_report, logs, stop).results()


@contextmanager
def _store() -> Iterator[int]:
    """The port of a store that meets the ranks; it listens on 127.0.0.1 (torch's own listens everywhere)."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_PLACE_S),
            master_listen_fd=os.dup(server.fileno()),  # the store closes its copy
        )
    yield port
    del store


@contextmanager
def _workers(world_size: int, device: str, logs: Path) -> Iterator[list[Any]]:
    """Actors in the order of a placement group's bundles, which is the order of ranks."""
    gpus = 1 if device == "cuda" else 0
    group = placement_group([{"CPU": 1, "GPU": gpus}] * world_size, strategy="STRICT_PACK")
    if not group.wait(_PLACE_S):
        raise RuntimeError(f"Ray found no place for {world_size} workers in {_PLACE_S:.0f} s")
    threads = max(1, cores() // world_size)
    actor = ray.remote(Worker)
    workers: list[Any] = [
        actor.options(
            num_cpus=1,
            num_gpus=gpus,
            max_concurrency=3,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote(str((logs / f"rank-{rank}.txt").absolute()), threads)
        for rank in range(world_size)
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            ray.kill(worker)
        remove_placement_group(group)


class _Watch:
    """Follows the workers until all have ended or one has failed."""

    def __init__(self, workers: list[Any], on_report: OnReport, logs: Path, stop: Callable[[], bool]) -> None:
        self._workers, self._on_report, self._logs, self._stop = workers, on_report, logs, stop
        self._told = False  # the workers, to stop
        self._results: dict[int, Any] = {}
        self._failures: dict[int, _Failure] = {}
        now = time.monotonic()
        self._heard = dict.fromkeys(range(len(workers)), now)  # when each rank reported last
        self._steps: dict[int, int] = {}  # of each rank's last heartbeat
        self._polls = {self._poll(rank): rank for rank in range(len(workers))}

    def results(self) -> list[Any]:
        while self._polls and not self._failures:
            self._look()
        start = time.monotonic()
        while self._polls and self._failures and time.monotonic() < start + self._patience_s():
            self._look()
        if self._failures:
            raise self._first_cause()
        return [self._results[rank] for rank in range(len(self._workers))]

    def _patience_s(self) -> float:
        return _CAUSE_S if all(f.collective for f in self._failures.values()) else _EARLIER_S

    def _poll(self, rank: int) -> Any:
        return self._workers[rank].reports.remote(_POLL_S)

    def _look(self) -> None:
        """Takes in what arrives in the next moment."""
        if self._stop() and not self._told:
            self._told = True
            for worker in self._workers:
                worker.stop.remote()
        ready, _ = ray.wait(list(self._polls), timeout=_EARLIER_S / 2)
        for ref in ready:
            rank = self._polls.pop(ref)
            try:
                events = ray.get(ref)
            except RayActorError as error:
                self._failures[rank] = _Failure(rank, time.time(), _death(error))
                continue
            for event in events:
                self._take(rank, event)
            if not (events and isinstance(events[-1], Outcome)):
                self._polls[self._poll(rank)] = rank

    def _take(self, rank: int, event: dict[str, Any] | Outcome) -> None:
        self._heard[rank] = time.monotonic()
        if isinstance(event, dict):
            self._steps[rank] = event.get("step", self._steps.get(rank, 0))
            self._on_report(rank, event)
        elif event.error:
            self._failures[rank] = _Failure(rank, event.at, event.error, event.collective, event.bad_input)
        else:
            self._results[rank] = pickle.loads(event.result)

    def _first_cause(self) -> RunFailed:
        first = min(self._failures.values(), key=lambda failure: (failure.collective, failure.at))
        cause = first.cause
        silent = [rank for rank in self._polls.values() if rank not in self._failures]
        if first.collective and silent:
            rank = min(silent, key=self._heard.__getitem__)
            seconds = time.monotonic() - self._heard[rank]
            step = f" (step {self._steps[rank]})" if rank in self._steps else ""
            cause += f"; rank {rank} still runs and was last heard {seconds:.0f} s ago{step}"
        return RunFailed(first.rank, cause, self._logs / f"rank-{first.rank}.txt", first.bad_input)


def _death(error: RayActorError) -> str:
    if "creation task" in str(error):  # the worker's __init__ has raised: the last line says what
        return f"could not start: {str(error).strip().splitlines()[-1].strip()}"
    return "its process died (killed, out of memory, or crashed)"
