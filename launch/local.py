"""Training on this machine: a private Ray, started for the run and gone with it."""

import functools
import logging
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nsa_dist.auto import choose_sizes, has_auto
from nsa_dist.config import Config
from nsa_dist.console import Console
from nsa_dist.launch.guard import __file__ as guard_file
from nsa_dist.launch.settings import OBJECT_STORE_BYTES, RAY_SETTINGS
from nsa_dist.process import choose_device, cores
from nsa_dist.rundir import Resume
from nsa_dist.session import session
from nsa_dist.stop import stop_on_signal


def train_local(config: Config, console: Console) -> None:
    """Trains as `config` says in parallel.dp * parallel.cp processes of this machine.

    Raises ConfigError where that is known before they start, RunFailed when one of them fails.
    """
    auto = has_auto(config)
    device = choose_device(config.launch.device, 1 if auto else config.parallel.dp * config.parallel.cp)
    places = cores() if device == "cpu" else torch.cuda.device_count()
    sized, _ = choose_sizes(config, [places])  # raises for what can't be
    world_size = sized.parallel.dp * sized.parallel.cp
    with session(sized, console, world_size, device) as resume, stop_on_signal() as stop:
        recover_local(config, resume, console, device, stop, max(world_size, places if auto else 0))


def recover_local(
    config: Config, resume: Resume, console: Console, device: str, stop: Callable[[], bool], places: int
) -> None:
    """recover.train_through, in a Ray of its own on this machine."""
    with private_ray(places, places if device == "cuda" else 0):
        from nsa_dist.launch.recover import train_through

        train_through(config, resume, console, device, stop)


def run_local(
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    on_report: Callable[[int, dict[str, Any]], object],
    logs: Path,
    device: str = "cpu",
    timeout_s: float = 600,
    stop: Callable[[], bool] = lambda: False,
    heartbeat_s: float = 0,
) -> list[Any]:
    """controller.run_workers, in a Ray of its own on this machine."""
    with private_ray(world_size, world_size if device == "cuda" else 0):
        from nsa_dist.launch.controller import run_workers

        return run_workers(world_size, fn, args, on_report, logs, device, timeout_s, stop, heartbeat_s)


@contextmanager
def private_ray(workers: int, gpus: int) -> Iterator[None]:
    """A Ray that only this process can reach, with a place for each of `workers` even beyond the cores.

    Listens on 127.0.0.1, asks for a token of its own, attaches to no cluster that happens to be there, whatever
    the environment says, and leaves neither process nor file behind. Raises RuntimeError where Ray was imported
    before, with other settings.
    """
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with _guarded_folder() as folder:
        with _ray_environment():
            import ray

            if ray.util.get_node_ip_address() != "127.0.0.1":
                raise RuntimeError("Ray was imported before nsa_dist.launch.local: it would listen to other machines")
            ray.init(
                address="local",
                num_cpus=max(workers, cores()),
                num_gpus=gpus,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _temp_dir=folder,
            )
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in its place
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _guarded_folder() -> Iterator[str]:
    """A folder for Ray's files; a process beside this one removes it, and who still uses it, at the end."""
    folder = tempfile.mkdtemp(prefix="nsa-", dir="/tmp")  # short: the paths of sockets are limited
    # In a session of its own: Ctrl-C at a terminal reaches everything else.
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", guard_file, folder], stdin=subprocess.PIPE, start_new_session=True
    )
    with guard:  # at its end closes the guard's input, and waits for it
        yield folder


@contextmanager
def _ray_environment() -> Iterator[None]:
    """The environment with our settings of Ray in place of the user's; as it was, afterwards."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("RAY_"):
            del os.environ[name]
    os.environ.update(RAY_SETTINGS, RAY_AUTH_TOKEN=_token())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@functools.cache
def _token() -> str:
    """One for this process: Ray keeps the first that it reads."""
    return secrets.token_hex(32)
