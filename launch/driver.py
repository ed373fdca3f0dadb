"""What a submitted job runs in the cluster: a launcher, and beside it a process that starts the launcher again.

Both run in the folder that package.py has filled.
"""

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nsa_dist.auto import choose_sizes, has_auto
from nsa_dist.config import AUTO, Config, ConfigError, config_from_dict
from nsa_dist.console import Console
from nsa_dist.launch.package import CHECKED, JOB, data_paths, versions
from nsa_dist.session import session
from nsa_dist.stop import die_with_parent, stop_on_signal
from nsa_dist.store import check_known, check_writable, place

_RESTARTS = 5
_LOST_RAY = 75  # exit status of a launcher whose Ray has ended beneath it
_STEADY_S = 3600.0  # a launcher that has run so long was no failing start
_PROBE_S = 120.0  # for a node to answer
_ALWAYS_S = 365 * 86400.0


def supervise() -> int:
    """Runs the launcher as a process beside this one, again where it is killed; its exit status.

    SIGTERM is passed on, and then nothing is started any more.
    """
    console, asked, child = Console(), False, None

    def pass_on(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        if child is not None:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    failures, words = 0, [sys.executable, "-m", "nsa_dist", "job", "--child"]
    while True:
        began = time.monotonic()
        child = subprocess.Popen([*words, "--again"] if failures else words, start_new_session=True)
        status = child.wait()
        if (status >= 0 and status != _LOST_RAY) or asked:  # it has said how it ended
            return status if status >= 0 else 128 - status
        cause = "was killed by " + signal.Signals(-status).name if status < 0 else "has lost Ray on its node"
        failures = 1 if time.monotonic() > began + _STEADY_S else failures + 1
        if failures > _RESTARTS:
            console.say(f"nsa-dist: error: the launcher {cause}, {failures} times; given up")
            return 1
        console.say(f"failure: the launcher {cause}; it is started again ({failures} of {_RESTARTS})")
        end = time.monotonic() + min(2.0 ** (failures - 1), 30.0)
        while time.monotonic() < end and not asked:
            time.sleep(0.1)
        if asked:
            return 143


def drive(again: bool) -> None:
    """Trains in the cluster that this process belongs to. again: after a launcher that was killed.

    Raises ConfigError where a node can't run it: nothing has been started then. RunFailed, Stopped as training does.
    """
    die_with_parent()
    job = json.loads(Path(JOB).read_text())
    config, console = config_from_dict(job["config"]), Console()
    import ray

    on_sigterm = signal.getsignal(signal.SIGTERM)
    if again:
        _wait_for_head(config.launch.wait_s)
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts its own in its place
    threading.Thread(target=_follow_ray, daemon=True).start()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    device = config.launch.device if config.launch.device != AUTO else "cuda" if gpus else "cpu"
    if not again:
        console.say(f"{CHECKED}{_check(config, job['versions'])}")
    if job["wait"]:
        _ask_for_nodes(config, device)
    sized = _sized(config, device)
    from nsa_dist.launch.faults import train_not_finite
    from nsa_dist.launch.recover import train_through
    from nsa_dist.train import train

    fn = partial(train_not_finite, job["not_finite"]) if job.get("not_finite") else train  # of the drill
    world_size = sized.parallel.dp * sized.parallel.cp
    # Ray sends SIGTERM to this process and to the one beside it, which passes it on.
    with session(sized, console, world_size, device) as resume, stop_on_signal(insist=False) as stop:
        train_through(config, resume, console, device, stop, fn, _ALWAYS_S)


def _wait_for_head(wait_s: float) -> None:
    """Returns when Ray's head listens at RAY_ADDRESS, or after so long: connecting tells what is wrong then."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    end = time.monotonic() + wait_s
    while host and time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=5):
            return
        time.sleep(0.5)


def _follow_ray() -> None:
    """Ends this process when Ray on this node does: a driver without it waits for ever, and starts nothing more."""
    from ray._private.worker import global_worker

    path, misses = global_worker.node.raylet_socket_name, 0
    while misses < 3:
        time.sleep(0.5)
        with socket.socket(socket.AF_UNIX) as probe:
            misses = misses + 1 if probe.connect_ex(path) else 0
    os._exit(_LOST_RAY)


def _sized(config: Config, device: str) -> Config:
    """With numbers of ranks, which the launcher chooses again when it has places."""
    from nsa_dist.launch.placement import Places

    if not has_auto(config):
        return config
    try:
        return choose_sizes(config, [node.places for node in Places(device).nodes()])[0]
    except ConfigError:  # none free so far
        dp, cp = config.parallel.dp, config.parallel.cp
        parallel = replace(config.parallel, dp=1 if dp == AUTO else dp, cp=1 if cp == AUTO else cp)
        return replace(config, parallel=parallel)


def _ask_for_nodes(config: Config, device: str) -> None:
    """Of an autoscaler, where the cluster has one."""
    from ray.autoscaler.sdk import request_resources

    sized = _sized(config, device).parallel
    place = {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": 1}
    request_resources(bundles=[place] * (sized.dp * sized.cp))


def _check(config: Config, wanted: dict[str, str]) -> str:
    """What was found on all nodes. Raises ConfigError for the first that can't run the job."""
    import ray
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    run_dir = Path(config.run.dir)
    probe = run_dir / f".probe-{secrets.token_hex(4)}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise ConfigError(f"run.dir={run_dir}: must be a folder that can be written ({error})") from None
    if config.run.store:
        check_writable(place(config.run.store))
    nodes = [node for node in ray.nodes() if node["Alive"]]
    try:
        asked = [
            ray.remote(_look)
            .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote(data_paths(config), str(probe), config.run.store)
            for node in nodes
        ]
        for node, ref in zip(nodes, asked, strict=True):
            name = node["NodeName"]
            try:
                found, missing = ray.get(ref, timeout=_PROBE_S)
            except GetTimeoutError:
                raise ConfigError(f"node {name}: has not answered for {_PROBE_S:.0f} s") from None
            except RayError as error:
                words = (str(error).strip().splitlines() or ["no reason given"])[-1]
                raise ConfigError(f"node {name}: can't run a task of this job ({words})") from None
            for part, version in wanted.items():
                if found[part] != version:
                    raise ConfigError(
                        f"node {name}: {part} is {found[part]} there, {version} where the job was submitted; must be "
                        "equal"
                    )
            if missing:
                raise ConfigError(f"node {name}: {missing}: no such file or folder there; must be on every node")
    finally:
        probe.unlink(missing_ok=True)
    names = ", ".join(f"{part} {version}" for part, version in wanted.items())
    return f"{len(nodes)} nodes have {names}, the data and run.dir"


def _look(paths: list[tuple[str, str]], probe: str, store: str) -> tuple[dict[str, Any], str]:
    """Runs on a node: its versions, and the first path that isn't there. Raises ConfigError for a store."""
    check_known("run.store", store)
    for key, path in [*paths, ("run.dir", probe)]:
        if not Path(path).exists():
            shown = f"{key}={path}" if key != "run.dir" else f"run.dir={Path(probe).parent} (shared)"
            return versions(), f"{shown} on {socket.gethostname()} in {os.getcwd()}"
    return versions(), ""
