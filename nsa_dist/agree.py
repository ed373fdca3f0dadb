"""What must be the same on several ranks is compared before they exchange anything, and named rank by rank.

Every rank sees the same, so that all of them end with the same line, and none waits for another.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nsa_dist.config import Config, ConfigError
from nsa_dist.parallel.exchange import all_gather
from nsa_dist.parallel.mesh import Mesh
from nsa_dist.parallel.sequence import ShardedSequence


def check_same(config: Config) -> None:
    """Raises ConfigError on all ranks, naming key and ranks, where the ranks' configurations differ."""
    every: list[dict[str, Any]] = _gathered(asdict(config))
    for section, values in every[0].items():
        for name in values:
            _require_same(f"{section}.{name}=", [other[section][name] for other in every])


def check_data(sha256: str, vocab_size: int) -> None:
    """Raises ConfigError on all ranks where their prepared tokens differ."""
    every = _gathered((sha256, vocab_size))
    _require_same("data.source: tokens with digest ", [digest[:12] for digest, _ in every])
    _require_same("data.tokenizer: vocabulary of ", [size for _, size in every])


def check_step(mesh: Mesh, step: int, sequences: Sequence[ShardedSequence]) -> None:
    """Raises ConfigError on all ranks where a step's number, or the sequences that ranks share, differ."""
    tokens = sum(sequence.packing.tokens for sequence in sequences)
    device = torch.device(mesh.parameters.device_type)
    facts = torch.tensor([step, len(sequences), tokens, _digest(sequences)], device=device)
    every = all_gather(mesh.world, facts, "control", "forward").wait().cpu().tolist()
    _require_same("step ", [numbers[0] for numbers in every])
    for first in range(0, mesh.world.size, mesh.cp.size):
        group = every[first : first + mesh.cp.size]
        words = [f"{n} of {total:,} tokens, digest {digest & 0xFFFFFFFF:08x}" for _, n, total, digest in group]
        _require_same(f"step {step}: sequences (documents and cuts) ", words, first)


def _digest(sequences: Sequence[ShardedSequence]) -> int:
    """Of documents and cuts: 63 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for sequence in sequences:
        for array in (sequence.packing.cu, sequence.layout.cuts, sequence.layout.owner):
            digest.update(np.ascontiguousarray(array).tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def _gathered(value: Any) -> list[Any]:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _require_same(what: str, values: Sequence[Any], first: int = 0) -> None:
    """values: of rank `first` and those after it."""
    kinds = list(dict.fromkeys(map(repr, values)))
    if len(kinds) == 1:
        return
    ranks = {kind: [first + i for i, value in enumerate(values) if repr(value) == kind] for kind in kinds}
    parts = [f"{values[at[0] - first]} on rank{'s' * (len(at) > 1)} {_listed(at)}" for at in ranks.values()]
    raise ConfigError(f"{what}{', '.join(parts)}: must be the same on all of them")


def _listed(ranks: list[int]) -> str:
    few = ", ".join(map(str, ranks[:8]))
    return few if len(ranks) <= 8 else f"{few} and {len(ranks) - 8} more"
