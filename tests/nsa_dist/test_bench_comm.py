"""The exchanges' benchmarks: bytes as computed, selections as described, ranks that all end when one does."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from nsa_dist.bench_comm import EXCHANGES, Case, bench_comm
from nsa_dist.bench_gpus import bench_gpus
from nsa_dist.bench_rows import Row
from nsa_dist.cli import main
from nsa_dist.device_trace import communication
from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.mesh import Mesh
from nsa_dist.parallel.traffic import TrafficModel
from nsa_dist.picks import SELECTIONS, open_trace, prescribed
from nsa_dist.process import RunFailed
from nsa_dist.ranks import Ranks
from nsa_dist.recovery import RAY, STEPS, TORCHRUN, recovery
from nsa_dist.traces import NEEDS_64K

SPEC = NSASpec()
T, RANKS, GROUPS = 2048, 2, 2


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_selection_is_causal_forced_and_without_repeats(selection: str) -> None:
    picks = prescribed(selection, np.arange(T), 3, SPEC, None)
    own = np.arange(T) // SPEC.select_block
    assert picks.shape == (T, 3, SPEC.select_count)
    for t in [0, 63, 64, 200, 1023, 1024, 1500, T - 1]:
        for row in picks[t]:
            chosen = row[row >= 0].tolist()
            assert chosen == sorted(set(chosen)) == row[: len(chosen)].tolist()  # ascending, what is missing last
            assert {0, int(own[t]), max(int(own[t]) - 1, 0)} <= set(chosen) <= set(range(int(own[t]) + 1))
            if selection != "trained":
                assert len(chosen) == min(SPEC.select_count, own[t] + 1)
    some = np.array([5, 700, 2000])
    assert (prescribed(selection, some, 3, SPEC, None) == picks[some]).all()  # whatever the rank holds


def test_a_group_of_queries_selects_what_the_trace_says() -> None:
    trace = open_trace(NEEDS_64K)
    assert trace.needs is not None
    for group in (20, 63):
        tokens = np.arange(group * 64, group * 64 + 64)
        picks = prescribed("trained", tokens, 2, SPEC, None)
        for g in range(2):
            wanted = set(np.flatnonzero(trace.needs[g, group, : group + 1]).tolist())
            assert set(np.unique(picks[:, g]).tolist()) - {-1} == wanted | {0, group - 1, group}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    file = tmp_path_factory.mktemp("comm") / "rows.jsonl"
    cases = [
        Case(name, RANKS, layout, "adversarial", T, 4, GROUPS, 16, 16, "float32")
        for layout, names in (("contiguous", EXCHANGES), ("zigzag", ("nsa",)))
        for name in names
    ]
    bench_comm(cases, "cpu", 1, file, lambda text: None)
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_counts_the_bytes_that_the_layout_gives(rows: list[dict]) -> None:
    assert [row["exchange"] for row in rows] == [*EXCHANGES, "nsa"]
    for row in rows:
        layout = make_layout(row["layout"], T, RANKS, SPEC.select_block)
        case = Case(row["exchange"], RANKS, row["layout"], "adversarial", T, 4, GROUPS, 16, 16, "float32")
        model = TrafficModel(Packing(np.array([0, T]), SPEC), layout, case.sizes)
        bits = np.zeros((RANKS, GROUPS, T // SPEC.select_block), bool)
        for rank in range(RANKS):
            picks = prescribed("adversarial", layout.own(rank), GROUPS, SPEC, None)
            for g in range(GROUPS):
                bits[rank, g, np.unique(picks[:, g][picks[:, g] >= 0])] = True
        traffic = model.nsa(case.exchange, bits)
        for phase, name in (("forward", ""), ("backward", "backward_")):
            received = sum(both[1] for key, both in traffic.items() if key[1] == phase)
            assert row[f"{name}received_bytes_mean"] == np.mean(received), (row["exchange"], phase)
            assert row[f"{name}received_bytes_max"] == np.max(received)
        whole = (RANKS - 1) * T / RANKS * GROUPS * (16 + 16) * 4
        assert row["share_of_allgather"] == pytest.approx(row["received_bytes_mean"] / whole)
        parts = sum(kind["forward"]["received_bytes"]["mean"] for kind in row["kinds"].values() if "forward" in kind)
        assert parts == row["received_bytes_mean"]


def test_the_whole_and_the_head_by_head_all_gather_bring_the_same(rows: list[dict]) -> None:
    whole, heads = (next(r for r in rows if r["exchange"] == name) for name in ("allgather", "allgather_heads"))
    assert whole["kinds"]["selected"] == heads["kinds"]["selected"]
    assert heads["kinds"]["refetch"]["backward"] == whole["kinds"]["selected"]["forward"]


def _ranks_pid(mesh: Mesh) -> int:
    return os.getpid()


def _dies(mesh: Mesh, rank: int) -> None:
    if mesh.world.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def _fails(mesh: Mesh, rank: int) -> int:
    if mesh.world.rank == rank:
        raise ValueError("no such thing")
    return 1


@pytest.mark.parametrize(
    ("fn", "cause"), [(_dies, r"its process died \(signal 9\)"), (_fails, "ValueError: no such")]
)
def test_every_rank_ends_when_one_does(fn: object, cause: str) -> None:
    with Ranks(3, "cpu") as pool:
        pids = pool.call(_ranks_pid)
        with pytest.raises(RunFailed, match=f"rank 1: {cause}"):
            pool.call(fn, 1)  # type: ignore[arg-type]
    assert len(set(pids)) == 3 and not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("comm --exchange mail", "--exchange mail: must be some of nsa, "),
        ("comm --tokens 100 --ranks 2 --layout zigzag", "--tokens 100: must be at least 193"),
        ("comm --device cuda --ranks 99 --tokens 65536", "--device=cuda: "),
        ("comm --selection trained --tokens 99999", "--tokens 99999: must be at most 65536"),
        ("comm --timeout-s 0", "--timeout-s 0: must be a positive integer"),
        ("comm --heads 5", "--heads 5: must be a multiple of --kv-heads 2"),
        ("comm --selection trained --trace nowhere.npz", "trace 'nowhere.npz': must be an .npz file"),
        ("gpus --device cuda --gpus 99", "--device=cuda: "),
        ("gpus --device cpu --gpus 2 --json /nowhere/rows", "--json /nowhere/rows: No such file or directory"),
    ],
)
def test_bad_input_is_one_line(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nsa-dist: error: {told}") and error.count("\n") == 1


def test_a_profile_gives_bytes_and_what_was_hidden() -> None:
    def kernel(name: str, start: float, duration: float) -> dict:
        return {"cat": "kernel", "name": name, "ts": start, "dur": duration}

    def given(**args: object) -> dict:
        return {"cat": "cpu_op", "name": "record_param_comms", "args": args}

    events = [
        kernel("ncclDevKernel_SendRecv", 0, 1000),
        kernel("range_forward", 400, 300),
        kernel("range_forward", 600, 200),
        kernel("ncclDevKernel_AllGather", 2000, 500),
        given(**{"Collective name": "all_to_allv", "In msg nelems": 60, "Out msg nelems": 40, "dtype": "BFloat16",
                 "In split size": "[1, 2, 3]", "Out split size": "[2, 0, 2]", "Group size": 3}),
        given(**{"Collective name": "_allgather_base", "In msg nelems": 8, "Out msg nelems": 24, "dtype": "Byte",
                 "Group size": 3}),
    ]  # fmt: skip
    found = communication(events, rank=0)
    assert (found.kernels_ms, found.hidden_ms, found.exposed_ms) == pytest.approx((1.5, 0.4, 1.1))
    assert found.sent_bytes == 50 * 2 + 8 * 2
    assert found.received_bytes == 20 * 2 + 16
    assert found.calls == 2


@pytest.mark.parametrize("launcher", [RAY, TORCHRUN])
def test_a_killed_rank_is_replaced_and_the_run_goes_on(launcher: str, tmp_path: Path) -> None:
    words = ["data.seq_len=512", "model.layers=1", "model.width=32", "model.ffn=64", "model.heads=2"]
    words += ["launch.timeout_s=60", f"data.cache_dir={tmp_path}"]
    row = recovery(launcher, 2, "cpu", words, limit_s=400)
    assert row["fine"] and (row["launcher"], row["steps"]) == (launcher, STEPS)
    assert row["resumed_from_step"] < row["killed_after_step"]


def test_a_launcher_under_which_the_run_is_not_done_in_time_costs_the_other_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def struck(launcher: str, ranks: int, device: str, words: list[str], limit_s: float) -> Row:
        if launcher == RAY:
            return recovery(launcher, ranks, device, words, limit_s=0.5)
        return {"part": "recovery", "ranks": ranks, "launcher": launcher, "killed_rank": 1, "killed_after_step": 15,
                "resumed_from_step": 10, "recovery_s": 1.0, "steps": 40, "fine": True}  # fmt: skip

    monkeypatch.setattr("nsa_dist.bench_gpus.recovery", struck)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the failed run's log stays
    file, said = tmp_path / "rows.jsonl", list[str]()
    bench_gpus("cpu", 2, 3, ["recovery"], file, None, said.append)
    failed, fine = [json.loads(line) for line in file.read_text().splitlines()]
    assert (failed["part"], fine["launcher"]) == ("failure", TORCHRUN)
    assert "no time is left before step 15" in failed["cause"]
    assert any("recovery under ray" in line for line in said)
