"""The processes of this machine, as the kernel lists them."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def tree(leader: int) -> set[int]:
    """The living processes of the session that `leader` leads, and all that those have started elsewhere."""
    parents, found = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # ended meanwhile
            continue
        if state not in "ZX":
            parents[int(folder.name)] = int(parent)
            if int(session) == leader:
                found.add(int(folder.name))
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
