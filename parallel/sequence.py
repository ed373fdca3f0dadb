"""A packed sequence cut over the ranks of an axis: what all layers of a step share.

Made once for a sequence, on the host, from the documents' edges and the layout; the same on every rank but
for the rank's own part.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels.compress import Chunks, make_chunks
from nsa_dist.kernels.compressed import CompressedView, compressed_view
from nsa_dist.kernels.packing import Ints, Packing, on_device
from nsa_dist.kernels.select import Admitted
from nsa_dist.kernels.selected import BlockIndex, block_index
from nsa_dist.kernels.tiled import Ranges, window_ranges
from nsa_dist.parallel import needs
from nsa_dist.parallel.exchange import Pending, add_returned, exchange
from nsa_dist.parallel.layout import Layout
from nsa_dist.parallel.mesh import Axis
from nsa_dist.parallel.plan import Pieces, RowPlan, make_pieces, row_plan
from nsa_dist.parallel.span import SpanRule


@dataclass(frozen=True)
class Gather:
    """Own rows and rows of others, put together in ascending order of their items."""

    axis: Axis
    plan: RowPlan
    items: Ints  # of the buffer
    order: Tensor  # the buffer's rows in [own; received]
    send: Tensor  # the plan's own rows, on the device once and for all layers
    kind: str
    grad_dtype: torch.dtype

    def start(self, x_NF: Tensor) -> Pending:
        """Starts fetching; the result, the received rows, goes to `buffer`."""
        return self.start_as(x_NF, self.kind, "forward")

    def start_as(self, x_NF: Tensor, kind: str, phase: str) -> Pending:
        return exchange(self.axis, x_NF[self.send], self.plan.send_counts, self.plan.recv_counts, kind, phase)

    def buffer(self, x_NF: Tensor, received: Tensor) -> Tensor:
        return torch.cat([x_NF, received])[self.order]

    def start_return(self, grad_buffer: Tensor) -> tuple[Tensor, Pending]:
        """From the buffer's gradient the own part, and the others' on their way home; goes to `finish`."""
        both = torch.empty_like(grad_buffer)
        both[self.order] = grad_buffer
        own, others = both.split([len(both) - int(self.plan.recv_counts.sum()), int(self.plan.recv_counts.sum())])
        counts = self.plan.recv_counts, self.plan.send_counts
        return own, exchange(self.axis, others.to(self.grad_dtype), *counts, self.kind, "backward")

    def finish(self, own: Tensor, pending: Pending) -> Tensor:
        """The gradient of the own rows, summed over ranks in their order."""
        return add_returned(own, pending.wait(), self.send, self.plan.send_counts)


class ShardedSequence:
    """The rank's part of a packed sequence, its halos, its views on buffers, and the plans that need no data.

    axis: the ranks over which the sequence is cut. grad_dtype: in which gradients travel.
    """

    def __init__(
        self, packing: Packing, layout: Layout, axis: Axis, device: torch.device, grad_dtype: torch.dtype
    ) -> None:
        if layout.items != packing.tokens or layout.ranks != axis.size:
            raise ValueError(
                f"layout of {layout.items} tokens on {layout.ranks} ranks: must be "
                f"{packing.tokens} tokens on {axis.size}"
            )
        self.packing, self.layout, self.axis = packing, layout, axis
        self.device, self.grad_dtype = device, grad_dtype
        self.tokens = layout.own(axis.rank)
        self.cmp_layout = layout.mapped(packing.cmp_start)
        self.plans: dict[Any, Any] = {}  # of layers whose backward is to come

    @cached_property
    def token_S(self) -> Tensor:
        """[S]: the own tokens' numbers in the sequence."""
        return on_device(self.tokens, self.device)

    @cached_property
    def position_S(self) -> Tensor:
        """[S]: the own tokens' positions in their documents, for RoPE."""
        return on_device(self.packing.position(self.tokens), self.device)

    @cached_property
    def own_compressed(self) -> Ints:
        """The compressed tokens whose first source token is an own one."""
        return self.cmp_layout.own(self.axis.rank)

    @cached_property
    def compressed_position_C(self) -> Tensor:
        """[C_own]: i * d of the own compressed tokens, for RoPE."""
        return on_device(self.packing.position(self.packing.cmp_start[self.own_compressed]), self.device)

    @cached_property
    def compress_halo(self) -> Gather:
        return self._gather(self.layout, needs.compress_halo(self.layout, self.packing), "compress_halo")

    @cached_property
    def compress_first(self) -> Ints:
        """[C_own]: the row in the compression's buffer at which each own compressed token begins."""
        return np.searchsorted(self.compress_halo.items, self.packing.cmp_start[self.own_compressed])

    def compress_chunks(self, groups: int) -> Chunks:
        """What the own compressed tokens are made of, in the compression's buffer [N, G, D]."""
        if groups not in self._compress_chunks:
            rows, spec = len(self.compress_halo.items), self.packing.spec
            self._compress_chunks[groups] = make_chunks(self.compress_first, rows, groups, spec, self.device)
        return self._compress_chunks[groups]

    @cached_property
    def _compress_chunks(self) -> dict[int, Chunks]:
        return {}

    @cached_property
    def window_halo(self) -> Gather:
        return self._gather(self.layout, needs.window_halo(self.layout, self.packing), "window_halo")

    @cached_property
    def window_view(self) -> Ranges:
        window = self.packing.spec.window
        return window_ranges(self.packing, self.tokens, self.window_halo.items, window, self.device)

    @cached_property
    def compressed(self) -> Gather:
        return self._gather(self.cmp_layout, needs.compressed(self.layout, self.packing), "compressed")

    @cached_property
    def compressed_view(self) -> CompressedView:
        return compressed_view(self.packing, self.tokens, self.compressed.items, self.device)

    @cached_property
    def _span_rule(self) -> SpanRule | None:
        if not self.packing.spec.span:
            return None
        return SpanRule(self.packing, self.layout, self.axis, self.compressed_view)

    def admitted(self, q_SHD: Tensor, k_CGD: Tensor, scale: float) -> Admitted | None:
        """What the span rule admits to the own queries, from the compressed keys that they see; None without it."""
        rule = self._span_rule
        return rule.admitted(q_SHD, k_CGD, scale) if rule else None

    @cached_property
    def causal(self) -> needs.Needs:
        return needs.causal(self.layout, self.packing)

    @cached_property
    def full_kv(self) -> Gather:
        """All tokens' rows: the all-gather for full attention."""
        return self._gather(self.layout, needs.everything(self.layout), "full_kv")

    @cached_property
    def pieces(self) -> Pieces:
        return make_pieces(self.layout, self.packing, self.causal)

    def local_blocks(self, groups: int) -> BlockIndex:
        """The index of the own rows [G * S, D]."""
        if groups not in self._local_blocks:
            self._local_blocks[groups] = block_index(self.packing, [self.tokens] * groups, self.device)
        return self._local_blocks[groups]

    @cached_property
    def _local_blocks(self) -> dict[int, BlockIndex]:
        return {}

    def _gather(self, layout: Layout, wanted: needs.Needs, kind: str) -> Gather:
        plan = row_plan(layout, wanted, self.axis.rank)
        both = np.concatenate([layout.own(self.axis.rank), plan.recv_items])
        order = np.argsort(both, kind="stable")
        at, send = on_device(order, self.device), on_device(plan.send_rows, self.device)
        return Gather(self.axis, plan, both[order], at, send, kind, self.grad_dtype)
