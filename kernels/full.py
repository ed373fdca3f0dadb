"""Full causal attention in rectangles, with log-sum-exp: for `full` layers and the ring.

A rectangle is queries of one document against keys of it: all of them visible, or the causal square. It is
computed by flash-attn where it is installed (GPU, 16 bit), else by the FlashAttention behind torch's SDPA
(called where it returns the log-sum-exp), else tile by tile.
"""

import importlib.util
from functools import cache

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.implementations import implementation
from nsa_dist.kernels.tiled import Ranges, make_ranges


def full_forward(q_MHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [M, H, Dv] and log-sum-exp [M, H] (float32 or float64). `causal` needs M = N."""
    kind = _implementation(q_MHD)
    if kind == "tiled":
        return implementation(q_MHD).range_forward(q_MHD, k_NGD, v_NGD, _ranges(q_MHD, k_NGD, causal), scale)
    heads, dv = q_MHD.shape[1], v_NGD.shape[2]
    q, k, v = _padded(q_MHD, k_NGD, v_NGD)
    if kind == "flash_attn":
        from flash_attn.flash_attn_interface import _flash_attn_forward

        o, lse, *_ = _flash_attn_forward(q[None], k[None], v[None], 0.0, scale, causal, -1, -1, 0.0, None, False)
        return o[0, ..., :dv], lse[0].T.contiguous()
    q4, k4, v4 = (
        _heads_first(q, 1),
        _heads_first(k, heads // k.shape[1]),
        _heads_first(v, heads // v.shape[1]),
    )
    if kind == "aten_cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q4, k4, v4, 0.0, causal, scale=scale)
    else:
        o, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q4, k4, v4, 0.0, causal, False, scale=scale)
    return o[0].transpose(0, 1)[..., :dv], lse[0].T.contiguous()


def full_backward(
    do_MHD: Tensor,
    q_MHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    o_MHD: Tensor,
    lse_MH: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, at least float32. `o`, `lse`: of the whole softmax, over more keys than these perhaps."""
    kind = _implementation(q_MHD)
    if kind == "tiled":
        ranges = _ranges(q_MHD, k_NGD, causal)
        branch = ungated(do_MHD, o_MHD, lse_MH)
        return implementation(q_MHD).range_backward(branch, q_MHD, k_NGD, v_NGD, ranges, scale)
    (heads, dk), (groups, dv) = q_MHD.shape[1:], v_NGD.shape[1:]
    q, k, v, o, do = _padded(q_MHD, k_NGD, v_NGD, o_MHD, do_MHD.to(q_MHD.dtype))
    lse = lse_MH.T.contiguous()[None]
    if kind == "flash_attn":
        from flash_attn.flash_attn_interface import _flash_attn_backward

        grads = [torch.empty_like(x[None]) for x in (q, k, v)]
        flash = (0.0, scale, causal, -1, -1, 0.0, None, True)  # deterministic
        _flash_attn_backward(do[None], q[None], k[None], v[None], o[None], lse, *grads, *flash)
        dq, d_k, d_v = (x[0].to(lse.dtype) for x in grads)
        return dq[..., :dk], d_k[..., :dk], d_v[..., :dv]
    q4, o4, do4 = (_heads_first(x, 1) for x in (q, o, do))
    k4, v4 = (_heads_first(x, heads // groups) for x in (k, v))
    if kind == "aten_cpu":
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do4, q4, k4, v4, o4, lse, 0.0, causal, scale=scale
        )
    else:
        m, n = q.shape[0], k.shape[0]
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            do4, q4, k4, v4, o4, lse, None, None, m, n, 0.0, causal, seed, seed[:0], scale=scale
        )
    dq, d_k, d_v = (x[0].transpose(0, 1).to(lse.dtype) for x in grads)
    d_k, d_v = (x.reshape(x.shape[0], groups, heads // groups, -1).sum(2) for x in (d_k, d_v))
    return dq[..., :dk], d_k[..., :dk], d_v[..., :dv]


def ungated(do_SHD: Tensor, o_SHD: Tensor, lse_SH: Tensor) -> BranchGrad:
    """The one branch of attention without gates."""
    delta = implementation(o_SHD).row_deltas(do_SHD, [o_SHD])[..., 0]
    return BranchGrad(do_SHD, torch.ones_like(lse_SH), o_SHD, lse_SH, delta)


@cache
def _flash_attn_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _implementation(q: Tensor) -> str:
    if q.device.type == "cpu":
        return "aten_cpu"
    if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
        return "flash_attn" if _flash_attn_installed() else "aten"
    return "tiled"


def _padded(*xs: Tensor) -> list[Tensor]:
    """FlashAttention takes one head size, a multiple of 8: zeros change neither products nor outputs."""
    width = -(-max(x.shape[-1] for x in xs) // 8) * 8
    return [torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in xs]


def _heads_first(x_NGD: Tensor, copies: int) -> Tensor:
    """[1, G * copies, N, D]"""
    return x_NGD.transpose(0, 1).repeat_interleave(copies, dim=0)[None]


def _ranges(q: Tensor, k: Tensor, causal: bool) -> Ranges:
    m, n = q.shape[0], k.shape[0]
    hi = np.arange(1, m + 1) if causal else np.full(m, n)
    return make_ranges(np.zeros(m, np.int64), hi, np.zeros(0, np.int64), q.device)
