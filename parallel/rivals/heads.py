"""NSA by an all-gather of KV, a KV head at a time: what open trainings of NSA do to bound memory.

The bytes of the whole all-gather, and once more in the backward, for the memory of two heads: one is worked on
while the next travels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from functools import cached_property

import torch
from torch import Tensor

from nsa_dist.kernels.attention import gated_branches
from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.implementations import implementation
from nsa_dist.kernels.packing import Ints
from nsa_dist.kernels.selected import BlockIndex, block_index
from nsa_dist.parallel.attention import pack, unpack
from nsa_dist.parallel.exchange import Pending
from nsa_dist.parallel.operator import Operation
from nsa_dist.parallel.sequence import Gather, ShardedSequence


class HeadAllGather(Operation):
    """Inputs as those of `NSAExchange`, compressed tokens and halos as there. picks: a prescribed selection."""

    def __init__(self, sequence: ShardedSequence, scale: float, picks: Tensor | None = None) -> None:
        self.sequence, self.scale, self.prescribed = sequence, scale, picks

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
        seq, scale, local = self.sequence, self.scale, implementation(q)
        sent_cmp = seq.compressed.start(pack(k_cmp, v_cmp))
        sent_win = seq.window_halo.start(pack(k_win, v_win))
        heads = self._heads(k_slc, v_slc, "selected", "forward")
        got_win = sent_win.wait()
        window = unpack(seq.window_halo.buffer(pack(k_win, v_win), got_win), k_win, v_win)
        o_win, lse_win = local.range_forward(q, *window, seq.window_view, scale)
        got_cmp = sent_cmp.wait()
        compressed = unpack(seq.compressed.buffer(pack(k_cmp, v_cmp), got_cmp), k_cmp, v_cmp)
        rule = seq.packing.spec, scale, seq.admitted(q, compressed[0], scale)
        o_cmp, lse_cmp, picks = local.compressed_forward(q, *compressed, seq.compressed_view, *rule)
        if self.prescribed is not None:
            picks = self.prescribed.clone()
        parts = []
        for g, (k, v) in enumerate(heads):
            of = self._queries(q, k_slc, g)
            words = k, v, picks[:, g : g + 1].contiguous(), seq.token_S, self._index, scale
            parts.append(local.selected_forward(q[:, of].contiguous(), *words))
        o_slc, lse_slc = (torch.cat(xs, dim=1) for xs in zip(*parts, strict=True))
        out = local.combine_forward(gates, [o_cmp, o_slc, o_win])
        return [out, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, picks, got_cmp, got_win]

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
        _, *outs_and_lses, picks, got_cmp, got_win = outputs
        seq, scale, local = self.sequence, self.scale, implementation(q)
        heads = self._heads(k_slc, v_slc, "refetch", "backward")
        d_gates, (cmp, slc, win) = gated_branches(local, grad, gates, outs_and_lses[:3], outs_and_lses[3:])
        compressed = unpack(seq.compressed.buffer(pack(k_cmp, v_cmp), got_cmp), k_cmp, v_cmp)
        dq, *d_cmp = local.range_backward(cmp, q, *compressed, seq.compressed_view.ranges, scale)
        sent_cmp = seq.compressed.start_return(pack(*d_cmp))
        window = unpack(seq.window_halo.buffer(pack(k_win, v_win), got_win), k_win, v_win)
        dq, *d_win = local.range_backward(win, q, *window, seq.window_view, scale, dq)
        sent_win = seq.window_halo.start_return(pack(*d_win))
        homes: list[tuple[Tensor, Pending]] = []
        for g, (k, v) in enumerate(heads):
            of = self._queries(q, k_slc, g)
            branch = BranchGrad(*(getattr(slc, f.name)[:, of].contiguous() for f in fields(slc)))
            words = k, v, picks[:, g : g + 1].contiguous(), seq.token_S, self._index, scale
            d_q, *d_rows = local.selected_backward(branch, q[:, of].contiguous(), *words)
            dq[:, of] += d_q
            homes.append(self._gather.start_return(torch.cat(d_rows, dim=-1)))
        home_cmp = unpack(seq.compressed.finish(*sent_cmp), k_cmp, v_cmp)
        home_win = unpack(seq.window_halo.finish(*sent_win), k_win, v_win)
        d_kv = torch.stack([self._gather.finish(*home) for home in homes], dim=1)
        return [dq, *home_cmp, *d_kv.split([k_slc.shape[2], v_slc.shape[2]], dim=-1), *home_win, d_gates]

    @cached_property
    def _gather(self) -> Gather:
        return replace(self.sequence.full_kv, kind="selected")

    @cached_property
    def _index(self) -> BlockIndex:
        tokens: Ints = self._gather.items
        return block_index(self.sequence.packing, [tokens], self.sequence.device)

    def _heads(self, k_SGD: Tensor, v_SGD: Tensor, kind: str, phase: str) -> Iterator[tuple[Tensor, Tensor]]:
        """All tokens' [T, Dk] and [T, Dv] of one KV head after the other. The first one travels from now on."""

        def start(g: int) -> tuple[Tensor, Pending]:
            own = torch.cat([k_SGD[:, g], v_SGD[:, g]], dim=-1)
            return own, self._gather.start_as(own, kind, phase)

        def heads(next_one: tuple[Tensor, Pending]) -> Iterator[tuple[Tensor, Tensor]]:
            for g in range(k_SGD.shape[1]):
                own, pending = next_one
                rows = self._gather.buffer(own, pending.wait())
                if g + 1 < k_SGD.shape[1]:
                    next_one = start(g + 1)
                yield rows[:, : k_SGD.shape[2]], rows[:, k_SGD.shape[2] :]

        return heads(start(0))

    def _queries(self, q: Tensor, k: Tensor, g: int) -> slice:
        group = q.shape[1] // k.shape[1]
        return slice(g * group, (g + 1) * group)
