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

# Weights large enough for uneven softmaxes.
RECIPE = """
model: {layers: 3, width: 24, heads: 4, kv_heads: 2, head_dim: 4, value_dim: 6, ffn: 32, init_std: 0.2}
nsa: {compress_block: 8, compress_stride: 4, select_block: 16, select_count: 4, window: 24}
data: {seq_len: 301, batch_size: 2, validation: 0}
train: {dtype: float64}
launch: {device: cpu}
"""
EVERY_KIND = ["model.attention=[nsa,window,full]"]
SHARED = ["model.attention=[nsa]", "model.tie_embeddings=true", "nsa.share_kv=true", "nsa.compression=mean"]
SHARED += ["nsa.span=100", "nsa.span_blocks=2", "nsa.span_prefetch=0.5", "nsa.span_pool=48"]
Gradients = dict[str, NDArray[np.float64]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on packed documents of odd lengths."""
    folder = tmp_path_factory.mktemp("gradients")
    letters = "".join(chr(97 + (i * i + i // 7) % 23) for i in range(500))
    lines = [json.dumps({"text": letters[i : i + n]}) for i, n in enumerate([333, 1, 7, 150, 31, 64, 2, 97] * 3)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    (folder / "recipe.yaml").write_text(RECIPE)
    prepare_all(configurations(folder / "recipe.yaml")[0].data, lambda text: None)
    return folder / "recipe.yaml"


def configurations(recipe: Path, *words: str) -> list[Config]:
    base = [f"data.source={recipe.with_name('text.jsonl')}", f"data.cache_dir={recipe.with_name('cache')}", *words]
    return [load_config(str(recipe), base + variant) for variant in (EVERY_KIND, SHARED)]


def gradients(configs: list[Config]) -> list[Gradients]:
    """Of each configuration's first step: every parameter's gradient by its name, and the loss."""
    results, device = [], torch.device("cpu")
    for config in configs:
        mesh = make_mesh(config.parallel.dp, config.parallel.cp, config.parallel.shard, "cpu")
        corpus, _ = open_corpora(config.data)
        model, _ = build(config, corpus.vocab_size, mesh, device)
        batches = Reader(config, mesh, device).training(corpus, 1)
        loss, _ = forward_backward(config, model, batches, mesh)
        found = {name: whole(p.grad).numpy() for name, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == dict(model.named_parameters()).keys()
        results.append(found | {"loss": np.array(loss)})
    return results


@pytest.fixture(scope="module")
def one_rank(recipe: Path) -> list[Gradients]:
    (results,) = run_ranks(1, gradients, configurations(recipe))
    return results


@pytest.mark.parametrize(("cp", "dp", "layout"), [(2, 2, "auto"), (3, 1, "zigzag"), (6, 1, "uneven")])
def test_every_gradient_is_that_of_one_rank(
    recipe: Path, one_rank: list[Gradients], cp: int, dp: int, layout: str
) -> None:
    cut = [f"parallel.cp={cp}", f"parallel.dp={dp}", f"parallel.layout={layout}"]
    for results in run_ranks(cp * dp, gradients, configurations(recipe, *cut)):
        for found, wanted in zip(results, one_rank, strict=True):
            for name, gradient in wanted.items():
                size = float(np.linalg.norm(gradient))
                assert size > 0, name
                assert np.linalg.norm(found[name] - gradient) <= 1e-9 * size, name
