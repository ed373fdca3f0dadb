"""The actor that holds a node's places for a run: it starts the node's ranks, hands out what they tell, ends them.

It outlives the ranks: after a failure new ones are forked from the process that has torch imported already.
"""

import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

from nsa_dist.launch.worker import Group, Outcome

_START_S = 300.0  # for the forker: torch from a shared file system, many nodes at once
_EXIT_S = 20.0  # for a process that was killed to be gone


class Host:
    """`ready`, `start`, `reports`, `stop`, `stacks` and `end` may be called at the same time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        # __init__ has no time to wait: several hosts start side by side.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "nsa_dist.launch.forker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            env=os.environ | _forker_environment(),
        )
        theirs.close()
        self._forker = Connection(ours.detach())
        self._ready = threading.Event()
        self._ranks: dict[int, _Rank] = {}
        self._events: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def ready(self) -> None:
        """Returns when ranks can start. Raises RuntimeError with the forker's last words where it doesn't come up."""
        if not self._ready.wait(_START_S) or self._process.poll() is not None:
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines() or ["no word"]
            raise RuntimeError(f"workers can't start: {lines[-1]}")

    def start(self, groups: list[Group], call: bytes) -> dict[int, int]:
        """Starts these ranks with the pickled (fn, args); their process ids."""
        self._ranks, self._events = {}, queue.SimpleQueue()
        for group in groups:
            ours, theirs = socket.socketpair()
            rank = self._ranks[group.rank] = _Rank(group, Connection(ours.detach()), self._events)
            self._forker.send(("start", group, call))
            send_handle(self._forker, theirs.fileno(), self._process.pid)
            theirs.close()
            if not rank.started.wait(_EXIT_S):
                raise RuntimeError(f"rank {group.rank} was not started")
        return {number: rank.pid for number, rank in self._ranks.items()}

    def reports(self, wait_s: float) -> list[tuple[int, dict[str, Any] | Outcome]]:
        """What ranks have told since the last call, waiting for something for at most wait_s seconds."""
        events, found = self._events, []
        try:
            found.append(events.get(timeout=wait_s))
            while True:
                found.append(events.get_nowait())
        except queue.Empty:
            return found

    def stop(self) -> None:
        """From now on the ranks' reports are answered with True: they should end when they can."""
        for rank in self._ranks.values():
            with suppress(OSError):  # it has ended
                rank.channel.send("stop")

    def stacks(self) -> dict[int, str | None]:
        """Where each rank stands, as Python's faulthandler writes it; None of one that doesn't answer."""
        sizes = {number: _size(rank.group.log) for number, rank in self._ranks.items()}
        living = {number: rank for number, rank in self._ranks.items() if not rank.exited.is_set()}
        for rank in living.values():
            with suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGUSR1)
        time.sleep(1)
        return {number: _written(rank.group.log, sizes[number]) or None for number, rank in living.items()}

    def end(self) -> None:
        """Kills the ranks; returns when they are gone. Raises RuntimeError for one that stays."""
        self._forker.send(("end",))
        deadline = time.monotonic() + _EXIT_S
        for number, rank in self._ranks.items():
            if not rank.exited.wait(max(0.0, deadline - time.monotonic())):
                raise RuntimeError(f"rank {number}: process {rank.pid} was killed and stays")

    def _listen(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                kind, *more = self._forker.recv()
                if kind == "ready":
                    self._ready.set()
                elif kind == "started":
                    self._ranks[more[0]].pid = more[1]
                    self._ranks[more[0]].started.set()
                else:
                    pid, status = more
                    for rank in self._ranks.values():
                        if rank.pid == pid:
                            rank.status = status
                            rank.exited.set()
        self._process.wait()
        self._ready.set()  # whoever waits finds out
        for rank in self._ranks.values():
            rank.exited.set()


def _forker_environment() -> dict[str, str]:
    """It imports what this process does; and asking whether there are GPUs must not start CUDA before the fork."""
    path = os.pathsep.join(path for path in sys.path if path)
    return {"PYTHONPATH": path, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class _Rank:
    """One process: what it sends goes into `events`, and an Outcome if it ends without one."""

    def __init__(self, group: Group, channel: Connection, events: "queue.SimpleQueue[tuple[int, Any]]") -> None:
        self.group, self.channel, self.pid = group, channel, 0
        self.status: int | None = None
        self.started, self.exited = threading.Event(), threading.Event()
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: "queue.SimpleQueue[tuple[int, Any]]") -> None:
        item: Any = None
        try:
            while not isinstance(item, Outcome):
                item = self.channel.recv()
                events.put((self.group.rank, item))
        except (EOFError, OSError):
            at = time.time()
            self.exited.wait(_EXIT_S)
            events.put((self.group.rank, Outcome(at, error=_death(self.status), died=True)))


def _death(status: int | None) -> str:
    if status is None:
        return "its process died"
    if status < 0:
        hint = " (out of memory, or by hand)" if -status == signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-status).name}{hint}"
    return f"its process ended with status {status}"


def _size(path: str) -> int:
    return Path(path).stat().st_size if Path(path).is_file() else 0


def _written(path: str, since: int) -> str:
    with suppress(OSError), Path(path).open("rb") as file:
        file.seek(since)
        return file.read().decode(errors="replace")
    return ""
