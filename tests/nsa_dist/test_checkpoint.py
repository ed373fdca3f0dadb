"""Checkpoints and the run's folder: what is saved comes back, and nothing half-written or damaged is taken.

Worker processes run a function of this file by name, see `run_ranks`.
"""

import json
import multiprocessing
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from nsa_dist import checkpoint
from nsa_dist.checkpoint import (
    Checkpointer,
    CheckpointError,
    OtherModelError,
    checkpoints,
    load,
    newest,
    read_trainer,
    restore_random,
    training_state,
    verify,
)
from nsa_dist.config import Config, ConfigError, config_from_dict, load_config
from nsa_dist.rundir import RunLock, event, fitting, load_resume, open_run
from nsa_dist.store import place

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# ---- in the workers


def build(size: int = 5, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Odd sizes: 5 rows on 2 or 3 ranks are uneven, 1 row leaves ranks without any."""
    model = nn.Sequential(nn.Linear(3, size, dtype=dtype), nn.Tanh(), nn.Linear(size, 1, dtype=dtype))
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        loss = model(torch.randn(4, 3)).square().mean()  # the random state decides the input
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of all tensors, gathered."""
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).detach().clone() for k, v in state.items()}


def train_and_save(run: str) -> Any:
    torch.manual_seed(0)
    model, optimizer = build()
    steps(model, optimizer, 2)
    saver = Checkpointer(run, keep=2)
    saver.save(2, training_state(model, optimizer), {"data_index": 8})
    at_save = whole(training_state(model, optimizer))
    losses = steps(model, optimizer, 3)
    saver.wait()
    return at_save, losses


def resume(path: str) -> Any:
    torch.manual_seed(1)
    model, optimizer = build()
    state = training_state(model, optimizer)
    trainer = load(path, state)
    loaded = whole(state)
    same = restore_random(trainer)
    return loaded, trainer["data_index"], same, steps(model, optimizer, 3)


def failures(run: str) -> Any:
    """One rank's failure is an error on both, and the checkpoints before are unharmed."""
    rank, errors = dist.get_rank(), []
    model, optimizer = build()
    state = training_state(model, optimizer)
    saver = Checkpointer(run, keep=2)
    saver.save(1, state, {})
    saver.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))  # a write that fails for real
    saver.save(2, state, {})
    try:
        saver.wait()
    except CheckpointError as error:
        errors.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    dist.barrier()  # rank 0 has removed what was half-written
    left = sorted(path.name for path in (Path(run) / "checkpoints").iterdir())
    dist.barrier()
    saver.save(3, state, {})
    saver.wait()
    values = whole(state)
    for path, wanted in (("step-1", state), ("step-3", training_state(*build(6)))):
        if path == "step-1" and rank == 0:
            flip(Path(run) / "checkpoints" / path / "__1_0.distcp")
        dist.barrier()
        try:
            load(Path(run) / "checkpoints" / path, wanted)
        except CheckpointError as error:
            errors.append(f"{type(error).__name__} {error}")
    unchanged = all(torch.equal(values[name], value) for name, value in whole(state).items())
    return errors, left, unchanged


def lose_a_rank(run: str) -> Any:
    model, optimizer = build()
    saver = Checkpointer(run, keep=2)
    saver.save(1, training_state(model, optimizer), {})
    saver.wait()
    if dist.get_rank() == 1:
        checkpoint._Writer.write_data = lambda *_: os._exit(9)  # type: ignore[method-assign,assignment]
    saver.save(2, training_state(model, optimizer), {})
    try:
        saver.wait()
    except CheckpointError as error:
        return str(error)


def die_at_the_rename(run: str) -> None:
    saver = Checkpointer(run, keep=2)
    saver.save(1, {"w": torch.ones(3)}, {})
    saver.wait()
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment]
    saver.save(2, {"w": torch.zeros(3)}, {})
    saver.wait()


def hold_lock(run: str) -> None:
    with RunLock(run):
        (Path(run) / "held").touch()
        time.sleep(600)


def worker(name: str, rank: int, ranks: int, meeting: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if ranks:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    torch.save(globals()[name](*arguments), f"{meeting}.{rank}")
    os._exit(0)  # nothing to take down in order


# ---- in the test's process

forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "pytest"])


def start(name: str, rank: int, ranks: int, meeting: Path, arguments: tuple[Any, ...]) -> Any:
    """This file is no importable module: the child runs it by its path, down to the last line."""
    job = {"JOB": (name, rank, ranks, str(meeting), arguments)}
    process = forkserver.Process(target=runpy.run_path, args=(__file__, job, "worker"), daemon=True)
    process.start()
    return process


def run_ranks(name: str, ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """What the function `name` of this file returns on each of `ranks` ranks; None for one that died."""
    meeting = folder / f"meeting-{name}-{ranks}"
    processes = [start(name, rank, ranks, meeting, arguments) for rank in range(max(ranks, 1))]
    for process in processes:
        process.join(120)
        assert process.exitcode is not None, f"{name} hangs"
    files = [Path(f"{meeting}.{rank}") for rank in range(len(processes))]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def flip(file: Path) -> None:
    """Flips a bit in the middle; of a manifest in the first digest, as its other words don't matter."""
    data = bytearray(file.read_bytes())
    at = data.index(b"sha256") + 12 if file.name == "manifest.json" else len(data) // 2
    data[at] ^= 1
    file.write_bytes(data)


def save_plain(run: Any, step: int, config: Config | None = None, keep: int = 0) -> Any:
    saver = Checkpointer(run, keep)
    saver.save(step, {"w": torch.full((4, 3), float(step))}, {"config": fitting(config or Config())})
    saver.wait()
    return place(run) / "checkpoints" / f"step-{step}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[float]]:
    folder = tmp_path_factory.mktemp("saved")
    (state, losses), (_, other) = run_ranks("train_and_save", 2, folder, str(folder))
    assert losses == other
    return folder / "checkpoints" / "step-2", state, losses


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_two_ranks_saved_loads_on_others(saved: Any, tmp_path: Path, ranks: int) -> None:
    path, state, losses = saved
    for loaded, data_index, same, after in run_ranks("resume", ranks, tmp_path, str(path)):
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], state[name]) for name in state)  # to the bit, moments too
        assert data_index == 8 and same == (ranks == 2)
        if ranks == 2:
            assert after == losses  # the uninterrupted run's, to the bit


def test_at_a_url_it_counts_once_its_manifest_is_there(tmp_path: Path) -> None:
    url, saved = f"file://{tmp_path}/there", tmp_path / "there" / "checkpoints" / "step-2"
    (tmp_path / "there" / "checkpoints" / "step-1").mkdir(parents=True)  # what a killed run has left
    (state, losses), _ = run_ranks("train_and_save", 2, tmp_path, url)
    assert [path.name for path in saved.parent.iterdir()] == ["step-2"]
    assert newest(url) == checkpoints(url)[0] == place(f"{url}/checkpoints/step-2")
    verify(f"{url}/checkpoints/step-2")
    for ranks in (2, 3):
        for loaded, _, same, after in run_ranks("resume", ranks, tmp_path, f"{url}/checkpoints/step-2"):
            assert all(torch.equal(loaded[name], state[name]) for name in state)
            assert (same, after == losses) == (ranks == 2, ranks == 2)
    flip(saved / "__1_0.distcp")
    with pytest.raises(CheckpointError, match=r"^file://.*/step-2/__1_0\.distcp: damaged"):
        load(f"{url}/checkpoints/step-2", training_state(*build()))
    (saved / "manifest.json").unlink()
    assert checkpoints(url) == []


def test_in_an_object_store_the_manifest_is_the_last_to_come_and_the_first_to_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fsspec's own in-memory store; what each of its calls would leave if it were the last one."""
    from fsspec.implementations.memory import MemoryFileSystem

    calls = []

    def watch(name: str) -> None:
        call = getattr(MemoryFileSystem, name)

        def watched(self: Any, *words: Any, **more: Any) -> Any:
            result = call(self, *words, **more)
            calls.append(name)
            for path in checkpoints("memory://bucket/run"):
                verify(path)  # at every moment what is seen is whole
            return result

        monkeypatch.setattr(MemoryFileSystem, name, watched)

    for name in ("rm_file", "pipe_file", "cp_file", "makedirs"):
        watch(name)
    saver, tensor = Checkpointer("memory://bucket/run", keep=2), torch.zeros(4, 3)
    for step in (5, 10, 15, 10):
        saver.save(step, {"w": torch.full((4, 3), float(step))}, {})
        saver.wait()
    assert [path.name for path in checkpoints("memory://bucket/run")] == ["step-10"]
    assert load("memory://bucket/run/checkpoints/step-10", {"w": tensor})["step"] == 10 and (tensor == 10).all()
    assert set(calls) == {"rm_file", "pipe_file", "cp_file", "makedirs"}


def test_a_failing_rank_fails_on_all_and_harms_nothing(tmp_path: Path) -> None:
    for errors, left, unchanged in run_ranks("failures", 2, tmp_path, str(tmp_path)):
        written, damaged, other = errors
        assert "step-2: not written" in written and "(rank 1)" in written and "unharmed" in written
        assert "\n" not in written
        assert left == ["step-1"]
        assert "__1_0.distcp: damaged" in damaged
        assert other.startswith("OtherModelError") and "0.bias is [5] there, [6] here" in other
        assert unchanged
    assert [path.name for path in checkpoints(tmp_path)] == ["step-3", "step-1"]


def test_a_lost_rank_is_an_error_and_no_hang(tmp_path: Path) -> None:
    error, lost = run_ranks("lose_a_rank", 2, tmp_path, str(tmp_path))
    assert lost is None and "step-2: not written" in error
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-1"


def test_killed_before_the_rename_leaves_the_earlier_one(tmp_path: Path) -> None:
    run_ranks("die_at_the_rename", 0, tmp_path, str(tmp_path))
    hidden = tmp_path / "checkpoints" / ".step-2.tmp"
    assert hidden.is_dir() and newest(tmp_path) == tmp_path / "checkpoints" / "step-1"
    verify(tmp_path / "checkpoints" / "step-1")
    Checkpointer(tmp_path, 2)
    assert not hidden.exists()


def test_saving_takes_a_snapshot_and_is_invisible_until_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, write = threading.Event(), checkpoint._Writer.write_data

    def slow(*arguments: Any) -> Any:
        assert changed.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpoint._Writer, "write_data", slow)
    tensor = torch.arange(6.0).view(2, 3).t()  # not contiguous
    expected, saver = tensor.clone(), Checkpointer(tmp_path, 1)
    saver.save(1, {"w": tensor}, {})
    tensor.zero_()
    assert checkpoints(tmp_path) == []
    changed.set()
    saver.wait()
    load(tmp_path / "checkpoints" / "step-1", {"w": tensor})
    assert torch.equal(tensor, expected)


def test_only_the_newest_stay_and_abandoned_ones_go(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20, 20):
        save_plain(tmp_path, step, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-20", "step-10"]
    verify(tmp_path / "checkpoints" / "step-20")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize("name", ["manifest.json", ".metadata", "trainer.json", "__0_0.distcp"])
@pytest.mark.parametrize("damage", [cut, Path.unlink, flip])
def test_damage_is_named_and_changes_no_tensor(tmp_path: Path, name: str, damage: Any) -> None:
    path = save_plain(tmp_path, 1)
    damage(path / name)
    tensor = torch.zeros(4, 3)
    for check in (lambda: verify(path), lambda: load(path, {"w": tensor})):
        with pytest.raises(CheckpointError) as error:
            check()
        assert path.name in str(error.value) and "\n" not in str(error.value)
    assert not tensor.any()
    if damage is not flip:  # which shows only when everything is read
        assert newest(tmp_path) is None


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.touch, (self.mark,))


def forge(path: Path, content: bytes) -> None:
    """Replaces `.metadata` as an attacker would, its manifest with it."""
    (path / ".metadata").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    digest = checkpoint._digest(path / ".metadata")
    manifest["files"][".metadata"] = {"size": len(content), "sha256": digest}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_malicious_metadata_executes_nothing(tmp_path: Path) -> None:
    path, mark = save_plain(tmp_path, 1), tmp_path / "executed"
    content = pickle.dumps(Malicious(mark))
    forge(path, content)
    with pytest.raises(CheckpointError, match=r"\.metadata: refers to (pathlib|builtins)\."):
        load(path, {"w": torch.zeros(4, 3)})
    assert not mark.exists()
    pickle.loads(content)
    assert mark.exists()  # it would have


def test_entries_that_torch_would_unpickle_or_read_elsewhere_are_refused(tmp_path: Path) -> None:
    path = save_plain(tmp_path, 1)
    genuine = (path / ".metadata").read_bytes()
    for change in ("bytes", "elsewhere"):
        metadata = pickle.loads(genuine)
        if change == "bytes":
            metadata.state_dict_metadata["w"] = BytesStorageMetadata()
        for info in metadata.storage_data.values():
            info.relative_path = "../../other" if change == "elsewhere" else info.relative_path
        forge(path, pickle.dumps(metadata))
        with pytest.raises(CheckpointError):
            load(path, {"w": torch.zeros(4, 3)})


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": torch.zeros(4, 2)}, r"w is \[4, 3\] there, \[4, 2\] here"),
        ({"w": torch.zeros(4, 3), "v": torch.zeros(2)}, r"v is absent there, \[2\] here"),
        ({}, r"w is \[4, 3\] there, absent here"),
    ],
)
def test_another_model(tmp_path: Path, state: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(OtherModelError, match=message):
        load(save_plain(tmp_path, 1), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
def test_the_model_alone_loads_without_its_optimiser(tmp_path: Path, dtype: torch.dtype) -> None:
    model, optimizer = build(dtype=dtype)
    saver = Checkpointer(tmp_path, 1)
    saver.save(1, training_state(model, optimizer), {})
    saver.wait()
    other, _ = build(dtype=dtype)
    load(tmp_path / "checkpoints" / "step-1", dict(other.named_parameters()))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_fresh_training_state_steps_like_a_fresh_adamw() -> None:
    results = []
    for fill in (False, True):
        torch.manual_seed(0)
        model, optimizer = build()
        if fill:
            training_state(model, optimizer)
        results.append(steps(model, optimizer, 3))
    assert results[0] == results[1]


def test_numbers_that_json_cannot_hold_fail_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        Checkpointer(tmp_path, 1).save(1, {}, {"loss": float("nan")})


# ---- the run's folder


def config(folder: Path, **sections: dict[str, Any]) -> Config:
    sections.setdefault("run", {})["dir"] = str(folder)
    return config_from_dict(sections)


def events(run: Path) -> list[Any]:
    file = run / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_lock_is_held_by_one_process_and_freed_by_its_death(tmp_path: Path) -> None:
    process = start("hold_lock", 0, 0, tmp_path / "meeting", (str(tmp_path),))
    while not (tmp_path / "held").exists():
        assert process.is_alive()
        time.sleep(0.02)
    with pytest.raises(ConfigError, match=f"run.dir={tmp_path}: process {process.pid} on "):
        RunLock(tmp_path)
    process.kill()
    process.join()
    with RunLock(tmp_path), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_lock_of_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"run\.dir=.*file/run: must be a folder"):
        RunLock(tmp_path / "file" / "run")


def test_auto_begins_then_goes_on_and_skips_what_is_damaged(tmp_path: Path) -> None:
    fits = config(tmp_path, train={"steps": 7}, parallel={"cp": 2})  # may change when a run goes on
    assert open_run(fits).checkpoints == ()
    first, second, third = (save_plain(tmp_path, step) for step in (1, 2, 3))
    cut(third / "__0_0.distcp")
    flip(second / "__0_0.distcp")  # shows only when all of it is read
    found = open_run(fits)
    assert found.checkpoints == (second, first) and found.same_run
    tensor = torch.zeros(4, 3)
    trainer = load_resume(found, tmp_path, {"w": tensor})
    assert trainer is not None and trainer["step"] == 1 and (tensor == 1).all()
    assert [Path(e["path"]).name for e in events(tmp_path) if e["kind"] == "checkpoint_skipped"] == [
        "step-3",
        "step-2",
    ]
    assert load_config(str(tmp_path / "config.yaml"), []) == fits


def test_a_store_holds_the_checkpoints_and_is_not_forgotten(tmp_path: Path) -> None:
    run, url = tmp_path / "run", f"file://{tmp_path}/there"
    fits = config(run, run={"store": url})
    assert open_run(fits).checkpoints == ()
    save_plain(url, 1)
    (first,) = open_run(fits).checkpoints
    assert str(first) == f"{url}/checkpoints/step-1"
    tensor = torch.zeros(4, 3)
    assert load_resume(open_run(fits), run, {"w": tensor}) is not None and (tensor == 1).all()
    with pytest.raises(ConfigError, match=rf"run\.store=: holds no checkpoint, {url} has this run's"):
        open_run(config(run))
    for resume in (str(run), url, str(first)):  # another run goes on from there
        found = open_run(config(tmp_path / "new", run={"resume": resume}))
        assert (found.checkpoints, found.same_run) == ((first,), False)
    moved = f"file://{tmp_path}/moved"
    shutil.copytree(tmp_path / "there", tmp_path / "moved")
    assert len(open_run(config(run, run={"store": moved})).checkpoints) == 1


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s33://bucket/run", "must be a folder or a URL of a protocol that fsspec knows; nearest: s3"),
        ("oci://bucket/run", "oci:// needs a package that isn't there"),
        ("memory://run", "must be a place that outlives the process"),
        ("http://127.0.0.1:9/run", "must be a place that can be written"),
    ],
)
def test_a_store_that_cannot_be_is_one_line(tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"run.store={url}: {message}")) as error:
        open_run(load_config(None, [f"run.store={url}", f"run.dir={tmp_path}/run"]))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_model_is_no_damage_to_fall_back_from(tmp_path: Path) -> None:
    save_plain(tmp_path, 1)
    save_plain(tmp_path, 2)
    with pytest.raises(OtherModelError, match="step-2"):
        load_resume(open_run(config(tmp_path)), tmp_path, {"w": torch.zeros(1)})
    assert events(tmp_path) == []


def test_auto_never_starts_over_beside_damaged_checkpoints(tmp_path: Path) -> None:
    (save_plain(tmp_path, 1) / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="none of its 1 checkpoints is whole"):
        open_run(config(tmp_path))


def test_never_wants_a_new_folder(tmp_path: Path) -> None:
    never = config(tmp_path / "run", run={"resume": "never"})
    assert open_run(never).checkpoints == ()
    (tmp_path / "run" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="holds a run"):
        open_run(never)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"layers": 6}}, r"another model: model\.layers is 4 there, 6 here"),
        ({"train": {"beta2": 0.5}}, r"another run: train\.beta2 is 0\.95 there, 0\.5 here"),
        ({"data": {"seq_len": 8192}}, r"data\.seq_len is 4096 there, 8192 here"),
    ],
)
def test_auto_refuses_what_does_not_fit(tmp_path: Path, sections: Any, message: str) -> None:
    save_plain(tmp_path, 1)
    with pytest.raises(ConfigError, match=message):
        open_run(config(tmp_path, **sections))
    assert not (tmp_path / "config.yaml").exists()


def test_a_path_is_another_runs_checkpoint_until_the_run_has_its_own(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    first, second = save_plain(old, 1), save_plain(old, 2)
    for path, expected in ((old, (second, first)), (first, (first,))):
        there = config(new, run={"resume": str(path)}, data={"seq_len": 8192})
        found = open_run(there)
        assert found.checkpoints == expected and not found.same_run
    own = save_plain(new, 3, there)
    found = open_run(there)
    assert found.checkpoints == (own,) and found.same_run
    for run, path, message in (
        (new, old, "holds another run"),
        (old, old / "checkpoints/step-7", "one of this run's whole checkpoints"),
        (tmp_path / "third", tmp_path / "absent", "no such folder"),
        (tmp_path / "third", tmp_path, "no whole checkpoint"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_run(config(run, run={"resume": str(path)}))
    back = open_run(config(old, run={"resume": str(first)}))  # to an earlier step of its own
    assert back.checkpoints == (first,) and back.same_run
    with pytest.raises(ConfigError, match=r"nsa\.window is 512 there, 128 here"):
        open_run(config(tmp_path / "third", run={"resume": str(old)}, nsa={"window": 128}))


def test_every_key_is_decided() -> None:
    """A key added to the configuration must fit unless it is listed as free to change."""
    assert {key.split(".")[0] for key in fitting(Config())} == {"run", "model", "nsa", "data", "train"}
    assert not {"train.steps", "run.dir", "parallel.cp"} & fitting(Config()).keys()
    assert {"run.seed", "train.lr", "data.sources", "data.validation", "train.dtype"} <= fitting(Config()).keys()


def test_the_checkpoint_carries_its_configuration_and_events_append(tmp_path: Path) -> None:
    assert read_trainer(save_plain(tmp_path, 1))["config"] == json.loads(json.dumps(fitting(Config())))
    event(tmp_path, "start", ranks=2)
    event(tmp_path, "failure", rank=1)
    assert [(e["kind"], e.get("ranks")) for e in events(tmp_path)] == [("start", 2), ("failure", None)]


if __name__ == "worker":
    worker(*JOB)  # type: ignore[name-defined] # noqa: F821 (run_ranks sets it)
