"""Compression against a loop over blocks that follows DESIGN section 2."""

from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from nsa_dist.kernels.compress import Chunks, compress_mean, compress_mlp, make_chunks
from nsa_dist.kernels.packing import Ints, Packing
from nsa_dist.kernels.spec import NSASpec

SPECS = [NSASpec(), NSASpec(16, 8, 32), NSASpec(8, 8, 8), NSASpec(24, 8, 16), NSASpec(32, 8, 32)]
LENGTHS = (1, 31, 32, 63, 64, 65)


def make_inputs(spec: NSASpec, tokens: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    l, size, groups = spec.compress_block, 3, 2
    shapes = {
        "x": (tokens, groups, size),
        "position": (l, size),
        "w1": (2 * size, l * size),
        "b1": (2 * size,),
        "w2": (size, 2 * size),
        "b2": (size,),
    }
    values = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {name: (0.5 * value).to(dtype).requires_grad_() for name, value in values.items()}


def packed(spec: NSASpec) -> tuple[Ints, int]:
    """Starts of blocks, and the tokens of their buffer."""
    packing = Packing(np.cumsum([0, *LENGTHS]), spec)
    return packing.cmp_start, packing.tokens


def with_gaps(spec: NSASpec) -> tuple[Ints, int]:
    """Segments with halos: blocks share all, some or no chunks, and lie anywhere."""
    l, d = spec.compress_block, spec.compress_stride
    steps = d, 2 * d, 2 * d, l, d, l + 1, l + d + 3, d, d
    first = np.array([*accumulate(steps, initial=5)], np.int64)
    return first, int(first[-1]) + l + 2


def chunks_of(inputs: dict[str, Tensor], first: Ints, spec: NSASpec) -> Chunks:
    return make_chunks(first, *inputs["x"].shape[:2], spec, torch.device("cpu"))


def mlp(inputs: dict[str, Tensor], first: Ints, spec: NSASpec) -> Tensor:
    x, position, w1, b1, w2, b2 = inputs.values()
    return compress_mlp(x, chunks_of(inputs, first, spec), position, w1, b1, w2, b2)


def mean(inputs: dict[str, Tensor], first: Ints, spec: NSASpec) -> Tensor:
    return compress_mean(inputs["x"], chunks_of(inputs, first, spec))


def mlp_by_definition(inputs: dict[str, Tensor], first: Ints, spec: NSASpec) -> Tensor:
    x, position, w1, b1, w2, b2 = inputs.values()
    rows = []
    for start in first.tolist():
        for g in range(x.shape[1]):
            block = (x[start : start + spec.compress_block, g] + position).reshape(-1)
            rows.append(w2 @ silu(w1 @ block + b1) + b2)
    return torch.stack(rows).view(len(first), x.shape[1], -1)


def mean_by_definition(inputs: dict[str, Tensor], first: Ints, spec: NSASpec) -> Tensor:
    return torch.stack([inputs["x"][s : s + spec.compress_block].mean(0) for s in first.tolist()])


def weighted(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("starts", [packed, with_gaps])
@pytest.mark.parametrize("kind", ["mlp", "mean"])
def test_compression_is_the_definition(
    spec: NSASpec, kind: str, starts: Callable[[NSASpec], tuple[Ints, int]]
) -> None:
    first, tokens = starts(spec)
    inputs = make_inputs(spec, tokens)
    if kind == "mlp":
        used = list(inputs.values())
        out, expected = mlp(inputs, first, spec), mlp_by_definition(inputs, first, spec)
    else:
        used = [inputs["x"]]
        out, expected = mean(inputs, first, spec), mean_by_definition(inputs, first, spec)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found, wanted = torch.autograd.grad(weighted(out), used), torch.autograd.grad(weighted(expected), used)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 20])
def test_no_compressed_token_gives_zero_gradients_to_every_input(tokens: int) -> None:
    spec = NSASpec()
    inputs, none = make_inputs(spec, tokens), np.zeros(0, np.int64)
    of_means = mean(inputs, none, spec)
    (gradient,) = torch.autograd.grad(of_means.sum(), [inputs["x"]])
    assert torch.equal(gradient, torch.zeros_like(inputs["x"]))
    out = mlp(inputs, none, spec)
    out.sum().backward()
    assert of_means.shape == out.shape == (0, 2, 3)
    for name, value in inputs.items():
        assert value.grad is not None, name
        assert torch.equal(value.grad, torch.zeros_like(value)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_floating_type(dtype: torch.dtype) -> None:
    spec, first = NSASpec(), np.arange(0, 300 - 32, 16)
    low = make_inputs(spec, 300, dtype)
    exact = {name: value.detach().double() for name, value in low.items()}
    found = mean(low, first, spec)
    assert found.dtype == dtype
    assert torch.equal(found, mean_by_definition(exact, first, spec).to(dtype)) or dtype == torch.float32
    out, eps = mlp(low, first, spec), torch.finfo(dtype).eps
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), mlp_by_definition(exact, first, spec), rtol=8 * eps, atol=8 * eps)


def test_repeated_backward_is_equal_to_the_bit() -> None:
    spec, first = NSASpec(), np.arange(0, 3000 - 32, 16)
    inputs = make_inputs(spec, 3000, torch.float32)
    used = list(inputs.values())
    one, two = (torch.autograd.grad(weighted(mlp(inputs, first, spec)), used) for _ in range(2))
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("name", ["position", "w1"])
def test_a_parameter_of_another_spec_is_refused(name: str) -> None:
    inputs = make_inputs(NSASpec(), 40)
    inputs[name] = make_inputs(NSASpec(16, 8, 32), 40)[name]
    with pytest.raises(ValueError, match=rf"^{name}\w* of shape .*: must be .*$"):
        mlp(inputs, np.zeros(1, np.int64), NSASpec())


@pytest.mark.parametrize("name", ["x", "w1", "b1"])
def test_a_gradient_is_the_same_where_nothing_else_has_one(name: str) -> None:
    spec = NSASpec()
    first, tokens = with_gaps(spec)
    inputs = make_inputs(spec, tokens)
    (wanted,) = torch.autograd.grad(weighted(mlp(inputs, first, spec)), [inputs[name]])
    alone = {key: value.detach().requires_grad_(key == name) for key, value in inputs.items()}
    weighted(mlp(alone, first, spec)).backward()
    assert alone[name].grad is not None
    assert torch.equal(alone[name].grad, wanted)
    assert all(value.grad is None for key, value in alone.items() if key != name)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_row_of_a_block_is_taken_once(spec: NSASpec) -> None:
    groups = 3
    for first, tokens in (packed(spec), with_gaps(spec)):
        taken = make_chunks(first, tokens, groups, spec, torch.device("cpu")).tokens_of_chunks.rows_MP.flatten()
        used = np.unique(first[:, None] + np.arange(spec.compress_block))
        wanted = used[:, None] * groups + np.arange(groups)
        assert np.array_equal(np.sort(taken.numpy()), wanted.ravel())


@pytest.mark.parametrize("first", [[0, 0], [0, 8], [16, 0], [0, 24], [0, 16, 40]])
def test_blocks_that_would_cut_each_others_chunks_are_refused(first: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^first=\[.*\]: must rise by at least d=16, by a multiple"):
        make_chunks(np.array(first), 100, 2, NSASpec(), torch.device("cpu"))


@pytest.mark.parametrize("first", [[-1], [69], [0, 69]])
def test_a_block_outside_the_buffer_is_refused(first: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^first from .*: must be from 0 to 68 in 100 tokens$"):
        make_chunks(np.array(first), 100, 2, NSASpec(), torch.device("cpu"))


@pytest.mark.parametrize("shape", [(99, 2, 3), (100, 3, 3), (100, 6)])
def test_a_buffer_that_the_chunks_were_not_made_for_is_refused(shape: tuple[int, ...]) -> None:
    chunks = make_chunks(np.array([0]), 100, 2, NSASpec(), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^x of shape .*: must be \[100, 2, head size\]$"):
        compress_mean(torch.zeros(shape), chunks)
