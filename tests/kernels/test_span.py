"""The span rule: the definition against words, the vectorised path and the kernels against the definition."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_dist.kernels import NSASpec, nsa_attention
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import reference_selection
from tests.kernels.test_attention import NAMES, make

SIZES = (8, 4, 8, 4, 1, 2, 16)  # tokens and blocks of a small NSA


@st.composite
def specs(draw: st.DrawFn) -> NSASpec:
    bound = draw(st.sampled_from([1, 2, 5, 0.1, 0.4]))
    ahead = draw(st.sampled_from([0, 0.5, 1.0]))
    return NSASpec(*SIZES, draw(st.integers(8, 150)), bound, ahead, draw(st.integers(1, 200)))


@settings(max_examples=10, deadline=None)
@given(specs(), st.lists(st.integers(1, 330), min_size=1, max_size=2))
def test_the_vectorised_path_is_the_reference(spec: NSASpec, lengths: list[int]) -> None:
    xs = make(spec, lengths, 4, 2, 4, 3)
    cu = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    outs = [nsa_attention(*xs, spec, cu_seqlens=cu, backend=backend) for backend in ("auto", "reference")]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-11, atol=1e-12)
    do = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad(out, xs, do) for out in outs]
    for name, a, b in zip(NAMES, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def selection(spec: NSASpec, xs: list[Tensor]) -> np.ndarray:
    packing = Packing(np.array([0, xs[0].shape[1]]), spec)
    q, k_cmp = (x.detach().flatten(0, 1) for x in xs[:2])
    return reference_selection(q, k_cmp, spec, packing, q.shape[-1] ** -0.5).numpy()


def scores(spec: NSASpec, xs: list[Tensor]) -> np.ndarray:
    """[T, G, B]: by the equations, one query after the other."""
    q, k = (x.detach()[0].numpy() for x in xs[:2])
    l, d, lp = spec.compress_block, spec.compress_stride, spec.select_block
    tokens, groups = len(q), k.shape[1]
    score = np.zeros((tokens, groups, -(-tokens // lp)))
    for t in range(l - 1, tokens):
        seen = (t + 1 - l) // d + 1
        for h in range(q.shape[1]):
            g = h * groups // q.shape[1]
            e = np.exp(k[:seen, g] @ q[t, h] * q.shape[-1] ** -0.5)
            for i, p in enumerate(e / e.sum()):
                for j in range(i * d // lp, (i * d + l - 1) // lp + 1):
                    score[t, g, j] += p * (min(i * d + l, (j + 1) * lp) - max(i * d, j * lp)) / d
    return score.astype(np.float32)


@pytest.mark.parametrize("ahead", [0, 0.5, 1.0])
def test_a_query_chooses_its_best_among_what_the_rule_admits(ahead: float) -> None:
    spec = NSASpec(*SIZES, 136, 4, ahead, 100)  # a span is 17 blocks, and groups of 64, 64 and 8 queries
    xs = make(spec, [400], 4, 2, 4, 3)
    picks, score = selection(spec, xs), scores(spec, xs).astype(np.float64)
    for start in (0, 136, 272):
        own = start // 8
        for g in range(2):
            total, admitted = score[max(start - 100, 0) : start, g].sum(0), []
            for i, t0 in enumerate(range(start, min(start + 136, 400), 64)):
                budget = min(4, max(own - 1, 0))
                first = int(np.ceil(budget * ahead))
                quota = first + (budget - first) * i // ((min(start + 136, 400) - start - 1) // 64 or 1)
                order = sorted(range(1, own), key=lambda j: (-total[j], j))
                admitted += [j for j in order if j not in admitted][: quota - len(admitted)]
                end = min(t0 + 64, start + 136, 400)
                for t in range(t0, end):
                    at = t // 8
                    forced = {j for j in (0, at - 1, at) if j >= 0}
                    free = {*admitted, *range(own, at + 1)} - forced
                    best = sorted(free, key=lambda j: (-score[t, g, j], j))[: 4 - len(forced)]
                    want = sorted({*forced, *best})
                    assert picks[t, g].tolist() == want + [-1] * (4 - len(want)), (t, g)
                total = total + score[t0:end, g].sum(0)


def test_the_union_of_a_span_is_bounded() -> None:
    spec = NSASpec(*SIZES, 64, 0.1)
    xs = make(spec, [1000], 4, 2, 4, 3)
    exact, bounded = (selection(s, xs) for s in (NSASpec(*SIZES), spec))
    for start in range(64, 1000, 64):
        own = start // 8
        unions = [{int(j) for j in p[start : start + 64, 0].flat if 0 <= j < own} for p in (exact, bounded)]
        assert len(unions[1]) <= -(-own // 10) + 2  # the initial block, and the local one before the span
    assert len(unions[0]) > 2 * len(unions[1])


@pytest.mark.parametrize("ahead", [0.5, 1.0])
def test_no_output_depends_on_a_later_token(ahead: float) -> None:
    """Every token in turn is changed, its part in compressed tokens too: all outputs before it stay, up to rounding
    (which rows a tile holds follows from all its queries)."""
    spec = NSASpec(4, 4, 4, 4, 1, 1, 8, 70, 3, ahead, 50)
    tokens, xs = 140, [x.detach() for x in make(spec, [140], 2, 1, 3, 3)]
    changed = [x.expand(tokens, *x.shape[1:]).clone() for x in xs]  # sequence t is changed at token t
    for t in range(tokens):
        for x, at in zip(changed, [t, t // 4, t // 4, t, t, t, t, t], strict=True):
            x[t, at : at + 1] = x[t, at : at + 1] * -2 + 1
    out, got = nsa_attention(*xs, spec)[0], nsa_attention(*changed, spec)
    for t in range(1, tokens):
        torch.testing.assert_close(got[t, :t], out[:t], rtol=1e-12, atol=1e-12, msg=lambda m, t=t: f"{t}: {m}")
        assert not torch.allclose(got[t, t], out[t]), t


def test_the_kernels_path_selects_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    spec = NSASpec(*SIZES, 80, 3, 0.5, 100)
    xs = [x.detach().float() for x in make(spec, [230], 4, 2, 16, 16)]
    outs = [nsa_attention(*xs, spec, backend=backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*outs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"span": 63}, "span=63: must be 0 or at least one block, select_block=64"),
        ({"span": 1024}, "span_blocks=0: must be at least one block"),
        ({"span_blocks": 4}, "span_blocks=4: must be 0 without a span"),
        ({"span": 1024, "span_blocks": 2.5}, "span_blocks=2.5: must be a share up to 1, or a whole number"),
        ({"span": 1024, "span_blocks": -1}, "span_blocks=-1: must be a number of blocks or a share"),
        ({"span": 1024, "span_blocks": 4, "span_prefetch": 5}, "span_prefetch=5: must be at most span_blocks=4"),
        ({"span": 1024, "span_blocks": 4, "span_pool": 0}, "span_pool=0: must be an integer of at least 1"),
    ],
)
def test_a_bound_that_cannot_work_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        NSASpec(**change)
