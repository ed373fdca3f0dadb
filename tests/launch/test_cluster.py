"""A cluster of two Ray nodes on this machine: what listens, who may speak, a node killed, everything gone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa_dist.launch.cluster import Cluster, add_node, kill_node, running_cluster
from nsa_dist.launch.processes import tree

LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1 as the kernel writes it, IPv4 and IPv6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster(nodes=2, cpus=2) as cluster:
        yield cluster


def ask(cluster: Cluster, program: str, **environment: str) -> object:
    """What a program that is connected to the cluster prints as JSON."""
    words = [sys.executable, "-c", f"import json, ray, time\nray.init(log_to_driver=False)\n{program}"]
    done = subprocess.run(
        words, env=cluster.environment() | environment, capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_node_killed_is_seen_and_another_takes_its_place(cluster: Cluster) -> None:
    alive = "[n['NodeName'] for n in ray.nodes() if n['Alive']]"
    assert sorted(ask(cluster, f"print(json.dumps({alive}))")) == ["node-0", "node-1"]  # type: ignore[type-var]
    kill_node(cluster, 1)
    assert tree(cluster.nodes[1]) == set()
    gone = f"while len({alive}) > 1:\n    time.sleep(0.1)\nprint(json.dumps({alive}))"
    assert ask(cluster, gone) == ["node-0"]
    add_node(cluster, cpus=3)
    assert ask(cluster, "print(json.dumps(ray.cluster_resources()['CPU']))") == 5


PROGRAM = """
from nsa_dist.launch.cluster import start_cluster
cluster = start_cluster(2)
print(*cluster.nodes, cluster.folder, flush=True)
input()
"""


def test_nodes_end_with_the_process_that_started_them() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    *nodes, folder = owner.stdout.readline().split()
    assert all(tree(int(node)) for node in nodes)
    os.kill(owner.pid, signal.SIGKILL)
    owner.communicate()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (any(tree(int(node)) for node in nodes) or Path(folder).exists()):
        time.sleep(0.2)
    assert [tree(int(node)) for node in nodes] == [set(), set()]
    assert not Path(folder).exists()
