"""Checkpoints: asynchronous, complete or invisible, loadable on another number of ranks.

A folder `<run>/checkpoints/step-N/` holds the tensors as torch.distributed.checkpoint writes them (`.metadata`
and a `__R_0.distcp` from each rank R), `trainer.json` with the trainer's numbers and each rank's random state,
and `manifest.json` with the size and SHA-256 of every file, which is written last and makes it count (store.py).
`<run>` is a local folder or any fsspec URL. Nothing is unpickled but the few classes that describe tensors.
"""

import base64
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from nsa_dist import store
from nsa_dist.config import ConfigError
from nsa_dist.store import Place, StoreError, place

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

    def __init__(self, run: str | Place, keep: int, process_group: dist.ProcessGroup | None = None) -> None:
        self._folder = place(run) / FOLDER
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
        final = self._folder / f"step-{step}"
        temp = final
        try:
            began = self._ranks.together(lambda: (self._begin(final), random))
            temp, numbers["random"] = began[0][0], [row[1] for row in began]
            files = _Files()
            planner = DefaultSavePlanner(flatten_state_dict=False)
            dcp.save(staged, storage_writer=_Writer(temp, files), planner=planner, process_group=self._ranks.group)
            shares = self._ranks.together(lambda: self._describe(temp, files, numbers))
            entries = {name: entry for share in shares for name, entry in sorted(share.items())}
            manifest = {"step": step, "ranks": self._ranks.size, "torch": torch.__version__, "files": entries}
            self._ranks.together(lambda: self._publish(temp, final, manifest))
        except _FAILURES as error:
            if self._ranks.rank == 0:
                with suppress(OSError, ConfigError):  # what can't be removed now is at the next start
                    store.withdraw(temp, MANIFEST)
            raise NotWrittenError(f"{final}: not written: {_cause(error)}; earlier ones are unharmed") from error
        self._ranks.together(lambda: self._prune(step))

    def _clean(self) -> None:
        """Removes what a killed run left half-written."""
        if self._ranks.rank == 0:
            store.clear(self._folder, "step-", MANIFEST)

    def _begin(self, final: Place) -> Place:
        """Where to write; rank 0's counts."""
        return store.begin(final, MANIFEST) if self._ranks.rank == 0 else final

    def _describe(self, temp: Place, files: "_Files", numbers: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Size and digest of the files that this rank wrote."""
        if self._ranks.rank == 0:
            with files.create_stream(temp / TRAINER, "wb") as file:
                file.write(_json(numbers))
        return files.written

    def _publish(self, temp: Place, final: Place, manifest: dict[str, Any]) -> None:
        if self._ranks.rank == 0:
            _check_sizes(temp, manifest)  # fails where the ranks don't share a file system
            store.publish(temp, final, MANIFEST, _json(manifest))

    def _prune(self, step: int) -> None:
        """Deletes the oldest; and those of later steps: damaged, the run went on from before them."""
        if self._ranks.rank != 0:
            return
        present = checkpoints(self._folder.parent)
        mine = [path for path in present if _step(path) <= step]
        stay = mine[: self._keep] if self._keep else mine
        for path in present:
            if path not in stay:
                store.withdraw(path, MANIFEST)


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
    path: str | Place, state: dict[str, Tensor], process_group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Reads a checkpoint into the given tensors and DTensors, in place; returns its trainer's numbers.

    All ranks of `process_group` call it together, any number of them. Each first verifies a share of the files.
    The names must be those of the checkpoint; its optimiser state is left unread where `state` has none. Values
    are converted to the dtypes of `state`.

    Raises CheckpointError on all ranks alike, before any tensor changes, for a damaged checkpoint, and
    OtherModelError for one of another model.
    """
    path, ranks = place(path), _group(process_group)
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


def checkpoints(run: str | Place) -> list[Place]:
    """The checkpoint folders of a run, newest first, whole or damaged."""
    folder = place(run) / FOLDER
    found: list[Place] = [folder / name for name in store.listing(folder) if _NAME.fullmatch(name)]
    return sorted((path for path in found if store.seen(path, MANIFEST)), key=_step, reverse=True)


def newest(run: str | Place) -> Place | None:
    """The newest checkpoint of a run that has its manifest and all its files in their sizes."""
    for path in checkpoints(run):
        try:
            read_trainer(path)
        except CheckpointError:
            continue
        return path
    return None


def read_trainer(path: str | Place) -> dict[str, Any]:
    """The trainer's numbers of a checkpoint, checked: manifest, all sizes, this file's digest.

    Raises CheckpointError naming the file that is wrong.
    """
    path = place(path)
    _check_digest(path, _manifest(path), TRAINER)
    return _read_json(path / TRAINER)


def verify(path: str | Place) -> None:
    """Raises CheckpointError naming the file if the manifest, a size or a digest is wrong. Reads everything."""
    _verify_share(place(path), 0, 1)


def _verify_share(path: Place, rank: int, size: int) -> None:
    """Verifies all sizes and every `size`-th file's digest, the largest files spread evenly."""
    manifest = _manifest(path)
    names = sorted(manifest["files"], key=lambda name: (-manifest["files"][name]["size"], name))
    for name in names[rank::size]:
        _check_digest(path, manifest, name)


def _manifest(path: Place) -> dict[str, Any]:
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


def _check_sizes(path: Place, manifest: dict[str, Any]) -> None:
    sizes = store.listing(path)
    for name, entry in manifest["files"].items():
        if sizes.get(name) is None:
            raise CheckpointError(f"{path / name}: missing; the checkpoint's manifest lists it")
        if sizes[name] != entry["size"]:
            raise CheckpointError(f"{path / name}: {sizes[name]} bytes; must be {entry['size']} (manifest)")


def _check_digest(path: Place, manifest: dict[str, Any], name: str) -> None:
    if _digest(path / name) != manifest["files"][name]["sha256"]:
        raise CheckpointError(f"{path / name}: damaged; its SHA-256 must be the manifest's")


def _check_tensors(path: Place, metadata: Metadata, state: dict[str, Tensor]) -> None:
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


class _Files(FileSystemBase):
    """A place as torch's reader and writer use it. `written`: size and SHA-256 of each file, as it was written."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with path.open(mode) as stream:
            noted = _Noted(stream) if mode == "wb" else stream
            yield noted
        if isinstance(noted, _Noted):
            self.written[path.name] = {"size": noted.size, "sha256": noted.sha256.hexdigest()}

    def rename(self, path: Any, new_path: Any) -> None:
        store.rename(path, new_path.name)
        self.written[new_path.name] = self.written.pop(path.name)

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def init_path(self, path: Any) -> Any:
        return path

    def mkdir(self, path: Any) -> None:
        store.make(path)

    def exists(self, path: Any) -> bool:
        return path.name in self.written  # the folder was empty

    def rm_file(self, path: Any) -> None:
        store.delete(path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Noted:
    """A file that is written from its beginning to its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.size, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return self._file.write(data)

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _Writer(dcp.FileSystemWriter):
    def __init__(self, path: Place, files: _Files) -> None:
        super().__init__("", sync_files=isinstance(path, Path))
        self.fs, self.path = files, path  # type: ignore[assignment] # torch asks of a path what _Files is asked

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # torch's has the folder's path, pickled as a pathlib class


class _Reader(dcp.FileSystemReader):
    """torch's reader without its `pickle.load`; tensors it already reads with `weights_only`."""

    def __init__(self, path: Place) -> None:
        super().__init__("")
        self.fs, self.path = _Files(), path  # type: ignore[assignment]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self.path / METADATA  # type: ignore[operator]
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        except Exception as error:  # a broken pickle raises nearly anything
            raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from None
        self._check(path, metadata)
        return metadata

    def _check(self, path: Place, metadata: Any) -> None:
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
        except (CheckpointError, StoreError) as error:
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


def _step(path: Place) -> int:
    return int(path.name.removeprefix("step-"))


def _digest(path: Place) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Place) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a checkpoint without it is incomplete") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return values


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1, allow_nan=False).encode()
