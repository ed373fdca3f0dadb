"""Plans against runs: every byte of the ledger, memory as torch counts it; measured selections; bad input."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsa_dist.bench_rows import traffic_tables
from nsa_dist.cli import main
from nsa_dist.cluster import Cluster
from nsa_dist.config import Config, ConfigError, load_config, nsa_spec
from nsa_dist.data import IGNORED
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel import block_plan
from nsa_dist.parallel.attention import NSAExchange
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.ledger import KINDS, as_table
from nsa_dist.parallel.mesh import Mesh, make_mesh
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.parallel.traffic import Sizes, TrafficModel, add_traffic
from nsa_dist.plan import Cut, plans, predict
from nsa_dist.plan_selection import Selections, open_selections, run_share
from nsa_dist.plan_traffic import (
    Selection,
    layer_traffic,
    make_units,
    parameter_shapes,
    parameter_traffic,
)
from nsa_dist.rivals import grad_dtype, layer_sizes
from nsa_dist.traces import NEEDS_64K, trace_traffic
from nsa_dist.train import Batch, build, forward_backward
from tests.conftest import run_ranks

VOCABULARY = 300
SMALL = [
    "launch.device=cpu",
    "data.batch_size=2",
    "model.width=40",
    "model.heads=2",
    "model.head_dim=16",
    "model.value_dim=8",
    "model.layers=3",
    "nsa.select_count=4",
]
CASES = {
    "groupcast": "parallel.cp=3 parallel.exchange=groupcast model.attention=[nsa,full,window]",
    "selected": "parallel.cp=2 parallel.dp=2 parallel.shard=2 parallel.layout=zigzag train.dtype=bfloat16 "
    "model.kv_heads=2 train.activation_checkpoint=layer",
    "rounds": "parallel.cp=2 parallel.exchange_max_bytes=20000 parallel.full_exchange=allgather "
    "parallel.exchange=allgather model.attention=[full,nsa] model.tie_embeddings=true",
}


def batches(config: Config, mesh: Mesh, packing: Packing) -> list[Batch]:
    """The same sequence of random tokens as often as this rank works on one."""
    layout = make_layout(config.parallel.layout, packing.tokens, mesh.cp.size, packing.spec.select_block)
    sequence = ShardedSequence(packing, layout, mesh.cp, torch.device("cpu"), grad_dtype(config))
    tokens = torch.randint(0, VOCABULARY, (packing.tokens,), generator=torch.Generator().manual_seed(1))
    own = tokens[torch.from_numpy(sequence.tokens)]
    labels = torch.where(sequence.position_S > 0, own, IGNORED)
    return [Batch(own, labels, sequence)] * (config.data.batch_size // config.parallel.dp)


def run(config: Config, cu: list[int]) -> tuple[Any, list[Any]]:
    """The ledger's table of a step, and the bitmaps of each NSA layer that fetched by them.

    The forward's plans serve the backward, under checkpointing too: as many are made as there are layers.
    """
    mesh = make_mesh(config.parallel.dp, config.parallel.cp, config.parallel.shard, "cpu")
    bits: list[Any] = []
    whole = NSAExchange._start_bitmaps

    def seen(self: NSAExchange, picks: torch.Tensor) -> Any:
        pending = whole(self, picks)
        bits.append(pending.wait())
        return pending

    NSAExchange._start_bitmaps = seen  # type: ignore[method-assign]
    made, make = [], block_plan.block_plan
    block_plan.block_plan = lambda *args: made.append(1) or make(*args)  # type: ignore[func-returns-value]
    model, _ = build(config, VOCABULARY, mesh, torch.device("cpu"))
    packing = Packing(np.array(cu), nsa_spec(config.nsa))
    mesh.ledger.take()
    forward_backward(config, model, batches(config, mesh, packing), mesh)
    assert config.parallel.exchange != "nsa" or len(made) == config.model.layers
    return as_table(mesh.ledger.take()), [b.numpy() for b in bits]


@pytest.mark.parametrize("case", CASES)
def test_a_run_sends_what_is_planned(case: str) -> None:
    config = load_config(None, SMALL + CASES[case].split())
    parallel, cu = config.parallel, [0, 500, 507, 1200]
    world = parallel.dp * parallel.cp
    results = run_ranks(world, run, config, cu)
    packing = Packing(np.array(cu), nsa_spec(config.nsa))
    layout = make_layout(parallel.layout, packing.tokens, parallel.cp, 64)
    bits = None
    if parallel.exchange == "nsa":  # of the first sequence's layers
        bits = [np.unpackbits(b, axis=-1, count=packing.blocks).astype(bool) for b in results[0][1][:3]]
    model = TrafficModel(packing, layout, layer_sizes(config))
    total: dict[tuple[str, str], Any] = {}
    for _, traffic, times in layer_traffic(config, model, Selection("", bits)):
        add_traffic(total, traffic, times * config.data.batch_size // parallel.dp)
    units = make_units(parameter_shapes(config, VOCABULARY), parallel.shard or world)
    shared = parameter_traffic(config, units, np.zeros(world, np.int64), config.data.batch_size // parallel.dp)
    planned = np.tile(traffic_tables(total, parallel.cp), (parallel.dp, 1, 1, 1)) + traffic_tables(shared, world)
    real = np.stack([table for table, _ in results])
    for i, kind in enumerate(KINDS):
        if kind != "control":
            assert real[:, i].tolist() == planned[:, i].tolist(), kind
    assert real.any() and (real[:, KINDS.index("refetch")].any() == (case == "rounds"))


def peak(config: Config) -> dict[str, int]:
    """Bytes of a second step at its peak, as torch's own tracker of tensors' memory counts them."""
    from torch.distributed._tools.mem_tracker import MemTracker

    mesh = make_mesh(1, config.parallel.cp, 0, "cpu")
    model, optimizer = build(config, VOCABULARY, mesh, torch.device("cpu"))
    step = batches(config, mesh, Packing(np.array([0, config.data.seq_len]), nsa_spec(config.nsa)))
    forward_backward(config, model, step, mesh)
    optimizer.step()
    optimizer.zero_grad()
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        forward_backward(config, model, step, mesh)
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


@pytest.mark.parametrize(
    "words",
    [
        ["train.activation_checkpoint=layer", "model.kv_heads=2"],
        ["train.dtype=bfloat16", "model.kv_heads=4", "model.attention=[nsa,full]"],
        ["model.attention=[nsa,window]", "parallel.layout=zigzag", "model.value_dim=48"],
    ],
)
def test_a_run_takes_the_memory_that_is_planned(words: list[str]) -> None:
    size = ["launch.device=cpu", "parallel.cp=2", "model.layers=4", "data.seq_len=4096", "model.width=128"]
    config = load_config(None, size + words)
    cluster = Cluster(gpus=2)
    shapes = parameter_shapes(config, VOCABULARY)
    planned = predict(config, cluster, Cut(config, cluster, shapes, VOCABULARY, Selections(""))).bytes
    real = max(run_ranks(2, peak, config))
    assert planned == pytest.approx(real, rel=0.15)


def test_a_million_tokens_on_1024_gpus(tmp_path: Path) -> None:
    words = ["data.seq_len=1048576", "model.kv_heads=4", "parallel.cp=auto", "parallel.dp=auto"]
    file = tmp_path / "plan.json"
    assert main(["plan", *words, "--gpus", "1024", "--union", "0.5", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["plan"] == found["choices"][0] and found["plan"]["fits"]
    assert {(c["cp"], c["layout"]) for c in found["choices"]} >= {(1024, "zigzag"), (1, "contiguous")}
    fitting = [c["step_s"] for c in found["choices"] if c["fits"]]
    assert all(a < 1.02 * b for a, b in itertools.pairwise(fitting))
    most = next(c for c in found["choices"] if c["cp"] == 1024 and c["layout"] == "contiguous")
    received = most["kinds"]["selected"]["forward"]["received_bytes"]
    layers, kv, part = 4, 4 * (32 + 32) * 4, 1024
    assert received["max"] == pytest.approx(0.5 * 1023 * part * kv * layers, rel=1e-3)
    # Of 8 ranks of a node at least one wants nearly every block: it crosses once, for half of them to have it.
    between = most["kinds"]["selected"]["forward"]["received_between_nodes_bytes"]
    assert between["max"] == pytest.approx(received["max"] * (1 - 0.5**8) / 8 / 0.5, rel=0.02)


def test_a_trace_gives_each_rank_its_share() -> None:
    config = load_config(None, ["model.kv_heads=2", "model.heads=4", "data.seq_len=65536", "parallel.cp=8"])
    selections = open_selections(config, NEEDS_64K, None, None)
    sizes = Sizes(4, 2, 32, 32, 4, 4)
    for kind in ("contiguous", "zigzag"):
        packing = Packing(np.array([0, 65536]), nsa_spec(config.nsa))
        layout = make_layout(kind, 65536, 8, 64)
        planned = TrafficModel(packing, layout, sizes).nsa("nsa", share_P=selections.of(packing, layout).share)
        counted = trace_traffic(NEEDS_64K, kind, 8, sizes).traffic["nsa"]["selected", "forward"][1]
        assert planned["selected", "forward"][1] == pytest.approx(counted, rel=1e-3)
        # Four times as long: the same shares.
        long = Packing(np.array([0, 1 << 18]), nsa_spec(config.nsa))
        share = selections.of(long, make_layout(kind, 1 << 18, 8, 64)).share
        assert share == pytest.approx(selections.of(packing, layout).share)


def test_a_run_gives_its_share(tmp_path: Path) -> None:
    def bytes_(mean: float) -> dict[str, Any]:
        return {"selected": {"forward": {"received_bytes": {"mean": mean, "max": 2 * mean}}}}

    comms = [bytes_(x) | {"rivals": {"groupcast": bytes_(100)}} for x in (60, 80)]
    lines = [json.dumps({"step": i, "comm": comm}) + "\n" for i, comm in enumerate(comms)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    assert run_share(tmp_path) == 0.7
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "comm": {}}\n')
    with pytest.raises(ConfigError, match="must be the folder of a run whose steps fetched selected KV"):
        run_share(tmp_path)


def test_the_span_rule_bounds_the_plan() -> None:
    config = load_config(None, ["data.seq_len=65536", "parallel.cp=8", "nsa.span=8192", "nsa.span_blocks=16"])
    packing = Packing(np.array([0, 65536]), nsa_spec(config.nsa))
    layout = make_layout("contiguous", 65536, 8, 64)
    share = Selections("").of(packing, layout).share
    assert share is not None
    rows = share[1:] * np.arange(1, 8) * 8192
    assert rows == pytest.approx(np.full(7, (16 + 3) * 64))


def test_too_little_memory_is_told_and_sorted_last() -> None:
    config = load_config(None, ["data.seq_len=65536", "parallel.cp=auto"])
    cluster = Cluster(gpus=4, memory_gb=1)
    found = plans(config, cluster, VOCABULARY, Selections(""))
    fits = [plan.fits for plan in found]
    assert True in fits and False in fits and fits == sorted(fits, reverse=True)
    assert all(plan.fits for plan in plans(config, replace(cluster, memory_gb=100), VOCABULARY, Selections("")))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--between-gb-s 0", "--between-gb-s 0: must be a number above 0"),
        ("--gpus 0", "--gpus 0: must be an integer of at least 1"),
        ("--cluster h20", "--cluster h20: must be one of h200, h100, a100, b200; nearest: h200"),
        ("--union 1.5", "--union 1.5: must be a share above 0, at most 1"),
        ("--union 0.5 --trace x.npz", "--trace, --run, --union: must be one of them at most"),
        ("nsa.span=128 nsa.span_blocks=0", "nsa.span_blocks=0.0: must be at least one block, or a share"),
        ("nsa.span=128 nsa.span_blocks=0.5 nsa.span_prefetch=-1", "nsa.span_prefetch=-1.0: must be"),
        (f"nsa.select_block=32 --trace {NEEDS_64K}", f"--trace {NEEDS_64K}: blocks of about 64 tokens; must be"),
        (f"model.kv_heads=3 model.heads=3 --trace {NEEDS_64K}", f"--trace {NEEDS_64K}: model.kv_heads=3 must divide"),
        ("--run nowhere", "--run nowhere: must be the folder of a run"),
    ],
)
def test_bad_input_is_one_line(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"nsa-dist: error: {told}") and error.count("\n") == 1
