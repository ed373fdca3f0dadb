"""From a tile's probabilities to the blocks that its queries select (equations 9 to 11 of the paper)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_dist.kernels.packing import overlap_weights
from nsa_dist.kernels.spec import NSASpec

_FORCED = 0x7FFFFFFF << 32  # above every score's key: no finite float32 has these bits


@dataclass(frozen=True)
class Admitted:
    """When each candidate of the spans of a set of queries is admitted: before group `when [N, G]` of its span's.

    Of each query: place of its span's candidates in `when`, their number, its group, its span's first block.
    """

    when_NG: Tensor
    place_S: Tensor
    width_S: Tensor
    group_S: Tensor
    own_S: Tensor
    initial: int

    def allowed(self, at: slice, blocks: int) -> Tensor:
        """[G, M, blocks]: among which of its document's blocks a query of the tile may choose by score."""
        block = torch.arange(blocks, device=self.place_S.device)
        candidate = block - self.initial
        inside = (candidate >= 0) & (candidate < self.width_S[at, None])
        row = torch.where(inside, self.place_S[at, None] + candidate, len(self.when_NG) - 1)
        early = self.when_NG[row] <= self.group_S[at, None, None]
        own = block >= self.own_S[at, None]
        return ((early & inside[..., None]) | own[..., None]).permute(2, 0, 1)


def block_scores(p_GMN: Tensor, blocks: int, spec: NSASpec) -> Tensor:
    """[G, M, blocks] float32: importance of each block of the queries' document.

    `p_GMN`: probabilities of the document's compressed tokens from its first one on, added over the group's
    heads. Compressed tokens are added in ascending order, in p's type; then the sum is rounded to float32.
    """
    stride = spec.select_block // spec.compress_stride
    weights = overlap_weights(spec)
    before = spec.compress_block // spec.compress_stride - 1
    width = (blocks - 1) * stride + len(weights)
    padded = torch.nn.functional.pad(p_GMN, (before, max(0, width - before - p_GMN.shape[-1])))
    score = torch.zeros(*p_GMN.shape[:2], blocks, dtype=p_GMN.dtype, device=p_GMN.device)
    for o, weight in enumerate(weights):
        score += padded[..., o : o + (blocks - 1) * stride + 1 : stride] * weight
    return score.float()


def select_blocks(p_GMN: Tensor, own_M: Tensor, spec: NSASpec, allowed_GMB: Tensor | None = None) -> Tensor:
    """[M, G, n] int64: the blocks that each query of one document selects, numbered inside the document.

    `own_M`: the block of each query. Ascending, -1 at the end where a query has fewer than n blocks. The first
    `initial_blocks` and the last `local_blocks` up to the query's own are always taken; equal scores: the
    lower block first. A score and a block make one integer key, so that no two keys are equal. `allowed_GMB`:
    among which blocks of the document the rest is chosen (the span rule); all where it is not given.
    """
    blocks = int(own_M.max()) + 1
    block = torch.arange(blocks, device=p_GMN.device)
    own = own_M[:, None]
    forced = (block < spec.initial_blocks) | (block > own - spec.local_blocks)
    key = block_scores(p_GMN, blocks, spec).view(torch.int32).to(torch.int64) << 32
    if allowed_GMB is not None:
        key.masked_fill_(~allowed_GMB, -_FORCED)
    key.masked_fill_(forced, _FORCED)
    key += 0xFFFFFFFF - block
    key.masked_fill_(block > own, -1)
    top, pick = key.topk(min(spec.select_count, blocks), dim=-1)
    pick = pick.masked_fill(top < 0, blocks).sort(dim=-1).values
    pick = pick.masked_fill_(pick == blocks, -1)
    missing = spec.select_count - pick.shape[-1]
    return torch.nn.functional.pad(pick, (0, missing), value=-1).transpose(0, 1)
