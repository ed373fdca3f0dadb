"""One rank: a process that the forker of its node has forked, which tells its host of its steps and its end."""

import faulthandler
import fcntl
import os
import pickle
import signal
import socket
import struct
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Group:
    """What a rank needs to join the process group.

    store: address and port; address: this node's own, on whose interface the ranks connect with each other;
    gpu: index among those of its host; neighbours: ranks on its machine; log: file for its output.
    """

    rank: int
    world_size: int
    store: tuple[str, int]
    address: str
    device: str
    gpu: int
    neighbours: int
    timeout_s: float
    log: str


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: `result` (pickled), or `error` in one line and at which time (s, its machine's clock).

    collective: the error tells of a connection to other ranks; not_finite: the step whose loss wasn't finite;
    died: the process ended without a word.
    """

    at: float
    result: bytes = b""
    error: str = ""
    collective: bool = False
    bad_input: bool = False
    not_finite: int = 0
    died: bool = False


class Leaving:
    """Notes that this process was sent SIGTERM: the machine is about to go."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.asked = True


def run_rank(group: Group, host: Connection, call: bytes) -> None:
    """Runs the pickled (fn, args) as fn(*args, report=...) in the process group; the host gets the outcome last."""
    leaving = Leaving()
    _redirect_output(Path(group.log))
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)  # where it hangs

    stop = False

    def report(event: dict[str, Any]) -> bool:
        nonlocal stop
        host.send(event)
        while host.poll():
            stop = host.recv() == "stop" or stop
        if leaving.asked and not stop:
            host.send({"kind": "leaving"})
            stop = True
        return stop

    try:
        outcome = Outcome(time.time(), result=pickle.dumps(_run(group, call, report)))
    except BaseException as error:
        outcome = _failed(error)
    host.send(outcome)


def _run(group: Group, call: bytes, report: Any) -> Any:
    import torch
    import torch.distributed as dist

    from nsa_dist.process import cores, process_group

    # gloo and NCCL choose an interface by themselves otherwise
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface(group.address)
    torch.set_num_threads(max(1, cores() // group.neighbours))
    fn, args = pickle.loads(call)
    store = dist.TCPStore(*group.store, timeout=timedelta(seconds=group.timeout_s))
    with process_group(store, group.rank, group.world_size, group.device, group.gpu, group.timeout_s):
        return fn(*args, report=report)


def _failed(error: BaseException) -> Outcome:
    from nsa_dist.process import describe, is_bad_input, is_collective_error

    traceback.print_exception(error)  # into the log
    return Outcome(
        time.time(),
        error=describe(error),
        collective=is_collective_error(error),
        bad_input=is_bad_input(error),
        not_finite=getattr(error, "not_finite", 0),
    )


def interface(address: str) -> str:
    """The name of the network interface with this IPv4 address. Raises RuntimeError where there is none."""
    siocgifaddr = 0x8915  # <linux/sockios.h>
    if address.startswith("127."):
        return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, siocgifaddr, struct.pack("256s", name.encode()))
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    raise RuntimeError(f"no network interface of this machine has the address {address} that Ray knows it by")


def _redirect_output(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
