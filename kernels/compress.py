"""Compression: each block of l tokens becomes one compressed token, one every d (arXiv 2502.11089, eq. 7).

One for keys and one for values, before RoPE, shared by the KV heads (DESIGN section 2). The tokens lie in a
buffer, of which the caller says where each block starts: a whole sequence, or a rank's segments with halos.
A block is l/d chunks of d tokens, most of which are also a part of its neighbours: each chunk is taken and
multiplied once, and a block adds up its chunks' products.

Suffixes: N tokens of the buffer, U chunks, C compressed tokens, P chunks of a block (l/d), G KV heads, l tokens
of a block, d of a chunk, D head size, F hidden.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, silu

from nsa_dist.kernels.packing import Ints, on_device
from nsa_dist.kernels.spec import NSASpec


@torch.library.custom_op("nsa_dist::sum_rows", mutates_args=())
def sum_rows(x_NF: Tensor, rows_MP: Tensor) -> Tensor:
    """[M, F], in x's type: for each m the sum, at least in float32, of the rows of x that `rows_MP` (int64) names,
    -1 being none. Not differentiable."""
    if x_NF.is_cuda:
        from nsa_dist.kernels import rows

        with torch.cuda.device_of(x_NF):
            return rows.sum_rows(x_NF, rows_MP)
    if not len(x_NF):
        return x_NF.new_zeros(len(rows_MP), x_NF.shape[1])
    none = rows_MP < 0
    parts = x_NF.index_select(0, rows_MP.clamp(min=0).flatten()).view(*rows_MP.shape, x_NF.shape[1])
    if none.any():
        parts.masked_fill_(none.unsqueeze(-1), 0)
    return parts.sum(1) if rows_MP.shape[1] > 1 else parts.squeeze(1)


@sum_rows.register_fake
def _(x_NF: Tensor, rows_MP: Tensor) -> Tensor:
    return x_NF.new_empty(len(rows_MP), x_NF.shape[1])


@dataclass(frozen=True)
class Lookup:
    """Which rows of a source make each row of a result, and the other way round.

    A source's row is in one of the result at most: its gradient is looked up too, where others would be added.
    """

    rows_MP: Tensor  # of the source, for each row of the result
    back_N1: Tensor  # the result's row that each of the source's is in, -1 where it is in none

    def take(self, x_NF: Tensor) -> Tensor:
        """[M, F]: the sums."""
        return sum_rows(x_NF, self.rows_MP)

    def give_back(self, grad_MF: Tensor) -> Tensor:
        """[N, F]: for each row of the source the gradient of what it is in."""
        return sum_rows(grad_MF, self.back_N1)


@dataclass(frozen=True)
class Chunks:
    """The chunks of a buffer's blocks, each once, for G heads. Made by `make_chunks`, for all layers of a step."""

    spec: NSASpec
    tokens: int  # N
    groups: int
    tokens_of_chunks: Lookup  # of [N * G, D], d to a chunk and head: heads need not be transposed
    parts_of_blocks: Lookup  # of [U * G * P, F], P to a block and head

    @property
    def parts(self) -> int:
        """P"""
        return self.spec.compress_block // self.spec.compress_stride

    def take(self, x_NGD: Tensor) -> Tensor:
        """[U, G, d * D]: the chunks' tokens."""
        width = self.spec.compress_stride * x_NGD.shape[2]
        return self.tokens_of_chunks.take(x_NGD.flatten(0, 1)).view(-1, self.groups, width)

    def give_back(self, grad_UGdD: Tensor) -> Tensor:
        """[N, G, D]: the gradient of `take`, from [U, G, d * D]."""
        size = grad_UGdD.shape[2] // self.spec.compress_stride
        return self.tokens_of_chunks.give_back(grad_UGdD.view(-1, size)).view(-1, self.groups, size)

    def add_up(self, y_UGPF: Tensor) -> Tensor:
        """[C, G, F]: the sum over each block's parts, from [U, G, P * F] with a chunk's values as each part."""
        size = y_UGPF.shape[2] // self.parts
        return self.parts_of_blocks.take(y_UGPF.view(-1, size)).view(-1, self.groups, size)

    def spread(self, grad_CGF: Tensor) -> Tensor:
        """[U, G, P * F]: the gradient of `add_up`."""
        parts = self.parts_of_blocks.give_back(grad_CGF.flatten(0, 1))
        return parts.view(-1, self.groups, self.parts * grad_CGF.shape[2])


def make_chunks(first: Ints, tokens: int, groups: int, spec: NSASpec, device: torch.device) -> Chunks:
    """The chunks of blocks whose l rows start at rows `first [C]` of a buffer of `tokens` rows.

    On the host, where the device need not be waited for to know how many there are. Raises ValueError where a
    block doesn't lie in the buffer, or where a row would be in two chunks.
    """
    l, d = spec.compress_block, spec.compress_stride
    if len(first) and (first[0] < 0 or first[-1] + l > tokens):
        raise ValueError(f"first from {first[0]} to {first[-1]}: must be from 0 to {tokens - l} in {tokens} tokens")
    start_U, chunk = np.unique(first[:, None] + np.arange(0, l, d), return_inverse=True)
    if (np.diff(first) < d).any() or (np.diff(start_U) < d).any():
        raise ValueError(
            f"first={first[:8].tolist()}: must rise by at least d={d}, by a multiple of it where blocks overlap"
        )
    head_G1 = np.arange(groups)[:, None]
    token_UGd = (start_U[:, None, None] + np.arange(d)) * groups + head_G1
    part_CGP = (chunk.reshape(len(first), 1, l // d) * groups + head_G1) * (l // d) + np.arange(l // d)
    of_chunks = _lookup(token_UGd.reshape(-1, 1), tokens * groups, device)
    of_blocks = _lookup(part_CGP.reshape(-1, l // d), len(start_U) * groups * (l // d), device)
    return Chunks(spec, tokens, groups, of_chunks, of_blocks)


def _lookup(rows_MP: NDArray[Any], source_rows: int, device: torch.device) -> Lookup:
    back_N1 = np.full((source_rows, 1), -1, np.int64)
    back_N1[rows_MP, 0] = np.arange(len(rows_MP))[:, None]
    return Lookup(on_device(rows_MP, device), on_device(back_N1, device))


def compress_mlp(
    x_NGD: Tensor, chunks: Chunks, position_lD: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """Linear(l*D, 2D), SiLU, Linear(2D, D) of each block's tokens plus a position embedding: [C, G, D].

    position_lD: embedding of a token's place in its block. Weights as `torch.nn.functional.linear` takes them:
    w1 [2D, l*D], b1 [2D], w2 [D, 2D], b2 [D].
    Every input gets a gradient, zero where C is 0. Results, gradients included, are the same on every run.

    Raises ValueError where x, position_lD or w1 doesn't fit the chunks.
    """
    _check(x_NGD, chunks)
    l, size = chunks.spec.compress_block, x_NGD.shape[-1]
    if position_lD.shape != (l, size):
        raise ValueError(f"position_lD of shape {tuple(position_lD.shape)}: must be {(l, size)}")
    if w1.dim() != 2 or w1.shape[1] != l * size:
        raise ValueError(f"w1 of shape {tuple(w1.shape)}: must be [features, {l * size}]")
    # w1 (x + position) = w1 x + w1 position: a second bias, for which no block's tokens are changed.
    hidden_CGF = _BlockLinear.apply(x_NGD, w1, chunks) + linear(position_lD.flatten(), w1, b1)
    return linear(silu(hidden_CGF), w2, b2)


def compress_mean(x_NGD: Tensor, chunks: Chunks) -> Tensor:
    """The mean of each block's l tokens, [C, G, D], summed in x's type, at least float32; also in the backward.

    Raises ValueError where x doesn't fit the chunks.
    """
    _check(x_NGD, chunks)
    return (_BlockSum.apply(x_NGD, chunks) / chunks.spec.compress_block).to(x_NGD.dtype)


def _check(x_NGD: Tensor, chunks: Chunks) -> None:
    if x_NGD.dim() != 3 or x_NGD.shape[:2] != (chunks.tokens, chunks.groups):
        raise ValueError(f"x of shape {tuple(x_NGD.shape)}: must be [{chunks.tokens}, {chunks.groups}, head size]")


class _BlockLinear(torch.autograd.Function):
    """linear(each block's l * D values, w1), [C, G, F]: chunks times the weights of every part that they may be.

    The taken tokens, a copy of x, are taken again in the backward.
    """

    @staticmethod
    def forward(ctx: Any, x_NGD: Tensor, w1: Tensor, chunks: Chunks) -> Tensor:
        ctx.save_for_backward(x_NGD, w1)
        ctx.chunks = chunks
        return chunks.add_up(linear(chunks.take(x_NGD), _stacked(w1, chunks.parts)))

    @staticmethod
    def backward(ctx: Any, grad_CGF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NGD, w1 = ctx.saved_tensors
        chunks, d_x, d_w1 = ctx.chunks, None, None
        d_y = chunks.spread(grad_CGF)
        if ctx.needs_input_grad[0]:
            d_x = chunks.give_back(d_y @ _stacked(w1, chunks.parts))
        if ctx.needs_input_grad[1]:
            stacked = d_y.flatten(0, 1).T @ chunks.take(x_NGD).flatten(0, 1)
            d_w1 = stacked.unflatten(0, (chunks.parts, -1)).transpose(0, 1).flatten(1)
        return d_x, d_w1, None


class _BlockSum(torch.autograd.Function):
    """The sum of each block's l tokens, [C, G, D], in x's type, at least float32."""

    @staticmethod
    def forward(ctx: Any, x_NGD: Tensor, chunks: Chunks) -> Tensor:
        ctx.chunks, ctx.dtype = chunks, x_NGD.dtype
        kind = torch.promote_types(x_NGD.dtype, torch.float32)
        chunk_UGD = chunks.take(x_NGD).unflatten(2, (chunks.spec.compress_stride, -1)).sum(2, dtype=kind)
        return chunks.add_up(chunk_UGD.repeat(1, 1, chunks.parts))

    @staticmethod
    def backward(ctx: Any, grad_CGD: Tensor) -> tuple[Tensor, None]:
        chunks = ctx.chunks
        chunk_UGD = chunks.spread(grad_CGD).unflatten(2, (chunks.parts, -1)).sum(2).to(ctx.dtype)
        return chunks.give_back(chunk_UGD.repeat(1, 1, chunks.spec.compress_stride)), None


def _stacked(w1: Tensor, parts: int) -> Tensor:
    """[P * F, d * D], of which rows [p * F, (p + 1) * F) are the weights of part p."""
    return w1.unflatten(1, (parts, -1)).transpose(0, 1).flatten(0, 1)
