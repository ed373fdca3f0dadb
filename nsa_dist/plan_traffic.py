"""What a step of a configuration sends: all layers, every kind of traffic, each rank, inside and between nodes.

The same counts as the exchanges' plans and the collectives' ledger give for a run, from the layout alone. Only
what the selection decides is given: as bitmaps, as a share of what a rank may see of others, or not at all.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from nsa_dist.config import Config, layer_kinds
from nsa_dist.kernels.packing import Ints
from nsa_dist.model import Decoder
from nsa_dist.parallel.plan import Bools, Floats
from nsa_dist.parallel.traffic import Traffic, TrafficModel
from nsa_dist.rivals import DTYPES


@dataclass(frozen=True)
class Selection:
    """Of NSA layers under the exchange `nsa`: bitmaps [P, G, NB] of each NSA layer, or the share [P] of the visible
    KV of others that a rank fetches. source: where it is from, for people."""

    source: str
    bits: list[Bools] | None = None
    share: Floats | None = None


def layer_traffic(config: Config, model: TrafficModel, selection: Selection) -> list[tuple[str, Traffic, int]]:
    """What one sequence's layers send, forward and backward: kind of layer, traffic of one, how many of them."""
    kinds, parallel = layer_kinds(config.model), config.parallel
    found = []
    if "nsa" in kinds:
        found += _nsa_layers(config, model, selection, kinds.count("nsa"))
    if "full" in kinds:
        found.append(("full", model.full(parallel.full_exchange), kinds.count("full")))
    if "window" in kinds:
        found.append(("window", model.window(), kinds.count("window")))
    return found


def _nsa_layers(
    config: Config, model: TrafficModel, selection: Selection, count: int
) -> list[tuple[str, Traffic, int]]:
    exchange, row_bytes = config.parallel.exchange, (model.sizes.dk + model.sizes.dv) * model.sizes.element_bytes
    bound = config.parallel.exchange_max_bytes // row_bytes
    each: list[Bools | None] = [None]
    if exchange == "nsa" and selection.bits is not None:
        each = list(selection.bits)
    found = []
    for bits in each:
        traffic = model.nsa(exchange, bits, share_P=selection.share)
        one_round = exchange in ("ulysses", "allgather_heads")
        if bound and not one_round and traffic["selected", "forward"][1].max() // row_bytes > bound:
            traffic["refetch", "backward"] = traffic["selected", "forward"]
        found.append(("nsa", traffic, count // len(each)))
    return found


@dataclass(frozen=True)
class Unit:
    """What FSDP2 gathers at a time: a layer, or all else (`root`). numbers: of its parameters; padded: of one
    rank's part, every parameter cut along its first dimension and padded."""

    name: str
    numbers: int
    padded: int


Shapes = list[tuple[str, list[torch.Size]]]


def parameter_shapes(config: Config, vocabulary: int) -> Shapes:
    """Of each layer's parameters, and last of all others; the model is made without storage."""
    with torch.device("meta"):
        model = Decoder(config, vocabulary)
    layers: list[nn.Module] = list(model.layers)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    root = [p.shape for p in model.parameters() if id(p) not in inside]
    return [*((f"layer {i}", [p.shape for p in x.parameters()]) for i, x in enumerate(layers)), ("root", root)]


def make_units(shapes: Shapes, shard: int) -> list[Unit]:
    """The units of a model over `shard` ranks, the root last."""
    return [
        Unit(
            name,
            sum(shape.numel() for shape in parameters),
            sum(-(-shape[0] // shard) * (shape.numel() // shape[0]) for shape in parameters),
        )
        for name, parameters in shapes
    ]


def parameter_traffic(config: Config, units: list[Unit], nodes: Ints, passes: int) -> Traffic:
    """FSDP2's of `passes` forwards and backwards, of all ranks; counted as rings, as the ledger does."""
    world = len(nodes)
    shard = config.parallel.shard or world
    compute = DTYPES[config.train.dtype]
    size, reduced = compute.itemsize, torch.promote_types(compute, torch.float32).itemsize
    copies = world // shard
    forward = sum(u.padded for u in units) * (shard - 1) * size
    again = sum(u.padded for u in units if u.name != "root") * (shard - 1) * size  # the root stays gathered
    sums = sum(u.padded * (shard - 1) * reduced + 2 * (copies - 1) * u.padded * reduced // copies for u in units)
    rank = np.arange(world)
    before = rank - rank % shard + (rank % shard - 1) % shard
    between = (nodes[before] != nodes).astype(np.int64)
    sent_between = np.zeros(world, np.int64)
    sent_between[before] = between

    def flow(total: int) -> Ints:
        each = np.full(world, total * passes, np.int64)
        return np.stack([each, each, each * sent_between, each * between])

    return {("parameters", "forward"): flow(forward), ("parameters", "backward"): flow(again + sums)}
