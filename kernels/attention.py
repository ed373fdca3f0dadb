"""The public function: NSA from q, the branches' keys and values, and gates, on one device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.branch import BranchGrad, work_dtype
from nsa_dist.kernels.compressed import CompressedView, compressed_view
from nsa_dist.kernels.implementations import BACKENDS, Implementation, implementation
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import reference_attention
from nsa_dist.kernels.selected import BlockIndex, block_index, head_rows
from nsa_dist.kernels.span import SpanView, admit, span_view, unit_sums
from nsa_dist.kernels.spec import NSASpec
from nsa_dist.kernels.tiled import Ranges, window_ranges


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
    recompute: bool = False,
) -> Tensor:
    """Native Sparse Attention (arXiv 2502.11089, equation 5), causal, trainable.

    Shapes: q [B, T, H, Dk]; k_cmp [B, C, G, Dk], v_cmp [B, C, G, Dv] with C = (T - l)//d + 1 compressed tokens
    (0 where T < l; with packed documents those of all documents, one document after the other); k_slc, k_win
    [B, T, G, Dk]; v_slc, v_win [B, T, G, Dv]; gates [B, T, H, 3] in the order compressed, selected, window.
    Returns [B, T, H, Dv] in q's type. G divides H.

    cu_seqlens: int32 [documents + 1], tokens at which packed documents start and the last ends (B = 1).
    scale: of the products, above 0; Dk ** -0.5 unless given.

    backend: `triton` (the kernels; float16, bfloat16, float32, head sizes from 16 to 256 that 8 divides), `auto` (the
    kernels on a GPU, plain torch operations in tiles on a CPU and in float64) or `reference` (the definition; any
    floating type, slow).

    recompute: the three branches' outputs, as large as the result each, aren't kept for the backward, which computes
    them again (the kernels to the bit, the plain operations to rounding); log-sum-exps and the selection are kept.

    An operator of torch.library: torch.compile takes it without a graph break.

    Raises ValueError naming the argument, its value and what is allowed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
    kv = {"k_cmp": k_cmp, "v_cmp": v_cmp, "k_slc": k_slc, "v_slc": v_slc, "k_win": k_win, "v_win": v_win}
    _check(q, kv, gates, spec, cu_seqlens)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < factor < math.inf:  # the kernels mask scores before they multiply
        raise ValueError(f"scale={scale}: must be a finite number above 0")
    sizes = [float(getattr(spec, f.name)) for f in fields(spec)]
    inputs = [x.flatten(0, 1) for x in (q, *kv.values(), gates)]
    if backend == "reference":
        packing = _packing(q.shape[0], inputs, sizes, cu_seqlens)
        q_, k_cmp_, v_cmp_, k_slc_, v_slc_, k_win_, v_win_, gates_ = inputs
        out = reference_attention(q_, k_cmp_, v_cmp_, k_slc_, v_slc_, k_win_, v_win_, gates_, spec, packing, factor)
    else:
        out = _attention(inputs, cu_seqlens, q.shape[0], sizes, factor, backend, recompute)[0]
    return out.view(*q.shape[:3], v_slc.shape[-1])


@dataclass(frozen=True)
class LocalViews:
    """What the queries of a whole sequence see of its own compressed tokens, blocks and window; the span rule's
    part where the spec has one."""

    compressed: CompressedView
    blocks: BlockIndex
    window: Ranges
    token_S: Tensor
    span: SpanView | None


def local_views(packing: Packing, device: torch.device, groups: int = 1) -> LocalViews:
    """The views of a sequence that one device holds whole."""
    tokens, compressed = np.arange(packing.tokens), np.arange(packing.compressed)
    return LocalViews(
        compressed_view(packing, tokens, compressed, device),
        block_index(packing, [tokens] * groups, device),
        window_ranges(packing, tokens, tokens, packing.spec.window, device),
        torch.from_numpy(tokens).to(device),
        span_view(packing, tokens, device) if packing.spec.span else None,
    )


def nsa_forward(
    views: LocalViews, spec: NSASpec, scale: float, inputs: Sequence[Tensor], backend: str = "auto"
) -> list[Tensor]:
    """Output, then what the backward needs: the branches' outputs, their log-sum-exps, the selection."""
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    local = implementation(q, backend)
    admitted = None
    if views.span is not None:
        tokens = np.arange(len(q))
        sums = unit_sums(q, k_cmp, tokens, views.compressed, spec, scale, views.span.units)
        admitted = admit(sums, views.span, spec)
    o_cmp, lse_cmp, picks = local.compressed_forward(q, k_cmp, v_cmp, views.compressed, spec, scale, admitted)
    o_win, lse_win = local.range_forward(q, k_win, v_win, views.window, scale)
    slc = q, head_rows(k_slc), head_rows(v_slc), picks, views.token_S, views.blocks, scale
    o_slc, lse_slc, out = local.selected_combined(gates, o_cmp, o_win, *slc)
    return [out, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, picks]


def nsa_backward(
    views: LocalViews,
    scale: float,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    do: Tensor,
    backend: str = "auto",
) -> list[Tensor]:
    """Gradients of the eight inputs, in their types.

    outputs: what `nsa_forward` returned; without the branches' outputs, these are computed again, one at a time.
    """
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
    local = implementation(q, backend)
    kept, lses, picks = outputs[1:-4], outputs[-4:-1], outputs[-1]
    cmp, win = (q, k_cmp, v_cmp, views.compressed.ranges, scale), (q, k_win, v_win, views.window, scale)

    def slc() -> tuple[Any, ...]:
        return q, head_rows(k_slc), head_rows(v_slc), picks, views.token_S, views.blocks, scale

    if kept:
        d_gates, made = gated_branches(local, do, gates, kept, lses)
    else:
        deltas: list[Tensor] = []
        gate_3SH = _rows_of_gates(gates)

    def branch(i: int, forward: Callable[[], tuple[Tensor, Tensor]]) -> BranchGrad:
        if kept:
            return made[i]
        o = forward()[0]
        deltas.append(local.row_deltas(do, [o])[..., 0])
        return BranchGrad(do, gate_3SH[i], o, lses[i], deltas[i])

    # A branch's gradients, in float32, are made those of the inputs' types before the next branch's are there.
    dq, *d_cmp = local.range_backward(branch(0, lambda: local.range_forward(*cmp)), *cmp)
    grads = [_as_input(*pair) for pair in zip(d_cmp, inputs[1:3], strict=True)]
    del d_cmp
    _, *d_rows = local.selected_backward(branch(1, lambda: local.selected_forward(*slc())), *slc(), dq)
    for d, x in zip(d_rows, inputs[3:5], strict=True):
        grads.append(_as_input(d.view(x.shape[1], len(x), d.shape[-1]).transpose(0, 1), x))
    del d, d_rows
    _, *d_win = local.range_backward(branch(2, lambda: local.range_forward(*win)), *win, dq)
    grads += [_as_input(*pair) for pair in zip(d_win, inputs[5:7], strict=True)]
    if not kept:
        d_gates = torch.stack(deltas, dim=-1)
    return [_as_input(dq, q), *grads, _as_input(d_gates, gates)]


def _as_input(grad: Tensor, x: Tensor) -> Tensor:
    return grad.to(x.dtype, memory_format=torch.contiguous_format).contiguous()


def _rows_of_gates(gates: Tensor) -> Tensor:
    """[3, S, H] in the working type."""
    return gates.permute(2, 0, 1).to(work_dtype(gates)).contiguous()


def gated_branches(
    local: Implementation, do: Tensor, gates: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[Tensor, list[BranchGrad]]:
    """The gates' gradient [S, H, 3], and what each branch's backward starts from."""
    d_gates = local.row_deltas(do, list(outs))
    gate_3SH = _rows_of_gates(gates)
    parts = zip(outs, lses, strict=True)
    return d_gates, [BranchGrad(do, gate_3SH[i], *part, d_gates[..., i]) for i, part in enumerate(parts)]


@torch.library.custom_op("nsa_dist::attention", mutates_args=())
def _attention(
    inputs: list[Tensor],
    cu_seqlens: Tensor | None,
    batch: int,
    sizes: list[float],
    scale: float,
    backend: str,
    recompute: bool,
) -> list[Tensor]:
    """`nsa_forward` of the flattened inputs [B * T, ...], without the branches' outputs where they are to be
    recomputed; `sizes`: the spec's fields."""
    packing = _packing(batch, inputs, sizes, cu_seqlens)
    with torch.cuda.device_of(inputs[0]):
        made = nsa_forward(_views(packing, inputs), packing.spec, scale, inputs, backend)
    return [made[0], *made[4:]] if recompute else made


@_attention.register_fake
def _(
    inputs: list[Tensor],
    cu_seqlens: Tensor | None,
    batch: int,
    sizes: list[float],
    scale: float,
    backend: str,
    recompute: bool,
) -> list[Tensor]:
    q, v_slc = inputs[0], inputs[4]
    outs = [q.new_empty(*q.shape[:2], v_slc.shape[2]) for _ in range(1 if recompute else 4)]
    lses = [q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32)) for _ in range(3)]
    count = int(sizes[[f.name for f in fields(NSASpec)].index("select_count")])
    return [*outs, *lses, q.new_empty(len(q), v_slc.shape[1], count, dtype=torch.int32)]


@torch.library.custom_op("nsa_dist::attention_backward", mutates_args=())
def _attention_backward(
    inputs: list[Tensor],
    outputs: list[Tensor],
    do: Tensor,
    cu_seqlens: Tensor | None,
    batch: int,
    sizes: list[float],
    scale: float,
    backend: str,
) -> list[Tensor]:
    packing = _packing(batch, inputs, sizes, cu_seqlens)
    with torch.cuda.device_of(inputs[0]):
        return nsa_backward(_views(packing, inputs), scale, inputs, outputs, do, backend)


@_attention_backward.register_fake
def _(inputs: list[Tensor], *rest: Any) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, cu_seqlens, *ctx.rest, _ = inputs
    ctx.cu_seqlens = cu_seqlens
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    inputs, outputs = list(ctx.saved_tensors[:8]), list(ctx.saved_tensors[8:])
    if grads[0] is None:
        return (None,) * 7
    found = _attention_backward(inputs, outputs, grads[0], ctx.cu_seqlens, *ctx.rest)
    return found, *(None,) * 6


_attention.register_autograd(_differentiate, setup_context=_setup)


@lru_cache(maxsize=8)
def _cached_packing(cu: tuple[int, ...], sizes: tuple[float, ...]) -> Packing:
    # The operator's numbers are floating: whole ones are counts, shares stay as they are.
    values: dict[str, Any] = {
        f.name: int(x) if x == int(x) else x for f, x in zip(fields(NSASpec), sizes, strict=True)
    }
    return Packing(np.array(cu), NSASpec(**values))


@lru_cache(maxsize=8)
def _cached_views(packing: Packing, device: torch.device, groups: int) -> LocalViews:
    return local_views(packing, device, groups)


def _views(packing: Packing, inputs: Sequence[Tensor]) -> LocalViews:
    """Of every layer alike: made once for a sequence."""
    return _cached_views(packing, inputs[0].device, inputs[3].shape[1])


def _packing(batch: int, inputs: Sequence[Tensor], sizes: Sequence[float], cu_seqlens: Tensor | None) -> Packing:
    tokens, rows = len(inputs[0]), len(inputs[1])
    if cu_seqlens is None:
        cu = tuple(range(0, tokens + 1, tokens // batch)) if tokens else (0,)
    else:
        cu = tuple(cu_seqlens.tolist())
    packing = _cached_packing(cu, tuple(sizes))
    if packing.tokens != tokens:
        raise ValueError(f"cu_seqlens[-1]={packing.tokens}: must be T={tokens}")
    if packing.compressed != rows:
        raise ValueError(f"k_cmp with {rows} compressed tokens: cu_seqlens makes {packing.compressed}")
    return packing


def _check(q: Tensor, kv: dict[str, Tensor], gates: Tensor, spec: NSASpec, cu_seqlens: Tensor | None) -> None:
    """What shapes, types and devices tell; what cu_seqlens holds is checked where it is read."""
    if q.dim() != 4:
        raise ValueError(f"q of shape {tuple(q.shape)}: must be [B, T, H, Dk]")
    if not q.dtype.is_floating_point:
        raise ValueError(f"q of type {q.dtype}: must be a floating type")
    batch, tokens, heads, dk = q.shape
    rows = max(0, (tokens - spec.compress_block) // spec.compress_stride + 1)
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens with B={batch}: packed documents take B = 1")
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1:
            raise ValueError(
                f"cu_seqlens of type {cu_seqlens.dtype}, shape {tuple(cu_seqlens.shape)}: "
                "must be int32 [documents + 1]"
            )
        rows = kv["k_cmp"].shape[1] if kv["k_cmp"].dim() == 4 else 0
    groups, dv = (*kv["v_slc"].shape, 0, 0, 0, 0)[2:4]
    if groups == 0 or heads % groups:
        raise ValueError(f"q with H={heads} heads: must be a multiple of the G={groups} KV heads of v_slc")
    for name, x in (*kv.items(), ("gates", gates)):
        want = (batch, rows if name.endswith("cmp") else tokens, groups, dk if name[0] == "k" else dv)
        if name == "gates":
            want = (batch, tokens, heads, 3)
        if tuple(x.shape) != want:
            raise ValueError(f"{name} of shape {tuple(x.shape)}: must be {want}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} of {x.dtype} on {x.device}: must be q's, {q.dtype} on {q.device}")
