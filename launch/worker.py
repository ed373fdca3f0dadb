"""One rank: a Ray actor that runs the given function in one thread and hands out its reports in another."""

import os
import pickle
import queue
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ray import cloudpickle

from nsa_dist.stop import die_with_parent


@dataclass(frozen=True)
class Group:
    """What a rank needs to join the process group. The store listens on `port` of this machine alone."""

    rank: int
    world_size: int
    port: int
    device: str
    timeout_s: float


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: `result` (pickled), or `error` in one line and at which time (s, this machine's clock)."""

    at: float
    result: bytes = b""
    error: str = ""
    collective: bool = False  # the error tells of a connection to other ranks
    bad_input: bool = False


class Worker:
    """The actor. `run`, `reports` and `stop` are called at the same time (max_concurrency=3)."""

    def __init__(self, log: str, threads: int) -> None:
        die_with_parent()
        _redirect_output(Path(log))
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is imported, below
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        # gloo and NCCL listen on the machine's outer address otherwise
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
        self._threads = threads
        self._stop = False
        self._events: queue.SimpleQueue[dict[str, Any] | Outcome] = queue.SimpleQueue()

    def run(self, group: Group, call: bytes) -> None:
        """Runs the pickled (fn, args) as fn(*args, report=...); the outcome follows the last report."""
        try:
            outcome = Outcome(time.time(), result=self._run(group, call))
        except BaseException as error:
            from nsa_dist.process import describe, is_bad_input, is_collective_error

            traceback.print_exc()  # into the log
            outcome = Outcome(
                time.time(),
                error=describe(error),
                collective=is_collective_error(error),
                bad_input=is_bad_input(error),
            )
        self._events.put(outcome)

    def reports(self, wait_s: float) -> list[dict[str, Any] | Outcome]:
        """What was reported since the last call, waiting for something for at most wait_s seconds."""
        found = []
        try:
            found.append(self._events.get(timeout=wait_s))
            while True:
                found.append(self._events.get_nowait())
        except queue.Empty:
            return found

    def stop(self) -> None:
        """From now on the function's reports are answered with True: it should end when it can."""
        self._stop = True

    def _report(self, event: dict[str, Any]) -> bool:
        self._events.put(event)
        return self._stop

    def _run(self, group: Group, call: bytes) -> bytes:
        import torch
        import torch.distributed as dist

        from nsa_dist.process import process_group

        torch.set_num_threads(self._threads)  # OpenMP's setting belongs to the thread that runs the function
        fn, args = cloudpickle.loads(call)
        store = dist.TCPStore("127.0.0.1", group.port, timeout=timedelta(seconds=group.timeout_s))
        with process_group(store, group.rank, group.world_size, group.device, 0, group.timeout_s):
            result = fn(*args, report=self._report)
        return pickle.dumps(result)


def _redirect_output(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
