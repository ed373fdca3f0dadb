"""The cluster's end of a job: checks every node, chooses the sizes, trains; started again when it is killed."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa_dist.auto import choose_sizes
from nsa_dist.config import Config, ConfigError, config_from_dict
from nsa_dist.console import Console
from nsa_dist.data import prepare_all
from nsa_dist.launch.forker import die_with_parent
from nsa_dist.launch.package import CHECKED, JOB, WAITING, data_paths, versions

_RESTARTS = 5  # of a driver that was killed
_LOOK_S = 2.0  # between two looks at the nodes, with --wait


def supervise() -> int:
    """Runs `drive` in a process of its own, again where it was killed; its exit status.

    A signal to stop goes to the driver: Ray sends it to all processes of the job.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for again in range(_RESTARTS + 1):
        command = [sys.executable, "-m", "nsa_dist", "job", "--child"]
        status = subprocess.run(command, preexec_fn=die_with_parent).returncode
        if status >= 0:
            return status
        cause = signal.Signals(-status).name
        print(f"launcher killed ({cause}); started again, {again + 1} of {_RESTARTS} times", flush=True)
        time.sleep(2.0**again)
    return 1


def drive() -> None:
    """Trains as the job in this folder says. Raises ConfigError before anything is started, RunFailed later."""
    import ray  # here, not above: the supervisor needs none of these

    from nsa_dist.launch.crew import nodes
    from nsa_dist.launch.recovery import Recovery
    from nsa_dist.session import session
    from nsa_dist.stop import stop_on_signal

    job = json.loads(Path(JOB).read_text())
    config, console = config_from_dict(job["config"]), Console()
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    with stop_on_signal() as stop:
        config, device = _placed(config, job["wait"], console, stop)
        if stop():
            return
        there = nodes(device)
        check_nodes(there, config, job["versions"])
        parallel, world_size = config.parallel, config.parallel.dp * config.parallel.cp
        console.say(f"{CHECKED}{world_size} ranks, dp {parallel.dp} x cp {parallel.cp}, {len(there)} nodes, {device}")
        with session(config, console, world_size, device) as resume:
            _on_each(there, _prepare, config)
            Recovery(config, resume, console, device, stop, train_prepared).run()


def train_prepared(config: Config, resume: Any, report: Any) -> bool:
    """`train`, on a node that may have joined after the data was prepared on the others."""
    from nsa_dist.train import train

    _prepare(config)
    return train(config, resume, report)


def check_nodes(there: list[Any], config: Config, wanted: dict[str, str]) -> None:
    """Raises ConfigError naming the first node that lacks a package, a file or the run's folder, or has other
    versions than those where the job was submitted."""
    probe = Path(config.run.dir).absolute() / f".probe-{os.getpid()}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise ConfigError(f"run.dir={config.run.dir}: must be a folder that can be written ({error})") from None
    try:
        found = _on_each(there, _inspect, data_paths(config), str(probe))
    finally:
        probe.unlink()
        with contextlib.suppress(OSError):  # it holds a run
            probe.parent.rmdir()
    for node, (has, missing, sees) in zip(there, found, strict=True):
        where = f"node {node.name} ({node.host})"
        for name, version in wanted.items():
            if has[name] != version:
                raise ConfigError(
                    f"{where}: {name} {has[name]} there, {version} where it was submitted; must be equal"
                )
        for key, path in missing:
            raise ConfigError(f"{where}: {key}={path}: no such file or folder there; must be on every node")
        if not sees:
            raise ConfigError(f"{where}: run.dir={config.run.dir}: isn't the launcher's folder; must be a shared one")


def _placed(config: Config, wait: bool, console: Console, stop: Callable[[], bool]) -> tuple[Config, str]:
    """The configuration with its numbers of ranks, and `cpu` or `cuda`; once there is room that is free.

    Raises ConfigError where the cluster is too small, unless it waits for more nodes.
    """
    import ray
    from ray.autoscaler.sdk import request_resources

    from nsa_dist.launch.crew import nodes

    told = ""
    while True:
        device = config.launch.device
        if device == "auto":
            device = "cuda" if nodes("cuda") else "cpu"
        unit = "GPU" if device == "cuda" else "CPU"
        places = [node.places for node in nodes(device)]
        problem = ""
        try:
            sized, why = choose_sizes(config, places)
        except ConfigError as error:
            problem, ranks = str(error), 0
        else:
            ranks = sized.parallel.dp * sized.parallel.cp
            free = int(ray.available_resources().get(unit, 0))
            if ranks > sum(places):
                problem = f"{ranks} ranks need a {unit} each, the cluster has {sum(places)} on {len(places)} nodes"
            elif ranks <= free:
                if why:
                    console.say(why)
                return sized, device
        if problem and not wait:
            raise ConfigError(problem)
        text = f"{WAITING}{problem or f'{ranks} ranks need a {unit} each, {free} of {sum(places)} are free'}"
        if text != told:
            console.say(text)
            told = text
            if problem and ranks:  # a cluster that can grow is asked to
                request_resources(bundles=[{unit: 1}] * ranks)
        if stop():
            return config, device
        time.sleep(_LOOK_S)


def _on_each(there: list[Any], fn: Callable[..., Any], *args: Any) -> list[Any]:
    """fn(*args) on each of the nodes. Raises ConfigError naming the first where it can't be run."""
    import ray

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from nsa_dist.launch.crew import why

    task = ray.remote(num_cpus=0, max_retries=0)(fn)
    where = [NodeAffinitySchedulingStrategy(node.id, soft=False) for node in there]
    refs = [task.options(scheduling_strategy=strategy).remote(*args) for strategy in where]
    results = []
    for node, ref in zip(there, refs, strict=True):
        try:
            results.append(ray.get(ref))
        except ray.exceptions.RayError as error:
            raise ConfigError(f"node {node.name} ({node.host}): {why(error)}") from None
    return results


def _inspect(paths: list[tuple[str, str]], probe: str) -> tuple[dict[str, str], list[tuple[str, str]], bool]:
    missing = [(key, path) for key, path in paths if not Path(path).exists()]
    return versions(), missing, Path(probe).exists()


def _prepare(config: Config) -> None:
    prepare_all(config.data, lambda text: None)
