"""Functions that run on several ranks together, as processes of this machine: for benchmarks. Knows no Ray."""

import multiprocessing
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nsa_dist.hosts import INTERFACE, enter
from nsa_dist.parallel.mesh import make_mesh
from nsa_dist.process import RunFailed, cores, describe, is_bad_input, is_collective_error, process_group
from nsa_dist.stop import die_with_parent

_CAUSE_S = 5.0  # the survivors' collective errors may arrive before the failure that caused them


class Ranks:
    """`world_size` processes with torch.distributed among them, listening on 127.0.0.1 alone.

    All of them have ended after `close`, after a call that failed, and when this process ends, however it ends.
    device: `cpu` (gloo) or `cuda` (a GPU for each, NCCL). timeout_s: of a collective. hosts: each rank's network
    namespace, on whose interface alone it listens then.
    """

    def __init__(self, world_size: int, device: str, timeout_s: float = 600, hosts: Sequence[str] = ()) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp(prefix="nsa-ranks-"))
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            words = (rank, world_size, device, timeout_s, str(self._folder), theirs, hosts[rank] if hosts else "")
            process = context.Process(target=_entry, args=words, daemon=True)
            process.start()
            theirs.close()  # so that the process's end is seen here
            self._pipes.append(ours)
            self._processes.append(process)

    def call(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 600) -> list[Any]:
        """fn(mesh, *args) on every rank; the results in rank order.

        Raises RunFailed naming the first cause when one of them fails, dies, or has not answered in time; all are
        ended then.
        """
        for pipe in self._pipes:
            try:
                pipe.send((fn, args))
            except OSError:  # it has died: the answers will tell
                continue
        results: dict[int, Any] = {}
        failures: list[tuple[bool, int, str, bool]] = []  # collective, rank, cause, bad input
        end = time.monotonic() + timeout_s
        while len(results) + len(failures) < len(self._pipes) and time.monotonic() < end:
            answered = {*results, *(rank for _, rank, *_ in failures)}
            open_ = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answered]
            ready = wait(open_, max(0.0, min(end - time.monotonic(), 1.0)))
            for rank in [rank for rank, pipe in enumerate(self._pipes) if pipe in ready]:
                self._take(rank, results, failures)
            if failures:
                # A failure of its own is known at once; a broken connection is most often somebody else's.
                end = min(end, time.monotonic() + (_CAUSE_S if all(f[0] for f in failures) else 0.0))
        if len(results) == len(self._pipes):
            return [results[rank] for rank in range(len(self._pipes))]
        self._kill()
        if not failures:
            late = next(rank for rank in range(len(self._pipes)) if rank not in results)
            failures = [(False, late, f"no answer in {timeout_s:.0f} s", False)]
        _, rank, cause, bad_input = min(failures)
        raise RunFailed(rank, cause, self._folder / f"rank-{rank}.txt", bad_input)

    def close(self) -> None:
        """Ends all processes; their logs go with them."""
        for pipe in self._pipes:
            try:
                pipe.send(None)
            except OSError:
                continue
        for process in self._processes:
            process.join(10)
        self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        self._kill()

    def _take(self, rank: int, results: dict[int, Any], failures: list[tuple[bool, int, str, bool]]) -> None:
        try:
            fine, answer = self._pipes[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
            failures.append((False, rank, f"its process died ({how})", False))
            return
        if fine:
            results[rank] = answer
        else:
            collective, cause, bad_input = answer
            failures.append((collective, rank, cause, bad_input))

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(10)


def _entry(
    rank: int, world_size: int, device: str, timeout_s: float, folder: str, pipe: Connection, host: str
) -> None:
    die_with_parent()
    log = os.open(f"{folder}/rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if host:
        enter(host)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    # gloo and NCCL listen on the machine's outer address otherwise
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = INTERFACE if host else loopback
    torch.set_num_threads(max(1, cores() // world_size))
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        group = process_group(store, rank, world_size, device, rank, timeout_s)
        with group:
            mesh = make_mesh(1, world_size, 0, device)
            while (call := pipe.recv()) is not None:
                fn, args = call
                pipe.send((True, fn(mesh, *args)))
    except EOFError:
        return
    except BaseException as error:
        traceback.print_exc()  # into the log
        pipe.send((False, (is_collective_error(error), describe(error), is_bad_input(error))))
        time.sleep(3600)  # what this process holds stays until the others are ended with it
