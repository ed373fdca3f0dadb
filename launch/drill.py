"""The drill: failures made on purpose on a cluster of this machine, and whether a run survives them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsa_dist.config import Config, ConfigError, check_config
from nsa_dist.launch.cluster import Cluster, add_node, has_store, kill_node, restart_head, start_cluster, stop_cluster
from nsa_dist.launch.drill_run import DrillRun
from nsa_dist.launch.package import absolute
from nsa_dist.rundir import event
from nsa_dist.started import DrillError

STEPS, EVERY, STRIKE = 30, 5, 12  # steps of a run, from one checkpoint to the next, and after which it is struck
LONG = 8 * STEPS  # of the runs in which it takes long until something is seen
HEARTBEAT_S = 5  # where a hang is made; elsewhere a loaded machine's slow step must not be one
ROUNDING = 1e-3  # relative difference of losses on other numbers of ranks
_PULSE_S = 0.4  # how long the straggler stands still at a time


@dataclass(frozen=True)
class Row:
    """seen_s: from the blow until it was seen; training_again_s: until a step was done after it (0: it never
    stopped); told: in the run's words, or why it wasn't recovered."""

    failure: str
    seen_s: float | None = None
    training_again_s: float | None = None
    steps_lost: int | None = None
    losses_equal: bool = False
    told: str = ""


class Drill:
    """Runs of `config` (on two CPU ranks, STEPS steps) on two Ray nodes of a place each; all is left in `folder`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.folder = folder
        train = replace(config.train, checkpoint_every=EVERY, keep_checkpoints=2, log_every=1)
        train = replace(train, steps=STEPS, validate_every=0, validation_sequences=0)
        launch = replace(config.launch, device="cpu", heartbeat_s=60, backend="ray")
        run = replace(config.run, dir=str(folder / "none"), store="", resume="auto")
        self._config = absolute(replace(config, train=train, launch=launch, run=run))
        self._cluster: Cluster | None = None
        self._runs: list[DrillRun] = []

    def row(self, name: str) -> Row:
        """Makes one failure. One that wasn't recovered says why in `told`."""
        try:
            return (FAILURES | RIVALS)[name](self, name)
        except (DrillError, ConfigError, OSError, RuntimeError) as error:
            return Row(name, told=f"not recovered: {error}")
        finally:
            for run in self._runs:
                run.close()

    def close(self) -> None:
        """Ends the cluster."""
        if self._cluster:
            stop_cluster(self._cluster)

    def cluster(self, nodes: int = 2) -> Cluster:
        """With so many nodes alive."""
        if self._cluster is None:
            self._cluster = start_cluster(nodes)
            self._alive = list(range(nodes))
        while len(self._alive) > nodes:
            kill_node(self._cluster, self._alive.pop())
        while len(self._alive) < nodes:
            add_node(self._cluster)
            self._alive.append(len(self._cluster.nodes) - 1)
        return self._cluster

    def run(
        self,
        name: str,
        cp: Any = 2,
        nodes: int = 2,
        steps: int = STEPS,
        not_finite: int = 0,
        heartbeat_s: int = 0,
        program: tuple[str, ...] = ("nsa_dist", "job"),
    ) -> DrillRun:
        """Starts a run in folder/name."""
        config = replace(
            self._config,
            run=replace(self._config.run, dir=str(self.folder / name)),
            train=replace(self._config.train, steps=steps),
            parallel=replace(self._config.parallel, dp=1, cp=cp),
        )
        if heartbeat_s:
            config = replace(config, launch=replace(config.launch, heartbeat_s=heartbeat_s))
        run = DrillRun(self.cluster(nodes), check_config(config), not_finite, program=program)
        self._runs.append(run)
        return run

    def undisturbed(self, cp: int = 2, steps: int = STEPS) -> DrillRun:
        """A run to its end without a failure, made once."""
        name = f"undisturbed-{cp}-{steps}"
        for run in self._runs:
            if run.dir.name == name:
                return run
        run = self.run(name, cp, steps=steps)
        run.finish()
        return run

    def survived(
        self, run: DrillRun, name: str, blow: Callable[[], Any], steps: int = STEPS, bits: bool = True
    ) -> Row:
        """The row of a blow from which the run's own launcher recovers it. bits: on the same number of ranks."""
        run.until_step(STRIKE)
        at = time.time()
        blow()
        run.until(lambda: run.events("recovery"), "it trained again")
        run.finish()
        again = run.events("recovery")[0]
        seen = next((row["time"] for row in run.events("failure")), again["time"] - again["seconds"])
        equal, difference = self.equal(run, steps, bits)
        told = again["cause"] + ("" if bits else f"; losses within {difference:.1e}")
        return Row(name, seen - at, again["time"] - at, again["steps_lost"], equal, told)

    def equal(self, run: DrillRun, steps: int = STEPS, bits: bool = True) -> tuple[bool, float]:
        """Whether its losses are those of a run without failure, and the largest relative difference."""
        mine, other = run.losses(), self.undisturbed(steps=steps).losses()
        if mine.keys() != other.keys():
            return False, float("nan")
        difference = max(abs(mine[step] - other[step]) / abs(other[step]) for step in other)
        return difference <= (0.0 if bits else ROUNDING), difference


def _killed_worker(drill: Drill, name: str) -> Row:
    run = drill.run(name)
    return drill.survived(run, name, lambda: os.kill(run.pid(1), signal.SIGKILL))


def _hang(drill: Drill, name: str) -> Row:
    run = drill.run(name, heartbeat_s=HEARTBEAT_S)
    return drill.survived(run, name, lambda: os.kill(run.pid(1), signal.SIGSTOP))


def _lost_node(drill: Drill, name: str) -> Row:
    run = drill.run(name, cp="auto")
    return drill.survived(run, name, lambda: drill.cluster(nodes=1), bits=False)


def _spot_node(drill: Drill, name: str) -> Row:
    """A rank gets the SIGTERM that a machine's processes get before it goes."""
    run = drill.run(name, cp="auto")
    return drill.survived(run, name, lambda: os.kill(run.pid(1), signal.SIGTERM), bits=False)


def _added_node(drill: Drill, name: str) -> Row:
    """From the moment in which Ray has the node."""
    run = drill.run(name, cp="auto", nodes=1, steps=LONG)
    run.until_step(STRIKE)
    drill.cluster(nodes=2)
    return drill.survived(run, name, lambda: None, steps=LONG, bits=False)


def _damaged(damage: Callable[[Path], None]) -> Callable[[Drill, str], Row]:
    """A rank is killed, and the newest checkpoint turns out damaged."""

    def make(drill: Drill, name: str) -> Row:
        run = drill.run(name)

        def blow() -> None:
            os.kill(run.pid(1), signal.SIGSTOP)  # else a newer checkpoint could be there by then
            time.sleep(0.5)
            damage(run.newest())
            os.kill(run.pid(1), signal.SIGKILL)

        row = drill.survived(run, name, blow)
        skipped = run.events("checkpoint_skipped")
        if not skipped:
            raise DrillError("the damaged checkpoint was not named")
        return replace(row, told=skipped[0]["reason"])

    return make


def _flip(checkpoint: Path) -> None:
    file = next(checkpoint.glob("__1_*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _halve(checkpoint: Path) -> None:
    file = next(checkpoint.glob("__1_*"))
    os.truncate(file, file.stat().st_size // 2)
    half = checkpoint.with_name(".step-999.tmp")  # what a kill in the middle of a save leaves
    half.mkdir()
    shutil.copy(file, half)


def _killed_launcher(drill: Drill, name: str) -> Row:
    run = drill.run(name)
    run.until_step(STRIKE)
    at = time.time()
    os.kill(run.launcher(), signal.SIGKILL)
    row = _second_start(drill, run, name, at)
    return replace(row, told=next(line for line in run.lines() if line.startswith("failure: the launcher")))


def _restarted_head(drill: Drill, name: str) -> Row:
    """SIGKILL to all of the head's processes; it starts again at once, where it was, with its store."""
    if not has_store():
        raise DrillError("not made: Ray keeps what it knows on a disk from 2.60 on")
    run = drill.run(name)
    run.until_step(STRIKE)
    cluster, at = drill.cluster(), time.time()
    kill_node(cluster, 0)
    restart_head(cluster)
    row = _second_start(drill, run, name, at)
    return replace(row, told=next(line for line in run.lines() if line.startswith("failure: the launcher")))


def _sigterm(drill: Drill, name: str) -> Row:
    """The times are those from the signal to the end, and from the next start until it trains."""
    run = drill.run(name)
    run.until_step(STRIKE)
    at = time.time()
    run.process.send_signal(signal.SIGTERM)
    run.finish(status=143)
    ended, done = time.time(), max(run.losses())
    if run.newest().name != f"step-{done}":
        raise DrillError(f"ended after step {done}, with {run.newest().name}")
    run.start()
    row = _second_start(drill, run, name, time.time())
    return replace(row, seen_s=ended - at, told=f"ended with a checkpoint of step {done}; started again by hand")


def _second_start(drill: Drill, run: DrillRun, name: str, at: float, bits: bool = True) -> Row:
    done = max(run.losses())
    run.until(lambda: len(run.events("training")) == 2, "it was started again")
    first = run.events("training")[1]["step"]
    run.until(lambda: first < max(run.losses(), default=0) <= done or max(run.losses()) > done, "it trained again")
    again = time.time()
    run.finish()
    seen = [row["time"] for row in run.events("start")][1:]
    return Row(name, seen[0] - at if seen else None, again - at, done - first, drill.equal(run, bits=bits)[0])


def _not_finite(drill: Drill, name: str) -> Row:
    """Compared with a run that never had that batch."""
    run = drill.run(name, not_finite=STRIKE)
    run.until(lambda: run.events("recovery"), "it trained again")
    run.finish()
    folder = drill.folder / f"{name}-undisturbed"
    folder.mkdir()
    event(folder, "batch_skipped", step=STRIKE)
    other = drill.run(folder.name)
    other.finish()
    failure, again = run.events("failure")[0], run.events("recovery")[0]
    equal = run.losses() == other.losses() and len(run.losses()) == STEPS - 1
    return Row(name, 0.0, again["time"] - failure["time"], again["steps_lost"], equal, failure["cause"])


def _full_disk(drill: Drill, name: str) -> Row:
    """A file system with room for a checkpoint and a half; later somebody makes room."""
    size = sum(file.stat().st_size for file in drill.undisturbed().newest().iterdir())
    folder = drill.folder / name / "checkpoints"
    folder.mkdir(parents=True)
    if not _mount(folder, int(1.5 * size)):
        raise DrillError("no small file system could be mounted here (root may)")
    try:
        run = drill.run(name)
        run.until(lambda: run.events("checkpoint_failed"), "a checkpoint was not written")
        failed = run.events("checkpoint_failed")[0]
        _mount(folder, 10 * size, "remount,")
        run.finish()
        whole = run.newest().name == f"step-{STEPS}" and not run.events("failure", "recovery")
        return Row(name, None, 0.0, 0, whole and drill.equal(run)[0], failed["reason"])
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _mount(folder: Path, size: int, options: str = "") -> bool:
    words = ["mount", "-t", "tmpfs", "-o", f"{options}size={size}", "tmpfs", str(folder)]
    return shutil.which("mount") is not None and subprocess.run(words, capture_output=True).returncode == 0


def _straggler(drill: Drill, name: str) -> Row:
    """A rank that stands still most of the time."""
    run = drill.run(name, steps=LONG)  # on a loaded machine it takes a while until others wait for it alone
    run.until_step(STRIKE)
    pid, at = run.pid(1), time.time()
    while not run.events("straggler") and run.process.poll() is None:
        try:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(_PULSE_S)
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            break
        time.sleep(_PULSE_S / 4)
    run.finish()
    told = run.events("straggler")
    if not told or told[0]["rank"] != 1:
        raise DrillError("rank 1 was not named")
    first = told[0]
    words = f"rank 1 on {first['node']} ({first['host']}): {first['lag_s']:.2f} s of each {first['step_s']:.2f} s"
    return Row(name, first["time"] - at, 0.0, 0, drill.equal(run, LONG)[0], words)


FAILURES: dict[str, Callable[[Drill, str], Row]] = {
    "killed-worker": _killed_worker,
    "hang": _hang,
    "lost-node": _lost_node,
    "spot-node": _spot_node,
    "added-node": _added_node,
    "killed-launcher": _killed_launcher,
    "restarted-head": _restarted_head,
    "full-disk": _full_disk,
    "flipped-byte": _damaged(_flip),
    "half-checkpoint": _damaged(_halve),
    "not-finite-loss": _not_finite,
    "straggler": _straggler,
    "sigterm": _sigterm,
}


def _ray_train(cp: Any, blow: Callable[[Drill, DrillRun], Any]) -> Callable[[Drill, str], Row]:
    """The same under Ray Train V2. When it has seen it, it doesn't say."""

    def make(drill: Drill, name: str) -> Row:
        try:
            subprocess.run([sys.executable, "-c", "import ray.train.torch"], check=True, capture_output=True)
        except subprocess.CalledProcessError:
            raise DrillError("not made: Ray Train isn't installed (pip install 'ray[train]')") from None
        run = drill.run(name, cp=cp, program=("nsa_dist.launch.ray_train",))
        run.until_step(STRIKE)
        at = time.time()
        blow(drill, run)
        row = _second_start(drill, run, name, at, bits=cp == 2)
        return replace(row, told="with this project's checkpoints")

    return make


# Asked for with --rival or --only.
RIVALS: dict[str, Callable[[Drill, str], Row]] = {
    "ray-train-killed-worker": _ray_train(2, lambda drill, run: os.kill(run.pid(1), signal.SIGKILL)),
    "ray-train-lost-node": _ray_train("auto", lambda drill, run: drill.cluster(nodes=1)),
}


def fine(row: Row) -> bool:
    """Whether it was recovered and the losses are right, with no more steps lost than since a whole checkpoint."""
    limit = 2 * EVERY if row.failure in ("flipped-byte", "half-checkpoint") else EVERY
    return row.losses_equal and row.steps_lost is not None and row.steps_lost <= limit + 1


def as_line(row: Row) -> str:
    """For reading."""
    seen, again = (f"{value:.1f} s" if value is not None else "-" for value in (row.seen_s, row.training_again_s))
    lost = "-" if row.steps_lost is None else str(row.steps_lost)
    return (
        f"{row.failure:<24}{seen:>8}{again:>9}{lost:>6}  {'equal' if row.losses_equal else 'NOT EQUAL':<10}{row.told}"
    )


HEADER = f"{'failure':<24}{'seen':>8}{'again':>9}{'lost':>6}  {'losses':<10}told"
