"""`nsa-dist bench kernels` without a GPU: rivals that fail, selections, rows, what it imports."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_dist import bench_kernels, bench_rivals
from nsa_dist.bench_inputs import SPEC, Made, Shape, by_mean, nsa_inputs, selected_by_ours, selection
from nsa_dist.bench_kernels import Rates, Thing, thing_rows
from nsa_dist.cli import main

SHAPE = Shape(200, 4, 2, 16, 8, "float32", "cpu")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs what is timed once: there is no clock of a GPU here."""

    def once(measure: Callable[[], object]) -> tuple[list[float], int]:
        measure()
        return [1.0, 2.0, 3.0], 4

    monkeypatch.setattr(bench_kernels, "_peak", once)
    monkeypatch.setattr(bench_kernels, "times", lambda fn: fn())


def rows(make: Callable[[Shape], Made]) -> list[bench_kernels.Row]:
    return list(thing_rows(SHAPE, Rates(1e12, 1e12), Thing("rival", "all of NSA", make, "what differs")))


def whole(shape: Shape, factor: float) -> Made:
    inputs = nsa_inputs(shape)
    leaves = [x.clone() for x in inputs]
    return Made(lambda *xs: by_mean(shape, list(xs)) * factor, leaves, lambda: by_mean(shape, inputs))


def test_a_rival_that_computes_something_else_is_told() -> None:
    forward, backward = rows(lambda shape: whole(shape, 1.5))
    assert (forward["phase"], backward["phase"]) == ("forward", "backward")
    assert forward["error_to_ours"] == pytest.approx(0.5, rel=1e-4)
    assert forward["differs"] == "what differs" and forward["ms"] == [1.0, 2.0, 3.0]
    assert rows(lambda shape: whole(shape, 1.0))[0]["error_to_ours"] < 1e-6


def test_a_rival_that_fails_gives_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(shape: Shape) -> Made:
        raise AssertionError("\ngroups of 16\nat least")

    def fails_later(*xs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no memory left")
        return xs[0]

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    (row,) = rows(refuses)
    assert (row["phase"], row["error"]) == ("not run", "AssertionError: groups of 16")
    forward, row = rows(lambda shape: Made(fails_later, nsa_inputs(shape)))
    assert forward["phase"] == "forward" and row["error"] == "OutOfMemoryError: no memory left"

    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(ValueError, match="rival at T=200: left the GPU unusable"):
        rows(refuses)


@pytest.mark.parametrize("name", ["random", "local", "same", "trained"])
def test_selections_hold_what_every_query_takes(name: str) -> None:
    picks = selection(name, 1500, 2, "cpu")
    assert picks is not None
    own = torch.arange(1500) // SPEC.select_block
    for t in (0, 63, 64, 200, 1100, 1499):
        for row in picks[t]:
            found = row[row >= 0].tolist()
            assert found == sorted(set(found)) and (row[len(found) :] == -1).all()
            assert len(found) == min(SPEC.select_count, own[t] + 1)
            assert {0, int(own[t]), max(0, int(own[t]) - 1)} <= set(found) and found[-1] == own[t]


def test_the_selected_branch_is_that_of_the_picks() -> None:
    picks = selection("local", 200, 2, "cpu")
    assert picks is not None
    q, k, v = (torch.randn(200, heads, d) for heads, d in ((4, 16), (2, 16), (2, 8)))
    out = selected_by_ours(SHAPE, picks, q, k, v)  # fewer blocks than n: all that is causal
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, want.transpose(0, 1))


def test_only_importable_rivals_are_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = replace(bench_rivals._NSA[0], name="fake", module="json")
    missing = replace(fake, name="missing", module="no_such_module")
    monkeypatch.setattr(bench_rivals, "_NSA", [fake, missing])
    assert bench_rivals.nsa_rivals("all") == bench_rivals.nsa_rivals("fake") == [fake]
    assert bench_rivals.nsa_rivals("none") == []
    assert main(["bench", "kernels", "--rivals", "missing"]) == 2
    assert "must be one of all, none, fake; missing needs the module no_such_module" in capsys.readouterr().err


def test_a_chart_of_every_shape(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = [
        {
            "name": name,
            "part": "all of NSA",
            "phase": phase,
            "ms": [1.0, 2.0, 3.0],
            "device": "none",
            "tokens": tokens,
        }
        | {"heads": 4, "groups": groups, "dk": 16, "dv": 8, "dtype": "float32"}
        for name in ("nsa-dist", "rival")
        for phase in ("forward", "backward")
        for groups in (1, 2)
        for tokens in (8, 16)
    ]
    bench_kernels.draw(
        [*made, {"name": "rival", "part": "all of NSA", "phase": "not run", "error": "no"}], tmp_path / "x.png"
    )
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_needs_neither_ray_nor_omegaconf() -> None:
    script = (
        "import sys; sys.modules['ray'] = sys.modules['omegaconf'] = None\n"
        "from nsa_dist.cli import main; sys.exit(main(['bench', 'kernels', '--rivals', 'nobody']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "--rivals nobody" in done.stderr
