"""The controller: gives the placed hosts their ranks, brings these together, and follows them to their end.

Works on whatever Ray this process is connected to. Why actors of our own and not Ray Train: a death is seen at
once, the order of the ranks is ours, and a failure is told in one line.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray import cloudpickle

from nsa_dist.launch.placement import Placed, Places, owners
from nsa_dist.launch.watch import OnReport, Watch
from nsa_dist.launch.worker import Group

_PLACE_S = 60.0  # for the cluster to start the hosts
_LOOPBACK = "127.0.0.1"


def run_workers(
    world_size: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    on_report: OnReport,
    logs: Path,
    device: str = "cpu",
    timeout_s: float = 600,
    stop: Callable[[], bool] = lambda: False,
    heartbeat_s: float = 0,
) -> list[Any]:
    """Runs fn(*args, report=...) in `world_size` processes; their results in the order of ranks. Once.

    In each, torch.distributed is initialised (collectives wait timeout_s seconds at most) and output goes to
    logs/rank-N.txt. on_report(rank, event) is called here for each report(event) there; once stop() is True,
    report answers True there, which asks the function to end. All workers have ended,
    whatever happens, when this returns or raises. Raises RunFailed naming the first cause; the others are
    ended with it.
    """
    places = Places(device)
    try:
        nodes = places.nodes()
        chosen = owners([node.places for node in nodes], 1, world_size)
        if len(chosen) < world_size:
            raise RuntimeError(f"Ray has places for {len(chosen)} workers, not for {world_size}")
        places.reserve(nodes, chosen)
        if not places.ready(_PLACE_S):
            raise RuntimeError(f"Ray has not started {world_size} workers in {_PLACE_S:.0f} s")
        placed = places.placed(nodes, chosen)
        with started(placed, fn, args, logs, device, timeout_s):
            return Watch(placed, on_report, logs, stop, heartbeat_s, timeout_s).results()
    finally:
        places.close()


@contextmanager
def started(
    placed: list[Placed], fn: Callable[..., Any], args: tuple[Any, ...], logs: Path, device: str, timeout_s: float
) -> Iterator[dict[int, int]]:
    """Starts the ranks on their hosts; their process ids. The store that brings them together lasts for the block."""
    world_size = sum(len(one.ranks) for one in placed)
    call = cloudpickle.dumps((fn, args))
    own = ray.util.get_node_ip_address()
    # Where all is on one machine, nothing listens to others.
    apart = len({own, *(one.node.address for one in placed)}) > 1
    on_machine = {one.node.machine: 0 for one in placed}
    for one in placed:
        on_machine[one.node.machine] += len(one.ranks)
    with _store(own if apart else _LOOPBACK) as store:
        refs = []
        for one in placed:
            address = one.node.address if apart else _LOOPBACK
            groups = [
                Group(
                    rank,
                    world_size,
                    store,
                    address,
                    device,
                    gpu,
                    on_machine[one.node.machine],
                    timeout_s,
                    str((logs / f"rank-{rank}.txt").absolute()),
                )
                for gpu, rank in enumerate(one.ranks)
            ]
            refs.append(one.host.start.remote(groups, call))
        pids: dict[int, int] = {}
        for found in ray.get(refs):
            pids |= found
        yield pids


@contextmanager
def _store(address: str) -> Iterator[tuple[str, int]]:
    """Address and port of a store that meets the ranks; it listens there alone (torch's own listens everywhere)."""
    with socket.create_server((address, 0)) as server:
        port = server.getsockname()[1]
        store = dist.TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_PLACE_S),
            master_listen_fd=os.dup(server.fileno()),  # the store closes its copy
        )
    yield address, port
    del store
