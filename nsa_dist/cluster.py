"""A cluster as `nsa-dist plan` sees it: how many GPUs, their memory, what they reach, what goes between them."""

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from nsa_dist.errors import ConfigError
from nsa_dist.kernels.packing import Ints

FREE = 0.9  # share of a GPU's memory that tensors may take: contexts, communicators and fragments need the rest


@dataclass(frozen=True)
class Cluster:
    """gpus in all, per_node of them in a node. Rates are what is reached, not what a data sheet says.

    tflops: of matrix products; attention_tflops: of attention, forward and backward together. inside_gb_s,
    between_gb_s: bytes that a GPU receives from others of its node, and from other nodes.
    """

    gpus: int = 8
    per_node: int = 8
    memory_gb: float = 141
    tflops: float = 450
    attention_tflops: float = 300
    inside_gb_s: float = 300
    between_gb_s: float = 40

    def nodes(self, ranks: int) -> Ints:
        """[ranks]: each rank's node, filled one after the other."""
        return np.arange(ranks, dtype=np.int64) // self.per_node


# Matrix products at 45% of the data sheet's dense bfloat16; attention as measured on an H200 and an H100 at 64k
# tokens, on the others in proportion; two thirds of NVLink's one direction; 80% of one network card a GPU.
PRESETS = {
    "h200": Cluster(),
    "h100": Cluster(memory_gb=80, attention_tflops=250),
    "a100": Cluster(memory_gb=80, tflops=140, attention_tflops=93, inside_gb_s=200, between_gb_s=20),
    "b200": Cluster(memory_gb=180, tflops=1000, attention_tflops=670, inside_gb_s=600, between_gb_s=40),
}


def make_cluster(preset: str, given: dict[str, str]) -> Cluster:
    """A preset with what is given (by field, as text) in place of its own. Raises ConfigError."""
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, 1)
        hint = f"; nearest: {near[0]}" if near else ""
        raise ConfigError(f"--cluster {preset}: must be one of {', '.join(PRESETS)}{hint}")
    kinds = {f.name: f.type for f in fields(Cluster)}
    numbers: dict[str, Any] = {name: _number(name, text, kinds[name] is int) for name, text in given.items()}
    return replace(PRESETS[preset], **numbers)


def _number(name: str, text: str, whole: bool) -> float:
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = 0
    if not value > 0 or not math.isfinite(value):
        allowed = "an integer of at least 1" if whole else "a number above 0"
        raise ConfigError(f"--{name.replace('_', '-')} {text}: must be {allowed}")
    return value
