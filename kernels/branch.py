"""What the backward of one branch starts from."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BranchGrad:
    """One branch of a gated sum: do the gradient of the sum [S, H, Dv]; gate [S, H]; the branch's output o
    [S, H, Dv] and log-sum-exp lse [S, H]; delta [S, H], the sum over a row of do times o, which is the gate's
    gradient.

    o and lse may be those of a softmax over more rows than a function is given (FlashAttention-2, arXiv
    2307.08691, algorithm 2): so parts that were computed apart are differentiated apart.
    """

    do_SHD: Tensor
    gate_SH: Tensor
    o_SHD: Tensor
    lse_SH: Tensor
    delta_SH: Tensor

    def grouped(self, groups: int) -> tuple[Tensor, Tensor, Tensor]:
        """The branch's own gradient and output [G, S, R, Dv] and the log-sum-exp [G, S, R], in the working type."""
        do = self.do_SHD.to(work_dtype(self.do_SHD)) * self.gate_SH.unsqueeze(-1)
        s, h = self.lse_SH.shape
        lse = self.lse_SH.view(s, groups, h // groups).transpose(0, 1)
        return group_queries(do, groups), group_queries(self.o_SHD, groups), lse

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """lse, delta, gate as a kernel reads them: contiguous float32, which it can load ahead of their use."""
        lse, delta, gate = (x.float().contiguous() for x in (self.lse_SH, self.delta_SH, self.gate_SH))
        return lse, delta, gate


def work_dtype(x: Tensor) -> torch.dtype:
    """The inputs' type, at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def group_queries(q_SHD: Tensor, groups: int) -> Tensor:
    """[S, H, D] to [G, S, R, D] in the working type."""
    s, h, d = q_SHD.shape
    return q_SHD.to(work_dtype(q_SHD)).view(s, groups, h // groups, d).transpose(0, 1)
