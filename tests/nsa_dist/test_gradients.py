"""Every parameter's whole gradient after one step, on any number of ranks: that of one rank."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nsa_dist.config import Config, load_config
from nsa_dist.data import open_corpora, prepare_all
from nsa_dist.parallel.mesh import make_mesh
from nsa_dist.parallel.parameters import whole
from nsa_dist.train import Reader, build, forward_backward
from tests.conftest import run_ranks

RECIPE = """
model: {layers: 3, width: 24, heads: 4, kv_heads: 2, head_dim: 4, value_dim: 6, ffn: 32, init_std: 0.2}
nsa: {compress_block: 8, compress_stride: 4, select_block: 16, select_count: 4, window: 24}
data: {seq_len: 301, batch_size: 2, validation: 0}
train: {dtype: float64}
launch: {device: cpu}
"""
EVERY_KIND = ["model.attention=[nsa,window,full]"]
SHARED = ["model.attention=[nsa]", "model.tie_embeddings=true", "nsa.share_kv=true", "nsa.compression=mean"]
Gradients = dict[str, NDArray[np.float64]]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A configuration on packed documents of odd lengths, prepared; weights large enough for uneven softmaxes."""
    folder = tmp_path_factory.mktemp("gradients")
    letters = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(500))
    lengths = [333, 1, 7, 150, 31, 64, 2, 97, 65, 12] * 3
    lines = [json.dumps({"text": letters[i : i + n]}) for i, n in enumerate(lengths)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    words = [*WORDS, f"data.source={folder / 'text.jsonl'}", f"data.cache_dir={folder / 'cache'}"]
    prepare_all(load_config(None, words).data, lambda text: None)
    return words


Gradients = dict[str, NDArray[np.float64]]


def gradients(configs: list[Config]) -> list[Gradients]:
    """Of each configuration's first step: the loss, and every parameter's gradient by its name."""
    results = []
    for config in configs:
        mesh = make_mesh(config.parallel.dp, config.parallel.cp, config.parallel.shard, "cpu")
        corpus, _ = open_corpora(config.data)
        model, _ = build(config, corpus.vocab_size, mesh, torch.device("cpu"))
        batches = Reader(config, mesh, torch.device("cpu")).training(corpus, 1)
        loss, _ = forward_backward(config, model, batches, mesh)
        found = {name: whole(p.grad).numpy() for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == dict(model.named_parameters()).keys()
        results.append(found | {"loss": np.array(loss)})
    return results


VARIANTS: list[list[str]] = [[], ["model.tie_embeddings=true", "nsa.share_kv=true", "nsa.compression=mean"]]


@pytest.fixture(scope="module")
def one_rank(words: list[str]) -> list[Gradients]:
    (results,) = run_ranks(1, gradients, [load_config(None, words + variant) for variant in VARIANTS])
    return results


@pytest.mark.parametrize(
    ("cp", "dp", "layout"), [(2, 2, "contiguous"), (3, 1, "zigzag"), (5, 1, "zigzag"), (6, 1, "contiguous")]
)
def test_every_gradient_is_that_of_one_rank(
    words: list[str], one_rank: list[Gradients], cp: int, dp: int, layout: str
) -> None:
    cut = [f"parallel.cp={cp}", f"parallel.dp={dp}", f"parallel.layout={layout}"]
    configs = [load_config(None, [*words, *variant, *cut]) for variant in VARIANTS]
    for results in run_ranks(cp * dp, gradients, configs):
        for found, wanted in zip(results, one_rank, strict=True):
            for name, gradient in wanted.items():
                size = float(np.linalg.norm(gradient))
                assert size > 0, name
                assert np.linalg.norm(found[name] - gradient) <= 1e-9 * size, name
