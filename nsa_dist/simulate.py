"""`nsa-dist bench comm --simulate`: what a layer would send under each exchange, planned and counted, not run.

The plans are those of real runs (`parallel/plan.py`, `parallel/traffic.py`), made from selections: of a trace, random
or adversarial (`picks.py`). A length beyond the trace's is refused; `stretched` makes one of it instead: query t of a
sequence m times as long takes what the trace's query t // m took, each block being one of the m blocks that stand in
its place, by a hash. Random and adversarial selections are made for any length.

With the span rule the scores that a trace lacks are replaced by counts: a block's score from a query is 1 where the
query picked it. All blocks that the rule admits are counted as fetched, whether or not a query of the rank would have
taken them: real runs send at most that. `kept_picks`: the share of the free picks that the rule leaves as they were.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nsa_dist.bench_comm import SPEC, Case
from nsa_dist.bench_rows import Row, Rows, traffic_row, traffic_tables
from nsa_dist.config import ConfigError
from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.kernels.span import GROUP, SpanView, admit, make_spans, make_units, span_view
from nsa_dist.parallel.layout import Layout, make_layout
from nsa_dist.parallel.plan import Bools
from nsa_dist.parallel.traffic import TrafficModel
from nsa_dist.picks import SELECTIONS, Picks, open_trace, prescribed, stretched
from nsa_dist.traces import NEEDS_64K

SIMULATED = (*SELECTIONS, "stretched")
_CHUNK = 1 << 16  # queries whose picks are made at a time


def span_spec(span: int, span_blocks: float) -> NSASpec:
    """NSA's sizes with the rule, all of it prefetched. Raises ConfigError for a bound that can't work."""
    try:
        return replace(SPEC, span=span, span_blocks=span_blocks)
    except ValueError as error:
        name, _, rest = str(error).partition("=")
        raise ConfigError(f"--{name.replace('_', '-')} {rest}") from None


def check_simulated(case: Case, spec: NSASpec) -> None:
    """Raises ConfigError for a trace that can't give the case's selection."""
    if case.selection not in ("trained", "stretched"):
        return
    trace = open_trace(case.trace or NEEDS_64K)
    if case.selection == "trained" and case.tokens > trace.tokens:
        raise ConfigError(
            f"--tokens {case.tokens}: must be at most {trace.tokens}, the trace's, for --selection trained "
            "(stretched makes a longer one of it)"
        )
    if case.selection == "stretched" and (case.tokens % trace.tokens or trace.picks is None):
        raise ConfigError(
            f"--tokens {case.tokens}: must be a multiple of {trace.tokens}, the trace's, and --trace a file of "
            "'picks', for --selection stretched"
        )
    if spec.span and trace.picks is None:
        raise ConfigError(
            f"--span {spec.span}: needs a trace of 'picks' (--trace); one of 'needs' has exact NSA only"
        )
    if trace.rows % case.groups:
        raise ConfigError(f"--kv-heads {case.groups}: must divide {trace.rows}, the trace's layers times KV heads")


def simulate(cases: list[Case], spec: NSASpec, file: Path | None, say: Callable[[str], None]) -> list[Row]:
    """A row for each case and exchange, the mean over the selection's layers; printed and written as it is known.

    A case's own `exchange` is the one that is counted.
    """
    for case in cases:
        check_simulated(case, spec)
    rows, tables = Rows(file), dict[Case, Any]()
    for case in cases:
        if case.impossible:
            say(f"  not possible: {case.impossible}")
            continue
        key = replace(case, exchange="")
        if key not in tables:
            tables = {key: _bits(case, spec)}
        say(line(rows.add(_row(case, spec, *tables[key]))))
    return rows.rows


def _row(case: Case, spec: NSASpec, bits_LPGB: list[Bools], kept: float | None) -> Row:
    packing = Packing(np.array([0, case.tokens]), spec)
    layout = make_layout(case.layout, case.tokens, case.ranks, spec.select_block)
    model = TrafficModel(packing, layout, case.sizes)
    layers = bits_LPGB if case.exchange == "nsa" else bits_LPGB[:1]
    counted = [traffic_tables(model.nsa(case.exchange, bits), case.ranks) for bits in layers]
    row: Row = {key: value for key, value in asdict(case).items() if key != "trace"}
    row |= {"span": spec.span, "span_blocks": spec.span_blocks, "kept_picks": kept, "layers": len(bits_LPGB)}
    return row | traffic_row(np.mean(counted, axis=0), case.tokens, case.sizes) | {"simulated": True}


def _bits(case: Case, spec: NSASpec) -> tuple[list[Bools], float | None]:
    """Of each layer the blocks [P, G, NB] that each rank's queries select; the share of free picks that is kept."""
    packing = Packing(np.array([0, case.tokens]), spec)
    layout = make_layout(case.layout, case.tokens, case.ranks, spec.select_block)
    view = span_view(packing, np.arange(case.tokens), torch.device("cpu")) if spec.span else None
    bits, kept = [], []
    for picks in _layers(case.selection, case.tokens, case.groups, case.trace or NEEDS_64K):
        found = np.zeros((case.ranks, case.groups, packing.blocks), bool)
        if view:
            picks = picks.copy()
            kept.append(_bound(picks, packing, view, layout, found))
        for rank in range(case.ranks):
            for a, b in layout.segments(rank).tolist():
                for g in range(case.groups):
                    chosen = picks[a:b, g]
                    found[rank, g, chosen[chosen >= 0]] = True
        bits.append(found)
    return bits, float(np.mean(kept)) if kept else None


@lru_cache(maxsize=2)
def _layers(selection: str, tokens: int, groups: int, trace: Path) -> list[Picks]:
    """The picks [T, G, n] of each layer of a trace, or of the one that is made."""
    count = open_trace(trace).rows // groups if selection in ("trained", "stretched") else 1
    return [_layer(selection, tokens, groups, trace, i * groups) for i in range(count)]


def _layer(selection: str, length: int, groups: int, trace: Path, first_row: int) -> Picks:
    parts = []
    for start in range(0, length, _CHUNK):
        tokens = np.arange(start, min(start + _CHUNK, length))
        if selection == "stretched":
            parts.append(stretched(trace, tokens, length, groups, SPEC, first_row))
        else:
            parts.append(prescribed(selection, tokens, groups, SPEC, trace, first_row))
    return np.concatenate(parts)


def _bound(picks: Picks, packing: Packing, view: SpanView, layout: Layout, found: Bools) -> float:
    """Applies the rule: takes from `picks`, in place, what isn't admitted, and marks in `found` [P, G, NB] what is.

    Returns the share of the free picks that stays.
    """
    spec, spans = packing.spec, make_spans(packing)
    units = make_units(spans, spec.span_pool)
    sums = [
        _counts(picks[lo:hi], spec.initial_blocks, w)
        for lo, hi, w in zip(units.lo, units.hi, units.width, strict=True)
    ]
    whole = np.concatenate([np.zeros((0, picks.shape[1]), np.int64), *sums])
    when = admit(torch.from_numpy(whole), view, spec).when_NG.numpy()
    place, width = view.place_S.numpy(), view.width_S.numpy()
    free = stay = 0
    for start, end, own in zip(spans.start, spans.end, spans.own, strict=True):
        of = when[place[start] : place[start] + width[start]]
        block = picks[start:end]
        mine = np.arange(start, end)[:, None, None]
        group = (mine - start) // GROUP
        forced = (block < spec.initial_blocks) | (block > mine // spec.select_block - spec.local_blocks)
        outside = (block >= spec.initial_blocks) & (block < own)
        early = np.zeros(block.shape, bool)
        at, g, n = np.nonzero(outside)
        early[at, g, n] = of[block[at, g, n] - spec.initial_blocks, g] <= group[at, 0, 0] if len(of) else False
        allowed = ~outside | early | forced
        free, stay = free + int((~forced & (block >= 0)).sum()), stay + int((~forced & (block >= 0) & allowed).sum())
        block[~allowed] = -1
        for a, b, owner in zip(layout.cuts[:-1], layout.cuts[1:], layout.owner, strict=True):
            last = min(b, end) - 1
            if last >= max(a, start) and len(of):
                fetched = of <= (last - start) // GROUP
                found[owner, :, spec.initial_blocks : spec.initial_blocks + len(of)] |= fetched.T
    return stay / max(free, 1)


def _counts(picks: Picks, first: int, width: int) -> Ints:
    """[width, G]: how many of the queries picked each of the blocks from `first` on."""
    chosen = [row[(row >= first) & (row < first + width)] - first for row in picks.transpose(1, 0, 2)]
    return np.stack([np.bincount(c, minlength=width) for c in chosen], axis=1).astype(np.int64)


def line(row: Row) -> str:
    """A row for people."""
    rule = f" span {row['span']}, {row['span_blocks']:g}" if row["span"] else ""
    kept = "" if row["kept_picks"] is None else f", {row['kept_picks']:.0%} of the free picks kept"
    shares = [_shares(row, prefix) for prefix in ("", "backward_")]
    return (
        f"  {row['exchange']:15s} P={row['ranks']:<3d} {row['layout']:10s} {row['selection']:11s} "
        f"T={row['tokens']:<8d}{rule} received {row['received_bytes_mean'] / 2**20:9.2f} MiB, {shares[0]} of the "
        f"all-gather; backward {shares[1]}{kept}"
    )


def _shares(row: Row, prefix: str) -> str:
    mean, most = row[f"{prefix}share_of_allgather"], row[f"{prefix}share_of_allgather_max"]
    return "-" if mean is None else f"{mean:6.1%}, at most {most:6.1%}"
