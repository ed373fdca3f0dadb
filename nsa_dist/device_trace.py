"""Communication on a GPU as torch's profiler saw it: what NCCL was given, what was hidden behind other kernels."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Double": 8, "Byte": 1, "Char": 1, "Bool": 1, "Int": 4, "Long": 8}
Spans = list[tuple[float, float]]


@dataclass(frozen=True)
class Communication:
    """Of one rank. sent_bytes, received_bytes: what NCCL was given, the rank's own part left out."""

    calls: int
    sent_bytes: int
    received_bytes: int
    kernels_ms: float
    exposed_ms: float  # a communication kernel ran and no other
    hidden_ms: float


def traced(fn: Callable[[], None], rank: int) -> Communication:
    """Runs fn once under the profiler. rank: this process's in the group that communicates."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        fn()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return communication(json.loads(file.read_text())["traceEvents"], rank)


def communication(events: list[dict[str, Any]], rank: int) -> Communication:
    """From a Chrome trace's events (times in microseconds)."""
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    is_comm = [e.get("cat") == "kernel" and "nccl" in e["name"].lower() for e in kernels]
    spans = [(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in kernels]
    comm = merged([s for s, c in zip(spans, is_comm, strict=True) if c])
    work = merged([s for s, c in zip(spans, is_comm, strict=True) if not c])
    total, hidden = _length(comm), _common(comm, work)
    given = [_given(e["args"], rank) for e in events if e.get("name") == "record_param_comms" and "args" in e]
    given = [g for g in given if g != (0, 0)]
    sent, received = (sum(g[i] for g in given) for i in (0, 1))
    return Communication(len(given), sent, received, total / 1e3, (total - hidden) / 1e3, hidden / 1e3)


def _given(args: dict[str, Any], rank: int) -> tuple[int, int]:
    """Bytes sent and received of one collective."""
    size = _BYTES.get(str(args.get("dtype", "")), 0)
    name, ranks = str(args.get("Collective name", "")), int(args.get("Group size", 0) or 0)
    there, here = (int(args.get(f"{way} msg nelems", 0) or 0) * size for way in ("In", "Out"))
    if "all_to_all" in name or "alltoall" in name:
        return _others(there, args.get("In split size"), rank), _others(here, args.get("Out split size"), rank)
    if name in ("send", "recv"):
        return (there, 0) if name == "send" else (0, here)
    if "gather" in name and ranks:
        return there * (ranks - 1), here - there
    if "reduce" in name and ranks:
        return (2 * there * (ranks - 1) // ranks,) * 2
    return 0, 0


def _others(total: int, splits: Any, rank: int) -> int:
    """Without the part that a rank keeps. splits: a list, or text such as `[3, 5]`."""
    parts = json.loads(splits) if isinstance(splits, str) and splits.endswith("]") else splits
    if not parts or rank >= len(parts) or not sum(parts):
        return total
    return total - total * int(parts[rank]) // sum(parts)


def merged(spans: Spans) -> Spans:
    """The same times as disjoint spans in order."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def _common(a: Spans, b: Spans) -> float:
    """The time that two lists of disjoint ordered spans share."""
    total, i, j = 0.0, 0, 0
    while i < len(a) and j < len(b):
        total += max(0.0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return total
