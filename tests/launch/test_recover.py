"""Ranks killed and stopped, checkpoints damaged, as a user has it; losses that aren't finite; placement."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nsa_dist.train as training
from nsa_dist.config import Config, load_config
from nsa_dist.console import Console
from nsa_dist.data import prepare_all
from nsa_dist.launch.local import private_ray
from nsa_dist.metrics import read_metrics
from nsa_dist.process import RunFailed
from nsa_dist.rundir import Resume
from tests.conftest import run_ranks

TINY = """
model: {layers: 1, width: 16, heads: 2, kv_heads: 1, head_dim: 8, ffn: 32}
nsa: {compress_block: 8, compress_stride: 4, select_block: 16, select_count: 4, window: 16}
data: {seq_len: 128, batch_size: 2}
train: {steps: 40, warmup_steps: 3, checkpoint_every: 5, validate_every: 0, validation_sequences: 0}
parallel: {cp: 2}
launch: {device: cpu}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recover")
    (folder / "text.txt").write_text("a rank that is killed is started again; " * 2000)
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def configure(recipe: Path, run: Path, *words: str) -> tuple[Config, list[str]]:
    words = (f"run.dir={run}", f"data.source={recipe}/text.txt", f"data.cache_dir={recipe}/cache", *words)
    return load_config(str(recipe / "tiny.yaml"), list(words)), [str(recipe / "tiny.yaml"), *words]


def undisturbed(recipe: Path, run: Path, skip: Collection[int] = ()) -> list[float]:
    config, _ = configure(recipe, run)
    prepare_all(config.data, lambda text: None)
    run.mkdir(exist_ok=True)
    run_ranks(2, train_all, config, skip)
    return losses(run)


def train_all(config: Config, skip: Collection[int]) -> None:
    training.train(config, Resume((), True), lambda event: False, skip)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


def wait_until(true: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not true():
        assert run.poll() is None and time.monotonic() < end
        time.sleep(0.02)


def test_a_run_survives_a_killed_rank_a_damaged_checkpoint_and_a_hang(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _, words = configure(recipe, run_dir, "launch.heartbeat_s=3")
    run = subprocess.Popen(
        [sys.executable, "-m", "nsa_dist", "train", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )

    def strike(number: signal.Signals, step: int, damage: bool) -> None:
        """After that many steps, to rank 1."""
        path = run_dir / "metrics.jsonl"
        wait_until(lambda: path.exists() and len(path.read_text().splitlines()) >= step, run)
        pid = events(run_dir, "ranks")[-1]["ranks"][1]["pid"]
        if damage:
            os.kill(pid, signal.SIGSTOP)  # no further checkpoint
            time.sleep(0.3)
            newest = max(run_dir.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))
            file = newest / "__1_0.distcp"
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
        before = len(events(run_dir, "recovery"))
        os.kill(pid, number)
        wait_until(lambda: len(events(run_dir, "recovery")) > before, run)

    try:
        strike(signal.SIGKILL, 12, damage=True)
        strike(signal.SIGSTOP, 22, damage=False)
        out, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode == 0, out
    assert losses(run_dir) == undisturbed(recipe, tmp_path / "other")
    killed, hung = events(run_dir, "recovery")
    assert (killed["failure"], killed["rank"], hung["failure"], hung["rank"]) == ("killed", 1, "hang", 1)
    (skipped,) = events(run_dir, "checkpoint_skipped")
    assert "__1_0.distcp: damaged" in skipped["reason"] and skipped["reason"] in out
    assert killed["from_step"] == int(Path(skipped["path"]).name[5:]) - 5
    assert "rank 1 on 127.0.0.1, after step " in out and "doesn't answer (stopped" in out
    assert "Traceback" not in out


def train_with_nan(
    bad: Collection[int], config: Config, resume: Resume, report: Any, skip: Collection[int] = ()
) -> bool:
    """The losses of these steps are not finite."""
    steps, original = iter(range(1_000_000)), training.Reader.training

    def reading(self: training.Reader, corpus: Any, step: int) -> Any:
        nonlocal steps
        steps = iter([step])
        return original(self, corpus, step)

    forward = training.forward_backward

    def forward_backward(*args: Any) -> Any:
        loss, rivals = forward(*args)
        return (math.nan if next(steps) in bad else loss), rivals

    training.Reader.training, training.forward_backward = reading, forward_backward  # type: ignore[method-assign]
    return training.train(config, resume, report, skip)


def test_a_batch_whose_loss_is_not_finite_is_skipped_once(recipe: Path, tmp_path: Path) -> None:
    config, _ = configure(recipe, tmp_path / "run", "train.steps=12")
    prepare_all(config.data, lambda text: None)
    with private_ray(2, 0):  # before Ray is imported
        from nsa_dist.launch.recover import train_through

        for name, bad in (("run", {7}), ("bad", {7, 8})):
            config = replace(config, run=replace(config.run, dir=str(tmp_path / name)))
            (tmp_path / name).mkdir()
            run = partial(
                train_through, config, Resume((), True), Console(), "cpu", lambda: False, partial(train_with_nan, bad)
            )
            if name == "run":
                run()
            else:
                with pytest.raises(RunFailed, match=r"rank \d: TrainingError: loss=nan at step 8: .*skipped already"):
                    run()
    assert [row["step"] for row in events(tmp_path / "run", "batch_skipped")] == [7]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [*range(1, 7), *range(8, 13)]
    evidence = json.loads((tmp_path / "run" / "not-finite" / "step-7-rank-0.json").read_text())
    assert (evidence["loss"], evidence["sequences"]) == ("nan", [12, 13])
    assert (tmp_path / "bad" / "not-finite" / "step-8-rank-1.json").exists()


def test_groups_stay_inside_nodes_where_they_fit() -> None:
    from nsa_dist.launch.placement import owners

    assert owners([2, 2, 2], 3, 2) == [0, 0, 1, 1, 2, 2]
    assert owners([3, 2, 1], 3, 2) == [0, 0, 1, 1, 0, 2]
    assert owners([4, 4], 1, 4) == [0, 0, 0, 0]
    assert owners([1, 4], 1, 4) == [1, 1, 1, 1]
    assert owners([1, 1], 1, 2) == [0, 1]


@pytest.mark.parametrize("cp", ["auto", "2"])
def test_a_node_that_fails_again_and_again_is_left_out_where_the_others_suffice(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cp: str
) -> None:
    from nsa_dist.launch.placement import Node, Places
    from nsa_dist.launch.recover import _Run
    from nsa_dist.launch.watch import Failed

    good, bad = (Node(name, name, "127.0.0.1", "here", places=1) for name in ("node-1", "node-2"))
    monkeypatch.setattr(Places, "nodes", lambda *_: [good, bad])
    for name in ("reserve", "give_back", "settle"):
        monkeypatch.setattr(Places, name, lambda *_: None)
    monkeypatch.setattr(Places, "ready", lambda *_: True)
    monkeypatch.setattr(_Run, "_sleep", lambda *_: None)
    config, _ = configure(recipe, tmp_path, f"parallel.cp={cp}", "launch.max_failures=100")
    run = _Run(config, Resume((), True), Console(), "cpu", lambda: False, training.train)

    def after(node: Node, kind: str, times: int) -> list[str]:
        """The nodes of the ranks that start after so many failures there."""
        for _ in range(times):
            failed = Failed(0, "it failed", tmp_path / "log")
            failed.node, failed.kind = node, kind
            run._failed(failed)
        choice = run._choose(0)
        assert choice
        return [choice[1][index].name for index in choice[2]]

    both, left = ["node-1", "node-2"], ["node-1"] if cp == "auto" else ["node-1", "node-2"]
    assert after(bad, "lost", 4) == after(bad, "not_finite", 0) == both  # its return is no failure of it
    assert after(bad, "killed", 2) == after(good, "error", 2) == both
    assert after(bad, "hang", 1) == left
    assert [row["node"] for row in events(tmp_path, "node_left_out")] == ["node-2"]
    assert after(good, "killed", 1) == both  # all have failed: better than none
    run._by_node = {name: [at - 86400 for at in times] for name, times in run._by_node.items()}
    assert after(good, "killed", 0) == both  # a day later


def test_ranks_that_are_still_to_end_have_not_recovered(recipe: Path, tmp_path: Path) -> None:
    from nsa_dist.launch.recover import _Run
    from nsa_dist.launch.straggler import Stragglers

    config, _ = configure(recipe, tmp_path)
    run = _Run(config, Resume((), True), Console(), "cpu", lambda: False, training.train)
    run._stragglers = Stragglers(1)
    run._ask_to_end("2 places instead of 1")
    run._report(0, {"kind": "beat", "step": 13, "waited_s": 0.0})  # of the step that was under way
    run._change = ""  # started again
    run._report(0, {"kind": "busy", "what": "first step", "step": 13})
    assert not (tmp_path / "events.jsonl").exists()
    run._report(0, {"kind": "beat", "step": 14, "waited_s": 0.0})
    (recovery,) = events(tmp_path, "recovery")
    assert (recovery["from_step"], recovery["steps_lost"]) == (13, 0)


def test_an_outage_of_the_store_is_a_failure_among_others(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nsa_dist.launch.recover import _Run

    config, _ = configure(recipe, tmp_path, "run.store=http://127.0.0.1:9/run")  # nobody listens there
    run = _Run(config, Resume((), True), Console(), "cpu", lambda: False, training.train)
    attempts = []

    def attempt(self: Any, *choice: Any) -> bool:
        attempts.append(1)
        return len(attempts) == 3 or bool(self._resume_from())

    monkeypatch.setattr(_Run, "_choose", lambda *_: (config, [], []))
    monkeypatch.setattr(_Run, "_attempt", attempt)
    monkeypatch.setattr(_Run, "_sleep", lambda *_: None)
    run.train(0)
    causes = [row["cause"] for row in events(tmp_path, "failure")]
    assert len(causes) == 2 and all(cause.startswith("http://127.0.0.1:9/run/checkpoints: ") for cause in causes)


def test_an_address_has_its_interface() -> None:
    from nsa_dist.launch.worker import interface

    assert interface("127.0.0.1").startswith("lo")
    with pytest.raises(RuntimeError, match=r"no network interface of this machine has the address 192\.0\.2\.1"):
        interface("192.0.2.1")


def test_a_step_of_the_usual_length_is_no_hang() -> None:
    from nsa_dist.launch.watch import _Pulse

    pulse = _Pulse(0.0)
    assert pulse.limit(5, 600) == 605  # starting takes its time
    pulse.take({"kind": "busy", "what": "first step", "step": 10}, 100.0)
    pulse.take({"kind": "beat", "step": 11}, 104.0)
    assert pulse.limit(5, 600) == 8
    pulse.take({"kind": "busy", "what": "checkpoint"}, 105.0)
    assert pulse.limit(5, 600) == 605
    pulse.take({"kind": "beat", "step": 12}, 300.0)
    assert pulse.limit(5, 600) == 8


def test_the_rank_that_waits_for_nobody_is_named() -> None:
    from nsa_dist.launch.watch import _guilty, _Pulse

    def stack(file: str) -> str:
        return (
            f'Thread 0x1 (most recent call first):\n  File "/a/queue.py", line 1 in get\n\nCurrent thread 0x2 (most '
            f'recent call first):\n  File "{file}", line 7 in f\n  File "/x/nsa_dist/train.py", line 9 in train\n'
        )

    pulses = {rank: _Pulse(float(rank), "", 3) for rank in range(3)}
    waiting = stack("/x/torch/distributed/distributed_c10d.py")
    assert _guilty({0: waiting, 1: stack("/x/nsa_dist/data.py"), 2: waiting}, pulses) == 1
    assert _guilty({0: waiting, 1: waiting, 2: None}, pulses) == 2
