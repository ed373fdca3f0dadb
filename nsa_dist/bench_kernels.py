"""`nsa-dist bench kernels`: NSA and full attention on one GPU, in one process, timed in turn.

A row is one thing in one phase: who (`nsa-dist`, a rival), which part, times at 20, 50 and 80%, peak memory, and
the time that the machine's own matmul rate would take for the operations that the definition needs.
"""

import gc
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_dist.bench_inputs import (
    SELECTIONS,
    SPEC,
    TYPES,
    Made,
    Maker,
    Shape,
    nsa_inputs,
    one_sequence,
    selected_by_ours,
    selection,
)
from nsa_dist.bench_rivals import Rival, full_rivals
from nsa_dist.errors import ConfigError
from nsa_dist.kernels.attention import local_views
from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.compress import compress_mlp
from nsa_dist.kernels.implementations import implementation
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.selected import head_rows

Row = dict[str, Any]
_LEAD = 64  # writes of 256 MB before a measurement, some 6 ms at an H100's 3 TB/s


@dataclass(frozen=True)
class Thing:
    """What is timed; `differs`: what it computes otherwise than the definition."""

    name: str
    part: str
    make: Maker
    differs: str = ""


@dataclass(frozen=True)
class Rates:
    """The machine's own: a matmul of 8192^3 in the inputs' type (FLOP/s), a copy (bytes/s)."""

    matmul: float
    copy: float


def bench_kernels(
    shapes: list[Shape],
    say: Callable[[str], None],
    rows_file: Path | None,
    parts: bool,
    longest_full: int,
    rivals: list[Rival],
    full: str = "all",
    recompute: bool = False,
) -> list[Row]:
    """Measures every shape; each row is printed and written when it is known.

    full: which full attentions, see `full_rivals`; none above `longest_full` tokens. recompute: also with the
    branches' outputs computed again in the backward.

    Raises ConfigError where there is no GPU, for a file that can't be written, and where a rival has left the GPU
    unusable.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "bench kernels: no GPU here; needs one that torch sees (--draw draws rows of another machine)"
        )
    rows: list[Row] = []
    whole = full_rivals(full)
    ours = [Thing("nsa-dist", "all of NSA", _whole)]
    if recompute:
        ours.append(Thing("nsa-dist, recomputed", "all of NSA", partial(_whole, recompute=True)))
    try:
        out = rows_file.open("w") if rows_file else None
    except OSError as error:
        raise ConfigError(f"--rows {rows_file}: {error.strerror}; must be a file that can be written") from None
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": _version("triton")}
    for rival in rivals:
        say(f"{rival.name}: {rival.differs}")
    for shape in shapes:
        rates = measure_rates(TYPES[shape.dtype])
        say(
            f"{machine['device']}  T={shape.tokens}  {shape.heads}/{shape.groups} heads  {shape.dk}/{shape.dv}  "
            f"{shape.dtype}  matmul {rates.matmul / 1e12:.0f} TFLOP/s  copy {rates.copy / 1e12:.2f} TB/s"
        )
        others = [Thing(n, "full attention", make) for n, make in whole if shape.tokens <= longest_full]
        for row in _shape_rows(shape, rates, parts, ours, others, rivals):
            row |= vars(shape) | machine
            rows.append(row)
            say(_line(row))
            if out:
                out.write(json.dumps(row) + "\n")
                out.flush()
    return rows


def _shape_rows(
    shape: Shape, rates: Rates, parts: bool, ours: list[Thing], others: list[Thing], rivals: list[Rival]
) -> Iterator[Row]:
    """Ours first: a rival that breaks the GPU's context costs no row but its own."""
    for thing in ours:
        yield from thing_rows(shape, rates, thing)
    if parts:
        yield from _branches(shape, rates)
    for thing in others:
        yield from thing_rows(shape, rates, thing)
    for rival in rivals:
        yield from thing_rows(shape, rates, Thing(rival.name, "all of NSA", rival.whole, rival.differs))
    for rival, name in itertools.product(rivals, SELECTIONS if parts else ()):
        picks = selection(name, shape.tokens, shape.groups)
        if picks is not None:
            yield from thing_rows(shape, rates, Thing(rival.name, f"selected: {name}", _given(rival, picks)))


def _given(rival: Rival, picks: Tensor) -> Maker:
    def make(shape: Shape) -> Made:
        made = rival.selected(shape, picks)
        return Made(made.fn, made.leaves, partial(selected_by_ours, shape, picks, *made.leaves))

    return make


def measure_rates(dtype: torch.dtype) -> Rates:
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    big = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(big)
    matmul = times(lambda: a @ a)[1]
    copy = times(lambda: other.copy_(big))[1]
    return Rates(2 * 8192**3 / matmul * 1e3, 2 * big.numel() / copy * 1e3)


def times(fn: Callable[[], object], budget_ms: float = 600) -> list[float]:
    """Milliseconds at 20, 50 and 80% of the runs, the L2 cache overwritten before each.

    It is overwritten for some milliseconds, so that the host is ahead, as in a training step: what a short function's
    launches take of the host is not its time on the GPU.
    """
    flush = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)

    def once() -> float:
        for _ in range(_LEAD):
            flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    once()
    first = once()
    found = [once() for _ in range(int(min(50, max(5, budget_ms / max(first, 1e-3)))))]
    return [float(x) for x in np.quantile(found, [0.2, 0.5, 0.8])]


def thing_rows(shape: Shape, rates: Rates, thing: Thing) -> Iterator[Row]:
    """Forward and backward of a differentiable function of tensors; what it can't run is told, not hidden.

    Raises ConfigError where it has left the GPU unusable.
    """
    flop = _flop(shape, thing.part)
    head: Row = {"name": thing.name, "part": thing.part}
    if thing.differs:
        head["differs"] = thing.differs
    gc.collect()
    torch.cuda.empty_cache()
    torch.compiler.reset()  # else FlexAttention of the ninth shape isn't compiled
    try:
        made = thing.make(shape)
        leaves = [x.requires_grad_() for x in made.leaves]
        with torch.no_grad():
            took, peak = _peak(lambda: times(lambda: made.fn(*leaves)))
            if made.same_by_ours:
                want = made.same_by_ours().float()
                head["error_to_ours"] = float((made.fn(*leaves).float() - want).norm() / want.norm())
                del want
        yield head | _measured("forward", took, peak, flop[0], rates)
        out = made.fn(*leaves)
        head["io_bytes"] = 2 * sum(x.numel() * x.element_size() for x in (*leaves, out))  # gradients as large
        grad = torch.randn_like(out)
        took, peak = _peak(lambda: times(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)))
        yield head | _measured("backward", took, peak, flop[1], rates)
    except Exception as error:  # whatever a rival raises
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        yield head | {"phase": "not run", "error": f"{type(error).__name__}: {told}"[:200]}
        _check_usable(shape, thing)


def _check_usable(shape: Shape, thing: Thing) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        told = str(error).splitlines()[0]
        raise ConfigError(
            f"{thing.name} at T={shape.tokens}: left the GPU unusable ({told}); the rows until here are written; "
            f"allowed: --rivals without it"
        ) from None


def _peak(measure: Callable[[], list[float]]) -> tuple[list[float], int]:
    torch.cuda.reset_peak_memory_stats()
    found = measure()
    return found, torch.cuda.max_memory_allocated()


def _measured(phase: str, ms: list[float], peak: int, flop: float, rates: Rates) -> Row:
    return {"phase": phase, "ms": ms, "peak_bytes": peak, "ideal_ms": flop / rates.matmul * 1e3}


def _line(row: Row) -> str:
    head = f"  {row['name']:23s} {row['part']:18s} {row['phase']:9s}"
    if "error" in row:
        return f"{head} {row['error']}"
    p20, p50, p80 = row["ms"]
    peak = f"{row['peak_bytes'] / 2**30:6.2f} GiB"
    if row.get("io_bytes"):
        peak += f" ({row['peak_bytes'] / row['io_bytes']:.2f} of inputs, output, gradients)"
    share = f"{row['ideal_ms'] / p50:5.0%} of the roofline" if row["ideal_ms"] else ""
    error = f"  {row['error_to_ours']:.1%} from ours" if "error_to_ours" in row else ""
    return f"{head} {p50:9.3f} ms ({p20:.3f} to {p80:.3f})  {peak}  {share}{error}"


def _pairs(shape: Shape) -> dict[str, float]:
    """Query and key pairs of one head: full, compressed, selected (as many blocks as there are), window."""
    t = np.arange(shape.tokens, dtype=np.int64)
    seen = np.maximum(0, (t + 1 - SPEC.compress_block) // SPEC.compress_stride + 1)
    whole = np.minimum(t // SPEC.select_block, SPEC.select_count - 1) * SPEC.select_block
    return {
        "full attention": float((t + 1).sum()),
        "compressed": float(seen.sum()),
        "selected": float((whole + t % SPEC.select_block + 1).sum()),
        "window": float(np.minimum(t + 1, SPEC.window).sum()),
    }


def _flop(shape: Shape, part: str) -> tuple[float, float]:
    """Of the definition, forward and backward: 2 (Dk + Dv) and 2 (3 Dk + 2 Dv) a head and pair; scores 2 Dk."""
    pairs = _pairs(shape)
    if part == "scores":
        return 2 * shape.dk * shape.heads * pairs["compressed"], 0.0
    names = ["compressed", "selected", "window"] if part == "all of NSA" else [part.split(":")[0]]
    total = shape.heads * sum(pairs.get(n, 0.0) for n in names)
    return 2 * (shape.dk + shape.dv) * total, 2 * (3 * shape.dk + 2 * shape.dv) * total


def _whole(shape: Shape, recompute: bool = False) -> Made:
    """From q, k, v and gates to the output, the compression of keys and values included."""
    chunks = shape.chunks()

    def weights(d: int) -> list[Tensor]:
        l = SPEC.compress_block
        sizes = (l, d), (2 * d, l * d), (2 * d,), (d, 2 * d), (d,)
        made = [shape.random(*size) for size in sizes]
        return [w * (l * d) ** -0.5 if w.dim() == 2 else w for w in made]

    def attend(q: Tensor, gates: Tensor, k: Tensor, v: Tensor, *xs: Tensor) -> Tensor:
        k_cmp, v_cmp = (compress_mlp(x, chunks, *w) for x, w in ((k, xs[4:9]), (v, xs[9:])))
        return one_sequence(q, gates, [k_cmp, v_cmp, *xs[:4]], recompute)

    return Made(attend, [*nsa_inputs(shape), *weights(shape.dk), *weights(shape.dv)])


def _branches(shape: Shape, rates: Rates) -> list[Row]:
    """Each part alone, as `nsa_attention` calls it."""
    t, h, g = shape.tokens, shape.heads, shape.groups
    packing = Packing(np.array([0, t]), SPEC)
    q, do, gates = shape.random(t, h, shape.dk), shape.random(t, h, shape.dv), torch.sigmoid(shape.random(t, h, 3))
    k, v = shape.random(t, g, shape.dk), shape.random(t, g, shape.dv)
    k_cmp, v_cmp = (shape.random(packing.compressed, g, d) for d in (shape.dk, shape.dv))
    views, local, scale = local_views(packing, q.device, g), implementation(q), shape.dk**-0.5
    rows: list[Row] = []

    def measure(part: str, phase: str, fn: Callable[[], object]) -> None:
        took, peak = _peak(lambda: times(fn))
        flop = _flop(shape, part)[phase == "backward"]
        rows.append({"name": "nsa-dist", "part": part} | _measured(phase, took, peak, flop, rates))

    def branch(o: Tensor, lse: Tensor) -> BranchGrad:
        return BranchGrad(do, gates[..., 0], o, lse, local.row_deltas(do, [o])[..., 0])

    for part, kv, ranges in (
        ("compressed", (k_cmp, v_cmp), views.compressed.ranges),
        ("window", (k, v), views.window),
    ):
        measure(part, "forward", partial(local.range_forward, q, *kv, ranges, scale))
        grad = branch(*local.range_forward(q, *kv, ranges, scale))
        measure(part, "backward", partial(local.range_backward, grad, q, *kv, ranges, scale))
    from nsa_dist.kernels.scores import select_blocks

    _, lse = local.range_forward(q, k_cmp, v_cmp, views.compressed.ranges, scale)
    measure("scores", "forward", lambda: select_blocks(q, k_cmp, lse, views.compressed, SPEC, scale))
    flat = head_rows(k), head_rows(v)
    for name in SELECTIONS:
        picks = selection(name, t, g)
        if picks is None:
            continue
        words = flat[0], flat[1], picks, views.token_S, views.blocks, scale
        measure(f"selected: {name}", "forward", partial(local.selected_forward, q, *words))
        grad = branch(*local.selected_forward(q, *words))
        measure(f"selected: {name}", "backward", partial(local.selected_backward, grad, q, *words))
    measure("combine", "forward", lambda: local.combine_forward(gates, [do] * 3))
    measure("combine", "backward", lambda: local.row_deltas(do, [do] * 3))
    return rows


def read_rows(path: Path) -> list[Row]:
    """Raises ConfigError for a file that isn't such rows."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--draw {path}: {error}; must be rows that nsa-dist bench kernels wrote") from None


def draw(rows: list[Row], path: Path) -> None:
    """Time against length, forward and backward, for everything that was measured whole.

    Raises ConfigError where matplotlib is missing, and for a path that can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--chart: matplotlib isn't installed; allowed: pip install nsa-dist[report]") from None
    whole = [row for row in rows if row["part"] in ("all of NSA", "full attention") and "ms" in row]
    shapes = list(dict.fromkeys(tuple(row[n] for n in ("heads", "groups", "dk", "dv", "dtype")) for row in whole))
    figure = Figure(figsize=(10, 4.2 * len(shapes)))
    for i, (shape, phase) in enumerate(itertools.product(shapes, ("forward", "backward"))):
        heads, groups, dk, dv, dtype = shape
        axes = figure.add_subplot(len(shapes), 2, i + 1)
        here = [row for row in whole if shape == (row["heads"], row["groups"], row["dk"], row["dv"], row["dtype"])]
        for name in dict.fromkeys(row["name"] for row in here):
            line = sorted((r["tokens"], r["ms"][1]) for r in here if r["name"] == name and r["phase"] == phase)
            axes.plot(*zip(*line, strict=True), marker="o", label=name, linewidth=3 if name == "nsa-dist" else 1.5)
        title = f"{phase}: {heads} heads, {groups} KV heads, {dk}/{dv}, {dtype}"
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms")
        axes.set_title(title, fontsize=10)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(rows[0]["device"] if rows else "")
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=130, format=path.suffix.removeprefix(".") or "png")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chart {path}: {error}; must be a picture that can be written") from None


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
