"""What other exchanges would have sent for a run's own sequences and layout: computed, not run."""

import numpy as np
import torch

from nsa_dist.config import Config, layer_kinds
from nsa_dist.kernels.packing import Ints
from nsa_dist.parallel.ledger import FIELDS, KINDS, PHASES
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.parallel.traffic import Sizes, Traffic, TrafficModel, add_traffic

RIVALS = ("allgather", "groupcast", "ring", "ulysses")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def grad_dtype(config: Config) -> torch.dtype:
    """In which gradients travel: `parallel.grad_dtype`, but float64 where a float64 run says float32."""
    wanted = config.parallel.grad_dtype
    return DTYPES["float64" if (config.train.dtype, wanted) == ("float64", "float32") else wanted]


def layer_sizes(config: Config) -> Sizes:
    """Sizes of one attention layer of a configuration."""
    model = config.model
    bytes_ = DTYPES[config.train.dtype].itemsize, grad_dtype(config).itemsize
    return Sizes(model.heads, model.kv_heads, model.head_dim, model.value_dim or model.head_dim, *bytes_)


def rival_traffic(name: str, model: TrafficModel, kinds: list[str]) -> Traffic | None:
    """Traffic of all layers under a rival; None where it can't run (Ulysses above the KV heads).

    NSA layers under `ring`: that of full attention over one branch's KV. Window layers are the same for all.
    """
    ranks, groups = model.layout.ranks, model.sizes.groups
    if name == "ulysses" and groups % ranks:
        return None
    total: Traffic = {}
    layers = {"nsa": lambda: model.nsa(name), "full": lambda: model.full(name), "window": model.window}
    for kind in sorted(set(kinds)):
        add_traffic(total, layers[kind](), kinds.count(kind))
    return total


def rival_tables(config: Config, sequence: ShardedSequence) -> Ints:
    """[rivals, kinds, phases, fields]: this rank's bytes; -1 throughout for a rival that can't run."""
    tables = np.zeros((len(RIVALS), len(KINDS), len(PHASES), len(FIELDS)), np.int64)
    axis = sequence.axis
    model = TrafficModel(sequence.packing, sequence.layout, layer_sizes(config), axis.nodes)
    for i, name in enumerate(RIVALS):
        traffic = rival_traffic(name, model, layer_kinds(config.model))
        if traffic is None:
            tables[i] = -1
            continue
        for (kind, phase), flow in traffic.items():
            tables[i, KINDS.index(kind), PHASES.index(phase)] = flow[:, axis.rank]
    return tables
