"""A Ray cluster on this machine: one node, or several that share it (for tests, the drill, and trying things).

Every process listens on 127.0.0.1 and asks for the cluster's own token. Nothing here touches another cluster
of this machine: `ray stop` would end them all.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from nsa_dist.config import ConfigError
from nsa_dist.launch.settings import OBJECT_STORE_BYTES, RAY_SETTINGS
from nsa_dist.processes import kill_tree


@dataclass
class Cluster:
    """A cluster on this machine.

    gcs: Ray's own address (host:port); dashboard: that of the Jobs API (http://…); folder: Ray's files; nodes: the
    process ids of the nodes, the head's first, each the leader of its session; node_ids: Ray's names for them.
    """

    token: str = field(repr=False)
    folder: str
    gcs: str = ""
    dashboard: str = ""
    nodes: list[int] = field(default_factory=list)
    node_ids: list[str] = field(default_factory=list)
    # Those that follow this process; each end of a pipe stays open with its object.
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list, repr=False)

    def environment(self) -> dict[str, str]:
        """The environment of a process that connects to this cluster, there before it imports Ray."""
        return ray_environment(self.token) | {"RAY_ADDRESS": self.gcs}


def start_cluster(nodes: int = 1, cpus: int = 1, gpus: list[int] | None = None, follow: bool = True) -> Cluster:
    """Starts `nodes` Ray nodes with `cpus` places each, and the GPUs of these indices dealt to them in order.

    follow: they end with this process, however it ends. Raises RuntimeError where one doesn't come up.
    """
    gpus = gpus or []
    cluster = Cluster(
        secrets.token_hex(32), tempfile.mkdtemp(prefix="nsa-", dir="/tmp")
    )  # sockets' paths are limited
    try:
        for i in range(nodes):
            add_node(cluster, cpus, gpus[i * len(gpus) // nodes : (i + 1) * len(gpus) // nodes], follow)
    except BaseException:
        stop_cluster(cluster)
        raise
    return cluster


def add_node(cluster: Cluster, cpus: int = 1, gpus: list[int] | None = None, follow: bool = True) -> None:
    """Starts one node more, the last of `cluster.nodes`; the first is the head. Returns when Ray has it."""
    process, facts = _start_node(cluster, f"node-{len(cluster.nodes)}", cpus, gpus or [], follow, cluster.gcs)
    cluster.nodes.append(process)
    cluster.node_ids.append(facts["node_id"])
    if len(cluster.nodes) == 1:
        cluster.gcs, cluster.dashboard = facts["gcs"], facts["dashboard"]


def restart_head(cluster: Cluster, cpus: int = 1) -> None:
    """Starts the head again, which was killed: at its address, with what Ray has written down."""
    port = int(cluster.gcs.rpartition(":")[2])
    cluster.nodes[0], facts = _start_node(cluster, "node-0", cpus, [], True, "", port)
    cluster.node_ids[0], cluster.dashboard = facts["node_id"], facts["dashboard"]


def _start_node(
    cluster: Cluster, name: str, cpus: int, gpus: list[int], follow: bool, gcs: str, port: int = 0
) -> tuple[int, dict[str, str]]:
    """Its process id and what it says of itself. gcs "": the head, at this port (0: any)."""
    options = {
        "name": name,
        "cpus": cpus,
        "gpus": len(gpus),
        "object_store_bytes": OBJECT_STORE_BYTES,
        "folder": cluster.folder,
        "gcs": gcs,
        "gcs_port": port,
        "follow": follow,
        "dashboard_port": 0 if follow else _dashboard_port(),
    }
    environment = ray_environment(cluster.token)
    if not gcs and has_store():  # what Ray knows survives its head
        environment |= {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": f"{cluster.folder}/gcs"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    log = Path(cluster.folder) / f"{name}.txt"
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "nsa_dist.launch.node", json.dumps(options)],
            stdin=subprocess.PIPE if follow else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )
    cluster.processes.append(process)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        kill_tree(process.pid)
        lines = log.read_text().strip().splitlines() or ["no word"]
        raise RuntimeError(f"a node of the local Ray cluster did not start: {lines[-1]}")
    return process.pid, json.loads(line)


def has_store() -> bool:
    """Whether Ray keeps what it knows on a disk: tried with 2.60."""
    return tuple(int(part) for part in version("ray").split(".")[:2]) >= (2, 60)


def kill_node(cluster: Cluster, index: int) -> None:
    """Ends a node at once, as a power cut would: its processes and all that those have started."""
    kill_tree(cluster.nodes[index])
    _collect(cluster)


def stop_cluster(cluster: Cluster) -> None:
    """Ends all nodes and removes the cluster's files; other clusters of the machine are not touched."""
    for node in reversed(cluster.nodes):
        kill_tree(node)
    _collect(cluster)
    shutil.rmtree(cluster.folder, ignore_errors=True)


@contextmanager
def running_cluster(nodes: int = 1, cpus: int = 1) -> Iterator[Cluster]:
    """A cluster for the length of the block."""
    cluster = start_cluster(nodes, cpus)
    try:
        yield cluster
    finally:
        stop_cluster(cluster)


def up(nodes: int, cpus: int, gpus: list[int]) -> Cluster:
    """A cluster that outlives this process, noted where `noted_cluster` finds it. Raises ConfigError if one is up."""
    noted = noted_cluster()
    if noted:
        raise ConfigError(f"cluster {noted.dashboard}: is up already; nsa-dist cluster down ends it")
    cluster = start_cluster(nodes, cpus, gpus, follow=False)
    facts = {name: value for name, value in vars(cluster).items() if name != "processes"}
    note = _note()
    note.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    with os.fdopen(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # it holds the token
        json.dump(facts, file)
    return cluster


def down() -> Cluster:
    """Ends the cluster that `up` started. Raises ConfigError where there is none."""
    cluster = noted_cluster()
    if cluster is None:
        raise ConfigError(f"cluster down: no cluster of yours is up here ({_note()} names none that lives)")
    stop_cluster(cluster)
    _note().unlink()
    return cluster


def noted_cluster() -> Cluster | None:
    """The cluster that `up` started for this user on this machine, if its head lives."""
    try:
        cluster = Cluster(**json.loads(_note().read_text()))
        command = Path(f"/proc/{cluster.nodes[0]}/cmdline").read_bytes()
    except (OSError, ValueError, TypeError, IndexError):
        return None
    return cluster if cluster.folder.encode() in command else None


def ray_environment(token: str) -> dict[str, str]:
    """This process's environment with our settings of Ray in place of the user's, and this Python's folder first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A job's `python` is the one on the path of the process that started Ray.
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return kept | RAY_SETTINGS | {"RAY_AUTH_TOKEN": token}


def _dashboard_port() -> int:
    """Ray's usual one, where it is free: what others know by heart."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8265))
        except OSError:
            return 0
    return 8265


def _note() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state) / "nsa-dist" / "cluster.json"


def _collect(cluster: Cluster) -> None:
    """Takes note of the ends of children, which stay as zombies otherwise."""
    for process in cluster.processes:
        process.poll()
