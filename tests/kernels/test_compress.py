"""Compression against a loop over blocks that follows DESIGN section 2."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from nsa_dist.kernels.compress import compress_mean, compress_mlp
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.spec import NSASpec

SPECS = [NSASpec(), NSASpec(16, 8, 32), NSASpec(8, 8, 8), NSASpec(24, 8, 16)]
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


def mlp(inputs: dict[str, Tensor], first: Tensor, spec: NSASpec) -> Tensor:
    x, position, w1, b1, w2, b2 = inputs.values()
    return compress_mlp(x, first, position, w1, b1, w2, b2, spec)


def mlp_by_definition(inputs: dict[str, Tensor], first: Tensor, spec: NSASpec) -> Tensor:
    x, position, w1, b1, w2, b2 = inputs.values()
    rows = []
    for start in first.tolist():
        for g in range(x.shape[1]):
            block = (x[start : start + spec.compress_block, g] + position).reshape(-1)
            rows.append(w2 @ silu(w1 @ block + b1) + b2)
    return torch.stack(rows).view(len(first), x.shape[1], -1)


def mean_by_definition(inputs: dict[str, Tensor], first: Tensor, spec: NSASpec) -> Tensor:
    return torch.stack([inputs["x"][s : s + spec.compress_block].mean(0) for s in first.tolist()])


def weighted(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["mlp", "mean"])
def test_compression_is_the_definition(spec: NSASpec, kind: str) -> None:
    packing = Packing(np.cumsum([0, *LENGTHS]), spec)
    inputs, first = make_inputs(spec, packing.tokens), torch.from_numpy(packing.cmp_start)
    if kind == "mlp":
        used = list(inputs.values())
        out, expected = mlp(inputs, first, spec), mlp_by_definition(inputs, first, spec)
    else:
        used = [inputs["x"]]
        out, expected = compress_mean(inputs["x"], first, spec), mean_by_definition(inputs, first, spec)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    found, wanted = torch.autograd.grad(weighted(out), used), torch.autograd.grad(weighted(expected), used)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, 20])
def test_no_compressed_token_gives_zero_gradients_to_every_input(tokens: int) -> None:
    spec = NSASpec()
    inputs, none = make_inputs(spec, tokens), torch.zeros(0, dtype=torch.int64)
    mean = compress_mean(inputs["x"], none, spec)
    (gradient,) = torch.autograd.grad(mean.sum(), [inputs["x"]])
    assert torch.equal(gradient, torch.zeros_like(inputs["x"]))
    out = mlp(inputs, none, spec)
    out.sum().backward()
    assert mean.shape == out.shape == (0, 2, 3)
    for name, value in inputs.items():
        assert value.grad is not None, name
        assert torch.equal(value.grad, torch.zeros_like(value)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_floating_type(dtype: torch.dtype) -> None:
    spec, first = NSASpec(), torch.arange(0, 300 - 32, 16)
    low = make_inputs(spec, 300, dtype)
    exact = {name: value.detach().double() for name, value in low.items()}
    mean = compress_mean(low["x"], first, spec)
    assert mean.dtype == dtype
    assert torch.equal(mean, mean_by_definition(exact, first, spec).to(dtype)) or dtype == torch.float32
    out, eps = mlp(low, first, spec), torch.finfo(dtype).eps
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), mlp_by_definition(exact, first, spec), rtol=8 * eps, atol=8 * eps)


def test_repeated_backward_is_equal_to_the_bit() -> None:
    spec, first = NSASpec(), torch.arange(0, 3000 - 32, 16)
    inputs = make_inputs(spec, 3000, torch.float32)
    used = list(inputs.values())
    one, two = (torch.autograd.grad(weighted(mlp(inputs, first, spec)), used) for _ in range(2))
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("name", ["position", "w1"])
def test_a_parameter_of_another_spec_is_refused(name: str) -> None:
    inputs = make_inputs(NSASpec(), 40)
    inputs[name] = make_inputs(NSASpec(16, 8, 32), 40)[name]
    with pytest.raises(ValueError, match=rf"^{name}\w* of shape .*: must be .*$"):
        mlp(inputs, torch.zeros(1, dtype=torch.int64), NSASpec())
