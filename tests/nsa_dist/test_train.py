"""The whole step on any number of ranks: equal losses and gradients, whatever the cut; resuming; bad steps."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_dist.config import Config, load_config
from nsa_dist.data import prepare_all
from nsa_dist.metrics import read_metrics
from nsa_dist.rundir import Resume, own_checkpoints
from nsa_dist.train import train
from tests.conftest import run_ranks

STEPS = 12
SMALL = """
model: {layers: 2, width: 24, heads: 4, kv_heads: 2, head_dim: 4, value_dim: 6, ffn: 32, attention: [nsa]}
nsa: {compress_block: 8, compress_stride: 4, select_block: 16, select_count: 5, window: 24}
train: {lr: 3e-3, warmup_steps: 3, checkpoint_every: 0, validate_every: 6, validation_sequences: 3, dtype: float64}
data: {seq_len: 301, batch_size: 2, validation: 0.2}
launch: {device: cpu}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on packed documents of odd lengths: 1, 7, 31, 64, 65, 333 bytes and so on."""
    folder = tmp_path_factory.mktemp("small")
    lengths = [1, 7, 31, 333, 64, 65, 2, 150, 97, 400, 5, 12] * 6
    words = [
        "the",
        "rank",
        "sends",
        "its",
        "block",
        "to",
        "another",
        "rank",
        "and",
        "adds",
        "the",
        "parts",
        "in",
        "order",
    ]
    text = " ".join(words[(i * i + i // 7) % len(words)] for i in range(4000))
    lines = [json.dumps({"text": text[i * 40 : i * 40 + n]}) for i, n in enumerate(lengths)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    (folder / "small.yaml").write_text(SMALL)
    return folder


def configure(recipe: Path, *words: str) -> Config:
    base = [f"data.source={recipe / 'text.jsonl'}", f"data.cache_dir={recipe / 'cache'}", f"train.steps={STEPS}"]
    return load_config(str(recipe / "small.yaml"), base + list(words))


def train_all(configs: list[Config], resume: Resume) -> None:
    for config in configs:
        train(config, resume, lambda event: None)


def runs(configs: list[Config], folder: Path, resume: Resume | None = None) -> list[list[dict[str, Any]]]:
    """The records of runs, one after the other, on as many processes as the configurations say."""
    placed = [replace(c, run=replace(c.run, dir=str(folder / str(i)))) for i, c in enumerate(configs)]
    prepare_all(configs[0].data, lambda text: None)
    parallel = configs[0].parallel
    run_ranks(parallel.dp * parallel.cp, train_all, placed, resume or Resume((), True))
    return [read_metrics(config.run.dir) for config in placed]


def differences(records: list[dict[str, Any]], wanted: list[dict[str, Any]], key: str) -> list[float]:
    assert len(records) == len(wanted) == STEPS
    return [abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(records, wanted, strict=True)]


CUTS = [(cp, dp, layout) for cp in (2, 3, 4, 6) for dp in (1,) for layout in ("contiguous", "zigzag")]
CUTS += [(1, 2, "contiguous"), (2, 2, "zigzag"), (3, 2, "contiguous")]


@pytest.fixture(scope="module")
def one_rank(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    return runs(both(recipe), tmp_path_factory.mktemp("one-rank"))


def both(recipe: Path, *words: str) -> list[Config]:
    return [configure(recipe, f"train.dtype={dtype}", *words) for dtype in ("float64", "float32")]


@pytest.mark.parametrize(("cp", "dp", "layout"), CUTS)
def test_the_number_of_ranks_changes_nothing(
    recipe: Path, tmp_path: Path, one_rank: list[list[dict[str, Any]]], cp: int, dp: int, layout: str
) -> None:
    words = [f"parallel.cp={cp}", f"parallel.dp={dp}", f"parallel.layout={layout}"]
    strict, rough = runs(both(recipe, *words), tmp_path)
    for key in ("loss", "grad_norm"):
        assert max(differences(strict, one_rank[0], key)) < 1e-9
    assert strict[-1]["validation"]["loss"] == pytest.approx(one_rank[0][-1]["validation"]["loss"], rel=1e-9)
    single = differences(rough, one_rank[1], "loss")
    assert single[0] < 1e-6
    assert single[-1] < 1e-4


OPTIONS = [
    ["parallel.exchange=allgather"],
    ["parallel.exchange=groupcast", "train.activation_checkpoint=layer"],
    ["parallel.exchange=ulysses", "parallel.cp=2", "train.activation_checkpoint=layer"],
    ["parallel.exchange_max_bytes=2000", "train.activation_checkpoint=layer"],
    ["parallel.cp=2", "parallel.dp=2", "parallel.shard=2", "parallel.layout=zigzag"],
]


@pytest.mark.parametrize("words", OPTIONS, ids=" ".join)
def test_no_option_of_the_exchange_changes_the_losses(
    recipe: Path, tmp_path: Path, one_rank: list[list[dict[str, Any]]], words: list[str]
) -> None:
    (records,) = runs([configure(recipe, "parallel.cp=3", *words)], tmp_path)
    assert max(differences(records, one_rank[0], "loss")) < 1e-9
    assert max(differences(records, one_rank[0], "grad_norm")) < 1e-9


@pytest.mark.parametrize("exchange", ["ring", "allgather", "ulysses"])
def test_full_and_window_layers_on_two_ranks(recipe: Path, tmp_path: Path, exchange: str) -> None:
    words = ["model.attention=[full,window,nsa]", "model.layers=3", "nsa.share_kv=true", "nsa.compression=mean"]
    words += [f"parallel.full_exchange={exchange}", "parallel.layout=zigzag", "model.yarn_factor=4"]
    (one,) = runs([configure(recipe, *words)], tmp_path / "1")
    (two,) = runs([configure(recipe, "parallel.cp=2", *words)], tmp_path / "2")
    assert max(differences(two, one, "loss")) < 1e-9
    assert max(differences(two, one, "grad_norm")) < 1e-9


def test_recomputing_a_layer_sends_nothing_twice(recipe: Path, tmp_path: Path) -> None:
    words = ["parallel.cp=2", "train.steps=2"]
    kept, recomputed = (
        runs([configure(recipe, *words, f"train.activation_checkpoint={kind}")], tmp_path / kind)[0]
        for kind in ("none", "layer")
    )
    for a, b in zip(kept, recomputed, strict=True):
        traffic = [{k: v for k, v in r["comm"].items() if k not in ("parameters", "compress_halo")} for r in (a, b)]
        assert traffic[0] == traffic[1]
        assert a["comm"]["compress_halo"]["forward"] == b["comm"]["compress_halo"]["forward"]
        assert a["loss"] == b["loss"]


def test_a_rank_of_nothing_and_documents_shorter_than_a_compressed_token(recipe: Path, tmp_path: Path) -> None:
    """13 blocks on 2 x 6 zigzag segments leave ranks without a token; no document has a compressed token."""
    lines = [json.dumps({"text": "abc" * (i % 2) + "de"}) for i in range(400)]
    (recipe / "short.jsonl").write_text("\n".join(lines))
    words = [f"data.source={recipe / 'short.jsonl'}", "data.seq_len=200", "train.steps=3"]
    (one,) = runs([configure(recipe, *words)], tmp_path / "1")
    (six,) = runs([configure(recipe, *words, "parallel.cp=6", "parallel.layout=zigzag")], tmp_path / "6")
    for a, b in zip(six, one, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-9)


def test_resumed_losses_are_those_of_the_whole_run(recipe: Path, tmp_path: Path) -> None:
    words = ["train.dtype=float32", "train.checkpoint_every=5", "parallel.cp=2"]
    (whole,) = runs([configure(recipe, *words)], tmp_path)
    expected = [r["loss"] for r in whole]
    for ranks in (2, 3):
        folder = tmp_path / f"resumed-{ranks}"
        shutil.copytree(tmp_path / "0", folder / "0")
        shutil.rmtree(folder / f"0/checkpoints/step-{STEPS}")
        config = configure(recipe, *words, f"parallel.cp={ranks}", f"run.dir={folder / '0'}")
        resume = own_checkpoints(config)
        assert resume.checkpoints[0].name == "step-10"
        (resumed,) = runs([config], folder, resume)
        found = [r["loss"] for r in resumed]
        assert [r["step"] for r in resumed] == list(range(1, STEPS + 1))
        assert found == expected if ranks == 2 else found == pytest.approx(expected, rel=1e-4)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(recipe: Path, tmp_path: Path) -> None:
    config = configure(recipe, "train.lr=1e30", "train.warmup_steps=0", "train.checkpoint_every=1", "train.clip=0")
    with pytest.raises(pytest.fail.Exception, match=r"TrainingError: (loss|grad_norm)=(nan|inf) at step"):
        runs([config], tmp_path)
    newest = own_checkpoints(replace(config, run=replace(config.run, dir=str(tmp_path / "0")))).checkpoints[0]
    stored = dcp_values(newest)
    assert stored and all(torch.isfinite(value).all() for value in stored)


def test_a_step_that_overflows_leaves_no_checkpoint(recipe: Path, tmp_path: Path) -> None:
    words = ["train.dtype=float32", "train.warmup_steps=0", "train.checkpoint_every=1"]
    words += ["model.init_std=10", "train.lr=1e18", "train.weight_decay=3e20"]  # 10 x 3e38 is no float32
    with pytest.raises(pytest.fail.Exception, match=r"TrainingError: parameters after step 1: must be finite"):
        runs([configure(recipe, *words)], tmp_path)
    assert not list((tmp_path / "0/checkpoints").glob("step-*"))


def dcp_values(checkpoint: Path) -> list[torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    return list(_load_state_dict_from_keys(storage_reader=FileSystemReader(checkpoint)).values())


def train_apart(config: Config) -> None:
    if torch.distributed.get_rank() == 1:
        config = replace(config, train=replace(config.train, lr=1.0))
    train(config, Resume((), True), lambda event: None)


def test_ranks_with_other_configurations_are_named(recipe: Path, tmp_path: Path) -> None:
    config = configure(recipe, "parallel.cp=2", f"run.dir={tmp_path}")
    prepare_all(config.data, lambda text: None)
    with pytest.raises(
        pytest.fail.Exception, match=r"train.lr=0.003 on rank 0, 1.0 on rank 1: must be the same on all of them"
    ):
        run_ranks(2, train_apart, config)


def test_other_text_under_the_same_name_is_not_gone_on_with(recipe: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one text " * 300)
    config = configure(recipe, f"data.source={text}", "train.steps=2", f"run.dir={tmp_path / '0'}")
    runs([config], tmp_path)
    text.write_text("another text " * 300)
    longer = replace(config, train=replace(config.train, steps=4))
    with pytest.raises(pytest.fail.Exception, match=r"data.source: its tokens are not those of step 2"):
        runs([longer], tmp_path, own_checkpoints(longer))
