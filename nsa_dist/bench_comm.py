"""`nsa-dist bench comm`: one attention layer on several ranks, under every exchange, on the same inputs.

A row is one exchange: bytes by kind from the ledger, times of forward and backward (of the slowest rank, median),
the part of the communication that stood in the way and the part that was hidden, peak memory of a rank.
"""

import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.bench_rows import Row, Rows, traffic_row
from nsa_dist.config import ConfigError
from nsa_dist.device_trace import Communication, traced
from nsa_dist.hosts import hosts
from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.compress import compress_mlp
from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.memory import Peak
from nsa_dist.parallel.attention import CompressHalo, pack, unpack
from nsa_dist.parallel.exchanges import full_exchange, nsa_exchange
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.ledger import as_table
from nsa_dist.parallel.mesh import Axis, Mesh, make_mesh
from nsa_dist.parallel.operator import apply
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.parallel.traffic import Sizes
from nsa_dist.picks import prescribed
from nsa_dist.process import choose_device, process_group, under_torchrun
from nsa_dist.ranks import Ranks
from nsa_dist.torchrun import torchrun_store

EXCHANGES = ("nsa", "allgather", "allgather_heads", "groupcast", "ulysses", "ring")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SPEC = NSASpec()
ENOUGH_S = 6.0  # no further repeats of what has taken so long


@dataclass(frozen=True)
class Case:
    """One layer under one exchange. `ring`: full attention over one branch's KV, the others NSA."""

    exchange: str
    ranks: int
    layout: str
    selection: str  # Ulysses and the ring take none: the first selects by its own scores
    tokens: int
    heads: int
    groups: int
    dk: int
    dv: int
    dtype: str
    trace: Path | None = None

    @property
    def sizes(self) -> Sizes:
        """Gradients travel in float32."""
        return Sizes(self.heads, self.groups, self.dk, self.dv, DTYPES[self.dtype].itemsize, 4)

    @property
    def impossible(self) -> str:
        """Why it can't run, or ""."""
        if self.exchange == "ulysses" and self.groups % self.ranks:
            return f"ulysses: {self.ranks} ranks don't divide {self.groups} KV heads"
        return ""


def bench_comm(
    cases: list[Case],
    device: str,
    repeats: int,
    file: Path | None,
    say: Callable[[str], None],
    gbit: float | None = None,
    timeout_s: float = 600,
) -> list[Row]:
    """Runs every case; each row is printed and written when it is known. repeats 0: times nothing.

    Under torchrun on the processes that are there, else on processes of this machine. gbit: each rank on a host of
    its own that sends at most so many Gbit/s (0: no limit); rows then hold `gbit`. Raises ConfigError for more ranks
    than the machine has GPUs, RunFailed for a rank that fails; every process has ended then.
    """
    if under_torchrun(os.environ):
        if gbit is not None:
            raise ConfigError("--hosts: torchrun has placed the ranks already")
        return _under_torchrun(cases, device, repeats, file, say, timeout_s)
    placed = choose_device(device, max(case.ranks for case in cases), "--device")
    rows = Rows(file)
    for ranks in sorted({case.ranks for case in cases}):
        with (
            nullcontext() if gbit is None else hosts(ranks, gbit) as made,
            Ranks(ranks, placed, timeout_s, made.names if made else ()) as pool,
        ):
            for case in [case for case in cases if case.ranks == ranks]:
                if case.impossible:
                    say(f"  not run: {case.impossible}")
                    continue
                row = pool.call(measure, case, repeats, timeout_s=timeout_s)[0]
                say(line(rows.add(row if gbit is None else row | {"gbit": gbit})))
    return rows.rows


def _under_torchrun(
    cases: list[Case], device: str, repeats: int, file: Path | None, say: Callable[[str], None], timeout_s: float
) -> list[Row]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if any(case.ranks != world_size for case in cases):
        raise ConfigError(f"--ranks {cases[0].ranks}: must be {world_size}, the processes that torchrun started")
    local_rank = int(os.environ["LOCAL_RANK"])
    placed = choose_device(device, int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)), "--device")
    rows = Rows(file if rank == 0 else None)
    with process_group(torchrun_store(), rank, world_size, placed, local_rank, timeout_s):
        mesh = make_mesh(1, world_size, 0, placed)
        for case in cases:
            if case.impossible:
                if rank == 0:
                    say(f"  not run: {case.impossible}")
                continue
            row = rows.add(measure(mesh, case, repeats))
            if rank == 0:
                say(line(row))
    return rows.rows


def measure(mesh: Mesh, case: Case, repeats: int) -> Row:
    """The case's row, the same on every rank of the mesh's cp axis; all of them call it together."""
    axis, device = mesh.cp, torch.device(mesh.parameters.device_type)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:  # libraries, threads and their scratch memory become resident once: not in what is measured first
        short = Layer(replace(case, tokens=min(case.tokens, 1024 * axis.size)), axis, device)
        short.forward()
        short.backward()
        del short
    layer = Layer(case, axis, device)
    axis.ledger.take()
    peak = Peak(device)
    layer.forward()
    layer.backward()  # warm: kernels are compiled, communicators made, plans known
    peak_bytes = peak.bytes()
    tables = gathered(as_table(axis.ledger.take()))
    if repeats and device.type == "cuda":
        times, exposed = _queued(layer, repeats), [0.0]
    else:
        times, exposed = _one_by_one(layer, axis, repeats)
    row: Row = {key: value for key, value in asdict(case).items() if key != "trace"}
    row |= traffic_row(tables, case.tokens, case.sizes)
    if times:
        forward, backward = (statistics.median(x) for x in zip(*times, strict=True))
        row |= {"forward_ms": 1e3 * forward, "backward_ms": 1e3 * backward}
        row["tokens_per_s"] = case.tokens / (forward + backward)
        row |= _communication(layer, axis, device, statistics.median(exposed))
    peaks = every(peak_bytes)
    row |= {"peak_bytes_mean": float(np.mean(peaks)), "peak_bytes_max": max(peaks), "peak_bytes": peaks}
    row |= {"device": device_name(device), "torch": torch.__version__, "repeats": len(times)}
    return row


def _one_by_one(layer: "Layer", axis: Axis, repeats: int) -> tuple[list[list[float]], list[float]]:
    """Seconds of each repeat's forward and backward, and those exposed."""
    device = torch.device("cpu")
    times: list[list[float]] = []
    exposed: list[float] = []
    while len(times) < repeats and sum(sum(t) for t in times) < ENOUGH_S:
        times.append(slowest([timed(layer.forward, device), timed(layer.backward, device)]))
        exposed.append(sum(totals.exposed_s for totals in axis.ledger.take().values()))
    return times, exposed


def _queued(layer: "Layer", repeats: int) -> list[list[float]]:
    """The same as a GPU's events tell it, nobody waiting between two of them: as layer follows layer in a step, the
    host starts a forward while the device has still to do what came before it."""
    once = slowest([timed(layer.forward, layer.q.device) + timed(layer.backward, layer.q.device)])[0]
    repeats = max(1, min(repeats, int(ENOUGH_S / once)))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * repeats + 1)]
    layer.forward()
    layer.backward()  # what the host has a lead of
    for before, work in zip(events, [layer.forward, layer.backward] * repeats, strict=False):
        before.record()
        work()
    events[-1].record()
    torch.cuda.synchronize()
    spans = [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]
    return [slowest(spans[2 * i : 2 * i + 2]) for i in range(repeats)]


class Layer:
    """One attention layer of a case on this rank, from q, k, v and gates: compression, exchange, attention."""

    def __init__(self, case: Case, axis: Axis, device: torch.device) -> None:
        self.case, packing = case, Packing(np.array([0, case.tokens]), SPEC)
        layout = make_layout(case.layout, case.tokens, axis.size, SPEC.select_block)
        self.sequence = ShardedSequence(packing, layout, axis, device, torch.float32)
        self.dtype = DTYPES[case.dtype]
        self.generator = torch.Generator(device).manual_seed(axis.rank)
        rows, heads, groups = len(self.sequence.tokens), case.heads, case.groups
        self.q = self._random(rows, heads, case.dk)
        branches = 1 if case.exchange == "ring" else 3
        self.kv = [self._random(rows, groups, d) for _ in range(branches) for d in (case.dk, case.dv)]
        self.leaves = [self.q, *self.kv]
        if case.exchange == "ring":
            self.operation = full_exchange("ring", self.sequence, case.dk**-0.5)
        else:
            self.gates = torch.sigmoid(self._random(rows, heads, 3))
            self.weights = [self._weights(case.dk), self._weights(case.dv)]
            self.leaves += [self.gates, *self.weights[0], *self.weights[1]]
            picks = None
            if case.exchange != "ulysses":
                chosen = prescribed(case.selection, self.sequence.tokens, groups, SPEC, case.trace)
                picks = torch.from_numpy(chosen).to(device)
            self.operation = nsa_exchange(case.exchange, self.sequence, case.dk**-0.5, picks=picks)
        self.leaves = [x.requires_grad_() for x in self.leaves]
        self.do = self._random(rows, heads, case.dv)
        self.out: Tensor | None = None

    def forward(self) -> None:
        self.out = None  # the last one's memory
        if self.case.exchange == "ring":
            self.out = apply(self.operation, self.q, *self.kv)
            return
        k, v, *others = self.kv
        halo = self.sequence.compress_halo
        buffer = unpack(apply(CompressHalo(halo), pack(k, v)), k, v)
        chunks = self.sequence.compress_chunks(self.case.groups)
        k_cmp, v_cmp = (compress_mlp(x, chunks, *w) for x, w in zip(buffer, self.weights, strict=True))
        self.out = apply(self.operation, self.q, k_cmp, v_cmp, *others, self.gates)

    def backward(self) -> None:
        assert self.out is not None
        torch.autograd.grad(self.out, self.leaves, self.do)
        self.out = None

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self.sequence.device, dtype=self.dtype, generator=self.generator)

    def _weights(self, d: int) -> list[Tensor]:
        l = SPEC.compress_block
        sizes: list[tuple[int, ...]] = [(l, d), (2 * d, l * d), (2 * d,), (d, 2 * d), (d,)]
        made = [self._random(*size) for size in sizes]
        return [w * (l * d) ** -0.5 if w.dim() == 2 else w for w in made]


def line(row: Row) -> str:
    """A row for people."""
    share = row["share_of_allgather"]
    of = (
        f" ({share:5.1%} of the all-gather, at most {row['share_of_allgather_max']:.1%})" if share is not None else ""
    )
    time_ = "  not timed"
    if "forward_ms" in row:
        time_ = _times(row)
    return (
        f"  {row['exchange']:15s} P={row['ranks']} {row['layout']:10s} {row['selection']:11s} T={row['tokens']:<8d}"
        f" received {row['received_bytes_mean'] / 2**20:9.2f} MiB{of}{time_}"
        f"  {row['peak_bytes_max'] / 2**30:6.2f} GiB"
    )


def _times(row: Row) -> str:
    hidden = f"{row['hidden_ms']:.1f}" if row["hidden_ms"] is not None else "?"
    exposed = f"{row['exposed_ms']:.1f}" if row["exposed_ms"] is not None else "?"
    return (
        f"  {row['forward_ms']:9.1f} + {row['backward_ms']:9.1f} ms, exposed {exposed}, hidden {hidden}"
        f"  {row['tokens_per_s']:11,.0f} tok/s"
    )


def every(value: Any) -> list[Any]:
    """Each rank's value, in rank order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def gathered(table: Ints) -> Ints:
    """[ranks, ...] of each rank's table."""
    return np.stack(every(table))


def slowest(seconds: list[float]) -> list[float]:
    """Each of them as it was on the slowest rank."""
    return [max(x) for x in zip(*every(seconds), strict=True)]


def timed(fn: Callable[[], object], device: torch.device) -> float:
    """Seconds of this rank, started together with the others'."""
    _together(device)
    start = time.perf_counter()
    fn()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _together(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.all_reduce(torch.zeros(1))  # on the CPU, by gloo


def _communication(layer: Layer, axis: Axis, device: torch.device, exposed_s: float) -> Row:
    """Times exposed and hidden, of the rank with most exposed; and what NCCL says that it was given."""
    if device.type == "cpu":
        worst = max(every(exposed_s))
        return {"exposed_ms": 1e3 * worst, "hidden_ms": None, "nccl": None}

    def both() -> None:
        layer.forward()
        layer.backward()

    _together(device)
    found: list[Communication] = every(traced(both, axis.rank))
    axis.ledger.take()
    worst = max(found, key=lambda c: c.exposed_ms)
    return {"exposed_ms": worst.exposed_ms, "hidden_ms": worst.hidden_ms, "nccl": [asdict(c) for c in found]}


def device_name(device: torch.device) -> str:
    """For a row."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "cpu, gloo"
