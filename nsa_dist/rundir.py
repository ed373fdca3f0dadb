"""A run's folder: who may write into it, what it holds, and from where training goes on.

`config.yaml`, `metrics.jsonl`, `events.jsonl`, `tensorboard/`, `checkpoints/step-N/`, `lock`.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor

from nsa_dist.checkpoint import CheckpointError, OtherModelError, checkpoints, load, read_trainer
from nsa_dist.config import Config, ConfigError
from nsa_dist.metrics import FILE as METRICS
from nsa_dist.store import Place, check_writable, place

CONFIG, EVENTS, LOCK = "config.yaml", "events.jsonl", "lock"
# What another run's checkpoint must agree on (run.resume=PATH) …
_MODEL_KEYS = ("model.", "nsa.", "data.tokenizer")
# … and what a run that goes on (run.resume=auto) may change: how long, how often, where, on how many ranks.
_FREE_KEYS = {
    "run.dir",
    "run.store",
    "run.resume",
    "data.cache_dir",
    "data.epochs",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.validate_every",
    "train.validation_sequences",
    "train.activation_checkpoint",
    "train.log_every",
}
_FREE_SECTIONS = ("parallel.", "launch.")


class RunLock:
    """Holds a run's folder for this process, until `release` or the process's end.

    Raises ConfigError naming the folder and the process that holds it, or why it can't be locked.
    """

    def __init__(self, run_dir: str | Path) -> None:
        path = Path(run_dir) / LOCK
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            raise ConfigError(f"run.dir={run_dir}: must be a folder that can be written ({error})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            held = f"process {self._file.read().strip()} holds it" if isinstance(error, BlockingIOError) else error
            self._file.close()
            raise ConfigError(f"run.dir={run_dir}: {held}; must be a folder that no other run uses") from None
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Lets others have the folder; the file stays."""
        self._file.close()

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True)
class Resume:
    """From where a run goes on: the first of `checkpoints` that proves whole; from the start if there is none.

    `same_run`: they are this run's own, or it starts afresh; else they are another's (run.resume=PATH).
    """

    checkpoints: tuple[Place, ...]
    same_run: bool


def open_run(config: Config) -> Resume:
    """Decides from where the run goes on, and writes its `config.yaml`. Call it holding the RunLock.

    Raises ConfigError for a folder that already holds a run (`never`), for a checkpoint of another
    configuration, naming the first key that differs, and where no checkpoint of several is whole.
    """
    run_dir, mode = Path(config.run.dir), config.run.resume
    if config.run.store:
        check_writable(store_of(config))
    if mode == "never" and (checkpoints(store_of(config)) or (run_dir / METRICS).exists()):
        raise ConfigError(f"run.dir={run_dir}: holds a run; must be a new folder with run.resume=never")
    resume = own_checkpoints(config) if mode in ("auto", "never") else _from_path(config, place(mode))
    _check_same_store(config, resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config)
    return resume


def store_of(config: Config) -> Place:
    """Where the run's `checkpoints` are."""
    return place(config.run.store or config.run.dir)


def _check_same_store(config: Config, resume: Resume) -> None:
    """A run that went on elsewhere would begin at its start beside its own checkpoints."""
    before = place(_before(config.run.dir, "run.store") or config.run.dir)
    if not resume.checkpoints and before != store_of(config) and checkpoints(before):
        raise ConfigError(
            f"run.store={config.run.store}: holds no checkpoint, {before} has this run's; must be that one, or a copy"
        )


def write_config(config: Config) -> None:
    """The run's `config.yaml`, with the numbers of ranks that it has now."""
    run_dir = Path(config.run.dir)
    temp = run_dir / f".{CONFIG}.tmp"
    OmegaConf.save(OmegaConf.structured(config), temp)
    temp.replace(run_dir / CONFIG)


def own_checkpoints(config: Config) -> Resume:
    """This run's own checkpoints, or none if it has made none yet; where a run goes on after a failure.

    Raises ConfigError as `open_run` does; a checkpoint that lacks a file is an event, and is left out.
    """
    present = checkpoints(store_of(config))
    whole = _whole(present, Path(config.run.dir))
    if present and not whole:
        key = "run.store" if config.run.store else "run.dir"
        raise CheckpointError(
            f"{key}={store_of(config)}: none of its {len(present)} checkpoints is whole; must be another folder"
        )
    _check_fit(whole, fitting(config))
    return Resume(tuple(whole), same_run=True)


def load_resume(
    resume: Resume,
    run_dir: str | Path,
    state: dict[str, Tensor],
    group: dist.ProcessGroup | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Loads the first whole checkpoint into `state` (see `checkpoint.load`), on all ranks together.

    Returns its trainer's numbers; None where the run begins at its start. One that proves damaged is told and is an
    event, and the one before it is taken; raises CheckpointError if none is left, or for another model's.
    """
    for path in resume.checkpoints:
        try:
            return load(path, state, group)
        except OtherModelError:
            raise
        except CheckpointError as error:
            if path == resume.checkpoints[-1]:
                raise
            say(f"{error}; the checkpoint before it is taken")
            if not dist.is_initialized() or dist.get_rank(group) == 0:
                event(run_dir, "checkpoint_skipped", path=str(path), reason=str(error))
    return None


def fitting(config: Config) -> dict[str, Any]:
    """The part of a configuration that a checkpoint must fit, as `section.key: value`, for `trainer["config"]`."""
    flat = {f"{name}.{key}": value for name, section in asdict(config).items() for key, value in section.items()}
    return {k: v for k, v in flat.items() if k not in _FREE_KEYS and not k.startswith(_FREE_SECTIONS)}


def event(run_dir: str | Path, kind: str, **fields: Any) -> None:
    """Appends a line to the run's events: time in s since 1970, kind, and what else is to be known."""
    line = json.dumps({"time": time.time(), "kind": kind, **fields}, allow_nan=False) + "\n"
    with (Path(run_dir) / EVENTS).open("a") as file:
        file.write(line)


def _from_path(config: Config, path: Place) -> Resume:
    """Another run's checkpoints. A run that once began there, and has its own by now, goes on from those."""
    run_dir, home = Path(config.run.dir), store_of(config)
    if path.resolve() in (run_dir.resolve(), home.resolve()):
        return own_checkpoints(config)
    if path.resolve().parent.parent == home.resolve():  # back to an earlier step of this run
        chosen = tuple(own for own in own_checkpoints(config).checkpoints if own.resolve() == path.resolve())
        if not chosen:
            raise ConfigError(f"run.resume={path}: must be one of this run's whole checkpoints")
        return Resume(chosen, same_run=True)
    if checkpoints(home):
        if _before(run_dir, "run.resume") != str(path):
            raise ConfigError(f"run.dir={run_dir}: holds another run; must be a new folder with run.resume={path}")
        return own_checkpoints(config)
    if not path.is_dir():
        raise ConfigError(f"run.resume={path}: no such folder; must be auto, never, or a checkpoint's or run's")
    single = path.name.startswith("step-")
    elsewhere = _before(path, "run.store") if isinstance(path, Path) else None
    whole = _whole([path] if single else checkpoints(elsewhere or path), run_dir)
    if not whole:
        raise CheckpointError(f"run.resume={path}: holds no whole checkpoint; must be checkpoints/step-N or a run")
    wanted = {k: v for k, v in fitting(config).items() if k.startswith(_MODEL_KEYS)}
    _check_fit(whole, wanted)
    return Resume(tuple(whole), same_run=False)


def _before(run_dir: str | Path, key: str) -> str | None:
    """A key's value in the configuration that a run's folder holds."""
    file = Path(run_dir) / CONFIG
    return OmegaConf.select(OmegaConf.load(file), key) if file.is_file() else None


def _whole(paths: list[Place], run_dir: Path) -> list[Place]:
    """Those that have all their files; digests are checked by the ranks, in shares, when they load."""
    whole: list[Place] = []
    for path in paths:
        try:
            read_trainer(path)
        except CheckpointError as error:
            run_dir.mkdir(parents=True, exist_ok=True)
            event(run_dir, "checkpoint_skipped", path=str(path), reason=str(error))
        else:
            whole.append(path)
    return whole


def _check_fit(paths: list[Place], wanted: dict[str, Any]) -> None:
    for path in paths:
        there = read_trainer(path).get("config", {})
        for key, here in wanted.items():
            if key not in there:
                raise CheckpointError(f"{path}: lacks {key} of its configuration; can't tell whether it fits")
            if there[key] != here:
                what = "model" if key.startswith(_MODEL_KEYS) else "run"
                raise CheckpointError(
                    f"{path}: checkpoint of another {what}: {key} is {there[key]} there, {here} here; must be equal"
                    + ("" if what == "model" else f", or run.dir a new folder with run.resume={path}")
                )
