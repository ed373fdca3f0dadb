"""Prescribed selections for benchmarks: random, adversarial, and those of a trained model's trace.

Every query takes its forced blocks (block 0, its own and the one before) and others among the earlier ones.
Pure functions of the tokens: the same on any number of ranks. One document.
"""

import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_dist.config import ConfigError
from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Ints
from nsa_dist.traces import NEEDS_64K, load_needs

SELECTIONS = ("random", "trained", "adversarial")
Picks = NDArray[np.int32]


@dataclass(frozen=True)
class Trace:
    """`picks [rows, T, n]`, each query's blocks, or `needs [rows, groups, NB]`, those of each group of 64 queries.

    A row is one KV head of one layer.
    """

    picks: NDArray[Any] | None
    needs: NDArray[np.bool_] | None
    tokens: int

    @property
    def rows(self) -> int:
        held = self.picks if self.picks is not None else self.needs
        assert held is not None
        return len(held)


@cache
def open_trace(file: Path) -> Trace:
    """Reads an .npz of `picks [layers, G, T, n]` or of `needs`. Raises ConfigError for one that holds neither."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            picks = arrays.get("picks", None)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(f"trace '{file}': must be an .npz file that holds 'picks' or 'needs' ({error})") from None
    if picks is None:
        found = load_needs(file)
        return Trace(
            None,
            np.unpackbits(found.bits, axis=-1).astype(bool).reshape(-1, *[found.bits.shape[2]] * 2),
            found.tokens,
        )
    if picks.ndim != 4 or picks.dtype.kind not in "iu" or picks.shape[3] < 1:
        shape = f"{picks.dtype} {list(picks.shape)}"
        raise ConfigError(f"trace '{file}': picks is {shape}; must be integers [layers, KV heads, tokens, blocks]")
    return Trace(picks.reshape(-1, *picks.shape[2:]), None, picks.shape[2])


def prescribed(
    selection: str, tokens: Ints, groups: int, spec: NSASpec, trace: Path | None, first_row: int = 0
) -> Picks:
    """[S, G, n] blocks of the queries `tokens`, ascending, -1 where a query has fewer.

    random: one of each of n - 3 equal parts of the earlier blocks, by a hash. adversarial: the earlier blocks in
    turn, so that few queries together want all of them. trained: the trace's; where it holds what groups of
    queries selected, its queries take those in turn, so that together they select just these. KV head g takes the
    trace's row first_row + g, cyclically.
    """
    if selection == "trained":
        source = open_trace(trace or NEEDS_64K)
        rows = [_traced(source, tokens, first_row + g, spec) for g in range(groups)]
    else:
        rows = [_free(selection, tokens, g, spec) for g in range(groups)]
    return np.stack(rows, axis=1)


def stretched(trace: Path, tokens: Ints, length: int, groups: int, spec: NSASpec, first_row: int) -> Picks:
    """[S, G, n]: of a sequence of `length` tokens, m times as long as the trace (of picks): query t takes what the
    trace's query t // m took, of the m blocks in each block's place one by a hash; its forced blocks are its own."""
    source = open_trace(trace)
    assert source.picks is not None
    times, own = length // source.tokens, tokens[:, None] // spec.select_block
    old = tokens // times
    rows = []
    for row in range(first_row, first_row + groups):
        picks = source.picks[row % len(source.picks), old].astype(np.int64)
        free = (picks >= spec.initial_blocks) & (picks <= old[:, None] // spec.select_block - spec.local_blocks)
        which = _hash(tokens[:, None] * 1_000_003 + np.arange(picks.shape[1]) * 10_007 + row) % np.uint64(times)
        made = np.where(free, picks * times + which.astype(np.int64), -1)
        rows.append(_with_forced(made, own, spec)[:, : spec.select_count])
    return np.stack(rows, axis=1)


def _free(selection: str, tokens: Ints, g: int, spec: NSASpec) -> Picks:
    own = tokens[:, None] // spec.select_block
    count = spec.select_count - spec.initial_blocks - spec.local_blocks
    slot = np.arange(count)
    first, earlier = spec.initial_blocks, own - spec.local_blocks + 1 - spec.initial_blocks
    if selection == "adversarial":
        free = (tokens[:, None] * count + slot) % np.maximum(earlier, 1)
    else:
        low, high = slot * earlier // count, (slot + 1) * earlier // count
        mixed = _hash(tokens[:, None] * 1_000_003 + slot * 10_007 + g)
        free = low + (mixed % np.maximum(high - low, 1).astype(np.uint64)).astype(np.int64)
    few = earlier <= count  # then all of them
    free = np.where(few, np.where(slot < earlier, slot, -1 - first), free) + first
    return _with_forced(free, own, spec)


def _with_forced(free: Ints, own: Ints, spec: NSASpec) -> Picks:
    local = own - np.arange(spec.local_blocks - 1, -1, -1)
    initial = np.broadcast_to(np.arange(spec.initial_blocks), (len(own), spec.initial_blocks))
    initial = np.where(initial < local[:, :1], initial, -1)
    return _ascending(np.concatenate([initial, free, local], axis=1))


def _ascending(picks: Ints) -> Picks:
    high = np.iinfo(np.int32).max
    ordered = np.sort(np.where(picks < 0, high, picks), axis=1)
    return np.where(ordered == high, -1, ordered).astype(np.int32)


def _traced(trace: Trace, tokens: Ints, g: int, spec: NSASpec) -> Picks:
    if trace.picks is not None:
        return trace.picks[g % len(trace.picks), tokens].astype(np.int32)
    assert trace.needs is not None
    needs = trace.needs[g % len(trace.needs)]
    own, place = tokens // spec.select_block, tokens % spec.select_block
    count = spec.select_count - spec.initial_blocks - spec.local_blocks
    free = np.full((len(tokens), count), -1, np.int64)
    for block in np.unique(own):
        wanted = np.flatnonzero(needs[block, spec.initial_blocks : max(block - spec.local_blocks + 1, 0)])
        at = own == block
        if len(wanted):
            turn = (place[at, None] * count + np.arange(count)) % len(wanted)
            chosen = wanted[turn] + spec.initial_blocks
            free[at] = np.where(np.arange(count) < len(wanted), chosen, -1)
    return _with_forced(free, own[:, None], spec)


def _hash(x: Ints) -> NDArray[np.uint64]:
    """splitmix64's finish: a pseudo-random 64 bits of each number."""
    z = x.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
