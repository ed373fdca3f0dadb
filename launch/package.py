"""What travels with a job: this package, the configuration, and the data files that it names by relative paths."""

import copy
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import nsa_dist
from nsa_dist.config import Config, ConfigError

JOB = "job.json"  # {"config": …, "versions": …, "wait": …}
CHECKED, WAITING = "checked: ", "waiting: "  # begin a job's lines that say that it can run, or will
MAX_BYTES = 64 * 2**20  # Ray takes 100 MiB over HTTP, packed
_BUILTIN = "builtin:"


def absolute(config: Config) -> Config:
    """Every path made absolute, for a cluster on this machine."""

    def here(key: str, value: str) -> str:
        return str(Path(value).expanduser().absolute())

    return _with_paths(config, here, here)


def pack(config: Config, wait: bool, folder: Path) -> list[tuple[str, int]]:
    """Fills an empty folder with what the job needs; the names and sizes (bytes) of what is there.

    Raises ConfigError for a place (run.dir, …) that is no absolute path, for data that isn't there, and for more
    than MAX_BYTES.
    """
    sent: list[tuple[str, int]] = []

    def place(key: str, value: str) -> str:
        if not Path(value).is_absolute():
            raise ConfigError(f"{key}={value}: must be an absolute path, of a folder that all nodes share")
        return value

    def data(key: str, value: str) -> str:
        if not Path(value).is_absolute():
            sent.append((value, _copy(key, value, folder)))
        return value

    config = _with_paths(config, place, data)
    code = folder / "nsa_dist"
    shutil.copytree(Path(nsa_dist.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__"))
    job = {"config": asdict(config), "versions": versions(), "wait": wait}
    (folder / JOB).write_text(json.dumps(job))
    return [(f"nsa_dist {nsa_dist.__version__}", _size(code)), *sent]


def versions() -> dict[str, str]:
    """What must be equal where a job is submitted and on every node. Without the build (+cu130)."""
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("ray", "torch", "triton", "numpy"):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def in_words(size: float) -> str:
    """A number of bytes for reading."""
    power = 0
    while size >= 1024 and power < 3:
        size, power = size / 1024, power + 1
    return f"{size:.1f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}".replace(".0 bytes", " bytes")


def data_paths(config: Config) -> list[tuple[str, str]]:
    """Key and value of each file or folder of data that the configuration names."""
    found: list[tuple[str, str]] = []

    def take(key: str, value: str) -> str:
        found.append((key, value))
        return value

    _with_paths(config, lambda key, value: value, take)
    return found


def _copy(key: str, value: str, folder: Path) -> int:
    source, goal = Path(value), folder / value
    if not source.exists():
        raise ConfigError(f"{key}={value}: no such file or folder here; must be, or an absolute path on the nodes")
    if ".." in source.parts:
        raise ConfigError(f"{key}={value}: must be below this folder, or an absolute path on the nodes")
    size = _size(source)
    if size > MAX_BYTES:
        raise ConfigError(
            f"{key}={value}: {in_words(size)}; at most {in_words(MAX_BYTES)} travel with a job: must be where all "
            "nodes see it, and an absolute path"
        )
    goal.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, goal, dirs_exist_ok=True)
    elif not goal.exists():
        shutil.copy(source, goal)
    return size


def _size(path: Path) -> int:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _with_paths(config: Config, place: Callable[[str, str], str], data: Callable[[str, str], str]) -> Config:
    """A copy with place(key, value) for each folder of the run's, data(key, value) for each of its data."""
    config = copy.deepcopy(config)
    run, files = config.run, config.data
    run.dir = place("run.dir", run.dir)
    if run.store and "://" not in run.store:
        run.store = place("run.store", run.store)
    if run.resume not in ("auto", "never") and "://" not in run.resume:
        run.resume = place("run.resume", run.resume)
    if files.cache_dir:
        files.cache_dir = place("data.cache_dir", files.cache_dir)
    if not files.sources and not files.source.startswith(_BUILTIN):
        files.source = data("data.source", files.source)
    for source in files.sources:
        if not source.path.startswith(_BUILTIN):
            source.path = data("data.sources", source.path)
    if isinstance(files.validation, str) and not files.validation.startswith(_BUILTIN):
        files.validation = data("data.validation", files.validation)
    if files.tokenizer != "bytes":
        files.tokenizer = data("data.tokenizer", files.tokenizer)
    return config
