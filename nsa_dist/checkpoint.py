"""Checkpoints: asynchronous, complete or invisible, loadable on another number of ranks.

A folder `<run>/checkpoints/step-N/` holds the tensors as torch.distributed.checkpoint writes them (`.metadata`
and a `__R_0.distcp` from each rank R), `trainer.json` with the trainer's numbers and each rank's random state,
and `manifest.json` with the size and SHA-256 of every file. It is written as `.step-N.tmp` and renamed when
every rank has finished. Nothing is unpickled but the few classes that describe tensors.
"""

import base64
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from nsa_dist.config import ConfigError

T = TypeVar("T")
FOLDER, MANIFEST, TRAINER, METADATA = "checkpoints", "manifest.json", "trainer.json", ".metadata"
_FAILURES = (Exception, dcp.CheckpointException)  # torch derives its own from BaseException
_NAME = re.compile(r"step-(\d+)")
# What a `.metadata` written by torch 2.11 to 2.13 refers to, besides torch's dtypes.
_DCP = "torch.distributed.checkpoint."
_HARMLESS = {
    *((_DCP + "metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_DCP + "metadata", name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata")),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    (_DCP + "filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


class CheckpointError(ConfigError):
    """A checkpoint that can't be used, or could not be written."""


class NotWrittenError(CheckpointError):
    """A checkpoint that could not be written: a full disk, a lost rank."""

    bad_input = False


class OtherModelError(CheckpointError):
    """A whole checkpoint whose tensors are not those that were asked for."""


class Checkpointer:
    """Writes the checkpoints of one run, at most one at a time, while training goes on.

    All ranks of `process_group` (None: all there are; one process without torch.distributed works too) make it
    and call it together. It communicates in a gloo group of its own, so that nothing interleaves with
    training. `keep`: newest checkpoints that stay, 0 for all of them.
    """

    def __init__(self, run_dir: str | Path, keep: int, process_group: dist.ProcessGroup | None = None) -> None:
        self._folder = Path(run_dir) / FOLDER
        self._keep = keep
        self._ranks = _own_group(process_group)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._ranks.together(self._clean)

    def save(self, step: int, state: dict[str, Tensor], trainer: dict[str, Any]) -> None:
        """Copies `state` (the same names on all ranks) to the host and starts to write it as step-`step`.

        `trainer` (JSON values; rank 0's counts) comes back from `load`, with `step`, `ranks`, `versions` and
        `random` added. Waits for a save that is still under way, and raises its CheckpointError if it failed.
        """
        self.wait()
        # On CPU, too, `to` must copy: the optimiser writes into these tensors while the thread reads.
        staged = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        versions = {"torch": torch.__version__, "format": 1}
        numbers = {**trainer, "step": step, "ranks": self._ranks.size, "versions": versions}
        json.dumps(numbers, allow_nan=False)  # what JSON can't hold fails here, not in the thread
        self._pending = self._thread.submit(self._save, step, staged, dict(numbers), _random_state())

    def wait(self) -> None:
        """Returns when no save is under way. Raises CheckpointError on every rank if the last one failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _save(self, step: int, staged: dict[str, Tensor], numbers: dict[str, Any], random: Any) -> None:
        temp, final = self._folder / f".step-{step}.tmp", self._folder / f"step-{step}"
        try:
            numbers["random"] = self._ranks.together(lambda: self._begin(temp, random))
            writer = _Writer(temp)
            planner = DefaultSavePlanner(flatten_state_dict=False)
            dcp.save(staged, storage_writer=writer, planner=planner, process_group=self._ranks.group)
            shares = self._ranks.together(lambda: self._describe(temp, numbers))
            files = {name: entry for share in shares for name, entry in sorted(share.items())}
            manifest = {"step": step, "ranks": self._ranks.size, "torch": torch.__version__, "files": files}
            self._ranks.together(lambda: self._publish(temp, final, manifest))
        except _FAILURES as error:
            if self._ranks.rank == 0:
                shutil.rmtree(temp, ignore_errors=True)  # what can't be removed now is at the next start
            raise NotWrittenError(f"{final}: not written: {_cause(error)}; earlier ones are unharmed") from error
        self._ranks.together(lambda: self._prune(step))

    def _clean(self) -> None:
        """Removes what a killed run left half-written."""
        if self._ranks.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            for path in self._folder.glob(".step-*.tmp"):
                shutil.rmtree(path)

    def _begin(self, temp: Path, random: dict[str, str]) -> dict[str, str]:
        if self._ranks.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir()
        return random

    def _describe(self, temp: Path, numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Size and digest of the files that this rank wrote."""
        names = [path.name for path in temp.glob(f"__{self._ranks.rank}_*")]
        if self._ranks.rank == 0:
            _write_json(temp / TRAINER, numbers)
            names += [METADATA, TRAINER]
        return {name: {"size": (temp / name).stat().st_size, "sha256": _digest(temp / name)} for name in names}

    def _publish(self, temp: Path, final: Path, manifest: dict[str, Any]) -> None:
        if self._ranks.rank != 0:
            return
        _write_json(temp / MANIFEST, manifest)
        _check_sizes(temp, manifest)  # fails where the ranks don't share a file system
        _sync_folder(temp)
        if final.exists():  # damaged and not resumed from, or the same step saved again
            _remove(final)
        temp.rename(final)
        _sync_folder(self._folder)

    def _prune(self, step: int) -> None:
        """Deletes the oldest; and those of later steps: damaged, the run went on from before them."""
        if self._ranks.rank != 0:
            return
        present = checkpoints(self._folder.parent)
        mine = [path for path in present if _step(path) <= step]
        stay = mine[: self._keep] if self._keep else mine
        for path in present:
            if path not in stay:
                _remove(path)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The flat state of a model and its AdamW: parameters by name, `optim.<name>.exp_avg|exp_avg_sq|step`.

    The tensors are the live ones, so `load` fills model and optimiser in place. An optimiser that has made no
    step gets the zeros that AdamW starts from.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[str, Tensor] = {name: parameter for parameter, name in names.items()}
    for group in optimizer.param_groups:
        on_device = group["fused"] or group["capturable"]
        for parameter in group["params"]:
            moments = optimizer.state[parameter]
            if not moments:
                dtype = torch.float32 if group["fused"] else torch.get_default_dtype()
                moments["step"] = torch.zeros((), dtype=dtype, device=parameter.device if on_device else "cpu")
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = torch.zeros_like(parameter, requires_grad=False)
            state.update({f"optim.{names[parameter]}.{name}": value for name, value in moments.items()})
    return state


def load(
    path: str | Path, state: dict[str, Tensor], process_group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Reads a checkpoint into the given tensors and DTensors, in place; returns its trainer's numbers.

    All ranks of `process_group` call it together, any number of them. Each first verifies a share of the files.
    The names must be those of the checkpoint; its optimiser state is left unread where `state` has none. Values
    are converted to the dtypes of `state`.

    Raises CheckpointError on all ranks alike, before any tensor changes, for a damaged checkpoint, and
    OtherModelError for one of another model.
    """
    path, ranks = Path(path), _group(process_group)
    ranks.together(lambda: _verify_share(path, ranks.rank, ranks.size))
    reader = _Reader(path)
    ranks.together(lambda: _check_tensors(path, reader.read_metadata(), state))
    try:
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        dcp.load(dict(state), storage_reader=reader, planner=planner, process_group=process_group)
    except _FAILURES as error:
        raise CheckpointError(f"{path}: can't be loaded: {_cause(error)}") from error
    return _read_json(path / TRAINER)


def restore_random(trainer: dict[str, Any], process_group: dist.ProcessGroup | None = None) -> bool:
    """Puts this rank's random state back (torch's, on CPU and on the current GPU) from what `load` returned.

    Returns False, and changes nothing, if the checkpoint was written by another number of ranks.
    """
    ranks = _group(process_group)
    if trainer["ranks"] != ranks.size:
        return False
    stored = {name: bytearray(base64.b64decode(text)) for name, text in trainer["random"][ranks.rank].items()}
    state = {name: torch.frombuffer(data, dtype=torch.uint8) for name, data in stored.items()}
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    return True


def checkpoints(run_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    found = [path for path in (Path(run_dir) / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def newest(run_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that has its manifest and all its files in their sizes."""
    for path in checkpoints(run_dir):
        try:
            read_trainer(path)
        except CheckpointError:
            continue
        return path
    return None


def read_trainer(path: str | Path) -> dict[str, Any]:
    """The trainer's numbers of a checkpoint, checked: manifest, all sizes, this file's digest.

    Raises CheckpointError naming the file that is wrong.
    """
    path = Path(path)
    _check_digest(path, _manifest(path), TRAINER)
    return _read_json(path / TRAINER)


def verify(path: str | Path) -> None:
    """Raises CheckpointError naming the file if the manifest, a size or a digest is wrong. Reads everything."""
    _verify_share(Path(path), 0, 1)


def _verify_share(path: Path, rank: int, size: int) -> None:
    """Verifies all sizes and every `size`-th file's digest, the largest files spread evenly."""
    manifest = _manifest(path)
    names = sorted(manifest["files"], key=lambda name: (-manifest["files"][name]["size"], name))
    for name in names[rank::size]:
        _check_digest(path, manifest, name)


def _manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"checkpoint '{path}': no such folder")
    manifest = _read_json(path / MANIFEST)
    try:
        entries = {name: (int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(f"{path / MANIFEST}: damaged; must list files with size and sha256") from None
    for name in [METADATA, TRAINER, *entries]:
        if name not in entries or Path(name).name != name:
            raise CheckpointError(f"{path / MANIFEST}: damaged; must list {METADATA}, {TRAINER} and plain names")
    _check_sizes(path, manifest)
    return manifest


def _check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the checkpoint's manifest lists it")
        if file.stat().st_size != entry["size"]:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes; must be {entry['size']} (manifest)")


def _check_digest(path: Path, manifest: dict[str, Any], name: str) -> None:
    if _digest(path / name) != manifest["files"][name]["sha256"]:
        raise CheckpointError(f"{path / name}: damaged; its SHA-256 must be the manifest's")


def _check_tensors(path: Path, metadata: Metadata, state: dict[str, Tensor]) -> None:
    here = {name: list(tensor.shape) for name, tensor in state.items()}
    there = {name: list(entry.size) for name, entry in _tensors(metadata).items()}
    if not any(name.startswith("optim.") for name in here):
        there = {name: shape for name, shape in there.items() if not name.startswith("optim.")}
    for name in sorted({*there, *here}):
        if there.get(name) != here.get(name):
            words = [str(shapes.get(name, "absent")) for shapes in (there, here)]
            raise OtherModelError(
                f"{path}: checkpoint of another model: tensor {name} is {words[0]} there, {words[1]} here"
            )


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    entries = metadata.state_dict_metadata.items()
    return {name: entry for name, entry in entries if isinstance(entry, TensorStorageMetadata)}


class _Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # torch's has the folder's path, pickled as a pathlib class


class _Reader(dcp.FileSystemReader):
    """torch's reader without its `pickle.load`; tensors it already reads with `weights_only`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # a broken pickle raises nearly anything
            raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        self._check(path, metadata)
        return metadata

    def _check(self, path: Path, metadata: Any) -> None:
        fine = isinstance(metadata, Metadata) and isinstance(metadata.storage_data, dict)
        # An entry that is no tensor would go through an unrestricted torch.load.
        if not fine or _tensors(metadata).keys() != metadata.state_dict_metadata.keys():
            raise CheckpointError(f"{path}: must describe tensors only")
        for info in metadata.storage_data.values():
            if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
                raise CheckpointError(f"{path}: names file '{info.relative_path}'; must be plain files of the folder")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in _HARMLESS:
            raise CheckpointError(f"refers to {module}.{name}; only torch's descriptions of tensors are read")
        return super().find_class(module, name)


@dataclass(frozen=True)
class _Ranks:
    """The ranks that share a checkpoint; `group` None: all there are, or one process alone."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def together(self, work: Callable[[], T]) -> list[T]:
        """Calls `work` on every rank; returns all results in rank order. A rank's failure raises on all."""
        result, failure = None, None
        try:
            result = work()
        except CheckpointError as error:
            failure = error
        except Exception as error:
            failure = CheckpointError(_cause(error))
        rows: list[Any] = [(result, failure)]
        if dist.is_initialized():
            rows = [None] * self.size
            dist.all_gather_object(rows, (result, failure), group=self.group)
        for rank, (_, problem) in enumerate(rows):
            if problem is not None:
                raise type(problem)(problem if self.size == 1 else f"{problem} (rank {rank})")
        return [row[0] for row in rows]


def _group(group: dist.ProcessGroup | None) -> _Ranks:
    if not dist.is_initialized():
        return _Ranks(None, 0, 1)
    return _Ranks(group, dist.get_rank(group), dist.get_world_size(group))


def _own_group(group: dist.ProcessGroup | None) -> _Ranks:
    """A gloo group of the same ranks."""
    if not dist.is_initialized():
        return _group(None)
    return _group(dist.new_group(dist.get_process_group_ranks(group), backend="gloo"))


def _random_state() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _cause(error: BaseException) -> str:
    """One line for an error; of torch's CheckpointException, the first rank's own."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items())
        return f"{_cause(inner)} (rank {rank})"
    line = (str(error).strip().splitlines() or [""])[0]
    return line if isinstance(error, (ConfigError, OSError)) else f"{type(error).__name__}: {line}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove(path: Path) -> None:
    """Deletes a checkpoint; it is hidden first, so that none is ever seen half-deleted."""
    hidden = path.with_name(f".{path.name}.old.tmp")
    path.rename(hidden)
    shutil.rmtree(hidden)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a checkpoint without it is incomplete") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(values, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
