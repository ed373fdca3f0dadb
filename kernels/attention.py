"""The public function: NSA from q, the branches' keys and values, and gates, on one device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.combine import combine_backward, combine_forward
from nsa_dist.kernels.compressed import CompressedView, compressed_forward, compressed_view
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import reference_attention
from nsa_dist.kernels.selected import BlockIndex, block_index, head_rows, selected_backward, selected_forward
from nsa_dist.kernels.spec import NSASpec
from nsa_dist.kernels.tiled import Ranges, range_backward, range_forward, window_ranges

BACKENDS = ("auto", "reference")


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    spec: NSASpec,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Native Sparse Attention (arXiv 2502.11089, equation 5), causal, trainable.

    Shapes: q [B, T, H, Dk]; k_cmp [B, C, G, Dk], v_cmp [B, C, G, Dv] with C = (T - l)//d + 1 compressed tokens
    (0 where T < l; with packed documents those of all documents, one document after the other); k_slc, k_win
    [B, T, G, Dk]; v_slc, v_win [B, T, G, Dv]; gates [B, T, H, 3] in the order compressed, selected, window.
    Returns [B, T, H, Dv] in q's type. G divides H.

    cu_seqlens: int32 [documents + 1], tokens at which packed documents start and the last ends (B = 1).
    scale: of the products; Dk ** -0.5 unless given. backend: `auto` (vectorised, in tiles) or `reference`
    (the definition; any floating type, slow).

    Raises ValueError naming the argument, its value and what is allowed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    packing = _packing(q, spec, cu_seqlens)
    kv = {"k_cmp": k_cmp, "v_cmp": v_cmp, "k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win}
    _check(q, kv, gates, packing)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    inputs = [x.flatten(0, 1) for x in (q, *kv.values(), gates)]
    if backend == "reference":
        q_, k_cmp_, v_cmp_, k_slc_, v_slc_, k_win_, v_win_, gates_ = inputs
        out = reference_attention(q_, k_cmp_, v_cmp_, k_slc_, v_slc_, k_win_, v_win_, gates_, spec, packing, factor)
    else:
        out = _TiledNSA.apply(local_views(packing, q.device, k_slc.shape[2]), spec, factor, *inputs)
    return out.view(*q.shape[:3], v_slc.shape[-1])


@dataclass(frozen=True)
class LocalViews:
    """What the queries of a whole sequence see of its own compressed tokens, blocks and window."""

    compressed: CompressedView
    blocks: BlockIndex
    window: Ranges
    token_S: Tensor


def local_views(packing: Packing, device: torch.device, groups: int = 1) -> LocalViews:
    """The views of a sequence that one device holds whole."""
    tokens, compressed = np.arange(packing.tokens), np.arange(packing.compressed)
    return LocalViews(
        compressed_view(packing, tokens, compressed, device),
        block_index(packing, [tokens] * groups, device),
        window_ranges(packing, tokens, tokens, packing.spec.window, device),
        torch.from_numpy(tokens).to(device),
    )


def nsa_forward(views: LocalViews, spec: NSASpec, scale: float, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Output, then what the backward needs: the branches' outputs, their log-sum-exps, the selection."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    o_cmp, lse_cmp, picks = compressed_forward(q, k_cmp, v_cmp, views.compressed, spec, scale)
    rows = head_rows(k_slc), head_rows(v_slc)
    o_slc, lse_slc = selected_forward(q, *rows, picks, views.token_S, views.blocks, scale)
    o_win, lse_win = range_forward(q, k_win, v_win, views.window, scale)
    out = combine_forward(gates, [o_cmp, o_slc, o_win])
    return [out, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, picks]


def nsa_backward(
    views: LocalViews, scale: float, inputs: Sequence[Tensor], outputs: Sequence[Tensor], do: Tensor
) -> list[Tensor]:
    """Gradients of the eight inputs, in their types."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    _, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, picks = outputs
    d_gates, (do_cmp, do_slc, do_win) = combine_backward(do, gates, [o_cmp, o_slc, o_win])
    cmp = range_backward(do_cmp, q, k_cmp, v_cmp, o_cmp, lse_cmp, views.compressed.ranges, scale)
    rows = head_rows(k_slc), head_rows(v_slc)
    dq_slc, *d_rows = selected_backward(do_slc, q, *rows, o_slc, lse_slc, picks, views.token_S, views.blocks, scale)
    slc = [d.view(k_slc.shape[1], len(k_slc), d.shape[-1]).transpose(0, 1) for d in d_rows]
    win = range_backward(do_win, q, k_win, v_win, o_win, lse_win, views.window, scale)
    grads = [cmp[0] + dq_slc + win[0], *cmp[1:], *slc, *win[1:], d_gates]
    return [g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]


class _TiledNSA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, views: LocalViews, spec: NSASpec, scale: float, *inputs: Tensor) -> Tensor:
        outputs = nsa_forward(views, spec, scale, inputs)
        ctx.views, ctx.scale = views, scale
        ctx.save_for_backward(*inputs, *outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        saved = ctx.saved_tensors
        return None, None, None, *nsa_backward(ctx.views, ctx.scale, saved[:8], saved[8:], do)


def _packing(q: Tensor, spec: NSASpec, cu_seqlens: Tensor | None) -> Packing:
    if q.dim() != 4:
        raise ValueError(f"q of shape {tuple(q.shape)}: must be [B, T, H, Dk]")
    batch, tokens = q.shape[:2]
    if cu_seqlens is None:
        return Packing(np.arange(batch + 1 if tokens else 1) * tokens, spec)
    if batch != 1:
        raise ValueError(f"cu_seqlens with B={batch}: packed documents take B = 1")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1:
        raise ValueError(
            f"cu_seqlens of type {cu_seqlens.dtype}, shape {tuple(cu_seqlens.shape)}: must be int32 [documents + 1]"
        )
    packing = Packing(cu_seqlens.cpu().numpy(), spec)
    if packing.tokens != tokens:
        raise ValueError(f"cu_seqlens[-1]={packing.tokens}: must be T={tokens}")
    return packing


def _check(q: Tensor, kv: dict[str, Tensor], gates: Tensor, packing: Packing) -> None:
    if not q.dtype.is_floating_point:
        raise ValueError(f"q of type {q.dtype}: must be a floating type")
    batch, tokens, heads, dk = q.shape
    groups, dv = (*kv["v_slc"].shape, 0, 0, 0, 0)[2:4]
    if groups == 0 or heads % groups:
        raise ValueError(f"q with H={heads} heads: must be a multiple of the G={groups} KV heads of v_slc")
    for name, x in (*kv.items(), ("gates", gates)):
        rows = packing.compressed // batch if name.endswith("cmp") else tokens
        want = (batch, rows, groups, dk if name[0] == "k" else dv)
        if name == "gates":
            want = (batch, tokens, heads, 3)
        if tuple(x.shape) != want:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: must be {want}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} of {x.dtype} on {x.device}: must be q's, {q.dtype} on {q.device}")
