"""The compressed branch: attention over compressed tokens, and from its probabilities the selection."""

from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.branch import group_queries
from nsa_dist.kernels.packing import Ints, Packing, on_device
from nsa_dist.kernels.select import Admitted, select_blocks
from nsa_dist.kernels.spec import NSASpec
from nsa_dist.kernels.tiled import Ranges, group_keys, make_ranges, query_breaks, tile_softmax, ungroup


@dataclass(frozen=True)
class CompressedView:
    """What a set of queries sees of a buffer of compressed tokens.

    `own_S`: each query's block inside its document; `first_S`: the number of its document's first block.
    """

    ranges: Ranges
    own_S: Tensor
    first_S: Tensor


def compressed_view(packing: Packing, queries: Ints, rows: Ints, device: torch.device) -> CompressedView:
    """The view of `queries` (token numbers) on a buffer that holds compressed tokens `rows` (ascending).

    The buffer must hold every compressed token that one of the queries sees.
    """
    document = packing.document(queries)
    first, end = packing.visible_compressed(queries)
    lo, hi = np.searchsorted(rows, first), np.searchsorted(rows, end)
    own = (queries - packing.cu[document]) // packing.spec.select_block
    breaks = query_breaks(packing, queries)  # a tile's queries are of one document
    return CompressedView(
        make_ranges(lo, hi, breaks, device),
        on_device(own, device),
        on_device(packing.blk_cu[document], device),
    )


def add_heads(p_GMRN: Tensor) -> Tensor:
    """[G, M, N]: head after head for every compressed token; `sum(2)` adds those at a row's end in another order, and
    what is equal would no longer be."""
    return reduce(torch.add, p_GMRN.unbind(2))


def compressed_forward(
    q_SHD: Tensor,
    k_NGD: Tensor,
    v_NGD: Tensor,
    view: CompressedView,
    spec: NSASpec,
    scale: float,
    admitted: Admitted | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [S, H, Dv], log-sum-exp [S, H], selection [S, G, n] (int32 block numbers, ascending, then -1).

    admitted: what the span rule leaves to choose from, where spec.span is not 0.

    The backward is `tiled.range_backward` with `view.ranges`: no gradient flows through the choice.
    """
    groups = k_NGD.shape[1]
    q, k, v = group_queries(q_SHD, groups), group_keys(k_NGD), group_keys(v_NGD)
    o = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    lse = q.new_full(q.shape[:3], -torch.inf)
    picks = torch.empty(q.shape[1], groups, spec.select_count, dtype=torch.int32, device=q.device)
    for at, rows, mask in view.ranges.tiles():
        o[:, at], lse[:, at], p = tile_softmax(q[:, at], k[:, rows], v[:, rows], mask, scale)
        own = view.own_S[at]
        allowed = None if admitted is None else admitted.allowed(at, int(own.max()) + 1)
        pick = select_blocks(add_heads(p), own, spec, allowed)
        picks[at] = torch.where(pick >= 0, pick + view.first_S[at, None, None], -1).to(torch.int32)
    return ungroup(o).to(q_SHD.dtype), ungroup(lse), picks
