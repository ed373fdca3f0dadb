"""Balance: what each rank's part of a sequence costs, and the cut whose slowest rank is fastest. Pure functions.

Compute is counted in floating-point operations of forward and backward, traffic in bytes that a rank receives;
a machine's two rates make seconds of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.parallel import needs
from nsa_dist.parallel.layout import LAYOUTS, Layout, make_layout
from nsa_dist.parallel.plan import Floats, row_counts
from nsa_dist.parallel.traffic import Sizes

MOST_TOKENS = 1.25  # a rank of an uneven cut holds at most so many times the mean: its memory grows with them
_GAIN = 0.99  # a layout is taken for another only where it is this much faster


@dataclass(frozen=True)
class Machine:
    """One rank: operations a second that it reaches, bytes a second that it receives while nothing hides them."""

    flops_per_s: float = 4e14
    bytes_per_s: float = 5e10


@dataclass(frozen=True)
class Prediction:
    """A layout, and for each rank [P] the seconds of a step's compute and of what it receives."""

    kind: str
    layout: Layout
    compute_s: Floats
    receive_s: Floats

    @property
    def seconds(self) -> float:
        """Of the slowest rank, with nothing hidden."""
        return float((self.compute_s + self.receive_s).max())

    @property
    def imbalance(self) -> float:
        """The slowest rank's compute over the mean: 1 is balance."""
        return imbalance(self.compute_s)


def imbalance(seconds_P: Floats) -> float:
    """The largest over the mean; 1 where nothing is done."""
    mean = float(seconds_P.mean())
    return float(seconds_P.max()) / mean if mean > 0 else 1.0


@lru_cache(maxsize=1)  # a plan asks for many cuts of one sequence
def branch_flops(packing: Packing, sizes: Sizes) -> dict[str, Floats]:
    """[T] each: operations for each token, forward and backward, of one layer's branches (`compressed` with the
    scores, `selected`, `window`) and of `full` attention.

    The backward is 2.5 times the forward (FlashAttention-2, arXiv 2307.08691, section 4).
    """
    tokens, spec = np.arange(packing.tokens), packing.spec
    seen = packing.position(tokens) + 1.0
    first, end = packing.visible_compressed(tokens)
    partly = (seen - 1) % spec.select_block + 1
    selected = np.minimum(seen, (spec.select_count - 1) * spec.select_block + partly)
    pair = 3.5 * 2 * sizes.heads * (sizes.dk + sizes.dv)
    scores = 2 * sizes.heads * sizes.dk  # the selection computes the products once more
    return {
        "compressed": (pair + scores) * (end - first),
        "selected": pair * selected,
        "window": pair * np.minimum(seen, spec.window),
        "full": pair * seen,
    }


def token_flops(packing: Packing, sizes: Sizes, kinds: Sequence[str], dense_flops: float) -> Floats:
    """[T]: operations for each token, forward and backward, in layers of these kinds (`nsa`, `full`, `window`).

    dense_flops: of a token in all that isn't attention, forward and backward: about 6 for each parameter.
    """
    of = branch_flops(packing, sizes)
    layer = {
        "nsa": of["compressed"] + of["selected"] + of["window"],
        "full": of["full"],
        "window": of["window"],
    }
    total = np.full(packing.tokens, dense_flops, np.float64)
    for kind in set(kinds):
        total += kinds.count(kind) * layer[kind]
    return total


def by_rank(x_T: Floats, layout: Layout) -> Floats:
    """[P]: the sum of a token's figures over each rank's tokens."""
    total = np.concatenate([[0.0], np.cumsum(x_T)])
    of_segment = total[layout.cuts[1:]] - total[layout.cuts[:-1]]
    return np.bincount(layout.owner, of_segment, minlength=layout.ranks).astype(np.float64)


def received_bytes(
    packing: Packing, layout: Layout, sizes: Sizes, kinds: Sequence[str], selected_share: float = 1.0
) -> Floats:
    """[P]: bytes that each rank receives in a step, KV forward and gradients backward.

    selected_share: which part of the causally visible KV the selection fetches (1: all of it).
    """
    causal = row_counts(layout, needs.causal(layout, packing)) * 1.0
    halo = row_counts(layout, needs.window_halo(layout, packing)) * 1.0
    cmp_layout = layout.mapped(packing.cmp_start)
    compressed = row_counts(cmp_layout, needs.compressed(layout, packing))
    layer = {"nsa": causal * selected_share + halo + compressed, "full": causal, "window": halo}
    rows = sum((kinds.count(kind) * layer[kind] for kind in set(kinds)), np.zeros_like(causal))
    return sizes.kv * (rows.sum(1) * sizes.element_bytes + rows.sum(0) * sizes.grad_bytes)


def uneven_layout(flops_T: Floats, ranks: int, block: int) -> Layout:
    """Contiguous parts of whole blocks and equal work, none above `MOST_TOKENS` times the mean of tokens."""
    tokens = len(flops_T)
    blocks = -(-tokens // block)
    edges = np.minimum(np.arange(blocks + 1, dtype=np.int64) * block, tokens)
    work = np.concatenate([[0.0], np.cumsum(flops_T)])[edges]
    most = int(np.ceil(blocks / ranks * MOST_TOKENS))
    cuts = [0]
    for left in range(ranks - 1, -1, -1):  # ranks that come after
        start = cuts[-1]
        share = work[start] + (work[-1] - work[start]) / (left + 1)
        after = int(np.searchsorted(work[:-1], share))
        end = after - (after > 0 and share - work[after - 1] < work[after] - share)
        least = max(min(start + 1, blocks), blocks - most * left)  # the others have room for the rest
        cuts.append(min(max(end, least), max(least, min(start + most, blocks - left))))
    return Layout(edges[cuts], np.arange(ranks, dtype=np.int64), ranks)


def predict(
    packing: Packing,
    layout: Layout,
    sizes: Sizes,
    kinds: Sequence[str],
    dense_flops: float = 0.0,
    machine: Machine = Machine(),
    selected_share: float = 1.0,
    kind: str = "given",
) -> Prediction:
    """What a step under a layout costs each rank."""
    compute = by_rank(token_flops(packing, sizes, kinds, dense_flops), layout) / machine.flops_per_s
    received = received_bytes(packing, layout, sizes, kinds, selected_share) / machine.bytes_per_s
    return Prediction(kind, layout, compute, received)


def choose_layout(
    packing: Packing,
    ranks: int,
    sizes: Sizes,
    kinds: Sequence[str],
    dense_flops: float = 0.0,
    machine: Machine = Machine(),
    selected_share: float = 1.0,
    among: Sequence[str] = (*LAYOUTS, "uneven"),
) -> Prediction:
    """The layout whose slowest rank is fastest; of nearly equal ones the first."""
    block, best = packing.spec.select_block, None
    for kind in among:
        if kind == "uneven":
            layout = uneven_layout(token_flops(packing, sizes, kinds, dense_flops), ranks, block)
        else:
            layout = make_layout(kind, packing.tokens, ranks, block)
        found = predict(packing, layout, sizes, kinds, dense_flops, machine, selected_share, kind)
        if best is None or found.seconds < _GAIN * best.seconds:
            best = found
    assert best is not None
    return best


def part_tokens(layout: Layout) -> Ints:
    """[P]: tokens that each rank holds."""
    return np.bincount(layout.owner, np.diff(layout.cuts), minlength=layout.ranks).astype(np.int64)
