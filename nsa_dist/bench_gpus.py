"""`nsa-dist bench gpus`: what several GPUs of one machine do, in one command and a bounded time.

Parts, a row each time one is known: `attention` and `model` (context parallelism against one device), `layer` (as
`bench comm`: time, bytes beside NCCL's, exposed, memory), `recipe` (a step of a 1B model), `recovery` (a rank
killed in a training run, under Ray and under torchrun). The most telling first; what time doesn't allow is named,
not hidden.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from nsa_dist.bench_comm import EXCHANGES, Case, device_name, gathered, line, measure, slowest, timed
from nsa_dist.bench_rows import Row, Rows, traffic_row
from nsa_dist.check_gpus import BOUNDS, check_attention, check_model, random_batch
from nsa_dist.config import Config, ConfigError, load_config
from nsa_dist.memory import Peak
from nsa_dist.parallel.ledger import as_table
from nsa_dist.parallel.mesh import Mesh
from nsa_dist.process import RunFailed, choose_device
from nsa_dist.ranks import Ranks
from nsa_dist.recovery import launchers, recovery
from nsa_dist.rivals import layer_sizes
from nsa_dist.train import build, forward_backward

Say = Callable[[str], None]
Shape = tuple[int, int, int, int]  # query heads, KV heads, Dk, Dv
PAPER: Shape = (64, 4, 192, 128)
PUBLISHED: Shape = (64, 4, 128, 128)  # 1M tokens on 8 H800: 576 ms forward, 1509 ms backward, by an all-gather


@dataclass(frozen=True)
class Sizes:
    """What is measured on a kind of device."""

    lengths: list[int]  # the trained trace fits the first
    shapes: list[Shape]
    check_tokens: int
    check_dims: dict[str, tuple[int, int, int]]  # dtype: Dk, Dv, query heads to a KV head
    recipe: list[str]  # settings over configs/1b-64k-gpu.yaml
    recipe_tokens: int  # of the shortest; and so many for each rank
    training: list[str]  # settings of the run in which a rank is killed


GPU = Sizes(
    [65536, 262144, 1048576],
    [PAPER, PUBLISHED],
    8192,
    {"bfloat16": (192, 128, 16), "float32": (64, 64, 16)},
    [],
    65536,
    ["data.seq_len=16384", "train.dtype=bfloat16"],
)
# The same on the CPU, so small that it only shows that the command works.
CPU = Sizes(
    [1024, 2048],
    [(4, 2, 24, 16)],
    1024,
    {"bfloat16": (24, 16, 2), "float32": (16, 16, 2)},
    ["model.layers=2", "model.width=64", "model.heads=4", "model.head_dim=16", "model.ffn=64"],
    1024,
    ["data.seq_len=1024", "model.layers=2"],
)


def bench_gpus(
    device: str, wanted: int, minutes: float, parts: Sequence[str], file: Path | None, chart: Path | None, say: Say
) -> None:
    """Measures on 1, 2, 4, 8 … up to `wanted` ranks (0: as many as there are GPUs); parts: in this order.

    Raises ConfigError for more ranks than GPUs, or a file that can't be written. A rank that dies ends what was
    measured, in one line; the next goes on with new processes.
    """
    there = torch.cuda.device_count() if device != "cpu" else 2
    most = wanted or there
    placed = choose_device(device, max(most, 1), "--device")
    counts = [p for p in (1, 2, 4, 8, 16) if p <= most]
    counts += [most] if most not in counts else []
    rows, sizes = Rows(file), GPU if placed == "cuda" else CPU
    bench = Bench(placed, rows, say, time.monotonic() + 60 * minutes)
    try:
        _all(bench, sizes, counts, parts)
    finally:
        bench.close()
    say(f"{len(rows.rows)} rows" + (f" in {file}" if file else ""))
    if chart and find_spec("matplotlib"):
        draw(rows.rows, chart)
        say(f"chart: {chart}")
    wrong = [row for row in rows.rows if row.get("fine") is False]
    if wrong:
        say(f"{len(wrong)} results differ from those of one device, the first: {wrong[0]}")
        raise SystemExit(1)


class Bench:
    """Runs functions on so many ranks, until the time is out."""

    def __init__(self, device: str, rows: Rows, say: Say, end: float) -> None:
        self.device, self.rows, self.say = device, rows, say
        self.end = self.section_end = end
        self.start = time.monotonic()
        self._pool: Ranks | None = None
        self._size = 0

    @contextmanager
    def section(self, title: str, share: float) -> Iterator[None]:
        """What follows may take the time up to this share of the whole."""
        self.section_end = self.start + share * (self.end - self.start)
        self.say(f"{title} (at {time.monotonic() - self.start:.0f} s, until {self.section_end - self.start:.0f} s)")
        yield

    def late(self, what: str) -> bool:
        """Whether the section's time is out; then `what` is told as skipped."""
        if time.monotonic() < self.section_end:
            return False
        self.say(f"  skipped, no time left: {what}")
        return True

    def call(self, ranks: int, what: str, fn: Callable[..., Any], *args: Any) -> list[Any] | None:
        """Each rank's result; None where the time was out or a rank failed, which is told in one line."""
        if self.late(what):
            return None
        if self._pool is None or self._size != ranks:
            self.close()
            self._pool, self._size = Ranks(ranks, self.device, timeout_s=120), ranks
        try:
            return self._pool.call(fn, *args, timeout_s=max(self.end - time.monotonic(), 30.0))
        except RunFailed as error:
            self._pool = None
            self.say(f"  {what}: {error}")
            self.rows.add({"part": "failure", "what": what, "ranks": ranks, "cause": error.cause})
            return None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


# A part's share of the time: results compile many small kernels, a killed rank takes two starts under each launcher.
_WEIGHTS = {"results": 2.0, "layer": 2.0, "longest": 1.0, "recovery": 4.0, "recipe": 1.0, "more": 1.0}


def _all(bench: Bench, sizes: Sizes, counts: list[int], parts: Sequence[str]) -> None:
    most, others = counts[-1], counts[1:-1]
    shape, (first, *longer) = sizes.shapes[0], sizes.lengths
    longest = longer[-1]
    wanted: dict[str, Any] = {}
    with bench.section("One device: what the others are held against", 0.25):
        memory = (bench.call(1, "memory", device_bytes) or [0])[0]
        small = fitting(shape, longest, 1, memory)
        if "results" in parts:
            wanted = {dtype: _model(bench, 1, sizes, dtype, "contiguous", "nsa") for dtype in BOUNDS}
        if "layer" in parts:
            for selection, tokens in (("trained", first), ("random", sizes.lengths[1])):
                _layer(bench, _case("nsa", 1, selection, tokens, fitting(shape, tokens, 1, memory)))
        if "longest" in parts:
            _layer(bench, _case("nsa", 1, "random", longest, small))
    share = 0.25
    for part in parts if most > 1 else []:
        share += 0.7 * _WEIGHTS[part] / sum(_WEIGHTS[p] for p in parts)
        with bench.section(f"{most} ranks: {part}", share):
            if part == "results":
                _check(bench, most, sizes, wanted)
            elif part == "layer":
                for exchange in EXCHANGES:
                    _layer(bench, _case(exchange, most, "trained", first, shape))
                for tokens in longer[:-1]:
                    fits = fitting(shape, tokens, most, memory)
                    for exchange in EXCHANGES[:-1]:  # the ring, which takes as long as all others, is in `more`
                        _layer(bench, _case(exchange, most, "random", tokens, fits))
            elif part == "longest":
                for exchange in EXCHANGES[:-1]:
                    _layer(bench, _case(exchange, most, "random", longest, small))
            elif part == "recovery":
                bench.close()
                _recovery(bench, most, sizes)
            elif part == "recipe":
                for tokens in (sizes.recipe_tokens, sizes.recipe_tokens * most):
                    _recipe(bench, most, sizes, tokens)
            else:
                _more(bench, most, sizes, memory)
    for ranks in reversed(others if "more" in parts else []):
        with bench.section(f"{ranks} ranks", 1.0):
            _layer(bench, _case("nsa", ranks, "random", longest, small))
            _check(bench, ranks, sizes, wanted)
            for exchange in EXCHANGES:
                _layer(bench, _case(exchange, ranks, "trained", first, shape))


def _more(bench: Bench, ranks: int, sizes: Sizes, memory: int) -> None:
    shape, first, longest = sizes.shapes[0], sizes.lengths[0], sizes.lengths[-1]
    for layout, selection in (("contiguous", "trained"), ("zigzag", "random"), ("zigzag", "adversarial")):
        for exchange in ("nsa", "allgather"):
            _layer(bench, replace(_case(exchange, ranks, selection, first, shape), layout=layout))
    for other in [fitting(s, longest, ranks, memory) for s in sizes.shapes]:  # all heads that several ranks hold
        for exchange in ("nsa", "allgather"):
            _layer(bench, _case(exchange, ranks, "random", longest, other))
    for tokens in sizes.lengths[1:]:
        _layer(bench, _case("ring", ranks, "random", tokens, fitting(shape, tokens, ranks, memory)))


def _case(exchange: str, ranks: int, selection: str, tokens: int, shape: Shape) -> Case:
    return Case(exchange, ranks, "zigzag", selection, tokens, *shape, "bfloat16")


def fitting(shape: Shape, tokens: int, ranks: int, memory: int) -> Shape:
    """The shape with as many of its heads as fit into a device's memory (0: unknown), by a coarse estimate."""
    heads, groups, dk, dv = shape
    while memory and groups > 1:
        queries = tokens // ranks * heads * (8 * dk + 11 * dv)  # q, outputs, gradients, those in float32
        kv = tokens * groups * (dk + dv) * 2 * 9  # all-gathered, with copies on the way, and float32 gradients
        if queries + kv + (4 << 30) <= 0.85 * memory:
            break
        heads, groups = heads // 2, groups // 2
    return heads, groups, dk, dv


def device_bytes(mesh: Mesh) -> int:
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_initialized() else 0


def _layer(bench: Bench, case: Case) -> None:
    what = f"{case.exchange}, {case.ranks} ranks, {case.layout}, {case.selection}, {case.tokens} tokens"
    if case.impossible:
        bench.say(f"  not run: {case.impossible}")
        return
    found = bench.call(case.ranks, what, measure, case, 5)
    if found:
        row = {"part": "layer"} | found[0]
        row["scaling"] = _scaling(bench, row)
        bench.rows.add(row)
        of = f"  {row['scaling']:.0%} of ideal scaling" if row["scaling"] and case.ranks > 1 else ""
        bench.say(line(row) + _beside(row) + of)


def _beside(row: Row) -> str:
    """What NCCL counted beside the ledger: a mean rank's bytes received, forward and backward."""
    if not row["nccl"]:
        return ""
    counted = np.mean([c["received_bytes"] for c in row["nccl"]])
    ours = row["received_bytes_mean"] + row["backward_received_bytes_mean"]
    return f"  NCCL {counted / 2**20:.2f} MiB, ledger {ours / 2**20:.2f} MiB"


def _scaling(bench: Bench, row: Row) -> float | None:
    """Tokens a second and rank over those of the same on one rank, where that is known."""
    same = ("exchange", "selection", "tokens", "heads", "groups", "dk", "dv", "dtype")
    for other in [*bench.rows.rows, row]:
        if other["part"] == "layer" and other["ranks"] == 1 and all(other[k] == row[k] for k in same):
            return float(row["tokens_per_s"] / other["tokens_per_s"] / row["ranks"])
    return None


def _check(bench: Bench, ranks: int, sizes: Sizes, wanted: dict[str, Any]) -> None:
    for dtype, (dk, dv, group_heads) in sizes.check_dims.items():
        words = dtype, sizes.check_tokens, max(2, ranks), dk, dv, group_heads
        found = bench.call(ranks, f"attention in {dtype}", check_attention, *words)
        for row in found[0] if found else []:
            bench.rows.add(row)
        if found:
            worst = max(found[0], key=lambda row: row["difference"])
            bench.say(
                f"  attention {dtype}, {len(found[0])} exchanges and layouts: differs from one device by at most "
                f"{worst['difference']:.1e} ({worst['exchange']}, {worst['layout']}); allowed {worst['bound']:.0e}"
            )
    for dtype, alone in wanted.items():
        for layout, exchange in (("zigzag", "nsa"), ("contiguous", "nsa"), ("zigzag", "allgather")):
            found = _model(bench, ranks, sizes, dtype, layout, exchange) if alone else None
            if not found:
                continue
            (loss, grads), (loss_1, grads_1) = found, alone
            off = float(np.linalg.norm(grads - grads_1) / np.linalg.norm(grads_1))
            row = {"part": "model", "ranks": ranks, "dtype": dtype, "layout": layout, "exchange": exchange}
            row |= {"loss": loss, "loss_one_device": loss_1, "difference": off, "bound": BOUNDS[dtype]}
            fine = off <= BOUNDS[dtype] and abs(loss - loss_1) <= BOUNDS[dtype] * loss_1
            bench.rows.add(row | {"fine": fine})
            bench.say(
                f"  model {dtype}, {exchange}, {layout}: loss {loss:.6f}, one device {loss_1:.6f}; "
                f"gradients differ by {off:.1e}; allowed {BOUNDS[dtype]:.0e}"
            )


def _model(bench: Bench, ranks: int, sizes: Sizes, dtype: str, layout: str, exchange: str) -> Any:
    words = dtype, sizes.check_tokens, layout, exchange
    found = bench.call(ranks, f"a model in {dtype}, {exchange}, {layout}", check_model, *words)
    return found[0] if found else None


def _recipe(bench: Bench, ranks: int, sizes: Sizes, tokens: int) -> None:
    words = [*sizes.recipe, f"parallel.cp={ranks}", f"data.seq_len={tokens}"]
    config = load_config(str(files("nsa_dist") / "configs" / "1b-64k-gpu.yaml"), words)
    found = bench.call(ranks, f"the recipe at {tokens} tokens", recipe_steps, config, ["nsa", "allgather"])
    for row in found[0] if found else []:
        bench.rows.add(row)
        share = row["share_of_allgather"]
        of = f" ({share:.1%} of the all-gather)" if share else ""
        bench.say(
            f"  recipe {row['exchange']:10s} T={tokens}: step {row['step_ms']:.0f} ms, "
            f"{row['tokens_per_s']:,.0f} tok/s, received {row['received_bytes_mean'] / 2**20:.1f} MiB{of}, "
            f"{row['peak_bytes_max'] / 2**30:.1f} GiB"
        )


def recipe_steps(mesh: Mesh, config: Config, exchanges: list[str], repeats: int = 3) -> list[Row]:
    """Steps of a configuration's model on random bytes, one row for each exchange."""
    device = torch.device(mesh.parameters.device_type)
    tokens, layout = config.data.seq_len, config.parallel.layout
    model, optimizer = build(config, 256, mesh, device)
    batch = random_batch(mesh, tokens, layout, device, packed=False)
    rows: list[Row] = []

    def step() -> None:
        forward_backward(config, model, [batch], mesh)
        optimizer.step()
        optimizer.zero_grad()

    for exchange in exchanges:
        config.parallel.exchange = exchange  # the layers read it from here
        peak = Peak(device)
        step()
        mesh.ledger.take()
        times = [slowest([timed(step, device)])[0]]
        tables = gathered(as_table(mesh.ledger.take()))
        times += [slowest([timed(step, device)])[0] for _ in range(repeats - 1 if times[0] < 5 else 0)]
        mesh.ledger.take()
        layers = config.model.layers
        row: Row = {"part": "recipe", "exchange": exchange, "ranks": mesh.cp.size, "layout": layout}
        row |= {"tokens": tokens, "layers": layers, "selection": "its own", "dtype": config.train.dtype}
        row |= traffic_row(tables, tokens, layer_sizes(config), layers)
        row |= {"step_ms": 1e3 * median(times), "tokens_per_s": tokens / median(times)}
        row |= {"peak_bytes_max": int(slowest([float(peak.bytes())])[0]), "device": device_name(device)}
        rows.append(row | {"parameters": sum(p.numel() for p in model.parameters()), "torch": torch.__version__})
    return rows


def _recovery(bench: Bench, ranks: int, sizes: Sizes) -> None:
    ways = launchers()
    for i, launcher in enumerate(ways):
        if bench.late(f"recovery under {launcher}"):
            continue
        limit_s = max((bench.section_end - time.monotonic()) / (len(ways) - i), 30.0)
        try:
            row = bench.rows.add(recovery(launcher, ranks, bench.device, sizes.training, limit_s))
        except RunFailed as error:
            what = f"recovery under {launcher}"
            bench.say(f"  {what}: {error}")
            bench.rows.add({"part": "failure", "what": what, "ranks": ranks, "cause": error.cause})
            continue
        bench.say(
            f"  {launcher}: rank {row['killed_rank']} killed after step {row['killed_after_step']}; went on "
            f"from step {row['resumed_from_step']} in {row['recovery_s']:.1f} s, to step {row['steps']}; "
            f"losses {'equal' if row['fine'] else 'DIFFER from'} those before the kill for the steps done twice"
        )


def draw(rows: list[Row], chart: Path) -> None:
    """Time of a layer by exchange, for each length on the most ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    layers = [row for row in rows if row["part"] == "layer" and row["ranks"] > 1 and row["layout"] == "zigzag"]
    if not layers:
        raise ConfigError(f"--chart {chart}: there is no layer on several ranks to draw")
    most = max(row["ranks"] for row in layers)
    of = Counter((r["tokens"], r["selection"], r["heads"], r["dk"]) for r in layers if r["ranks"] == most)
    keys = sorted(key for key in of if of[key] == max(of.values()) or of[key] > 2)
    figure, axes = pyplot.subplots(1, len(keys), figsize=(3.2 * len(keys) + 1, 3.6), squeeze=False)
    for axis, key in zip(axes[0], keys, strict=True):
        found = [
            r for r in layers if r["ranks"] == most and key == (r["tokens"], r["selection"], r["heads"], r["dk"])
        ]
        names = [r["exchange"] for r in found]
        axis.bar(names, [r["forward_ms"] for r in found], label="forward")
        axis.bar(names, [r["backward_ms"] for r in found], bottom=[r["forward_ms"] for r in found], label="backward")
        axis.set_title(f"{key[0] // 1024}k tokens, {key[1]}\n{key[2]} heads of {key[3]}, {most} ranks", fontsize=9)
        axis.tick_params(axis="x", rotation=60, labelsize=8)
        axis.set_ylabel("ms a layer")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(chart, dpi=150)
