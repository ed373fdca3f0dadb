"""Workers on a private Ray. The functions that they run are local ones: those travel by value."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nsa_dist.config import ConfigError
from nsa_dist.launch.local import private_ray, run_local
from nsa_dist.process import RunFailed


@pytest.fixture(scope="module")
def run_workers() -> Iterator[Callable[..., Any]]:
    """controller.run_workers in one private Ray, with places enough for every test: they come free late."""
    with private_ray(12, 0):
        from nsa_dist.launch.controller import run_workers

        yield run_workers


def ignore(rank: int, event: dict[str, Any]) -> None:
    pass


def processes() -> dict[int, tuple[int, int]]:
    """Parent and session of each living process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent, _, session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # ended meanwhile
            continue
        if state != "Z":
            found[int(folder.name)] = (int(parent), int(session))
    return found


def descendants(pid: int) -> list[int]:
    found, table = [pid], processes()
    for ancestor in found:
        found += [child for child, (parent, _) in table.items() if parent == ancestor]
    return found[1:]


def in_session(session: int) -> list[int]:
    return [pid for pid, (_, its) in processes().items() if its == session]


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


def wait_until(true: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def test_results_of_more_ranks_than_cores_unreachable_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")  # no such cluster: it must not be asked
    environment, before = dict(os.environ), descendants(os.getpid())  # the fork server of earlier tests
    world_size = len(os.sched_getaffinity(0)) + 1

    def fn(shift: int, report: Callable[[dict[str, Any]], None]) -> tuple[int, float, int]:
        import torch
        import torch.distributed as dist

        total = torch.tensor([float(dist.get_rank() + shift)])
        dist.all_reduce(total)
        print("words of rank", dist.get_rank())
        report({"kind": "beat", "step": dist.get_rank()})
        return dist.get_rank(), total.item(), torch.get_num_threads()

    beats, open_to = [], set()

    def on_report(rank: int, event: dict[str, Any]) -> None:
        beats.append((rank, event["step"]))
        open_to.update(listening([os.getpid(), *descendants(os.getpid())]))

    results = run_local(world_size, fn, (10,), on_report, tmp_path / "logs")

    ranks = range(world_size)
    assert results == [(rank, float(sum(ranks) + 10 * world_size), 1) for rank in ranks]
    assert sorted(beats) == [(rank, rank) for rank in ranks]
    for rank in ranks:
        assert f"words of rank {rank}" in (tmp_path / f"logs/rank-{rank}.txt").read_text()
    assert open_to == {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, and the same in IPv6
    assert descendants(os.getpid()) == before
    assert dict(os.environ) == environment
    assert capfd.readouterr() == ("", "")


def test_first_cause_is_the_dead_rank_though_others_fail_and_hang(
    run_workers: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def fn(report: Callable[[dict[str, Any]], None]) -> None:
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.ones(1))
        if dist.get_rank() == 2:  # its connections end before it does
            dist.destroy_process_group()
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 1:
            time.sleep(1000)
        dist.recv(torch.ones(1), src=2)

    with pytest.raises(RunFailed) as caught:
        run_workers(3, fn, (), ignore, tmp_path)
    assert caught.value.rank == 2
    assert str(caught.value) == (
        f"rank 2: its process was killed by SIGKILL (out of memory, or by hand); see {tmp_path}/rank-2.txt"
    )
    assert "gloo" in (tmp_path / "rank-0.txt").read_text()
    assert capfd.readouterr() == ("", "")


def test_a_hang_is_told_with_the_silent_rank(
    run_workers: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa_dist.launch.watch._CAUSE_S", 1.0)

    def fn(report: Callable[[dict[str, Any]], None]) -> None:
        import torch
        import torch.distributed as dist

        report({"kind": "beat", "step": 41})
        if dist.get_rank() == 1:
            time.sleep(1000)
        dist.all_reduce(torch.ones(1))

    with pytest.raises(RunFailed, match=r"^rank 0: .*; rank 1 still runs and was last heard .* \(step 41\)"):
        run_workers(2, fn, (), ignore, tmp_path, timeout_s=3)


@pytest.mark.parametrize("error", [ValueError("too small\nby far"), ConfigError("a=b: must be c")])
def test_an_error_is_told_in_one_line_and_kept_in_full(
    run_workers: Callable[..., Any], tmp_path: Path, error: Exception
) -> None:
    def fn(report: Callable[[dict[str, Any]], None]) -> None:
        import torch
        import torch.distributed as dist

        if dist.get_rank() == 1:
            time.sleep(0.5)
            raise error
        dist.all_reduce(torch.ones(1))

    with pytest.raises(RunFailed) as caught:
        run_workers(2, fn, (), ignore, tmp_path)
    bad_input = isinstance(error, ConfigError)
    assert (caught.value.rank, caught.value.bad_input) == (1, bad_input)
    told = "a=b: must be c" if bad_input else f"rank 1: ValueError: too small; see {tmp_path}/rank-1.txt"
    assert str(caught.value) == told
    log = (tmp_path / "rank-1.txt").read_text()
    assert "Traceback" in log and str(error) in log


PROGRAM = """
import sys, time
from pathlib import Path
from nsa_dist.launch.local import private_ray, run_local

def main(logs, seconds):
    def fn(report):
        report({"kind": "beat", "step": 0})
        time.sleep(seconds)
        return 7
    print(run_local(2, fn, (), lambda rank, event: print("beat", flush=True), Path(logs)), flush=True)

main(sys.argv[1], float(sys.argv[2]))
"""


def test_killed_controller_leaves_nothing_and_a_run_beside_it_goes_on(tmp_path: Path) -> None:
    def start(name: str, seconds: float) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", PROGRAM, str(tmp_path / name), str(seconds)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)

    killed, other = start("killed", 1000), start("other", 5)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "beat\n"
    assert len(in_session(killed.pid)) > 3  # the controller, its workers, and Ray's own
    killed.kill()
    assert wait_until(lambda: in_session(killed.pid) == [])
    assert other.communicate(timeout=120)[0].splitlines()[-1] == "[7, 7]"
    killed.communicate()
