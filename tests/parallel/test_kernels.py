"""Context parallelism with Triton's kernels, under the interpreter, against one rank: what a GPU's ranks run."""

from unittest import mock

import pytest
import torch

from nsa_dist import check_gpus
from nsa_dist.kernels import NSASpec, tuning
from nsa_dist.kernels.implementations import Implementation, implementation
from nsa_dist.parallel import attention
from nsa_dist.parallel.mesh import make_mesh
from tests.conftest import run_ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available() or not tuning.interpreted(), reason="no interpreter")


def by_triton(q: torch.Tensor) -> Implementation:
    return implementation(q, "triton")


def check(ranks: int) -> list[str]:
    """What differs from one rank; the cuts lie inside compressed tokens, blocks and documents."""
    with (
        mock.patch.object(attention, "implementation", by_triton),
        mock.patch.object(check_gpus, "SPEC", NSASpec(8, 4, 16, 4, 1, 2, 24)),
        mock.patch.object(check_gpus, "NSA_EXCHANGES", ("nsa",)),
        mock.patch.object(check_gpus, "FULL_EXCHANGES", ("ring",)),
    ):
        tuning.launches.clear()
        rows = check_gpus.check_attention(make_mesh(1, ranks, 0, "cpu"), "float32", 109, 1, 24, 16, 2)
        assert tuning.launches["range_dkv"] and tuning.launches["block_backward"]
    return [str(row) for row in rows if not row["fine"]]


def test_equals_one_rank() -> None:
    assert run_ranks(2, check, 2) == [[], []]
