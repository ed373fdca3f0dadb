"""What `nsa-dist bench kernels` measures on: shapes, inputs, selections."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_dist.kernels import NSASpec, nsa_attention
from nsa_dist.kernels.attention import local_views
from nsa_dist.kernels.compress import Chunks, compress_mean, make_chunks
from nsa_dist.kernels.implementations import implementation
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.selected import head_rows
from nsa_dist.traces import NEEDS_64K, load_needs

SPEC = NSASpec()
SELECTIONS = ("random", "local", "same", "trained")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Shape:
    tokens: int
    heads: int
    groups: int
    dk: int
    dv: int
    dtype: str
    device: str = "cuda"

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self.device, dtype=TYPES[self.dtype])

    def chunks(self) -> Chunks:
        """What the compressed tokens are made of."""
        first = Packing(np.array([0, self.tokens]), SPEC).cmp_start
        return make_chunks(first, self.tokens, self.groups, SPEC, torch.device(self.device))


@dataclass(frozen=True)
class Made:
    """A function of tensors to be timed, and the tensors; `same_by_ours`: what it should give, by our kernels."""

    fn: Callable[..., Tensor]
    leaves: list[Tensor]
    same_by_ours: Callable[[], Tensor] | None = None


Maker = Callable[[Shape], Made]


def nsa_inputs(shape: Shape) -> list[Tensor]:
    """q [T, H, Dk], gates before their sigmoid [T, H, 3]; keys and values [T, G, ·] to be compressed, those of the
    selected branch, those of the window."""
    kv = [shape.random(shape.tokens, shape.groups, d) for _ in range(3) for d in (shape.dk, shape.dv)]
    return [shape.random(shape.tokens, shape.heads, shape.dk), shape.random(shape.tokens, shape.heads, 3), *kv]


def by_mean(shape: Shape, inputs: list[Tensor]) -> Tensor:
    """Our output [T, H, Dv] from `nsa_inputs`, compressed by the mean: what rivals that compress so should give."""
    q, gates, k, v, *kv = inputs
    chunks = shape.chunks()
    k_cmp, v_cmp = (compress_mean(x, chunks) for x in (k, v))
    return one_sequence(q, gates, [k_cmp, v_cmp, *kv])


def one_sequence(q: Tensor, gates: Tensor, kv: list[Tensor], recompute: bool = False) -> Tensor:
    """`nsa_attention` of tensors without a batch dim, of gates before their sigmoid."""
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = (x[None] for x in kv)
    weights = torch.sigmoid(gates)[None]
    out = nsa_attention(q[None], k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, weights, SPEC, recompute=recompute)
    return out.view(out.shape[1:])  # out[0] would cost a copy of its gradient


def selected_by_ours(shape: Shape, picks: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The selected branch [T, H, Dv] by our kernels."""
    views = local_views(Packing(np.array([0, shape.tokens]), SPEC), q.device, shape.groups)
    words = head_rows(k), head_rows(v), picks, views.token_S, views.blocks, shape.dk**-0.5
    return implementation(q).selected_forward(q, *words)[0]


def selection(name: str, tokens: int, groups: int, device: str = "cuda") -> Tensor | None:
    """[T, G, n] int32, block 0 and the last two of each query included, ascending, then -1.

    random: any earlier blocks; local: the nearest; same: the first ones for every query; trained: among those that
    the query's group of 64 selected in the packaged trace of a model (None above its 65,536 tokens).
    """
    n, size = SPEC.select_count, SPEC.select_block
    own = torch.arange(tokens, device=device) // size
    block = torch.arange(int(own[-1]) + 1, device=device)
    generator = torch.Generator(device).manual_seed(0)
    if name == "trained":
        if tokens > 65536:
            return None
        needs = np.unpackbits(load_needs(NEEDS_64K).bits[0], axis=-1).astype(bool)[:, : -(-tokens // size)]
        needed = torch.from_numpy(needs).to(device)[:, :, : len(block)]
    picks = torch.empty(tokens, groups, n, dtype=torch.int32, device=device)
    for g in range(groups):
        for first in range(0, tokens, 8192):
            at = own[first : first + 8192, None]
            if name == "local":
                rank = block.float().expand(len(at), -1).clone()
            elif name == "same":
                rank = -block.float().expand(len(at), -1).clone()
            else:
                rank = torch.rand(len(at), len(block), generator=generator, device=device)
            if name == "trained":
                rank += needed[g % len(needed), at[:, 0]].float()
            rank.masked_fill_((block == 0) | (block > at - SPEC.local_blocks), torch.inf)
            rank.masked_fill_(block > at, -torch.inf)
            best, pick = rank.topk(min(n, len(block)), dim=1)
            pick = pick.masked_fill(best == -torch.inf, len(block)).sort(1).values
            pick = F.pad(pick.masked_fill(pick == len(block), -1), (0, n - pick.shape[1]), value=-1)
            picks[first : first + 8192, g] = pick.int()
    return picks
