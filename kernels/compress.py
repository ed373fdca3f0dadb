"""Compression: each block of l tokens becomes one compressed token, one every d (arXiv 2502.11089, eq. 7).

One for keys and one for values, before RoPE, shared by the KV heads (DESIGN section 2). The tokens lie in a
buffer, of which the caller says where each block starts: a whole sequence, or a rank's segments with halos.

Suffixes: N tokens of the buffer, C compressed tokens, G KV heads, l tokens of a block, D head size, F hidden.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from nsa_dist.kernels.spec import NSASpec


def compress_mlp(
    x_NGD: Tensor,
    first_C: Tensor,
    position_lD: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    spec: NSASpec,
) -> Tensor:
    """Linear(l*D, 2D), SiLU, Linear(2D, D) of each block's tokens plus a position embedding: [C, G, D].

    first_C (int64): the buffer's row where each block's l rows start. position_lD: embedding of a token's
    place in its block. Weights as `torch.nn.functional.linear` takes them: w1 [2D, l*D], b1 [2D], w2 [D, 2D],
    b2 [D].
    Every input gets a gradient, zero where C is 0. Results, gradients included, are the same on every run
    where starts are at least d rows apart, as those of a sequence's blocks are.

    Raises ValueError where position_lD or w1 doesn't fit the spec.
    """
    l, d, size = spec.compress_block, spec.compress_stride, x_NGD.shape[-1]
    if position_lD.shape != (l, size):
        raise ValueError(f"position_lD of shape {tuple(position_lD.shape)}: must be {(l, size)}")
    if w1.dim() != 2 or w1.shape[1] != l * size:
        raise ValueError(f"w1 of shape {tuple(w1.shape)}: must be [features, {l * size}]")
    # w1 (x + position) = w1 x + w1 position: a second bias, for which no block's tokens are changed.
    hidden_CGF = linear(position_lD.flatten(), w1, b1).expand(len(first_C), x_NGD.shape[1], -1)
    for rows_Cd, w_part in zip(_parts(first_C, spec), w1.split(d * size, dim=1), strict=True):
        hidden_CGF = hidden_CGF + _TakenLinear.apply(x_NGD, rows_Cd, w_part)
    return linear(silu(hidden_CGF), w2, b2)


def compress_mean(x_NGD: Tensor, first_C: Tensor, spec: NSASpec) -> Tensor:
    """The mean of each block's l tokens, [C, G, D], summed in x's type, at least float32.

    Arguments as in `compress_mlp`.
    """
    kind = torch.promote_types(x_NGD.dtype, torch.float32)
    total_CGD = x_NGD.new_zeros(len(first_C), *x_NGD.shape[1:], dtype=kind)
    for rows_Cd in _parts(first_C, spec):
        total_CGD = total_CGD + _Take.apply(x_NGD, rows_Cd).sum(1, dtype=kind)
    return (total_CGD / spec.compress_block).to(x_NGD.dtype)


def _parts(first_C: Tensor, spec: NSASpec) -> Iterator[Tensor]:
    """The rows of each block's l tokens in l/d parts of d tokens, [C, d].

    Blocks overlap, but those of one part don't: its backward writes each row once, where that of whole blocks
    would add in an order that changes from run to run.
    """
    rows_Cd = first_C[:, None] + torch.arange(spec.compress_stride, device=first_C.device)
    for start in range(0, spec.compress_block, spec.compress_stride):
        yield rows_Cd + start


class _Take(torch.autograd.Function):
    """Rows that differ from each other: the gradient is put where they were, nothing is added."""

    @staticmethod
    def forward(ctx: Any, x_NGD: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x_NGD.shape
        return x_NGD[rows]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        d_x = grad.new_zeros(ctx.shape)
        d_x[rows] = grad
        return d_x, None


class _TakenLinear(torch.autograd.Function):
    """linear(x_NGD[rows_Cd] as [C, G, d * D], w): the taken rows, a copy of x, are taken again in the backward."""

    @staticmethod
    def forward(ctx: Any, x_NGD: Tensor, rows_Cd: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x_NGD, rows_Cd, w)
        return linear(_taken(x_NGD, rows_Cd), w)

    @staticmethod
    def backward(ctx: Any, grad_CGF: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        x_NGD, rows_Cd, w = ctx.saved_tensors
        d_x = d_w = None
        if ctx.needs_input_grad[0]:
            d_x = torch.zeros_like(x_NGD, memory_format=torch.contiguous_format)
            parts_CGdD = (grad_CGF @ w).unflatten(2, (rows_Cd.shape[1], x_NGD.shape[2]))
            d_x.flatten(0, 1)[_by_head(rows_Cd, x_NGD.shape[1])] = parts_CGdD
        if ctx.needs_input_grad[2]:
            d_w = grad_CGF.flatten(0, 1).T @ _taken(x_NGD, rows_Cd).flatten(0, 1)
        return d_x, None, d_w


def _taken(x_NGD: Tensor, rows_Cd: Tensor) -> Tensor:
    """[C, G, d * D]"""
    return x_NGD.flatten(0, 1)[_by_head(rows_Cd, x_NGD.shape[1])].flatten(2)


def _by_head(rows_Cd: Tensor, groups: int) -> Tensor:
    """[C, G, d]: each KV head's rows in [N * G, D]. So taken they are copied once, not again to be transposed."""
    return rows_Cd[:, None] * groups + torch.arange(groups, device=rows_Cd.device)[:, None]
