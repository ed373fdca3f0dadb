"""The processes of this machine, as the kernel lists them."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def children(pid: int) -> list[int]:
    """Its child processes that live, in the order in which they have started."""
    return [child for _, child, parent, _ in sorted(_living()) if parent == pid]


def tree(leader: int) -> set[int]:
    """The living processes of the session that `leader` leads, and all that those have started elsewhere."""
    living = list(_living())
    parents = {pid: parent for _, pid, parent, _ in living}
    found = {pid for _, pid, _, session in living if session == leader}
    more = found
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found = found | more
    return found


def kill_tree(leader: int) -> None:
    """SIGKILL to `tree(leader)`, but not to this process, until none is left of what they started meanwhile."""
    while found := tree(leader) - {os.getpid()}:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _living() -> Iterator[tuple[int, int, int, int]]:
    """Of each: when it started, its id, its parent's, its session's."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if fields[0] not in "ZX":
            yield int(fields[19]), int(folder.name), int(fields[1]), int(fields[3])
