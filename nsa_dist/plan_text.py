"""A plan for people, and as JSON."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nsa_dist.bench_rows import Rows
from nsa_dist.cluster import FREE, Cluster
from nsa_dist.config import AUTO, Config, layer_kinds
from nsa_dist.kernels.packing import Ints
from nsa_dist.parallel.ledger import FIELDS
from nsa_dist.parallel.traffic import Traffic
from nsa_dist.plan import Cut, Plan, plans, predict
from nsa_dist.plan_selection import open_selections
from nsa_dist.plan_traffic import parameter_shapes
from nsa_dist.tables import Lines, Unit, table, wrapped
from nsa_dist.tokenizer import load_tokenizer

_GB = 1e9


def plan(
    config: Config,
    cluster: Cluster,
    given: tuple[Path | None, Path | None, float | None],
    file: Path | None,
    top: int,
    say: Callable[[str], None],
) -> None:
    """Says what the configuration takes on the cluster, and the best `top` of all choices; writes JSON.

    The configuration as it stands is described where its dp x cp are the cluster's GPUs, else the best choice.
    given: --trace, --run, --union. Raises ConfigError for input that doesn't fit.
    """
    rows = Rows(file)
    selections = open_selections(config, *given)
    vocabulary = config.model.vocab_size or load_tokenizer(config.data).vocab_size
    every = plans(config, cluster, vocabulary, selections)
    stands = AUTO not in (config.parallel.dp, config.parallel.cp)
    stands = stands and config.parallel.dp * config.parallel.cp == cluster.gpus
    chosen = every[0]
    if stands:
        chosen = predict(
            config, cluster, Cut(config, cluster, parameter_shapes(config, vocabulary), vocabulary, selections)
        )
    title = "This configuration" if stands else "The best choice"
    for lines in (
        _head(config, cluster, selections.source, chosen),
        [f"{title}: {name(chosen)}", *_time(chosen)],
        _bytes(chosen),
        _memory(chosen),
        _ranking(every, top),
    ):
        say("\n".join([*lines, ""]))
    result = {"cluster": asdict(cluster), "selection": selections.source, "plan": as_json(chosen)}
    rows.add(result | {"choices": [as_json(found) for found in every]})


def name(plan: Plan) -> str:
    parallel, train = plan.config.parallel, plan.config.train
    return f"cp {parallel.cp} x dp {parallel.dp}, {parallel.layout}, checkpointing {train.activation_checkpoint}"


def _head(config: Config, cluster: Cluster, source: str, chosen: Plan) -> Lines:
    kinds = layer_kinds(config.model)
    layers = " + ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    nodes = -(-cluster.gpus // cluster.per_node)
    return [
        f"{layers} layers, width {config.model.width}, exchange {config.parallel.exchange}; "
        f"{config.data.batch_size} x {config.data.seq_len:,} tokens a step, each sequence one document",
        f"{cluster.gpus} GPUs of {cluster.memory_gb:g} GB on {nodes} nodes; reached: {cluster.tflops:g} TFLOP/s in "
        f"matrix products, {cluster.attention_tflops:g} in attention, {cluster.inside_gb_s:g} GB/s inside a node, "
        f"{cluster.between_gb_s:g} between nodes",
        f"selection: {source}",
    ]


def _time(plan: Plan) -> Lines:
    at, tokens = plan.slowest, plan.config.data.batch_size * plan.config.data.seq_len
    return wrapped(
        f"step {_s(plan.step_s)}, {tokens / plan.step_s:,.0f} tokens/s: on the slowest rank ({at} of "
        f"{len(plan.compute_s)}) compute {_s(plan.compute_s[at])}, exchanges exposed {_s(plan.exposed_s[at])}, "
        f"hidden {_s(plan.hidden_s[at])}; imbalance of compute {plan.imbalance:.2f}"
    )


def _s(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def totals(plan: Plan) -> dict[tuple[str, str], Ints]:
    """[fields, ranks] of a step by kind and phase: all sequences, and the parameters."""
    found = {key: flow * plan.passes for key, flow in plan.traffic.items()}
    return found | plan.parameters


def _bytes(plan: Plan) -> Lines:
    found = totals(plan)
    unit = Unit.fitting(float(flow[1].max()) for flow in found.values())

    def cells(flow: Ints) -> Lines:
        inside, between = flow[1] - flow[3], flow[3]
        return [unit(float(x)) for part in (inside, between) for x in (part.mean(), part.max())]

    empty = np.zeros((len(FIELDS), 1), np.int64)
    rows = [
        [kind, *(cell for phase in ("forward", "backward") for cell in cells(found.get((kind, phase), empty)))]
        for kind in dict.fromkeys(kind for kind, _ in found)
    ]
    groups = [("", 1), *((f"{phase} {where}", 2) for phase in ("forward", "backward") for where in _WHERE)]
    return [f"Received by a rank in a step, {unit.name}:", *table(groups, ["kind", *["mean", "max"] * 4], rows)]


_WHERE = ("inside", "between")


def _memory(plan: Plan) -> Lines:
    parts = {key: value for key, value in plan.memory.items() if value}
    rows = [[key, f"{value / _GB:,.3f}", f"{value / plan.room:.1%}"] for key, value in parts.items()]
    rows += [["all", f"{plan.bytes / _GB:,.3f}", f"{plan.bytes / plan.room:.1%}"]]
    title = f"Memory of the rank with most, of {plan.room / _GB:,.1f} GB ({1 - FREE:.0%} of a GPU's kept free):"
    return [title, *table([("", 1), ("", 1), ("", 1)], ["part", "GB", "share"], rows)[1:]]


def _ranking(every: list[Plan], top: int) -> Lines:
    fitting = [plan for plan in every if plan.fits]
    rows = [
        [
            name(plan),
            _s(plan.step_s),
            _s(float(plan.exposed_s[plan.slowest])),
            f"{plan.imbalance:.2f}",
            f"{plan.bytes / _GB:,.1f}",
            why(plan),
        ]
        for plan in fitting[:top]
    ]
    header = ["choice", "step", "exposed", "imbalance", "GB", "what most of it is"]
    lines = [f"{len(fitting)} of {len(every)} choices fit; the fastest first, of equal ones that with less memory:"]
    lines += table([("", 1)] * len(header), header, rows)[1:] if rows else []
    if len(fitting) < len(every):
        least = min((plan for plan in every if not plan.fits), key=lambda plan: plan.bytes)
        lines += wrapped(f"The others need more memory, the least of them {name(least)}: {_too_much(least)}.")
    return lines


def why(plan: Plan) -> str:
    """What the slowest rank's time goes to."""
    at = plan.slowest
    compute, exposed = plan.compute_s[at], plan.exposed_s[at]
    idle = compute - float(plan.compute_s.mean())
    parts = {"compute": compute - idle, "imbalance": idle, "exchanges": exposed}
    return ", ".join(
        f"{key} {value / plan.step_s:.0%}" for key, value in parts.items() if value >= 0.005 * plan.step_s
    )


def _too_much(plan: Plan) -> str:
    part = max(plan.memory, key=lambda key: plan.memory[key])
    return f"{plan.bytes / _GB:,.0f} GB of {plan.room / _GB:,.0f}, of it {part} {plan.memory[part] / _GB:,.0f}"


def as_json(plan: Plan) -> dict[str, Any]:
    parallel = plan.config.parallel
    at = plan.slowest
    return {
        "cp": parallel.cp,
        "dp": parallel.dp,
        "layout": parallel.layout,
        "activation_checkpoint": plan.config.train.activation_checkpoint,
        "fits": plan.fits,
        "step_s": plan.step_s,
        "compute_s": float(plan.compute_s[at]),
        "exposed_s": float(plan.exposed_s[at]),
        "hidden_s": float(plan.hidden_s[at]),
        "imbalance": plan.imbalance,
        "tokens_per_s": plan.config.data.batch_size * plan.config.data.seq_len / plan.step_s,
        "memory_bytes": {**plan.memory, "all": plan.bytes, "room": plan.room},
        "kinds": _kinds(totals(plan)),
    }


def _kinds(found: Traffic) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    result: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for (kind, phase), flow in found.items():
        figures = {
            field: {"mean": float(x.mean()), "max": int(x.max())} for field, x in zip(FIELDS, flow, strict=True)
        }
        result.setdefault(kind, {})[phase] = figures
    return result
