"""What trained models select, and what an exchange would send for it: computed from the bits, no run took place."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nsa_dist.errors import ConfigError
from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.layout import Layout, make_layout
from nsa_dist.parallel.plan import Bools
from nsa_dist.parallel.traffic import Sizes, Traffic, TrafficModel, add_traffic

NEEDS_64K = Path(__file__).parent / "needs_64k_0.npz"
EXCHANGES = ("nsa", "groupcast", "allgather", "ring")  # and Ulysses, where its degree divides the KV heads

Means = dict[tuple[str, str], tuple[NDArray[np.float64], NDArray[np.float64]]]


@dataclass(frozen=True)
class Needs:
    """What the queries of one sequence, one document, selected: of each group of `block` queries the blocks.

    `bits [layers, G, groups, NB / 8]`: numpy's packed bits; there are as many groups as blocks.
    """

    bits: NDArray[np.uint8]
    block: int

    @property
    def tokens(self) -> int:
        return self.bits.shape[2] * self.block

    @property
    def kv_heads(self) -> int:
        return self.bits.shape[1]


@dataclass(frozen=True)
class TraceTraffic:
    """Bytes of one NSA layer, the mean over the trace's layers; `traffic[exchange][kind, phase]`: sent, received."""

    tokens: int
    layers: int
    layout: str
    ranks: int
    sizes: Sizes
    traffic: dict[str, Means]


def load_needs(file: Path) -> Needs:
    """Reads a trace: `needs [layers, G, groups, NB / 8]`, uint8. Raises ConfigError for a file that holds none."""
    try:
        bits = np.load(file, allow_pickle=False)["needs"]
    except (OSError, ValueError, KeyError, IndexError, zipfile.BadZipFile) as error:
        raise ConfigError(f"trace '{file}': must be an .npz file that holds 'needs' ({error})") from None
    if bits.ndim != 4 or bits.dtype != np.uint8 or bits.shape[2] != 8 * bits.shape[3]:
        shape = f"{bits.dtype} {list(bits.shape)}"
        raise ConfigError(f"trace '{file}': needs is {shape}; must be uint8 [layers, KV heads, groups, groups / 8]")
    return Needs(bits, NSASpec().select_block)


def rank_needs(needs: Needs, layout: Layout) -> Bools:
    """[layers, P, G, NB]: the blocks that any query of each rank selected. Segments are whole groups of queries."""
    owner = layout.owner_of(np.arange(needs.bits.shape[2]) * needs.block)
    union = [np.bitwise_or.reduce(needs.bits[:, :, owner == rank], axis=2) for rank in range(layout.ranks)]
    return np.unpackbits(np.stack(union, axis=1), axis=-1).astype(bool)


def trace_traffic(needs_file: Path, layout: str, ranks: int, sizes: Sizes) -> TraceTraffic:
    """What one layer sends under each exchange when its queries select what those of a trace did.

    layout: `contiguous` or `zigzag`. sizes.groups must be the trace's KV heads. A pure function of its arguments
    and the file; raises ConfigError for a file that is no trace, and for what can't be cut so.
    """
    needs = load_needs(needs_file)
    segments = ranks * (2 if layout == "zigzag" else 1)
    if not 1 <= segments <= needs.bits.shape[2]:
        raise ConfigError(
            f"ranks={ranks}: must be at least 1, and {layout} segments no more than the {needs.bits.shape[2]} blocks"
        )
    if sizes.groups != needs.kv_heads:
        raise ConfigError(f"KV heads={sizes.groups}: must be {needs.kv_heads}, as in trace '{needs_file}'")
    packing = Packing(np.array([0, needs.tokens]), NSASpec())
    model = TrafficModel(packing, make_layout(layout, needs.tokens, ranks, needs.block), sizes)
    bits_LPGB = rank_needs(needs, model.layout)
    exchanges = EXCHANGES + (() if sizes.groups % ranks else ("ulysses",))
    traffic = {
        name: _mean([model.nsa(name, bits) for bits in (bits_LPGB if name == "nsa" else bits_LPGB[:1])])
        for name in exchanges
    }
    return TraceTraffic(needs.tokens, len(bits_LPGB), layout, ranks, sizes, traffic)


def ulysses_bytes(tokens: int, ranks: int, sizes: Sizes) -> float:
    """Received by a rank in a forward, by formula: q, output and one branch's KV, copied to one head a rank at least.

    (P-1)/P * L * (Dk + Dv) * (H + max(G, P)) numbers: where P is above G, NSA can't be cut by heads at all.
    """
    per_token = (sizes.dk + sizes.dv) * (sizes.heads + max(sizes.groups, ranks)) * sizes.element_bytes
    return (ranks - 1) / ranks * (tokens / ranks) * per_token


def _mean(layers: list[Traffic]) -> Means:
    total: Traffic = {}
    for layer in layers:
        add_traffic(total, layer)
    return {key: (flow[0] / len(layers), flow[1] / len(layers)) for key, flow in total.items()}
