"""What NSA layers fetch in a plan: a stated share, a trace's, a run's, or the span rule's bound."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nsa_dist.config import Config, ConfigError, layer_kinds, nsa_spec
from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.kernels.span import make_spans
from nsa_dist.metrics import read_metrics
from nsa_dist.parallel import needs
from nsa_dist.parallel.layout import Layout
from nsa_dist.parallel.plan import Bools, Floats, make_pieces, row_counts
from nsa_dist.picks import Trace, open_trace
from nsa_dist.plan_traffic import Selection


@dataclass(frozen=True)
class Selections:
    """For any layout: the share of what a rank may see of others that it fetches. source: in words."""

    source: str
    share: float = 1.0
    trace: Trace | None = None
    groups: int = 1

    def of(self, packing: Packing, layout: Layout) -> Selection:
        spec = packing.spec
        share = np.full(layout.ranks, self.share)
        if self.trace is not None:
            share = traced_shares(self.trace, self.groups, packing, layout)
        if spec.span:
            share = np.minimum(share, bounded_shares(packing, layout))
        return Selection(self.source, share=share)


def open_selections(config: Config, trace: Path | None, run: Path | None, union: float | None) -> Selections:
    """Of at most one of a trace, a run's folder, and a stated share. Raises ConfigError for what doesn't fit."""
    if sum(x is not None for x in (trace, run, union)) > 1:
        raise ConfigError("--trace, --run, --union: must be one of them at most")
    if trace is not None:
        return Selections(f"measured: trace {trace}", trace=_fitting(config, trace), groups=config.model.kv_heads)
    if run is not None:
        share = run_share(run)
        return Selections(f"measured: {share:.1%} of the visible KV in run {run}", share)
    if union is not None:
        if not 0 < union <= 1:
            raise ConfigError(f"--union {union:g}: must be a share above 0, at most 1")
        return Selections(f"stated: {union:.1%} of the visible KV", union)
    return Selections("not known: all visible KV, the most that there can be (--trace, --run or --union tell)")


def run_share(folder: Path) -> float:
    """Of a run: bytes of selected KV received over those of the group cast, in the mean of its steps and ranks."""
    records = read_metrics(folder) if folder.is_dir() else []
    comms = [record.get("comm", {}) for record in records]
    got = [(_received(comm), _received(comm.get("rivals", {}).get("groupcast", {}))) for comm in comms]
    if not got or not all(visible for _, visible in got) or not any(own for own, _ in got):
        raise ConfigError(
            f"--run {folder}: must be the folder of a run whose steps fetched selected KV (metrics.jsonl, "
            "parallel.exchange=nsa, parallel.cp above 1)"
        )
    return sum(own for own, _ in got) / sum(visible for _, visible in got)


def _received(comm: dict[str, Any]) -> float:
    return float(comm.get("selected", {}).get("forward", {}).get("received_bytes", {}).get("mean", 0))


def _fitting(config: Config, file: Path) -> Trace:
    """The trace. Raises ConfigError where it isn't one of the configuration's blocks and KV heads."""
    trace, spec, groups = open_trace(file), nsa_spec(config.nsa), config.model.kv_heads
    held, count = _sizes(trace)
    size = trace.tokens / held
    if "nsa" not in layer_kinds(config.model) or config.parallel.exchange != "nsa":
        raise ConfigError(f"--trace {file}: must go with NSA layers and parallel.exchange=nsa")
    if -(-trace.tokens // spec.select_block) != held:
        raise ConfigError(
            f"--trace {file}: blocks of about {size:.0f} tokens; must be as nsa.select_block={spec.select_block}"
        )
    if count > spec.select_count:
        raise ConfigError(
            f"--trace {file}: a query takes {count} blocks; must be at most nsa.select_count={spec.select_count}"
        )
    if trace.rows % groups:
        raise ConfigError(
            f"--trace {file}: model.kv_heads={groups} must divide its {trace.rows} layers times KV heads"
        )
    return trace


def _sizes(trace: Trace) -> tuple[int, int]:
    """Its blocks, and how many of them a query takes (0: not known)."""
    if trace.picks is not None:
        return int(trace.picks.max()) + 1, trace.picks.shape[-1]
    assert trace.needs is not None
    return trace.needs.shape[-1], 0


def traced_shares(trace: Trace, groups: int, packing: Packing, layout: Layout) -> Floats:
    """[P]: the mean over the trace's layers, of its first tokens where it is longer than the sequence.

    Of a shorter trace it is cut over as many ranks in the same layout: a share hardly depends on the length
    (docs/exchange.md). Where it has too few blocks for so many segments, neighbours share one.
    """
    block = packing.spec.select_block
    tokens = min(packing.tokens, trace.tokens)
    cuts = np.rint(layout.cuts * (tokens / packing.tokens) / block).astype(np.int64) * block
    cut = Layout(np.minimum(cuts, tokens), layout.owner, layout.ranks)
    small = Packing(np.array([0, tokens]), packing.spec)
    visible = needs.causal(cut, small)
    pieces = make_pieces(cut, small, visible)
    length = pieces.end - pieces.start
    foreign = pieces.visible & (pieces.owner[None] != np.arange(layout.ranks)[:, None])
    seen = (foreign * length).sum(1)
    found = np.zeros(layout.ranks)
    for rank in range(layout.ranks):
        bits = rank_bits(trace, cut.segments(rank), small.blocks)
        found[rank] = (bits[:, pieces.block] & foreign[rank]).mean(0) @ length
    share = np.divide(found, seen, out=np.ones(layout.ranks), where=seen > 0)
    few = seen == 0  # ranks without a part of the trace, or that see nothing: as the others in the mean
    share[few] = found.sum() / max(seen.sum(), 1)
    return share


def rank_bits(trace: Trace, segments: Ints, blocks: int) -> Bools:
    """[rows, NB]: the blocks that any query of the segments selected."""
    bits = np.zeros((trace.rows, blocks), bool)
    for a, b in segments.tolist():
        if trace.picks is not None:
            for row, picks in enumerate(trace.picks[:, a:b]):
                bits[row, picks[picks >= 0]] = True
        else:
            assert trace.needs is not None
            size = trace.tokens // trace.needs.shape[1]
            bits |= trace.needs[:, a // size : -(-b // size), :blocks].any(1)
    return bits


def bounded_shares(packing: Packing, layout: Layout) -> Floats:
    """[P]: the most that the span rule lets a rank fetch, over what it may see of others."""
    spec, spans = packing.spec, make_spans(packing)
    seen = row_counts(layout, needs.causal(layout, packing)).sum(1).astype(np.float64)
    outside = (spans.budget + spec.initial_blocks + spec.local_blocks) * spec.select_block
    most = np.zeros(layout.ranks)
    for rank in range(layout.ranks):
        segments = layout.segments(rank)
        for a, b in segments.tolist():
            of = np.flatnonzero((spans.start < b) & (spans.end > a))
            before = np.maximum(a - spans.start[of], 0)  # the span's own tokens on other ranks
            most[rank] += (outside[of] + before).sum()
    return np.divide(np.minimum(most, seen), seen, out=np.ones(layout.ranks), where=seen > 0)
