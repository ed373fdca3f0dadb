"""`nsa-dist bench kernels`: NSA and full attention on one GPU, in one process, timed in turn.

A row is one thing in one phase: who (`nsa-dist`, a rival), which part, times at 20, 50 and 80%, peak memory, and
the time that the machine's own matmul rate would take for the operations that the definition needs.
"""

import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_dist.config import ConfigError
from nsa_dist.kernels import NSASpec, nsa_attention
from nsa_dist.kernels.attention import local_views
from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.compress import compress_mlp
from nsa_dist.kernels.implementations import implementation
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.selected import head_rows
from nsa_dist.traces import NEEDS_64K, load_needs

SPEC = NSASpec()
SELECTIONS = ("random", "local", "same", "trained")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Row = dict[str, Any]
Made = tuple[Callable[..., Tensor], list[Tensor]]


@dataclass(frozen=True)
class Shape:
    tokens: int
    heads: int
    groups: int
    dk: int
    dv: int
    dtype: str

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device="cuda", dtype=TYPES[self.dtype])


Maker = Callable[[Shape], Made]
Thing = tuple[str, str, Maker]


@dataclass(frozen=True)
class Rates:
    """The machine's own: a matmul of 8192^3 in the inputs' type (FLOP/s), a copy (bytes/s)."""

    matmul: float
    copy: float


def bench_kernels(
    shapes: list[Shape], say: Callable[[str], None], rows_file: Path | None, parts: bool, longest_full: int
) -> list[Row]:
    """Measures every shape; each row is printed and written when it is known.

    Raises ConfigError where there is no GPU, and for a file that can't be written.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "bench kernels: no GPU here; needs one that torch sees (--draw draws rows of another machine)"
        )
    rows: list[Row] = []
    try:
        out = rows_file.open("w") if rows_file else None
    except OSError as error:
        raise ConfigError(f"--rows {rows_file}: {error.strerror}; must be a file that can be written") from None
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": _version("triton")}
    for shape in shapes:
        rates = measure_rates(TYPES[shape.dtype])
        say(
            f"{machine['device']}  T={shape.tokens}  {shape.heads}/{shape.groups} heads  {shape.dk}/{shape.dv}  "
            f"{shape.dtype}  matmul {rates.matmul / 1e12:.0f} TFLOP/s  copy {rates.copy / 1e12:.2f} TB/s"
        )
        things: list[Thing] = [("nsa-dist", "all of NSA", _whole)]
        if shape.tokens <= longest_full:
            things += [(name, "full attention", maker) for name, maker in _rivals()]
        whole = [_whole_rows(shape, rates, *thing) for thing in things]
        for row in itertools.chain(*whole, _branches(shape, rates) if parts else []):
            row |= vars(shape) | machine
            rows.append(row)
            say(_line(row))
            if out:
                out.write(json.dumps(row) + "\n")
                out.flush()
    return rows


def measure_rates(dtype: torch.dtype) -> Rates:
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    big = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    other = torch.empty_like(big)
    matmul = times(lambda: a @ a)[1]
    copy = times(lambda: other.copy_(big))[1]
    return Rates(2 * 8192**3 / matmul * 1e3, 2 * big.numel() / copy * 1e3)


def times(fn: Callable[[], object], budget_ms: float = 600) -> list[float]:
    """Milliseconds at 20, 50 and 80% of the runs, the L2 cache overwritten before each."""
    flush = torch.empty(256 << 20, device="cuda", dtype=torch.uint8)

    def once() -> float:
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


def _whole_rows(shape: Shape, rates: Rates, name: str, part: str, make: Maker) -> Iterator[Row]:
    """Forward and backward of a differentiable function of tensors; what a rival can't run is told, not hidden."""
    flop = _flop(shape, part)
    torch.cuda.empty_cache()
    try:
        fn, leaves = make(shape)
        leaves = [x.requires_grad_() for x in leaves]
        with torch.no_grad():
            took, peak = _peak(lambda: times(lambda: fn(*leaves)))
        yield _row(name, part, "forward", took, peak, flop[0], rates)
        out = fn(*leaves)
        grad = torch.randn_like(out)
        took, peak = _peak(lambda: times(lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)))
        yield _row(name, part, "backward", took, peak, flop[1], rates)
    except (RuntimeError, NotImplementedError) as error:
        told = str(error).strip().splitlines()[0][:160]
        yield {"name": name, "part": part, "phase": "not run", "error": told}


def _peak(measure: Callable[[], list[float]]) -> tuple[list[float], int]:
    torch.cuda.reset_peak_memory_stats()
    found = measure()
    return found, torch.cuda.max_memory_allocated()


def _row(name: str, part: str, phase: str, ms: list[float], peak: int, flop: float, rates: Rates) -> Row:
    ideal = flop / rates.matmul * 1e3
    return {"name": name, "part": part, "phase": phase, "ms": ms, "peak_bytes": peak, "ideal_ms": ideal}


def _line(row: Row) -> str:
    head = f"  {row['name']:22s} {row['part']:22s} {row['phase']:9s}"
    if "error" in row:
        return f"{head} {row['error']}"
    p20, p50, p80 = row["ms"]
    share = f"{row['ideal_ms'] / p50:5.0%} of the roofline" if row["ideal_ms"] else ""
    return f"{head} {p50:9.3f} ms ({p20:.3f} to {p80:.3f})  {row['peak_bytes'] / 2**30:6.2f} GiB  {share}"


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


def _whole(shape: Shape) -> Made:
    """From q, k, v and gates to the output, the compression of keys and values included."""
    t, g = shape.tokens, shape.groups
    first = torch.from_numpy(Packing(np.array([0, t]), SPEC).cmp_start).cuda()

    def weights(d: int) -> list[Tensor]:
        l = SPEC.compress_block
        made = (
            shape.random(l, d),
            shape.random(2 * d, l * d),
            shape.random(2 * d),
            shape.random(d, 2 * d),
            shape.random(d),
        )
        return [w * (l * d) ** -0.5 if w.dim() == 2 else w for w in made]

    def attend(q: Tensor, gates: Tensor, *xs: Tensor) -> Tensor:
        k, v, k_slc, v_slc, k_win, v_win = xs[:6]
        k_cmp, v_cmp = (_compress(x, first, *w) for x, w in ((k, xs[6:11]), (v, xs[11:])))
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (
            x[None] for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
        )
        return nsa_attention(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, SPEC)[0]

    kv = [shape.random(t, g, d) for _ in range(3) for d in (shape.dk, shape.dv)]
    gates = torch.sigmoid(shape.random(t, shape.heads, 3))
    return attend, [shape.random(t, shape.heads, shape.dk), gates, *kv, *weights(shape.dk), *weights(shape.dv)]


def _compress(x: Tensor, first: Tensor, position: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return compress_mlp(x, first, position, w1, b1, w2, b2, SPEC)


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
        rows.append(_row("nsa-dist", part, phase, took, peak, _flop(shape, part)[phase == "backward"], rates))

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


def selection(name: str, tokens: int, groups: int) -> Tensor | None:
    """[T, G, n] int32 on the GPU, block 0 and the last two of each query included.

    random: any earlier blocks; local: the nearest; same: the first ones for every query; trained: among those that
    the query's group of 64 selected in the packaged trace of a model (None above its 65,536 tokens).
    """
    n, size = SPEC.select_count, SPEC.select_block
    own = torch.arange(tokens, device="cuda") // size
    block = torch.arange(int(own[-1]) + 1, device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    if name == "trained":
        if tokens > 65536:
            return None
        needs = np.unpackbits(load_needs(NEEDS_64K).bits[0], axis=-1).astype(bool)[:, : -(-tokens // size)]
        needed = torch.from_numpy(needs).cuda()[:, :, : len(block)]
    picks = torch.empty(tokens, groups, n, dtype=torch.int32, device="cuda")
    for g in range(groups):
        for first in range(0, tokens, 8192):
            at = own[first : first + 8192, None]
            if name == "local":
                rank = block.float().expand(len(at), -1).clone()
            elif name == "same":
                rank = -block.float().expand(len(at), -1).clone()
            else:
                rank = torch.rand(len(at), len(block), generator=generator, device="cuda")
            if name == "trained":
                rank += needed[g % len(needed), at[:, 0]].float()
            rank.masked_fill_((block == 0) | (block > at - SPEC.local_blocks), torch.inf)
            rank.masked_fill_(block > at, -torch.inf)
            best, pick = rank.topk(min(n, len(block)), dim=1)
            pick = pick.masked_fill(best == -torch.inf, len(block)).sort(1).values
            pick = F.pad(pick.masked_fill(pick == len(block), -1), (0, n - pick.shape[1]), value=-1)
            picks[first : first + 8192, g] = pick.int()
    return picks


def _rivals() -> list[tuple[str, Maker]]:
    """Full causal attention by what is installed."""
    from torch.nn.attention import SDPBackend

    made: list[tuple[str, Maker]] = [
        ("cuDNN (SDPA)", lambda shape: _sdpa(shape, SDPBackend.CUDNN_ATTENTION)),
        ("FlashAttention-2 (SDPA)", lambda shape: _sdpa(shape, SDPBackend.FLASH_ATTENTION)),
    ]
    if importlib.util.find_spec("flash_attn"):
        made.append(("flash-attn", _flash_attn))
    made.append(("FlexAttention", _flex))
    return made


def _qkv(shape: Shape) -> list[Tensor]:
    """[1, heads, T, D]"""
    sizes = (shape.heads, shape.dk), (shape.groups, shape.dk), (shape.groups, shape.dv)
    return [shape.random(1, heads, shape.tokens, d) for heads, d in sizes]


def _sdpa(shape: Shape, backend: Any) -> Made:
    from torch.nn.attention import sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = F.pad(v, (0, shape.dk - shape.dv)) if "FLASH" in str(backend) else v  # it takes one head size
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, wide, is_causal=True, enable_gqa=True)[..., : shape.dv]

    return attend, _qkv(shape)


def _flash_attn(shape: Shape) -> Made:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, F.pad(v, (0, shape.dk - shape.dv))))
        return flash_attn_func(q, k, v, causal=True)[..., : shape.dv]

    return attend, _qkv(shape)


def _flex(shape: Shape) -> Made:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = create_block_mask(causal, None, None, shape.tokens, shape.tokens, device="cuda")
    torch._functorch.config.donated_buffer = False  # else its backward runs once only
    compiled = torch.compile(flex_attention)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)

    return attend, _qkv(shape)


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
    figure = Figure(figsize=(10, 4.2))
    whole = [row for row in rows if row["part"] in ("all of NSA", "full attention") and "ms" in row]
    for i, phase in enumerate(("forward", "backward")):
        axes = figure.add_subplot(1, 2, i + 1)
        for name in dict.fromkeys(row["name"] for row in whole):
            line = sorted((r["tokens"], r["ms"][1]) for r in whole if r["name"] == name and r["phase"] == phase)
            axes.plot(*zip(*line, strict=True), marker="o", label=name, linewidth=3 if name == "nsa-dist" else 1.5)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", title=phase)
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    first = rows[0]
    shape = f"{first['heads']} heads, {first['groups']} KV heads, {first['dk']}/{first['dv']}, {first['dtype']}"
    figure.suptitle(f"{first['device']}: {shape}")
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
