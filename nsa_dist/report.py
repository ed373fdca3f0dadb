"""What a run did and what it sent, from its folder alone: text for a terminal, and one picture.

Figures of exchanges that the run didn't use are computed from its layout, and say so. A trace of a trained
model's selections shows the run's layout at a length where the exchanges differ (nsa_dist/traces/README.md).
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nsa_dist.config import Config, ConfigError, config_from_dict, layer_kinds
from nsa_dist.metrics import APART, FILE, FULL_KV, GIB, read_metrics
from nsa_dist.parallel.layout import LAYOUTS
from nsa_dist.parallel.ledger import KINDS, PHASES
from nsa_dist.parallel.traffic import Sizes
from nsa_dist.rivals import DTYPES, RIVALS
from nsa_dist.rundir import CONFIG, EVENTS
from nsa_dist.tables import Lines, Unit, share, table, wrapped
from nsa_dist.tokenizer import ByteTokenizer
from nsa_dist.traces import NEEDS_64K, TraceTraffic, load_needs, trace_traffic, ulysses_bytes

Cells = dict[tuple[str, str], NDArray[np.float64]]  # (kind, phase): bytes sent mean, max, received mean, max

_EXCHANGED = tuple(kind for kind in KINDS if kind not in APART)
_TOP = ("compressed", "compress_halo", "window_halo", "bitmap")
_TRACE_RANKS = 8
_LABEL = 36  # columns of a table's first column where two tables share it


@dataclass(frozen=True)
class Run:
    """A run's folder, read; `records` (of metrics.jsonl) are at least one."""

    path: Path
    config: Config
    records: list[dict[str, Any]]
    events: list[dict[str, Any]]


@dataclass(frozen=True)
class Received:
    """Bytes that a rank receives under one exchange: `mean[kind, phase]`, and `most[phase]` by the rank with most."""

    name: str
    mean: dict[tuple[str, str], float]
    most: dict[str, float]

    def of(self, kinds: Iterable[str], phase: str) -> float:
        return sum(self.mean.get((kind, phase), 0.0) for kind in kinds)


def report(run_dir: Path, say: Callable[[str], None], picture: Path | None = None) -> None:
    """Says what the run did, what it sent, and its layout's traffic at 64k tokens; draws `picture` if given.

    Raises ConfigError for a folder that holds no run, or one without any step yet.
    """
    run = read_run(run_dir)
    for lines in (describe(run), own_traffic(run), against_rivals(run), at_64k(run.config)):
        say("\n".join([*lines, ""]))
    if picture is not None:
        save_picture(run_dir, picture)
        say(f"picture: {picture}")


def read_run(run_dir: Path) -> Run:
    """Reads a run's folder. Raises ConfigError naming the folder, or the file in it, and what is wrong there."""
    if not run_dir.is_dir():
        raise ConfigError(f"run folder '{run_dir}': no such folder; must be the run.dir of a run")
    for name in (CONFIG, FILE):
        if not (run_dir / name).is_file():
            raise ConfigError(f"run folder '{run_dir}': has no {name}; must be the run.dir of a run that has begun")
    try:
        config = config_from_dict(OmegaConf.load(run_dir / CONFIG))  # type: ignore[arg-type]
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{run_dir / CONFIG}: must be the configuration of a run ({reason})") from None
    records = read_metrics(run_dir)
    if not records:
        raise ConfigError(f"run folder '{run_dir}': {FILE} has no step yet; must have at least one")
    for record in records:
        missing = [key for key in ("loss", "tokens", "step_s", "comm") if key not in record]
        if missing:
            raise ConfigError(
                f"{run_dir / FILE}: step {record['step']} lacks '{missing[0]}'; must be a step of training"
            )
    return Run(run_dir, config, records, _read_events(run_dir / EVENTS))


def _read_events(path: Path) -> list[dict[str, Any]]:
    """All events; a last line that was cut is left out."""
    lines = path.read_text(errors="replace").split("\n")[:-1] if path.is_file() else []
    try:
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError):
        raise ConfigError(f"{path}: every line must be a JSON object") from None


# The run


def describe(run: Run) -> Lines:
    """The configuration in a few lines, the losses, the speed, and what went wrong."""
    config, records = run.config, run.records
    parallel, data = config.parallel, config.data
    seconds, tokens = sum(r["step_s"] for r in records), sum(r["tokens"] for r in records)
    losses, last = [r["loss"] for r in records], [r["loss"] for r in records[-10:]]
    sources = ", ".join(s.path for s in data.sources) or data.source
    facts = {
        "model": _model(config),
        "data": f"{sources}; {data.batch_size} x {data.seq_len:,} tokens a step",
        "ranks": f"{parallel.dp * parallel.cp} (dp {parallel.dp} x cp {parallel.cp}), {parallel.layout}, "
        f"exchange {_exchange(config)}, gradients travel in {parallel.grad_dtype}",
        "steps": f"{_steps(run)}; {tokens:,} tokens in {seconds:,.0f} s",
        "speed": f"{tokens / seconds:,.0f} tokens/s, {median(r['step_s'] for r in records):.2f} s a step (median), "
        f"peak memory {max(r.get('memory_bytes', 0) for r in records) / GIB:.2f} GiB (rank 0)",
        "loss": f"{losses[0]:.4f} -> {losses[-1]:.4f}; mean of the last {len(last)}: {fmean(last):.4f}",
        **_balance(records),
        **_validation(records),
        "events": _events(run.events),
    }
    lines = [
        (name if i == 0 else "", part) for name, text in facts.items() for i, part in enumerate(wrapped(text, 98))
    ]
    return [f"Run {run.path}", *(f"  {name:<12}{part}" for name, part in lines)]


def _model(config: Config) -> str:
    model, kinds = config.model, layer_kinds(config.model)
    layers = " + ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    known = _parameters(config)
    return (
        f"layers {layers}, width {model.width}, {model.heads} heads over {model.kv_heads} KV heads, "
        f"Dk/Dv {model.head_dim}/{model.value_dim or model.head_dim}, {config.train.dtype}"
        + (f"; {known:,} parameters" if known else "")
    )


def _parameters(config: Config) -> int | None:
    """Counted on a model without storage; None where only a tokenizer's file knows the vocabulary."""
    from nsa_dist.model import Decoder

    vocabulary = config.model.vocab_size or (ByteTokenizer.vocab_size if config.data.tokenizer == "bytes" else 0)
    if not vocabulary:
        return None
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config, vocabulary).parameters())


def _exchange(config: Config) -> str:
    kinds = layer_kinds(config.model)
    used = {"nsa": config.parallel.exchange, "full": config.parallel.full_exchange}
    return (
        " and ".join(f"{name} ({kind} layers)" for kind, name in used.items() if kind in kinds) or "of windows alone"
    )


def _steps(run: Run) -> str:
    first, last = run.records[0]["step"], run.records[-1]["step"]
    planned = [e["steps"] for e in run.events if e.get("kind") == "training" and "steps" in e]
    begun = f"{first} to {last}" if first > 1 else f"{last}"
    return f"{begun} of {planned[-1] if planned else run.config.train.steps}"


def _balance(records: list[dict[str, Any]]) -> dict[str, str]:
    """Of runs on several ranks, mean over steps: the busiest rank's work over the mean rank's."""
    names = {"predicted_imbalance": "by the cost model", "measured_imbalance": "measured (CPU time)"}
    found = {name: [r["balance"][name] for r in records if name in r.get("balance", {})] for name in names}
    parts = [f"{fmean(values):.3f} {names[name]}" for name, values in found.items() if values and max(values) > 1]
    return {"balance": f"the busiest rank's work over the mean: {', '.join(parts)}"} if parts else {}


def _validation(records: list[dict[str, Any]]) -> dict[str, str]:
    found = [(r["step"], r["validation"]) for r in records if r.get("validation")]
    if not found:
        return {"validation": "none"}
    (first, before), (last, after) = found[0], found[-1]
    text = f"{before['loss']:.4f} (step {first}) -> {after['loss']:.4f} (step {last})"
    by_position = ", ".join(f"{where}: {loss:.3f}" for where, loss in after.get("by_position", {}).items())
    return {"validation": text} | ({"": f"by position in its document: {by_position}"} if by_position else {})


def _events(events: list[dict[str, Any]]) -> str:
    """Starts, resumes, failures, checkpoints left out; and whether the run came to its end."""
    if not events:
        return "none on record"
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        by_kind.setdefault(str(event.get("kind")), []).append(event)
    resumed = [str(e["step"]) for e in by_kind.get("training", []) if e.get("step")]
    failures = [_failure(e) for e in by_kind.get("failure", [])]
    parts = [f"started {len(by_kind.get('training', []))} x"]
    parts += [f"resumed after step {', '.join(resumed)}"] if resumed else []
    parts += [f"{len(failures)} failures ({'; '.join(failures[-3:])})"] if failures else ["no failure"]
    skipped = len(by_kind.get("checkpoint_skipped", []))
    parts += [f"{skipped} damaged checkpoints left out"] if skipped else []
    parts += [] if events[-1].get("kind") in ("end", "failure") else ["no end on record (running, or killed)"]
    return ", ".join(parts)


def _failure(event: dict[str, Any]) -> str:
    where = "" if event.get("rank") is None else f"rank {event['rank']}: "
    return where + str(event.get("cause", "unknown")).strip().split("\n")[0][:60]


# Its traffic


def mean_cells(comms: list[dict[str, Any]]) -> Cells:
    """The mean over steps of each kind's bytes a step; a step without a kind counts as 0."""
    total: Cells = {}
    for comm in comms:
        for kind, phases in comm.items():
            for phase, figures in phases.items() if kind != "rivals" else ():
                cell = [figures[way][of] for way in ("sent_bytes", "received_bytes") for of in ("mean", "max")]
                total[kind, phase] = total.get((kind, phase), np.zeros(4)) + cell
    return {key: cell / len(comms) for key, cell in total.items()}


def own_traffic(run: Run) -> Lines:
    """Sent and received by kind of traffic; parameters and control apart."""
    cells = mean_cells([r["comm"] for r in run.records])
    if not cells:
        return ["Traffic: none (one rank)"]
    unit = Unit.fitting(cell.max() for (kind, _), cell in cells.items() if kind in _EXCHANGED)
    apart = Unit.fitting(cell.max() for (kind, _), cell in cells.items() if kind in APART)

    def row(name: str, kinds: Iterable[str], unit: Unit) -> Lines:
        sums = [sum((cells.get((kind, phase), np.zeros(4)) for kind in kinds), np.zeros(4)) for phase in PHASES]
        whole = sum(s[2] for s in sums) * len(run.records)
        total = Unit.fitting([whole])
        return [name, *(unit(value) for s in sums for value in s), f"{total(whole)} {total.name}"]

    def present(kinds: Iterable[str]) -> list[str]:
        return [kind for kind in kinds if any((kind, phase) in cells for phase in PHASES)]

    rows = [row(kind, [kind], unit) for kind in present(_EXCHANGED)]
    rows += [row("exchange", present(_EXCHANGED), unit), []]
    rows += [row(f"{kind} ({apart.name})", [kind], apart) for kind in present(APART)]
    groups = [(f"{phase} {way}", 2) for phase in PHASES for way in ("sent", "received")]
    return [
        *wrapped(
            f"Traffic of this run, counted by its ledger: {unit.name} a step, mean over {len(run.records)} steps; "
            "of the mean rank, and of the one with most (`exchange`: the sum of the kinds' maxima, no rank has "
            "more). Whole run: received by the mean rank in all steps, forward and backward. Below: parameters and "
            "control, in no share."
        ),
        *table([("", 1), *groups, ("whole run", 1)], ["kind", *["mean", "max"] * 4, "received"], rows),
        *_between_nodes(run.records),
    ]


def _between_nodes(records: list[dict[str, Any]]) -> Lines:
    """A line where ranks are on several nodes."""
    key, kinds = "received_between_nodes_bytes", [r["comm"].get(kind, {}) for r in records for kind in _EXCHANGED]
    total = sum(figures[key]["mean"] for phases in kinds for figures in phases.values() if key in figures)
    unit = Unit.fitting([total / len(records)])
    mean = f"{unit(total / len(records))} {unit.name}"
    return [f"of `exchange`, between nodes: {mean} received by the mean rank, both phases"] if total else []


def received(name: str, cells: Cells) -> Received:
    """Of a run: the maxima of the kinds are of different ranks, so that their sum is an upper bound."""
    own = {key: cell for key, cell in cells.items() if key[0] in _EXCHANGED}
    most = {phase: sum(cell[3] for key, cell in own.items() if key[1] == phase) for phase in PHASES}
    return Received(name, {key: float(cell[2]) for key, cell in own.items()}, most)


def run_exchanges(run: Run) -> tuple[Received, dict[str, Received]]:
    """The run's own exchange, and the rivals that every step of it has figures of."""
    comms = [r["comm"] for r in run.records]
    every = [name for name in RIVALS if all(name in comm.get("rivals", {}) for comm in comms)]
    rivals = {name: received(name, mean_cells([comm["rivals"][name] for comm in comms])) for name in every}
    return received("this run", mean_cells(comms)), rivals


def full_kv(allgather: Received) -> dict[str, float]:
    """By phase: (P-1) L kv, the all-gather of the full KV of one branch, and the same of its gradients."""
    return {phase: allgather.of(FULL_KV, phase) for phase in PHASES}


def against_rivals(run: Run) -> Lines:
    """The run's exchange beside the others, and what causality and the selection each save."""
    own, rivals = run_exchanges(run)
    base = full_kv(rivals["allgather"]) if "allgather" in rivals else {}
    if not any(base.values()):
        return ["Against other exchanges: no rank needs another's KV in this run, there is nothing to compare"]
    lines = [
        *wrapped(
            "Against other exchanges: received by a rank in a step. `this run` is counted by its ledger; the others "
            "are COMPUTED from the run's sequences and layout, not run. Shares are of (P-1) L kv, the all-gather "
            "of the full KV of one branch (backward: of its gradients). max: the sum of the kinds' maxima, no "
            "rank has more."
        ),
        *exchange_table([own, *rivals.values()], base),
    ]
    if "ulysses" not in rivals:
        ranks, heads = run.config.parallel.cp, run.config.model.kv_heads
        lines.append(f"ulysses can't run: parallel.cp={ranks} doesn't divide model.kv_heads={heads}")
    if run.config.parallel.exchange == "nsa" and "nsa" in layer_kinds(run.config.model):
        lines += ["", *split_table(own, rivals["allgather"], rivals["groupcast"], base)]
    return lines


def exchange_table(exchanges: list[Received], base: dict[str, float]) -> Lines:
    """A line an exchange: by phase mean and maximum, in bytes and as shares of `base`. No phase: `-`."""
    unit = Unit.fitting(value for exchange in exchanges for value in exchange.most.values())

    def cells(exchange: Received, phase: str) -> Lines:
        if phase not in exchange.most:
            return ["-"] * 4
        values = exchange.of(_EXCHANGED, phase), exchange.most[phase]
        return [*map(unit, values), *(share(value, base[phase]) for value in values)]

    rows = [[exchange.name, *(cell for phase in PHASES for cell in cells(exchange, phase))] for exchange in exchanges]
    header = [f"received, {unit.name}", *["mean", "max", "mean", "max"] * 2]
    return table([("", 1), *((phase, 4) for phase in PHASES)], header, rows, _LABEL)


def split(own: Received, allgather: Received, groupcast: Received, phase: str) -> dict[str, float]:
    """From the all-gather to an `nsa` exchange, in mean bytes received: what causality saves, and the selection."""
    every, visible, sent = (exchange.of(["selected"], phase) for exchange in (allgather, groupcast, own))
    return {
        "all-gather of the NSA layers' KV": every,
        "- causality (all-gather - group cast)": every - visible,
        "- selection (group cast - selected)": visible - sent,
        "= selected blocks": sent,
        "+ compressed, halos, bitmaps": own.of(_TOP, phase),
        "+ fetched again (refetch)": own.of(["refetch"], phase),
        "+ full-attention layers' KV": own.of(["full_kv"], phase),
        "+ ulysses, full-attention layers": own.of(["ulysses"], phase),
        "= this exchange": own.of(_EXCHANGED, phase),
    }


def split_table(own: Received, allgather: Received, groupcast: Received, base: dict[str, float]) -> Lines:
    """`split` for both phases; kinds that don't occur are left out."""
    parts = {phase: split(own, allgather, groupcast, phase) for phase in PHASES}
    unit = Unit.fitting(value for part in parts.values() for value in part.values())
    rows = [
        [name, *(cell for p in PHASES for cell in (unit(parts[p][name]), share(parts[p][name], base[p])))]
        for name in parts[PHASES[0]]
        if not name.startswith("+") or any(parts[p][name] for p in PHASES)
    ]
    header = [f"where it goes, {unit.name}", *["mean", "share"] * 2]
    return table([("", 1), *((phase, 2) for phase in PHASES)], header, rows, _LABEL)


# The same layout at 64k tokens


def trace_sizes(kv_heads: int, grad_dtype: str) -> Sizes:
    """A layer of the paper's shape (arXiv 2502.11089): 16 query heads to a KV head, Dk/Dv 192/128, in bfloat16."""
    return Sizes(16 * kv_heads, kv_heads, 192, 128, DTYPES["bfloat16"].itemsize, DTYPES[grad_dtype].itemsize)


def at_64k(config: Config) -> Lines:
    """The run's layout, and the other one in short, under a trained model's selections. Computed."""
    sizes = trace_sizes(load_needs(NEEDS_64K).kv_heads, config.parallel.grad_dtype)
    layout = config.parallel.layout if config.parallel.layout in LAYOUTS else LAYOUTS[0]
    trace = trace_traffic(NEEDS_64K, layout, _TRACE_RANKS, sizes)
    by_name = trace_exchanges(trace)
    base = full_kv(by_name["allgather"])
    heads = f"{sizes.heads} query heads over {sizes.groups} KV heads, Dk/Dv {sizes.dk}/{sizes.dv}"
    three = by_name["nsa"], by_name["allgather"], by_name["groupcast"]
    formula = ulysses_bytes(trace.tokens, trace.ranks, sizes)
    # Every rank receives the same; the formula has no backward.
    ulysses = Received("ulysses (formula)", {("ulysses", "forward"): formula}, {"forward": formula})
    return [
        *wrapped(
            f"COMPUTED, no run took place: the {layout} layout at {trace.tokens:,} tokens on {trace.ranks} ranks, "
            f"one NSA layer (the mean of {trace.layers}), from the selections of a model of 85M parameters, trained "
            "with NSA on 40M tokens of Python source and read on a held-out sequence: a small model, briefly trained "
            f"(nsa_dist/traces/README.md). Assumed: {heads}, bfloat16, gradients in {config.parallel.grad_dtype}, "
            "one document. Shares are of (P-1) L kv, the all-gather of the full KV of one branch (backward: of its "
            "gradients)."
        ),
        *exchange_table([*by_name.values(), ulysses], base),
        *wrapped(
            f"ulysses can't cut {sizes.groups} KV heads over {trace.ranks} ranks: its figure is the formula's, q, "
            f"output and one branch's KV, copied to {trace.ranks} heads."
        ),
        "",
        *split_table(*three, base),
        f"The blocks that a rank's queries select are {_visible(*three):.1%} of those causally visible to it.",
        *(line for o in LAYOUTS if o != layout for line in wrapped(_short(o, sizes))),
    ]


def trace_exchanges(trace: TraceTraffic) -> dict[str, Received]:
    """Here every rank's bytes are known: `most` is that of the rank with the largest sum."""
    result = {}
    for name, means in trace.traffic.items():
        by_rank = {p: np.sum([got for (_, phase), (_, got) in means.items() if phase == p], axis=0) for p in PHASES}
        most = {phase: float(np.max(got)) for phase, got in by_rank.items()}
        result[name] = Received(name, {key: float(got.mean()) for key, (_, got) in means.items()}, most)
    return result


def _visible(own: Received, allgather: Received, groupcast: Received) -> float:
    return own.of(["selected"], "forward") / groupcast.of(["selected"], "forward")


def _short(layout: str, sizes: Sizes) -> str:
    by_name = trace_exchanges(trace_traffic(NEEDS_64K, layout, _TRACE_RANKS, sizes))
    own, base = by_name["nsa"], full_kv(by_name["allgather"])["forward"]
    parts = split(own, by_name["allgather"], by_name["groupcast"], "forward")
    totals = {name: (e.of(_EXCHANGED, "forward"), e.most["forward"]) for name, e in by_name.items()}
    shares = ", ".join(
        f"{name} {share(mean, base)} (max {share(most, base)})" for name, (mean, most) in totals.items()
    )
    saved = [share(value, base) for name, value in parts.items() if name.startswith("- ")]
    return f"{layout} instead, forward: {shares}; causality saves {saved[0]}, the selection {saved[1]}"


# The picture


def save_picture(run_dir: Path, path: Path) -> None:
    """Draws the losses over the steps, and the bytes received a rank and step beside those of other exchanges.

    Raises ConfigError where matplotlib is missing, and for a path that can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "matplotlib isn't installed; must be there for a picture: pip install nsa-dist[report]"
        ) from None
    run = read_run(run_dir)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_losses(left, run.records)
    _draw_traffic(right, run)
    try:
        # Without a format matplotlib would write to another name where this one has no ending.
        figure.savefig(path, dpi=130, format=path.suffix.removeprefix(".") or "png")
    except (OSError, ValueError) as error:
        raise ConfigError(f"picture '{path}': must be a file that can be written, e.g. run.png ({error})") from None


def _draw_losses(axes: Any, records: list[dict[str, Any]]) -> None:
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1, label="training")
    found = [(r["step"], r["validation"]["loss"]) for r in records if r.get("validation")]
    if found:
        axes.plot(*zip(*found, strict=True), "o", label="validation")
    axes.set(xlabel="step", ylabel="loss", title=f"Loss over {records[-1]['step']} steps")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_traffic(axes: Any, run: Run) -> None:
    """Bars stacked by kind of traffic, forward and backward together."""
    own, rivals = run_exchanges(run)
    bars = [own, *rivals.values()]
    kinds = [kind for kind in _EXCHANGED if any((kind, phase) in bar.mean for bar in bars for phase in PHASES)]
    totals = [sum(bar.of(_EXCHANGED, phase) for phase in PHASES) for bar in bars]
    unit, below = Unit.fitting(totals), np.zeros(len(bars))
    labels = [f"this run\n({run.config.parallel.exchange})", *(f"{name}\n(computed)" for name in rivals)]
    for kind in kinds:
        heights = np.array([sum(bar.of([kind], phase) for phase in PHASES) for bar in bars]) / unit.bytes
        axes.bar(labels, heights, bottom=below, label=kind, width=0.6)
        below += heights
    parallel = run.config.parallel
    tokens = f"{run.config.data.seq_len:,} tokens, cp {parallel.cp}, {parallel.layout}"
    axes.set(ylabel=f"{unit.name} received, mean rank, a step", title=f"KV exchange, {tokens}")
    if kinds:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
