"""One run of the drill: the launcher as a job has it, on a cluster of this machine, with what its folder says."""

import contextlib
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

from nsa_dist.checkpoint import checkpoints
from nsa_dist.config import Config
from nsa_dist.launch.cluster import Cluster
from nsa_dist.launch.package import JOB, versions
from nsa_dist.processes import children, kill_tree
from nsa_dist.started import DrillError, StartedRun


class DrillRun(StartedRun):
    """Started when made."""

    def __init__(
        self,
        cluster: Cluster,
        config: Config,
        not_finite: int = 0,
        limit_s: float = 300,
        program: tuple[str, ...] = ("nsa_dist", "job"),
    ) -> None:
        folder = Path(config.run.dir)
        super().__init__(folder, folder / "out.txt", limit_s)
        folder.mkdir(parents=True, exist_ok=True)
        job = {"config": asdict(config), "versions": versions(), "wait": False, "not_finite": not_finite}
        (folder / JOB).write_text(json.dumps(job))
        self._environment, self._program = cluster.environment(), program
        self.start()

    def start(self) -> None:
        """The launcher; once more after its end."""
        self.python("-m", *self._program, cwd=self.dir, env=self._environment)

    def launcher(self) -> int:
        """The process id of the launcher itself."""
        return children(self.process.pid)[0]

    def newest(self) -> Path:
        """Its newest checkpoint, whole or not."""
        found = checkpoints(self.dir)
        if not found:
            raise DrillError("there is no checkpoint")
        return Path(str(found[0]))  # they are in its folder

    def close(self) -> None:
        """Ends all of it."""
        kill_tree(self.process.pid)
        for row in self.events("ranks"):  # a stopped one, say
            for rank in row["ranks"]:
                with contextlib.suppress(ProcessLookupError, OSError):
                    if b"nsa_dist.launch.forker" in Path(f"/proc/{rank['pid']}/cmdline").read_bytes():
                        os.kill(rank["pid"], signal.SIGKILL)
        self.process.wait()
