"""The decoder on one rank: packed documents are apart, and rotary positions are as published."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nsa_dist.attention import Rope
from nsa_dist.config import Config, ModelConfig, load_config, nsa_spec
from nsa_dist.data import IGNORED
from nsa_dist.kernels.packing import Packing
from nsa_dist.model import Decoder
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.mesh import make_mesh
from nsa_dist.parallel.sequence import ShardedSequence
from tests.conftest import run_ranks

RECIPE = """
model: {layers: 3, width: 16, heads: 4, kv_heads: 2, head_dim: 4, ffn: 16, init_std: 0.5}
nsa: {compress_block: 8, compress_stride: 4, select_block: 16, select_count: 4, window: 24}
"""


def losses(config: Config, documents: list[list[int]]) -> list[list[float]]:
    """Each token's loss, of documents that are packed into one sequence; a label is a token itself."""
    axis = make_mesh(1, 1, 0, "cpu").cp
    torch.manual_seed(0)
    model = Decoder(config, 32).double()
    lengths = [len(d) for d in documents]
    packing = Packing(np.cumsum([0, *lengths]), nsa_spec(config.nsa))
    layout = make_layout("contiguous", packing.tokens, 1, 16)
    sequence = ShardedSequence(packing, layout, axis, torch.device("cpu"), torch.float64)
    tokens = torch.tensor([t for d in documents for t in d])
    labels = tokens.roll(-1).masked_fill(
        torch.isin(torch.arange(len(tokens)), torch.tensor(lengths).cumsum(0) - 1), IGNORED
    )
    return [part.tolist() for part in model(tokens, labels, sequence).split(lengths)]


def packed_and_alone(config: Config, documents: list[list[int]]) -> tuple[list[list[float]], list[list[float]]]:
    return losses(config, documents), [losses(config, [d])[0] for d in documents]


@pytest.mark.parametrize("kinds", ["[nsa]", "[full,window,nsa]"])
def test_a_packed_document_is_as_if_alone(tmp_path: Path, kinds: str) -> None:
    """Nothing crosses its edges: neither keys nor positions."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 32, n).tolist() for n in (37, 1, 90, 8, 150, 7)]
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    config = load_config(str(tmp_path / "recipe.yaml"), [f"model.attention={kinds}"])
    ((packed, alone),) = run_ranks(1, packed_and_alone, config, documents)
    for found, wanted in zip(packed, alone, strict=True):
        assert found == pytest.approx(wanted, rel=1e-10)


def turned(model: ModelConfig, position: int) -> torch.Tensor:
    """The vector of each pair (1, 0) after the turn, as complex numbers [D / 2]."""
    half = model.head_dim // 2
    x = torch.cat([torch.ones(half), torch.zeros(half)]).double().view(1, 1, -1)
    a, b = Rope(model)(x, torch.tensor([position])).flatten().chunk(2)
    return torch.complex(a, b)


def test_rotary_positions_are_those_of_the_papers() -> None:
    """Pair i turns by position * base ** (-2i / D); YaRN slows the pairs that turn less than 32 times over the
    original length, wholly below 1 turn, and scales by 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3)."""
    plain = ModelConfig(head_dim=64, rope_base=10000.0, yarn_original=4096)
    exponent = -torch.arange(0, 64, 2, dtype=torch.float64) / 64
    frequency = 10000.0**exponent
    torch.testing.assert_close(turned(plain, 1000), torch.polar(torch.ones(32).double(), 1000 * frequency))

    found = turned(replace(plain, yarn_factor=8.0), 1)
    turns = 4096 * frequency / (2 * math.pi)
    magnitude = torch.full((32,), 0.1 * math.log(8) + 1, dtype=torch.float64)
    torch.testing.assert_close(found.abs(), magnitude)
    torch.testing.assert_close(found.angle()[turns > 32], frequency[turns > 32])
    torch.testing.assert_close(found.angle()[turns < 1], frequency[turns < 1] / 8)
    between = (turns > 1) & (turns < 32)
    share = (turns[between] - 1) / 31
    torch.testing.assert_close(found.angle()[between], frequency[between] * (share + (1 - share) / 8))
