"""Simulated traffic: that of real runs, and what the span rule leaves of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nsa_dist.bench_comm import EXCHANGES, SPEC, Case, bench_comm
from nsa_dist.cli import main
from nsa_dist.picks import prescribed
from nsa_dist.simulate import simulate, span_spec

TOKENS = 1500


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer's picks, of random ones every second query's."""
    picks = prescribed("random", np.arange(TOKENS), 2, SPEC, None)
    file = tmp_path_factory.mktemp("trace") / "picks.npz"
    np.savez(file, picks=np.where(picks % 3 == 1, -1, picks).transpose(1, 0, 2)[None])
    return file


def quiet(text: str) -> None:
    pass


def test_a_real_run_sends_what_was_simulated(trace: Path) -> None:
    cases = [
        Case(exchange, ranks, layout, "trained", TOKENS, 4, 2, 16, 8, "float32", trace)
        for ranks, layout in ((2, "zigzag"), (3, "contiguous"))
        for exchange in EXCHANGES
    ]
    real = bench_comm(cases, "cpu", 0, None, quiet)  # untimed
    assert not any("forward_ms" in row for row in real)
    planned = simulate(cases, SPEC, None, quiet)
    assert [row["exchange"] for row in real] == [row["exchange"] for row in planned]
    assert len(real) == 2 * len(EXCHANGES) - 1  # Ulysses can't cut 2 KV heads in 3
    for got, want in zip(real, planned, strict=True):
        fields = ("sent_bytes", "received_bytes")
        parts = [
            {(k, p, f): phases[p][f] for k, phases in row["kinds"].items() for p in phases for f in fields}
            for row in (got, want)
        ]
        assert parts[0] == parts[1], got["exchange"]
        assert got["share_of_allgather_max"] == want["share_of_allgather_max"]


@pytest.mark.parametrize("selection", ["random", "adversarial", "stretched"])
def test_the_rule_bounds_what_any_selection_fetches(selection: str, trace: Path) -> None:
    tokens, ranks = 9000, 6
    case = Case("nsa", ranks, "contiguous", selection, tokens, 4, 2, 16, 8, "float32", trace)
    exact, bounded = (simulate([case], spec, None, quiet)[0] for spec in (SPEC, span_spec(1536, 0.1)))
    before = np.arange(ranks) * 24  # blocks before each rank's span
    # The tenth, the initial block and the local one before the span, where there are any.
    most = np.minimum(np.ceil(before / 10) + 2, before) * 64 * (16 + 8) * 2 * 4
    found = bounded["kinds"]["selected"]["forward"]["received_bytes"]
    assert found["max"] <= most.max() and found["mean"] <= most.mean()
    assert found["max"] >= most.max() / 2
    assert exact["kinds"]["selected"]["forward"]["received_bytes"]["mean"] > 3 * found["mean"]
    assert 0 < bounded["kept_picks"] < 1 and exact["kept_picks"] is None
    if selection != "stretched":
        assert (
            exact["kinds"]["selected"]
            == simulate([replace(case, exchange="groupcast")], SPEC, None, quiet)[0]["kinds"]["selected"]
        )


def test_an_admitted_block_keeps_its_picks(trace: Path) -> None:
    """A bound of all blocks changes nothing but that every block counts as fetched."""
    case = Case("nsa", 3, "contiguous", "random", 3000, 4, 2, 16, 8, "float32", None)
    row = simulate([case], span_spec(1024, 100), None, quiet)[0]
    assert row["kept_picks"] == 1


def test_rows_are_written_and_bad_words_refused(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "comm", "--simulate", "--ranks", "4,64", "--tokens", "8192", "--json", str(tmp_path / "rows")]
    assert main([*words, "--layout", "contiguous,zigzag", "--exchange", "nsa,ring"]) == 0
    rows = [json.loads(row) for row in (tmp_path / "rows").read_text().splitlines()]
    assert [(r["exchange"], r["ranks"], r["layout"]) for r in rows[:2]] == [
        ("nsa", 4, "contiguous"),
        ("ring", 4, "contiguous"),
    ]
    assert len(rows) == 8 and all(r["received_bytes_max"] >= r["received_bytes_mean"] > 0 for r in rows)
    assert [r["share_of_allgather"] for r in rows if r["exchange"] == "ring"] == [1.0] * 4
    for more, said in (
        (["--span", "32", "--span-blocks", "2"], "--span 32: must be 0 or at least one block"),
        (["--span", "2048"], "--span-blocks 0.0: must be at least one block"),
        (["--selection", "trained", "--trace", str(trace)], "--tokens 8192: must be at most 1500, the trace's"),
        (["--selection", "stretched", "--trace", str(trace)], "--tokens 8192: must be a multiple of 1500"),
        (
            ["--selection", "trained", "--span", "2048", "--span-blocks", "0.1"],
            "--span 2048: needs a trace of 'picks'",
        ),
        (["--selection", "trained", "--kv-heads", "3"], "--kv-heads 3: must divide 16, the trace's layers"),
        (["--trace", str(tmp_path / "none"), "--selection", "trained"], f"trace '{tmp_path}/none': must be an .npz"),
    ):
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
