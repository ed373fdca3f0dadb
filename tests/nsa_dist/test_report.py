"""The report: printed figures against known ones, traces against a count token by token, bad folders, the picture."""

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from nsa_dist.config import Config, ConfigError
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.traffic import Sizes
from nsa_dist.report import at_64k, report, save_picture
from nsa_dist.traces import NEEDS_64K, load_needs, trace_traffic, ulysses_bytes

KIB = 1024
SIZES = Sizes(heads=32, groups=2, dk=192, dv=128, element_bytes=2, grad_bytes=4)


def phase(mean: float, most: float, between: float = 0) -> dict[str, Any]:
    figures = {"mean": mean * KIB, "max": most * KIB}
    other = {"mean": between * KIB, "max": between * KIB}
    sent = figures | {"max": (most + 1) * KIB}
    return {"sent_bytes": sent, "received_bytes": figures, "received_between_nodes_bytes": other}


def both(mean: float, most: float, between: float = 0) -> dict[str, Any]:
    return {"forward": phase(mean, most, between), "backward": phase(2 * mean, 2 * most)}


def comm(scale: float) -> dict[str, Any]:
    """KiB. The full KV of one branch is 400, what is causally visible 200, the selection `scale` times 100."""
    top = {"window_halo": both(10, 20), "bitmap": {"forward": phase(1, 1)}}
    rivals = {
        "allgather": {"window_halo": both(10, 20), "selected": both(400, 400)},
        "groupcast": {"window_halo": both(10, 20), "selected": both(200, 400)},
        "ring": {"full_kv": both(400, 400)},
    }
    own = {"selected": both(100 * scale, 150 * scale, between=50), "refetch": {"backward": phase(8, 9)}}
    return {**top, **own, "parameters": both(777, 777), "control": both(5, 5), "rivals": rivals}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(comms: list[dict[str, Any]], events: tuple[dict[str, Any], ...] = (), **parallel: Any) -> Path:
        config = Config()
        for key, value in ({"cp": 2} | parallel).items():
            setattr(config.parallel, key, value)
        OmegaConf.save(OmegaConf.structured(config), tmp_path / "config.yaml")
        records: list[dict[str, Any]] = [
            {"step": i, "loss": 6.0 - i, "tokens": 1000, "step_s": 0.5, "memory_bytes": i << 29, "comm": c}
            for i, c in enumerate(comms, 1)
        ]
        records[0]["validation"] = {"loss": 5.5}
        records[-1]["validation"] = {"loss": 4.5, "by_position": {"<64": 4.75, "<128": 4.25}}
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        return tmp_path

    return make


def printed(run_dir: Path) -> list[str]:
    said: list[str] = []
    report(run_dir, said.append)
    return "\n".join(said).splitlines()


def figures(lines: list[str], name: str, after: str) -> list[float]:
    """The numbers of the row that begins with `name`, in the part of the report that begins with `after`."""
    start = next(i for i, line in enumerate(lines) if line.startswith(after))
    row = next(line for line in lines[start:] if line.strip().startswith(name + "  "))
    cells = row.strip()[len(name) :].replace(",", "").split()
    return [float(cell.removesuffix("%")) for cell in cells if cell not in ("KiB", "MiB")]


def test_balance_is_told_where_there_is_any(make_run: Callable[..., Path]) -> None:
    folder = make_run([comm(1), comm(1)])
    assert not any(line.strip().startswith("balance") for line in printed(folder))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record, measured in zip(records, (1.2, 1.4), strict=True):
        record["balance"] = {"predicted_imbalance": 1.25, "measured_imbalance": measured}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (line,) = [line for line in printed(folder) if line.strip().startswith("balance")]
    assert "1.250 by the cost model, 1.300 measured (CPU time)" in line


def test_printed_figures_are_those_of_the_run(make_run: Callable[..., Path]) -> None:
    lines = printed(make_run([comm(1.0), comm(2.0)]))
    own, rivals = "Traffic of this run", "Against other"
    assert figures(lines, "selected", own) == [150, 226, 150, 225, 300, 451, 300, 450, 900]
    assert figures(lines, "refetch", own) == [0, 0, 0, 0, 8, 10, 8, 9, 16]
    assert figures(lines, "exchange", own) == [161, 249, 161, 246, 328, 502, 328, 499, 978]
    assert figures(lines, "parameters (KiB)", own)[:4] == [777, 778, 777, 777]
    assert figures(lines, "this run", rivals) == [161, 246, 40.2, 61.5, 328, 499, 41.0, 62.4]
    assert figures(lines, "groupcast", rivals) == [210, 420, 52.5, 105, 420, 840, 52.5, 105]
    assert figures(lines, "ring", rivals) == [400, 400, 100, 100, 800, 800, 100, 100]
    parts = {name: figures(lines, name, rivals) for name in ("= selected blocks", "= this exchange")}
    assert parts == {"= selected blocks": [150, 37.5, 300, 37.5], "= this exchange": [161, 40.2, 328, 41.0]}
    assert figures(lines, "- causality (all-gather - group cast)", rivals) == [200, 50, 400, 50]
    assert figures(lines, "- selection (group cast - selected)", rivals) == [50, 12.5, 100, 12.5]
    assert figures(lines, "+ compressed, halos, bitmaps", rivals) == [11, 2.8, 20, 2.5]
    assert any("between nodes: 50.00 KiB" in line for line in lines)
    assert any("parallel.cp=2 doesn't divide model.kv_heads=1" in line for line in lines)
    assert max(map(len, lines)) <= 120


def test_the_run_itself_is_described(make_run: Callable[..., Path]) -> None:
    begun = {"kind": "training", "step": 0, "steps": 40}
    failed = {"kind": "failure", "rank": 1, "cause": "signal 9\nmore"}
    events = (begun, failed, begun | {"step": 10}, {"kind": "end"})
    text = "\n".join(printed(make_run([comm(1.0)] * 12, events)))
    assert "12 of 40; 12,000 tokens in 6 s" in text and "2,000 tokens/s, 0.50 s a step" in text
    assert "peak memory 6.00 GiB" in text
    assert "5.0000 -> -6.0000; mean of the last 10: -1.5000" in text
    assert "5.5000 (step 1) -> 4.5000 (step 12)" in text and "<64: 4.750, <128: 4.250" in text
    assert "started 2 x, resumed after step 10, 1 failures (rank 1: signal 9)\n" in text


def test_one_rank_has_nothing_to_compare(make_run: Callable[..., Path]) -> None:
    text = "\n".join(printed(make_run([{"rivals": {"allgather": {}, "groupcast": {}, "ring": {}}}], cp=1)))
    assert "Traffic: none" in text and "there is nothing to compare" in text


def test_other_exchanges_claim_no_saving_of_a_selection(make_run: Callable[..., Path]) -> None:
    lines = printed(make_run([comm(1.0)], exchange="allgather"))
    ours = lines[: next(i for i, line in enumerate(lines) if line.startswith("COMPUTED"))]
    assert any(line.startswith("Against") for line in ours)
    assert not any("selection" in line for line in ours)


def brute_force(bits_LGQB: np.ndarray, owner: np.ndarray, ranks: int) -> np.ndarray:
    """[P]: rows of single KV heads that each rank receives, all layers: block after block, from Python's sets."""
    rows = np.zeros(ranks, np.int64)
    for layer in bits_LGQB:
        for head in layer:
            wanted = {(int(owner[q]), int(b)) for q, b in zip(*np.nonzero(head), strict=True) if owner[b] != owner[q]}
            for rank, _ in wanted:
                rows[rank] += 64
    return rows


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_trace_traffic_is_a_count_of_the_bits(layout: str, ranks: int, tmp_path: Path) -> None:
    bits = np.random.default_rng(ranks).random((3, 2, 24, 24)) < 0.08
    bits &= np.tri(24, dtype=bool)  # no query selects what is after it
    np.savez(tmp_path / "trace.npz", needs=np.packbits(bits, axis=-1))
    traffic = trace_traffic(tmp_path / "trace.npz", layout, ranks, SIZES).traffic["nsa"]
    owner = make_layout(layout, 24 * 64, ranks, 64).owner_of(np.arange(24) * 64)
    rows = brute_force(bits, owner, ranks)
    assert ranks == 1 or rows.sum() > 0
    np.testing.assert_allclose(traffic["selected", "forward"][1], rows * 320 * 2 / 3)
    np.testing.assert_allclose(traffic["selected", "backward"][0], rows * 320 * 4 / 3)
    assert traffic["selected", "forward"][0].sum() == pytest.approx(rows.sum() * 320 * 2 / 3)


def test_the_64k_trace_is_a_count_of_its_bits(tmp_path: Path) -> None:
    packed = load_needs(NEEDS_64K).bits[3:4]
    np.savez(tmp_path / "layer.npz", needs=packed)
    traffic = trace_traffic(tmp_path / "layer.npz", "zigzag", 8, SIZES).traffic["nsa"]
    sixteenth = np.arange(1024) // 64
    rows = brute_force(np.unpackbits(packed, axis=-1), np.minimum(sixteenth, 15 - sixteenth), 8)
    np.testing.assert_array_equal(traffic["selected", "forward"][1], rows * 320 * 2)


def test_aligned_formulas() -> None:
    """Those of the volume a layer, forward, received by a rank; T = 64k, P = 8, G = 2, 192/128, bfloat16."""
    trace = trace_traffic(NEEDS_64K, "contiguous", 8, SIZES)
    got = {name: {kind: g for (kind, p), (_, g) in t.items() if p == "forward"} for name, t in trace.traffic.items()}
    ranks, length, kv = 8, 65536 // 8, 2 * 320 * 2
    full = (ranks - 1) * length * kv
    assert (got["allgather"]["selected"] == full).all() and (got["ring"]["full_kv"] == full).all()
    assert got["groupcast"]["selected"].mean() == full / 2
    # The last rank sees every compressed token; a rank in the middle has both halos.
    assert got["nsa"]["compressed"][-1] == (ranks - 1) * length / 16 * kv
    assert got["nsa"]["window_halo"][3] + got["nsa"]["compress_halo"][3] == (511 + 16) * kv
    assert (got["nsa"]["bitmap"] == (ranks - 1) * 2 * 1024 / 8).all()
    assert "ulysses" not in got
    assert ulysses_bytes(65536, 8, SIZES) == 7 / 8 * length * 2 * 320 * (32 + 8)
    zigzag = trace_traffic(NEEDS_64K, "zigzag", 8, SIZES).traffic["groupcast"]["selected", "forward"][1]
    assert zigzag.mean() == full * 3 / 4
    visible = got["nsa"]["selected"].sum() / got["groupcast"]["selected"].sum()
    assert visible == pytest.approx(0.96, abs=0.01)  # what is known of the trace


@pytest.mark.parametrize(("layout", "causal"), [("contiguous", 50.0), ("zigzag", 25.0)])
def test_64k_section_prints_the_traces_figures(layout: str, causal: float) -> None:
    config = Config()
    config.parallel.layout, config.parallel.grad_dtype = layout, "bfloat16"
    lines = at_64k(config)
    mib, head = 1 << 20, "COMPUTED"
    traffic = trace_traffic(NEEDS_64K, layout, 8, Sizes(32, 2, 192, 128, 2, 2)).traffic["nsa"]
    every = sum(got for (_, p), (_, got) in traffic.items() if p == "forward")
    mean, most = every.mean() / mib, every.max() / mib
    expected = [mean, most, mean / 0.7, most / 0.7]  # shares of 70 MiB
    assert figures(lines, "nsa", head)[:4] == pytest.approx(expected, abs=0.05)
    assert figures(lines, "ring", head)[:4] == [70, 70, 100, 100]
    assert figures(lines, "- causality (all-gather - group cast)", head)[1] == causal
    _, selected, _, selected_backward = figures(lines, "= selected blocks", head)
    assert selected == selected_backward
    assert figures(lines, "- selection (group cast - selected)", head)[1] == pytest.approx(
        100 - causal - selected, abs=0.11
    )
    other = {"contiguous": "zigzag", "zigzag": "contiguous"}[layout]
    short = " ".join(lines[next(i for i, line in enumerate(lines) if line.startswith(f"{other} instead")) :])
    assert f"causality saves {75 - causal:.1f}%" in short


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("config.yaml", None, ["config.yaml", "run.dir"]),
        ("metrics.jsonl", None, ["metrics.jsonl", "run.dir"]),
        ("metrics.jsonl", "", ["no step yet"]),
        ("metrics.jsonl", '{"step": 1', ["no step yet"]),
        ("metrics.jsonl", '{"step": 1, "loss": 2.0}\n', ["metrics.jsonl", "step 1", "tokens"]),
        ("config.yaml", "model: {layer: 3}\n", ["config.yaml", "layer"]),
        ("config.yaml", "- a\n- b\n", ["config.yaml"]),
        ("config.yaml", "a: [\n", ["config.yaml"]),
        ("events.jsonl", "[1]\n", ["events.jsonl"]),
    ],
)
def test_bad_folders_are_one_line(
    name: str, text: str | None, names: list[str], make_run: Callable[..., Path]
) -> None:
    run_dir = make_run([comm(1.0)])
    if text is None:
        (run_dir / name).unlink()
    else:
        (run_dir / name).write_text(text)
    with pytest.raises(ConfigError) as error:
        printed(run_dir)
    assert "\n" not in str(error.value)
    assert all(part in str(error.value) for part in names)


def test_no_folder_and_bad_traces_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*no such folder"):
        printed(tmp_path / "nowhere")
    np.savez(tmp_path / "other.npz", picks=np.zeros(3))
    np.savez(tmp_path / "shape.npz", needs=np.zeros((1, 2, 8, 2), np.uint8))
    for file in ("missing.npz", "other.npz", "shape.npz"):
        with pytest.raises(ConfigError, match=file):
            trace_traffic(tmp_path / file, "contiguous", 2, SIZES)
    with pytest.raises(ConfigError, match="KV heads=3: must be 2"):
        trace_traffic(NEEDS_64K, "contiguous", 8, Sizes(48, 3, 192, 128, 2, 4))
    with pytest.raises(ConfigError, match="ranks=513"):
        trace_traffic(NEEDS_64K, "zigzag", 513, SIZES)


def test_picture_is_a_png(make_run: Callable[..., Path]) -> None:
    pytest.importorskip("matplotlib")
    run_dir = make_run([comm(1.0), comm(2.0)])
    said: list[str] = []
    report(run_dir, said.append, run_dir / "run.png")
    content = (run_dir / "run.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert 1000 < width < 2000 and 400 < height < 1000
    save_picture(run_dir, run_dir / "picture")
    assert (run_dir / "picture").is_file()  # under the name that was given
    with pytest.raises(ConfigError, match=r"run\.nothing"):
        save_picture(run_dir, run_dir / "run.nothing")


def test_picture_without_matplotlib_says_what_to_install(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"nsa-dist\[report\]"):
        save_picture(make_run([comm(1.0)]), Path("run.png"))


def test_full_attention_layers_are_in_what_shares_are_of(make_run: Callable[..., Path]) -> None:
    mixed = comm(1.0) | {"full_kv": both(600, 600)}
    mixed["rivals"]["allgather"]["full_kv"] = both(600, 600)
    lines = printed(make_run([mixed]))
    assert figures(lines, "this run", "Against") == [711, 771, 71.1, 77.1, 1428, 1549, 71.4, 77.5]
    assert figures(lines, "+ full-attention layers' KV", "Against") == [600, 60, 1200, 60]
    assert figures(lines, "- causality (all-gather - group cast)", "Against") == [200, 20, 400, 20]
