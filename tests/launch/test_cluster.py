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
import requests

from nsa_dist.launch.cluster import Cluster, add_node, kill_node, running_cluster
from nsa_dist.processes import tree

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


def test_all_listen_on_this_machine_alone_and_ask_for_the_token(cluster: Cluster) -> None:
    open_to = listening([pid for node in cluster.nodes for pid in tree(node)])
    assert open_to and open_to <= LOOPBACK
    for path in ("/api/version", "/api/jobs/", "/api/v0/nodes", "/nodes?view=summary"):
        for token, status in ((None, 401), ("f" * 64, 403), (cluster.token, 200)):
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            assert requests.get(cluster.dashboard + path, headers=headers, timeout=60).status_code == status
    told = subprocess.run(
        [sys.executable, "-c", "import ray; ray.init()"],
        env=cluster.environment() | {"RAY_AUTH_TOKEN": "f" * 64},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode and "InvalidAuthToken" in told.stderr


def listening(pids: list[int]) -> set[str]:
    """The addresses (hexadecimal, as the kernel writes them) on which processes listen for TCP."""
    sockets = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(fd).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue
    table = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))
    rows = [line.split() for line in table.splitlines()]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


# Each in turn: the words, the environment's changes, Ray's version (or none); answers with status, stdout, stderr.
MANY = """
import contextlib, io, json, os, sys
import ray
from nsa_dist.cli import main
version, answers = ray.__version__, []
for words, environment, pretended in json.load(sys.stdin):
    os.environ.update(environment)
    ray.__version__ = pretended or version
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    answers.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


def test_bad_submissions_are_one_line_and_start_nothing(cluster: Cluster, tmp_path: Path) -> None:
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(65 * 2**20)
    fine, right = [f"run.dir={tmp_path}/run", f"--address={cluster.dashboard}"], {"RAY_AUTH_TOKEN": cluster.token}
    wrong, listing = {"RAY_AUTH_TOKEN": "f" * 64}, ["list", "--json", f"--address={cluster.dashboard}"]
    cases: list[tuple[list[str], dict[str, str], str, str]] = [
        (["run.dir=/x/run"], right, "", "--address: no cluster of yours is up here"),
        (["run.dir=/x/run", "--address=127.0.0.1:1"], right, "", "http://127.0.0.1:1: no Ray cluster answers there"),
        ([*fine, "run.dir=runs/relative"], right, "", "run.dir=runs/relative: must be an absolute path"),
        ([*fine, "parallel.dp=9", "data.batch_size=9"], right, "", "18 ranks need a CPU each, the cluster has"),
        ([*fine, "launch.device=cuda"], right, "", "2 ranks need a GPU each, the cluster has 0"),
        ([*fine, "data.source=large.txt"], right, "", "data.source=large.txt: 65.0 MiB; at most 64.0 MiB travel"),
        ([*fine, "data.source=none.txt"], right, "", "data.source=none.txt: no such file or folder here"),
        (fine, right, "2.1.0", ", 2.1.0 here; must be equal"),
        (fine, wrong, "", "a wrong token was given"),
    ]
    asked = [(["submit", *words], environment, version) for words, environment, version, _ in cases]
    done = subprocess.run(
        [sys.executable, "-c", MANY],  # this process must not import Ray: others start one of their own in it
        input=json.dumps([*asked, (listing, right, "")]),
        cwd=tmp_path,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path)},  # no cluster of this user's
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    *answers, listed = json.loads(done.stdout.splitlines()[-1])
    for (words, *_, told), (status, _, error) in zip(cases, answers, strict=True):
        assert status == 2, words
        assert error.startswith("nsa-dist: error: ") and error.count("\n") == 1 and told in error
    assert (listed[0], json.loads(listed[1])) == (0, [])
    assert not (tmp_path / "run").exists()
