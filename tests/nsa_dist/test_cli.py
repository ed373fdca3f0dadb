"""The command line: bad input before any worker starts, real runs, signals, torchrun."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nsa_dist.checkpoint import NotWrittenError
from nsa_dist.cli import main
from nsa_dist.console import Console
from nsa_dist.process import RunFailed, is_bad_input

TINY = """
model: {layers: 1, width: 32, heads: 2, head_dim: 16, ffn: 64}
nsa: {select_block: 32, select_count: 3, window: 32}
data: {source: SOURCE, cache_dir: CACHE, seq_len: 128, validation: 0}
train: {steps: 3, warmup_steps: 1}
parallel: {cp: 2}
launch: {device: cpu}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    source = tmp_path / "corpus.txt"
    source.write_text("Whatever is worth doing is worth doing well. " * 200)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("SOURCE", str(source)).replace("CACHE", str(tmp_path / "cache")))
    return path


def events(run_dir: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (run_dir / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["train", "no-such.yaml"], ["no-such.yaml"]),
        (["train", "RECIPE", "model.layer=3"], ["model.layer", "model.layers"]),
        (["train", "RECIPE", "parallel.layout=zigzap"], ["parallel.layout=zigzap", "contiguous, zigzag"]),
        (["train", "RECIPE", "data.source=missing.txt"], ["missing.txt"]),
        (["train", "RECIPE", "model.vocab_size=256"], ["model.vocab_size=256", "257", "data.tokenizer=bytes"]),
        (["train", "RECIPE", "parallel.cp=two"], ["parallel.cp=two", "an integer"]),
        (["train", "RECIPE", "train.lr="], ["train.lr=None", "a number"]),
        (["train", "RECIPE", "model.attention=nsa"], ["model.attention=nsa", "a list"]),
        (["train", "RECIPE", "parallel=3"], ["parallel=3", "section"]),
        (["train", "RECIPE", "xyzzy=3"], ["'xyzzy'", "run, model, nsa, data, train, parallel, launch"]),
        (["train", "RECIPE", f"run.seed={1 << 63}"], ["run.seed=9223372036854775808", "below 2**63"]),
        (["train", "RECIPE", f"data.seq_len={1 << 31}"], ["data.seq_len=2147483648", "below 2**31"]),
        (["train", "RECIPE", "launch.timeout_s=100000000"], ["launch.timeout_s=100000000", "31536000"]),
        (["train", "RECIPE", "data.seq_len=1", "parallel.cp=1"], ["data.seq_len=1", "at least 2"]),
        (["train", "RECIPE", "train.weight_decay=inf"], ["train.weight_decay=inf", "finite"]),
        (["train", "RECIPE", "train.clip=inf"], ["train.clip=inf", "finite"]),
        (["train", "RECIPE", "model.yarn_original=0"], ["model.yarn_original=0", "at least 1"]),
        (["train", "RECIPE", "launch.backend=torchrun"], ["torchrun --nproc-per-node=2 -m nsa_dist train"]),
        (["train", "RECIPE", "run.dir=/dev/null/run"], ["/dev/null/run"]),
        (["prepare", "RECIPE", "data.tokenizer=none.json"], ["none.json"]),
        (["report", "no-such-run"], ["no-such-run"]),
    ],
)
def test_bad_input_is_one_line_before_any_worker_starts(
    words: list[str],
    names: list[str],
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nsa_dist.launch.local.recover_local", None)  # to start a worker would be a TypeError
    assert main([str(recipe) if word == "RECIPE" else word for word in words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("nsa-dist: error: ") and told.count("\n") == 1
    assert all(name in told for name in names)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("model:\n\tlayers: 2\n", ["line 2", "token"]),
        ("model: {layers: 1}\nmodel: {layers: 2}\n", ["line 2", "duplicate key model"]),
        ("model.layers: 2\n", ["model.layers=2", "section"]),
    ],
)
def test_a_wrong_recipe_is_named_with_its_line(
    text: str, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a=b.yaml").write_text(text)  # a recipe though it looks like a setting
    assert main(["train", str(tmp_path / "a=b.yaml")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(name in told for name in names)


@pytest.mark.parametrize("words", [[], ["bogus"], ["report"], ["train", "--steps"]])
def test_wrong_words_are_one_line_that_leads_to_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and told.endswith("--help\n")


def test_more_ranks_than_gpus_names_both(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main(["train", str(recipe), f"run.dir={tmp_path}/run", "launch.device=auto"]) == 2
    told = capsys.readouterr().err
    assert "2 ranks" in told and "it has 1" in told
    assert not (tmp_path / "run").exists()


def test_train_trains(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert main(["train", str(recipe), f"run.dir={run_dir}"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    steps = [line.split()[1] for line in out.splitlines() if line.startswith("step ")]
    assert steps == ["1/3", "2/3", "3/3"]
    kinds = [kind for kind in events(run_dir) if kind in ("start", "end", "failure")]
    assert kinds == ["start", "end"]
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert main(["train", str(recipe), f"run.dir={run_dir}"]) == 0
    assert capfd.readouterr().out.startswith("nothing to do: step 3 of 3 is reached")
    assert (run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(("bad_input", "status"), [(False, 1), (True, 2)])
def test_a_failure_is_told_and_written_down(
    recipe: Path,
    tmp_path: Path,
    bad_input: bool,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise RunFailed(1, "ValueError: too small", Path("rank-1.txt"), bad_input)

    monkeypatch.setattr("nsa_dist.launch.local.recover_local", fail)
    assert main(["train", str(recipe), f"run.dir={tmp_path}/run"]) == status
    told = "ValueError: too small" if bad_input else "rank 1: ValueError: too small; see rank-1.txt"
    assert capsys.readouterr().err == f"nsa-dist: error: {told}\n"
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert (last["kind"], last["rank"], last["cause"]) == ("failure", 1, "ValueError: too small")


def workers(session: int) -> list[int]:
    """The ranks, and the process they were forked from, among a session's processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            its = int((path / "stat").read_text().rpartition(")")[2].split()[3])
            if its == session and b"nsa_dist.launch.forker" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_ends_the_run(recipe: Path, tmp_path: Path, number: signal.Signals, status: int, times: int) -> None:
    """The first after a step, with a checkpoint; two together at once."""
    words = ["train", str(recipe), f"run.dir={tmp_path}/run", "train.steps=100000"]
    run = subprocess.Popen(
        [sys.executable, "-m", "nsa_dist", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    while not (line := run.stdout.readline()).startswith("step 2/"):
        assert line, "ended before its second step"
    if times == 2:  # workers that stand still: no step ends between the first signal and the second
        for pid in workers(run.pid):
            os.kill(pid, signal.SIGSTOP)
    for i in range(times):
        time.sleep(3 * i)  # Python takes signals that come while it is in a call as one
        if number == signal.SIGINT:  # as a terminal does: to everything in the foreground
            os.killpg(run.pid, number)
        else:
            run.send_signal(number)
    _, err = run.communicate(timeout=60)
    assert run.returncode == status, err
    assert err.count("\n") == 1 and err.startswith("nsa-dist: ")
    assert events(tmp_path / "run")[-1] == ("stopped" if times == 1 else "failure")
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    left = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert left == ([f"step-{steps[-1]}"] if times == 1 else [])
    with pytest.raises(ProcessLookupError):  # nobody is left in its process group
        time.sleep(1)
        os.killpg(run.pid, 0)


def test_a_disk_that_is_full_is_one_line_and_hides_no_cause(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = ["train", str(recipe), f"run.dir={tmp_path}/run"]
    with monkeypatch.context() as patch:
        patch.setattr("nsa_dist.rundir.OmegaConf.save", full)
        assert main(words) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"run.dir={tmp_path}/run" in told and "No space left" in told

    def fail(*args: object) -> None:  # a checkpoint that isn't written, and then no event either
        monkeypatch.setattr("nsa_dist.session.event", full)
        raise RunFailed(0, "step-2: not written", Path("rank-0.txt"), is_bad_input(NotWrittenError("step-2")))

    monkeypatch.setattr("nsa_dist.launch.local.recover_local", fail)
    assert main(words) == 1
    out, err = capsys.readouterr()
    assert err == "nsa-dist: error: rank 0: step-2: not written; see rank-0.txt\n"
    assert "event 'failure' not written" in out


def torchrun(recipe: Path, tmp_path: Path, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Under torchrun, where `import ray` fails."""
    (tmp_path / "ray.py").write_text("raise ImportError('Ray must not be needed')")
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "nsa_dist"]
    return subprocess.run(
        [sys.executable, *command, "train", str(recipe), f"run.dir={tmp_path}/run", *words],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_torchrun_trains_without_ray(recipe: Path, tmp_path: Path) -> None:
    done = torchrun(recipe, tmp_path, 2)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")] == ["1/3", "2/3", "3/3"]
    assert "end" in events(tmp_path / "run")


def test_torchrun_tells_once_what_only_rank_0_finds(recipe: Path, tmp_path: Path) -> None:
    done = torchrun(recipe, tmp_path, 2, "data.source=missing.txt")
    told = [line for line in done.stderr.splitlines() if line.startswith("nsa-dist: error: ")]
    assert done.returncode != 0
    assert len(told) == 1 and "missing.txt" in told[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_with_another_number_of_processes(
    recipe: Path, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 6, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in there.items():
        monkeypatch.setenv(name, str(value))
    assert main(["train", str(recipe), "parallel.dp=1"]) == 2
    told = capsys.readouterr().err
    if rank == 0:
        assert "WORLD_SIZE=6" in told and "parallel.cp=2 = 2 processes" in told
    else:
        assert told == ""


def test_a_reader_that_leaves_does_not_end_the_run() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        console = Console(stream)
        for _ in range(2):
            console.step("step 1/2")
        console.say("done")


def test_progress_is_rewritten_in_place_on_a_terminal_only() -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = {}
    for stream in (Terminal(), io.StringIO()):
        console = Console(stream)
        for event in ({"kind": "step", "line": "a"}, {"kind": "beat"}, {"kind": "step", "line": "b"}):
            console.report(event)
        console.report({"kind": "say", "text": "done"})
        shown[stream.isatty()] = stream.getvalue()
    assert shown == {True: "\r\x1b[Ka\r\x1b[Kb\ndone\n", False: "a\nb\ndone\n"}
