"""What a step leaves: a line of `metrics.jsonl`, TensorBoard's scalars, the progress line. Rank 0 writes them."""

import json
import math
import os
import resource
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from nsa_dist.config import ConfigError

FILE = "metrics.jsonl"
GIB = 1 << 30
APART = ("parameters", "control")  # kinds of traffic that are counted, but in no share
FULL_KV = ("selected", "full_kv")  # under the all-gather, these are the full KV of one branch


class MetricsWriter:
    """Appends the records of a run's steps; `say` is told what had to be dropped.

    Lines of steps after `start_step` are dropped first: a resumed run makes them again. A record holds `step,
    loss, grad_norm, tokens, lr, step_s, tokens_per_s`, `comm: {kind: {forward|backward: {sent_bytes|
    received_bytes: {mean, max}}}, rivals: {name: {kind: …}}}`, and where known `balance: {predicted_imbalance,
    measured_imbalance}`, `validation: {loss, …}`, `memory_bytes`, `memory_total_bytes`, `mfu`.
    """

    def __init__(self, run_dir: str | Path, start_step: int, say: Callable[[str], None]) -> None:
        self._path = Path(run_dir) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(self._path, start_step, say)
        self._file = self._path.open("a")
        self._board = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # slow; reading metrics needs none of it

            self._board = SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=start_step + 1)
        else:
            say("TensorBoard isn't installed: metrics.jsonl alone is written")

    def step(self, record: dict[str, Any]) -> None:
        """Writes one step. Raises ConfigError naming the value, and writes nothing, if one isn't finite."""
        for key, value in _leaves(record):
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{key}={value} at step {record['step']}: must be finite")
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board:
            for name, value in _scalars(record).items():
                self._board.add_scalar(name, value, record["step"])
            self._board.flush()

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        if self._board:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; none if the file isn't there. A last line that was cut is left out.

    Raises ConfigError naming file and line for any other line that is no JSON object.
    """
    path = Path(run_dir) / FILE
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else [""]
    return [_parse(path, number, line) for number, line in enumerate(lines[:-1], 1)]


def progress(record: dict[str, Any], total_steps: int, ranks: int) -> str:
    """`step 120/5000 (2.4%) | loss 3.1234 | … | eta 4h12m`; what the record doesn't know is left out."""
    step, seconds = record["step"], record.get("step_s")
    formats = {
        "loss": lambda r: f"loss {r['loss']:.4f}",
        "grad_norm": lambda r: f"grad_norm {r['grad_norm']:.2f}",
        "memory_bytes": _memory,
        "tokens_per_s": lambda r: f"tok/s/gpu {r['tokens_per_s'] / ranks:,.0f}",
        "mfu": lambda r: f"mfu {r['mfu']:.1%}",
        "validation": lambda r: f"validation {r['validation']['loss']:.4f}",
    }
    parts = [f"step {step}/{total_steps} ({step / total_steps:.1%})"]
    parts += [form(record) for key, form in formats.items() if record.get(key) is not None]
    share = share_of_allgather(record)
    if share is not None:
        parts.append(f"comm {share:.2f}x allgather")
    if seconds is not None:
        parts += [f"step {seconds:.1f}s", f"eta {_duration(seconds * (total_steps - step))}"]
    return " | ".join(parts)


def share_of_allgather(record: dict[str, Any]) -> float | None:
    """Bytes that the mean rank received in this step, over (P-1) L kv: the all-gather of one branch's full KV.

    Both with the backward's gradients. Parameters and control are in neither. None where one rank needs no other.
    """
    comm = record.get("comm") or {}
    allgather = comm.get("rivals", {}).get("allgather", {})
    whole = _received({kind: allgather[kind] for kind in FULL_KV if kind in allgather})
    return _received({kind: comm[kind] for kind in comm if kind not in (*APART, "rivals")}) / whole if whole else None


def memory_bytes() -> int:
    """Peak memory of this process: reserved on the GPU where it uses one, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _received(kinds: dict[str, Any]) -> float:
    return sum(phase["received_bytes"]["mean"] for phases in kinds.values() for phase in phases.values())


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """TensorBoard's names, torchtitan's where it has one."""
    names = {
        "loss": "loss_metrics/global_avg_loss",
        "grad_norm": "grad_norm",
        "lr": "lr",
        "tokens_per_s": "throughput(tps)",
        "step_s": "time_metrics/end_to_end(s)",
    }
    scalars = {name: record[key] for key, name in names.items() if record.get(key) is not None}
    if record.get("mfu") is not None:
        scalars["mfu(%)"] = 100 * record["mfu"]
    if record.get("memory_bytes") is not None:
        scalars["memory/max_reserved(GiB)"] = record["memory_bytes"] / GIB
    if record.get("validation"):
        scalars["validation_metrics/loss"] = record["validation"]["loss"]
    comm = record.get("comm") or {}
    for key, value in _leaves({kind: phases for kind, phases in comm.items() if kind != "rivals"}):
        if key.count(".") == 3:
            kind, phase, direction, statistic = key.split(".")
            scalars[f"comm/{kind}_{phase}_{direction.removesuffix('_bytes')}_{statistic}_bytes"] = value
    scalars |= {f"balance/{name}": value for name, value in record.get("balance", {}).items()}
    share = share_of_allgather(record)
    if share is not None:
        scalars["comm/received_share_of_allgather"] = share
    return scalars


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, (dict, list, tuple)):
        items = values.items() if isinstance(values, dict) else enumerate(values)
        for key, value in items:
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values


def _drop_after(path: Path, step: int, say: Callable[[str], None]) -> None:
    if not path.is_file():
        return
    text = path.read_text(errors="replace")
    lines = text.split("\n")[:-1]
    kept = [line for number, line in enumerate(lines, 1) if _parse(path, number, line)["step"] <= step]
    rest = "".join(line + "\n" for line in kept)
    if rest == text:
        return
    say(f"{path}: {len(text.splitlines()) - len(kept)} lines of steps after {step}, or cut off, are dropped")
    temp = path.with_suffix(".tmp")
    with temp.open("w") as file:
        file.write(rest)
        file.flush()
        os.fsync(file.fileno())
    temp.replace(path)


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ConfigError(f"{path}: line {number} must be a JSON object with a step: '{line[:60]}'")
    return record


def _memory(record: dict[str, Any]) -> str:
    total = record.get("memory_total_bytes")
    share = f" ({record['memory_bytes'] / total:.0%})" if total else ""
    return f"mem {record['memory_bytes'] / GIB:.1f}GiB{share}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
