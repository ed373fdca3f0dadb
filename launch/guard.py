"""Run beside a private Ray: once its parent has ended, however it ended, nothing of that Ray stays.

Ray's own processes follow a killed driver, except its agents: those try for a minute to tell Ray so. Started as
a file, with the standard library alone, so that it is there before Ray is.
"""

import os
import shutil
import signal
import sys
from pathlib import Path


def main(folder: str) -> None:
    """Waits for the end of standard input, which only the parent holds; then clears up after `folder`'s Ray."""
    parent = os.getppid()
    sys.stdin.read()
    for pid in set(_users(folder)) - {parent}:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # ended meanwhile
            continue
    shutil.rmtree(folder, ignore_errors=True)


def _users(folder: str) -> set[int]:
    """The processes that hold a file in the folder open: each of Ray's has its log there."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link).startswith(folder + "/"):
                found.add(int(link.parts[2]))
        except OSError:  # ended meanwhile, or another user's
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1])
