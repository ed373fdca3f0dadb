"""What `nsa-dist bench kernels` measures beside ours: full attention, and other implementations of NSA where they
can be imported. Only their public functions are called; each runs all of NSA from the inputs that ours gets, as far
as it can, and says what differs.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_dist.bench_inputs import SPEC, Made, Maker, Shape, by_mean, nsa_inputs
from nsa_dist.errors import ConfigError

Window = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rival:
    """An implementation of NSA: the module that must be importable; all of NSA; the selected branch alone, of
    picks [T, G, n] that it is given; what it computes otherwise than ours."""

    name: str
    module: str
    whole: Maker
    selected: Callable[[Shape, Tensor], Made]
    differs: str


def nsa_rivals(wanted: str) -> list[Rival]:
    """`all`: those that can be imported; `none`; or names, commas between.

    Raises ConfigError for a name that isn't known, and for one whose module isn't there.
    """
    if wanted == "none":
        return []
    there = [r for r in _NSA if importlib.util.find_spec(r.module)]
    if wanted == "all":
        return there
    for name in wanted.split(","):
        if name not in [r.name for r in there]:
            here = ", ".join(["all", "none", *(r.name for r in there)])
            missing = "".join(f"; {r.name} needs the module {r.module}" for r in _NSA if r not in there)
            raise ConfigError(f"--rivals {name}: must be one of {here}{missing}")
    return [r for r in there if r.name in wanted.split(",")]


def _one_document(shape: Shape) -> Tensor:
    return torch.tensor([0, shape.tokens], dtype=torch.int32, device=shape.device)


def _window(shape: Shape) -> Window:
    """The window branch of rivals that lack one, or whose own needs flash-attn: FlexAttention, [T, ·, D]."""
    from torch.nn.attention.flex_attention import create_block_mask

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < SPEC.window)

    # Compiled: else a tensor of T x T is made.
    mask = torch.compile(create_block_mask)(near, None, None, shape.tokens, shape.tokens, device=shape.device)
    attend = _flex_attention()

    def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return attend(*heads_first, block_mask=mask, enable_gqa=True)[0].transpose(0, 1).contiguous()

    return window


def _add_gated(gates: Tensor, o_cmp: Tensor, o_slc: Tensor, o_win: Tensor) -> Tensor:
    weight = torch.sigmoid(gates)
    return weight[..., 0:1] * o_cmp + weight[..., 1:2] * o_slc + weight[..., 2:3] * o_win


def _fla(shape: Shape) -> Made:
    from fla.ops.nsa import parallel_nsa

    window = _window(shape)
    q, gates, k, v, _, _, k_win, v_win = nsa_inputs(shape)

    def attend(q: Tensor, gates: Tensor, k: Tensor, v: Tensor, k_win: Tensor, v_win: Tensor) -> Tensor:
        cmp, slc, win = torch.sigmoid(gates)[None].unbind(-1)
        sizes: dict[str, Any] = {"block_counts": SPEC.select_count, "block_size": SPEC.select_block}
        out = parallel_nsa(q[None], k[None], v[None], g_cmp=cmp, g_slc=slc, window_size=0, **sizes)
        return torch.addcmul(out, window(q, k_win, v_win)[None], win.unsqueeze(-1))[0]

    return Made(attend, [q, gates, k, v, k_win, v_win])


def _fla_selected(shape: Shape, picks: Tensor) -> Made:
    from fla.ops.nsa import parallel_nsa

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes: dict[str, Any] = {"block_counts": SPEC.select_count, "block_size": SPEC.select_block}
        return parallel_nsa(q[None], k[None], v[None], block_indices=picks[None], window_size=0, **sizes)[0]

    return Made(attend, _selected_inputs(shape))


def _mdy_helper(shape: Shape) -> None:
    """Its functions read the spec and the documents from a class."""
    from flash_nsa import NSAHelper

    NSAHelper.set_hyperparameters(
        kernel_size=SPEC.compress_block,
        stride=SPEC.compress_stride,
        block_size=SPEC.select_block,
        window_size=SPEC.window,
        top_n=SPEC.select_count,
        num_init_blocks=SPEC.initial_blocks,
        num_local_blocks=SPEC.local_blocks,
    )
    NSAHelper.init_cu_seqlens(_one_document(shape))


def _mdy(shape: Shape) -> Made:
    from flash_nsa import compress_attn, mean_pooling, select_attn, slc_topk_indices
    from flash_nsa.ops.combine import fused_sigmoid_combine

    _mdy_helper(shape)
    window, scale, inputs = _window(shape), shape.dk**-0.5, nsa_inputs(shape)

    def attend(q: Tensor, gates: Tensor, k: Tensor, v: Tensor, *kv: Tensor) -> Tensor:
        k_cmp, v_cmp = mean_pooling(k), mean_pooling(v)
        o_cmp, lse = compress_attn(q, k_cmp, v_cmp, sm_scale=scale)
        picks, _ = slc_topk_indices(q, k_cmp, lse, sm_scale=scale, maybe_efficient_version=True, scale_slc_p=True)
        o_slc = select_attn(q, kv[0], kv[1], picks, sm_scale=scale)
        return fused_sigmoid_combine(o_cmp, o_slc, window(q, kv[2], kv[3]), gates)

    return Made(attend, inputs, partial(by_mean, shape, inputs))


def _mdy_selected(shape: Shape, picks: Tensor) -> Made:
    from flash_nsa import select_attn

    _mdy_helper(shape)
    none = -(-shape.tokens // SPEC.select_block)  # what it writes where a query has fewer blocks
    rows = picks.masked_fill(picks < 0, none).transpose(0, 1).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return select_attn(q, k, v, rows.clone(), sm_scale=shape.dk**-0.5)  # its backward may write to its picks

    return Made(attend, _selected_inputs(shape))


def _xunhao(shape: Shape) -> Made:
    from native_sparse_attention.ops import avgpool_compress, compressed_attention, topk_sparse_attention

    cu, window, inputs = _one_document(shape), _window(shape), nsa_inputs(shape)
    sizes, add_gated = (SPEC.compress_block, SPEC.compress_stride), torch.compile(_add_gated)

    def attend(q: Tensor, gates: Tensor, k: Tensor, v: Tensor, *kv: Tensor) -> Tensor:
        (k_cmp, cu_cmp), (v_cmp, _) = (avgpool_compress(x, None, cu, *sizes, None) for x in (k, v))
        o_cmp, picks = compressed_attention(
            q,
            k_cmp,
            v_cmp,
            *sizes,
            SPEC.select_block,
            SPEC.select_count,
            cu,
            cu_cmp,
            shape.tokens,
            len(k_cmp),
            None,
            SPEC.initial_blocks,
            SPEC.local_blocks,
        )
        o_slc = topk_sparse_attention(q, kv[0], kv[1], picks, SPEC.select_block, cu, None)
        return add_gated(gates, o_cmp, o_slc, window(q, kv[2], kv[3]))

    return Made(attend, inputs, partial(by_mean, shape, inputs))


def _xunhao_selected(shape: Shape, picks: Tensor) -> Made:
    from native_sparse_attention.ops import topk_sparse_attention

    cu, rows = _one_document(shape), picks.transpose(0, 1).contiguous()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return topk_sparse_attention(q, k, v, rows, SPEC.select_block, cu, None)

    return Made(attend, _selected_inputs(shape))


def _selected_inputs(shape: Shape) -> list[Tensor]:
    sizes = (shape.heads, shape.dk), (shape.groups, shape.dk), (shape.groups, shape.dv)
    return [shape.random(shape.tokens, heads, d) for heads, d in sizes]


_WINDOW = "window by FlexAttention"
_NSA = [
    Rival(
        "fla",
        "fla",
        _fla,
        _fla_selected,
        "mean of 64 tokens, one every 64: a quarter of our compressed tokens; one k and v for compressed and "
        f"selected; {_WINDOW}",
    ),
    Rival("mdy666", "flash_nsa", _mdy, _mdy_selected, f"compressed by the mean (ours: MLP); {_WINDOW}"),
    Rival(
        "XunhaoLai",
        "native_sparse_attention",
        _xunhao,
        _xunhao_selected,
        f"compressed by the mean (ours: MLP); {_WINDOW}; branches added by compiled torch",
    ),
]


def full_rivals(wanted: str) -> list[tuple[str, Maker]]:
    """Full causal attention by what is installed: `all`, `none`, or names of FULL, commas between.

    Raises ConfigError for a name that isn't known, and for flash-attn where it isn't installed.
    """
    from torch.nn.attention import SDPBackend

    made: dict[str, tuple[str, Maker]] = {
        "cudnn": ("cuDNN (SDPA)", lambda shape: _sdpa(shape, SDPBackend.CUDNN_ATTENTION)),
        "fa2": ("FlashAttention-2 (SDPA)", lambda shape: _sdpa(shape, SDPBackend.FLASH_ATTENTION)),
        "flash-attn": ("flash-attn", _flash_attn),
        "flex": ("FlexAttention", _flex),
    }
    if not importlib.util.find_spec("flash_attn"):
        del made["flash-attn"]
    names = {"all": list(made), "none": []}.get(wanted, wanted.split(","))
    for name in names:
        if name not in made:
            raise ConfigError(f"--full {name}: must be all, none, or some of {', '.join(made)}")
    return [made[name] for name in names]


def _qkv(shape: Shape) -> list[Tensor]:
    """[1, heads, T, D]"""
    sizes = (shape.heads, shape.dk), (shape.groups, shape.dk), (shape.groups, shape.dv)
    return [shape.random(1, heads, shape.tokens, d) for heads, d in sizes]


def _sdpa(shape: Shape, backend: Any) -> Made:
    from torch.nn.attention import sdpa_kernel

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = F.pad(v, (0, shape.dk - shape.dv)) if "FLASH" in str(backend) else v  # it takes one head size
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, wide, is_causal=True, enable_gqa=True)[..., : shape.dv]

    return Made(attend, _qkv(shape))


def _flash_attn(shape: Shape) -> Made:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, F.pad(v, (0, shape.dk - shape.dv))))
        return flash_attn_func(q, k, v, causal=True)[..., : shape.dv]

    return Made(attend, _qkv(shape))


def _flex(shape: Shape) -> Made:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    mask = torch.compile(create_block_mask)(causal, None, None, shape.tokens, shape.tokens, device=shape.device)
    attend = _flex_attention()
    return Made(lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=True), _qkv(shape))


def _flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._functorch.config.donated_buffer = False  # else its backward runs once only
    return torch.compile(flex_attention)
