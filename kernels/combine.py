"""Merging parts of one softmax by their log-sum-exps, and branches by their gates."""

import torch
from torch import Tensor


def merge(o: Tensor, lse: Tensor, o_part: Tensor, lse_part: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of a softmax, o [S, H, Dv] and lse [S, H], as one. A part may have seen nothing (lse -inf)."""
    total = torch.logaddexp(lse, lse_part)
    safe = total.masked_fill(total == -torch.inf, 0)
    merged = o * (lse - safe).exp().unsqueeze(-1) + o_part * (lse_part - safe).exp().unsqueeze(-1)
    return merged.to(o.dtype), total


def combine_forward(gates_SH3: Tensor, branches: list[Tensor]) -> Tensor:
    """Sum of gate times branch (equation 5): [S, H, Dv]; gates in the order compressed, selected, window."""
    work = torch.promote_types(gates_SH3.dtype, torch.float32)
    parts = [gates_SH3[..., i, None].to(work) * o for i, o in enumerate(branches)]
    return (parts[0] + parts[1] + parts[2]).to(branches[0].dtype)


def row_deltas(do_SHD: Tensor, branches: list[Tensor]) -> Tensor:
    """[S, H, branches]: the sum over a row of do times each branch's output: the gates' gradients."""
    do = do_SHD.to(torch.promote_types(do_SHD.dtype, torch.float32))
    return torch.stack([(do * o).sum(-1) for o in branches], dim=-1)
