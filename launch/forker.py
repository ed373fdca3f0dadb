"""A process that has imported torch and waits: forked, it is a rank at once, where a new Python would take seconds.

`python -m nsa_dist.launch.forker FD`, FD being a socket to its host. It has one thread and no state of
torch.distributed or CUDA, so that what it forks begins like a new process.
"""

import os
import signal
import sys
import traceback
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle
from typing import Any

from nsa_dist.stop import die_with_parent


def main(descriptor: int) -> None:
    """Answers the host: ("start", group, call) and a socket starts a rank, ("end",) kills all of them.

    Tells ("ready",), ("started", rank, pid), and ("exit", pid, status) of each. Ends when the host does, and with
    it its ranks.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal reaches everything in the foreground
    host = Connection(descriptor)
    _preload()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    host.send(("ready",))
    ranks: set[int] = set()
    with suppress(EOFError, ConnectionResetError, BrokenPipeError):
        while True:
            ready = wait([host, woken])
            if woken in ready:
                os.read(woken, 4096)
                for pid, status in _ended(ranks):
                    host.send(("exit", pid, status))
            if host in ready:
                command, *more = host.recv()
                if command == "start":
                    ranks.add(_start(host, *more))
                else:
                    _kill(ranks)
    _kill(ranks)


def _preload() -> None:
    import torch.distributed.checkpoint

    import nsa_dist.train  # noqa: F401

    if find_spec("tensorboard"):
        import torch.utils.tensorboard  # noqa: F401


def _start(host: Connection, group: Any, call: bytes) -> int:
    channel = Connection(recv_handle(host))
    pid = os.fork()
    if pid:
        channel.close()
        host.send(("started", group.rank, pid))
        return pid
    try:
        die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        host.close()
        from nsa_dist.launch.worker import run_rank

        run_rank(group, channel, call)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _ended(ranks: set[int]) -> list[tuple[int, int]]:
    """Process ids of ranks that have ended, with their status (negative: the signal that killed it)."""
    found = []
    for pid in list(ranks):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            ranks.remove(pid)
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _kill(ranks: set[int]) -> None:
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
