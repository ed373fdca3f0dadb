"""Training in the processes that torchrun started, on one node or many. Needs no Ray."""

import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nsa_dist.auto import choose_sizes
from nsa_dist.config import Config, ConfigError
from nsa_dist.console import Console
from nsa_dist.process import RunFailed, choose_device, describe, is_bad_input, is_collective_error, process_group
from nsa_dist.processes import children
from nsa_dist.rundir import Resume, event
from nsa_dist.session import session
from nsa_dist.stop import stop_on_signal

_OPENING = "nsa_dist/opening"  # what rank 0 decided: a Resume, or None after an error
_FAILURES = "nsa_dist/failures"  # how many ranks have failed
_OPENING_TIME = timedelta(days=7)  # preparing a large corpus; torchrun ends the others if rank 0 dies
_CAUSE_S = 5.0  # a rank that lost its connections gives the culprit so long to speak first
_DEAD_S = 2.0  # a main thread that isn't blocked has left the run by then


def torchrun_store() -> dist.Store:
    """The store that meets the ranks. torchrun keeps one for all its restarts: each sees only its own entries,
    else a run started again would read what the one before has decided, and look for its ranks."""
    store, _, _ = next(rendezvous("env://"))
    return dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def train_torchrun(config: Config, console: Console) -> None:
    """Trains as one rank of those that are there. Rank 0 prepares the data, holds the lock, and decides alone.

    Raises ConfigError for a number of processes that doesn't fit, and on rank 0 for what else is found before
    training; RunFailed on the first rank that fails. The others then leave by SystemExit, without a word.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    config, why = choose_sizes(config, [local] * (world_size // local))
    if why and rank == 0:
        console.say(why)
    wanted = config.parallel.dp * config.parallel.cp
    if world_size != wanted:
        raise ConfigError(
            f"WORLD_SIZE={world_size}: torchrun must start parallel.dp={config.parallel.dp} x "
            f"parallel.cp={config.parallel.cp} = {wanted} processes"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    device = choose_device(config.launch.device, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)))
    placed = replace(config, launch=replace(config.launch, device=device))
    store = torchrun_store()
    with _opened(config, console, store, rank, world_size, device) as resume:
        try:
            from nsa_dist.train import train

            group = process_group(store, rank, world_size, device, local_rank, config.launch.timeout_s)
            # torchrun passes a signal on that its processes have had already: the second is no insistence.
            with stop_on_signal(insist=False) as stop, _no_wait_for_the_dead(local, Path(config.run.dir)), group:
                train(placed, resume, lambda event: console.report(event) or stop())
        except Exception as error:
            raise _failure(error, store, rank, Path(config.run.dir)) from error


@contextmanager
def _opened(
    config: Config, console: Console, store: dist.Store, rank: int, world_size: int, device: str
) -> Iterator[Resume]:
    """Rank 0 opens the run and tells the others where it goes on, or that it doesn't."""
    if rank != 0:
        store.wait([_OPENING], _OPENING_TIME)
        resume = pickle.loads(bytes.fromhex(store.get(_OPENING).decode()))
        if resume is None:
            raise SystemExit(2)
        yield resume
        return
    told = False
    try:
        with session(config, console, world_size, device) as resume:
            store.set(_OPENING, pickle.dumps(resume).hex())
            told = True
            yield resume
    finally:
        if not told:
            store.set(_OPENING, pickle.dumps(None).hex())


@contextmanager
def _no_wait_for_the_dead(ranks: int, run_dir: Path) -> Iterator[None]:
    """On a SIGTERM, where one of this machine's `ranks` is dead, ends this process: its step can't end.

    So torchrun ends what a dead rank leaves, to start all again. A rank that waits in NCCL for the dead one runs no
    handler, and would be killed after 30 s only. A SIGTERM while all ranks live asks for a stop, as ever.
    """
    agent = os.getppid()
    if len(children(agent)) != ranks:  # torchrun isn't the parent, or this is no Linux
        yield
        return
    over = threading.Event()
    signals, wake = socket.socketpair()
    wake.setblocking(False)

    def watch() -> None:
        while number := signals.recv(1):
            living = children(agent)
            if number[0] == signal.SIGTERM and len(living) < ranks and not over.wait(_DEAD_S):
                if living[0] == os.getpid():  # one of them tells
                    cause = "a rank of this machine has died; the others end without their step"
                    print(f"nsa-dist: error: {cause}", file=sys.stderr, flush=True)
                    with suppress(OSError):
                        event(run_dir, "failure", rank=None, cause=cause)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(wake.fileno())  # the C handler writes there, whatever the main thread does
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        wake.close()


def _failure(error: Exception, store: dist.Store, rank: int, run_dir: Path) -> BaseException:
    """The RunFailed that names the first cause, on the rank that has it; elsewhere a silent end."""
    log = run_dir / "logs" / f"rank-{rank}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        traceback.print_exception(error, file=file)
    if is_collective_error(error):
        time.sleep(_CAUSE_S)
    if not _first(store):
        return SystemExit(1)
    failed = RunFailed(rank, describe(error), log, is_bad_input(error))
    if rank != 0:  # rank 0's session writes its own
        event(run_dir, "failure", rank=rank, cause=failed.cause)
    return failed


def _first(store: dist.Store) -> bool:
    try:
        return store.add(_FAILURES, 1) == 1
    except dist.DistError:  # the store is gone with the process that held it: better two lines than none
        return True
