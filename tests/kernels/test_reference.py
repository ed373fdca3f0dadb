"""The reference against an independent computation of DESIGN section 2, token by token, in float64."""

from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import (
    reference_attention,
    reference_full,
    reference_selection,
    reference_window,
)
from nsa_dist.kernels.spec import NSASpec

NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
PAPER = NSASpec()
SMALL = NSASpec(16, 8, 32, 3, 1, 1, 20)
ODD_LENGTHS = (1, 31, 32, 63, 64, 65)


@dataclass(frozen=True)
class Case:
    """One shape: documents' lengths, KV heads, query heads to each, head sizes, sizes of NSA, scores."""

    lengths: tuple[int, ...]
    groups: int = 1
    heads: int = 1
    dk: int = 4
    dv: int = 4
    spec: NSASpec = PAPER
    scores: str = "random"  # q_zero, k_cmp_equal: all tie; k_cmp_coarse: some


CASES = [
    Case((1,)),
    Case((31,), heads=2),
    Case((32,), groups=2),
    Case((149,), dk=6, dv=3, spec=SMALL),
    Case((200,), groups=2, heads=2, dk=3, dv=5, spec=NSASpec(select_block=32, select_count=4, window=33)),
    Case((83,), heads=16, spec=SMALL),
    Case((77,), groups=3, heads=2, dv=2, spec=SMALL),
    Case(ODD_LENGTHS, groups=2, heads=2, dk=4, dv=3),
    Case(ODD_LENGTHS, heads=2, dv=6, spec=SMALL),
    Case((90, 7, 70), spec=NSASpec(16, 8, 32, 3, 2, 1, 1)),
    Case((100, 40), spec=NSASpec(8, 8, 8, 4, 0, 1, 1000)),
    Case((150,), spec=NSASpec(24, 8, 16, 5, 1, 3, 17), groups=2),
    Case((70,), spec=NSASpec(16, 4, 4, 6, 2, 2, 5)),
    Case((40,), spec=NSASpec(1, 1, 1, 2, 1, 1, 1)),
    Case((300,), spec=SMALL, scores="q_zero"),
    Case((131, 150), groups=2, heads=2, spec=SMALL, scores="k_cmp_equal"),
    Case((290,), heads=3, spec=NSASpec(16, 8, 16, 5, 0, 1, 9), scores="k_cmp_coarse"),
]


def overlap(i: int, j: int, l: int, d: int, lp: int) -> float:
    return len(set(range(i * d, i * d + l)) & set(range(j * lp, (j + 1) * lp))) / d


def softmax(scores: Tensor) -> Tensor:
    e = torch.exp(scores - scores.max())
    return e / e.sum()


def choose(score: list[float], own: int, n: int, initial: int, local: int) -> list[int]:
    """Blocks up to `own`: the forced ones, then the highest scores in float32, the lower index first."""
    forced = {j for j in range(own + 1) if j < initial or j > own - local}
    free = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-np.float32(score[j]), j))
    return sorted(forced | set(free[: n - len(forced)]))


def define(inputs: dict[str, Tensor], case: Case) -> tuple[Tensor, list[list[list[int]]]]:
    """Output [T, H, Dv] and, for each token and KV head, the blocks, numbered through the documents."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (inputs[name] for name in NAMES)
    l, d, lp, n, initial, local, window = astuple(case.spec)[:7]
    scale, rows, picks, token0, cmp0, block0 = case.dk**-0.5, [], [], 0, 0, 0
    for length in case.lengths:
        compressed = max((length - l) // d + 1, 0) if length >= l else 0
        for t in range(length):
            heads, picks_of_token = [], []
            for g in range(case.groups):
                seen = [i for i in range(compressed) if i * d + l - 1 <= t]
                of = slice(cmp0, cmp0 + len(seen))
                mine = range(g * case.heads, (g + 1) * case.heads)
                p = [softmax(k_cmp[of, g] @ q[token0 + t, h] * scale) if seen else None for h in mine]
                mass = [sum(p_h[i].item() for p_h in p if p_h is not None) for i in seen]
                score = [sum(mass[i] * overlap(i, j, l, d, lp) for i in seen) for j in range(t // lp + 1)]
                blocks = choose(score, t // lp, n, initial, local)
                picks_of_token.append([block0 + j for j in blocks])
                chosen = [token0 + s for j in blocks for s in range(j * lp, min((j + 1) * lp, t + 1))]
                near = list(range(token0 + max(t - window + 1, 0), token0 + t + 1))
                for p_h, h in zip(p, mine, strict=True):
                    x = q[token0 + t, h] * scale
                    out = gates[token0 + t, h, 1] * (softmax(k_slc[chosen, g] @ x) @ v_slc[chosen, g])
                    out = out + gates[token0 + t, h, 2] * (softmax(k_win[near, g] @ x) @ v_win[near, g])
                    if p_h is not None:
                        out = out + gates[token0 + t, h, 0] * (p_h @ v_cmp[of, g])
                    heads.append(out)
            rows.append(torch.stack(heads))
            picks.append(picks_of_token)
        token0, cmp0, block0 = token0 + length, cmp0 + compressed, block0 + -(-length // lp)
    return torch.stack(rows), picks


def make_inputs(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(case.lengths) + sum(case.lengths))
    l, d = case.spec.compress_block, case.spec.compress_stride
    tokens, compressed = sum(case.lengths), sum((n - l) // d + 1 for n in case.lengths if n >= l)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = case.groups * case.heads
    inputs = {"q": 2 * normal(tokens, heads, case.dk), "gates": normal(tokens, heads, 3).sigmoid()}
    for branch, n in (("cmp", compressed), ("slc", tokens), ("win", tokens)):
        inputs["k_" + branch] = normal(n, case.groups, case.dk)
        inputs["v_" + branch] = normal(n, case.groups, case.dv)
    if case.scores == "q_zero":
        inputs["q"].zero_()
    elif case.scores == "k_cmp_equal":
        inputs["k_cmp"][:] = inputs["k_cmp"][:1]
    elif case.scores == "k_cmp_coarse":
        inputs["k_cmp"] = inputs["k_cmp"].sign()
    return {name: inputs[name].to(dtype).requires_grad_() for name in NAMES}


def make_packing(case: Case) -> Packing:
    return Packing(np.cumsum([0, *case.lengths]), case.spec)


def run_reference(inputs: dict[str, Tensor], case: Case) -> Tensor:
    return reference_attention(**inputs, spec=case.spec, packing=make_packing(case), scale=case.dk**-0.5)


def gradients(out: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    found = torch.autograd.grad((out * weight).sum(), list(inputs.values()), materialize_grads=True)
    return dict(zip(inputs, found, strict=True))


def close(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_definition(case: Case) -> None:
    inputs = make_inputs(case)
    expected, expected_picks = define(inputs, case)
    picks = reference_selection(inputs["q"], inputs["k_cmp"], case.spec, make_packing(case), case.dk**-0.5).tolist()
    n = case.spec.select_count
    assert picks == [[row + [-1] * (n - len(row)) for row in token] for token in expected_picks]

    with torch.autograd.set_detect_anomaly(True):  # raises on a NaN anywhere in the backward
        out = run_reference(inputs, case)
        found = gradients(out, inputs)
    close(out, expected, "out")
    for name, gradient in gradients(expected, inputs).items():
        close(found[name], gradient, name)


def test_cases_reach_every_part_of_the_selection() -> None:
    """A case whose queries never leave a block out, or whose scores never tie, would hide a wrong rule."""
    case = next(c for c in CASES if c.scores == "q_zero")
    _, picks = define(make_inputs(case), case)
    assert picks[-1][0] == [0, 1, 9]  # block 0 and the own one are forced; equal scores: the lowest
    case = CASES[3]
    _, picks = define(make_inputs(case), case)
    assert len({tuple(token[0]) for token in picks if token[0][-1] == 4}) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_computes_in_float32_and_rounds(dtype: torch.dtype) -> None:
    case = Case((131, 20), groups=2, heads=2, spec=SMALL)
    low = make_inputs(case, dtype)
    high = {name: x.detach().to(torch.float32).requires_grad_() for name, x in low.items()}
    out, expected = run_reference(low, case), run_reference(high, case)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    exact = run_reference({name: x.double() for name, x in low.items()}, case)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(out, low).items():
        assert gradient.dtype == dtype, name


@pytest.mark.parametrize("window", [1, 40, 1000, None])
def test_full_and_window_attention(window: int | None) -> None:
    case = Case((*ODD_LENGTHS, 130), groups=2, heads=3, dk=6, dv=5)
    inputs = make_inputs(case)
    q, k, v = (inputs[name] for name in ("q", "k_win", "v_win"))
    packing = make_packing(case)
    document = torch.repeat_interleave(torch.tensor(case.lengths))
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
    mask = (document[:, None] == document) & (distance >= 0)
    if window is None:
        out = reference_full(q, k, v, packing, 0.3)
    else:
        mask &= distance < window
        out = reference_window(q, k, v, packing, window, 0.3)
    k, v = (x.repeat_interleave(3, 1).transpose(0, 1) for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), k, v, mask, scale=0.3)
    close(out, expected.transpose(0, 1), "out")
    found, wanted = gradients(out, inputs), gradients(expected.transpose(0, 1), inputs)
    for name in ("q", "k_win", "v_win"):
        close(found[name], wanted[name], name)


def test_a_packing_of_another_spec_is_refused() -> None:
    inputs = make_inputs(Case((40,)))
    with pytest.raises(ValueError, match=r"^packing: made for NSASpec\(.*$"):
        reference_selection(inputs["q"], inputs["k_cmp"], SMALL, make_packing(Case((40,))), 1.0)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, views of inputs included."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def measure(tokens: int) -> tuple[int, int, int]:
    """Bytes kept for the backward; elements of the largest tensor of both ways; of all probabilities."""
    case = Case((tokens,), groups=2, heads=2, spec=SMALL)
    inputs = make_inputs(case, torch.float32)
    kept: dict[int, int] = {}  # by storage: a slice of an input keeps nothing new

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = run_reference(inputs, case)
        out.sum().backward()
    return sum(kept.values()), largest.elements, tokens**2 * 4


def test_memory_is_linear_in_the_tokens() -> None:
    sizes = [measure(tokens) for tokens in (512, 1024, 2048)]
    for small, large in pairwise(sizes):
        assert large[0] <= 2.1 * small[0], "kept for the backward"
        assert large[1] <= 2.1 * small[1], "largest tensor"
    assert sizes[-1][0] + sizes[-1][1] < sizes[-1][2] / 8
