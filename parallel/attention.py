"""Context-parallel attention: NSA over a cut sequence, section 4 of the design in one page.

Shapes are those of the rank's part: q [S, H, Dk]; compressed tokens [C_own, G, ·]; k, v [S, G, ·];
gates [S, H, 3]. Other exchanges and full attention are in `rivals/`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa_dist.kernels.attention import gated_branches
from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.full import ungated
from nsa_dist.kernels.implementations import implementation
from nsa_dist.kernels.selected import head_rows
from nsa_dist.parallel import block_plan
from nsa_dist.parallel.aside import ToHost, aside
from nsa_dist.parallel.block_plan import BlockPlan, Wanted
from nsa_dist.parallel.exchange import all_gather
from nsa_dist.parallel.fetch import Fetch, Fetching, Returning
from nsa_dist.parallel.operator import Operation
from nsa_dist.parallel.sequence import Gather, ShardedSequence


class NSAExchange(Operation):
    """NSA of one layer. exchange: `nsa` fetches the selected blocks, `groupcast` every causally visible block,
    `allgather` every block; compressed tokens and halos are the same for all three.

    max_bytes bounds the fetched KV held at a time (0: no bound); then it is fetched in rounds, and once more
    in the backward. picks [S, G, n]: a prescribed selection, for measurements; the scores are computed all the same.
    """

    def __init__(
        self,
        sequence: ShardedSequence,
        scale: float,
        exchange: str = "nsa",
        max_bytes: int = 0,
        picks: Tensor | None = None,
    ) -> None:
        self.sequence, self.scale, self.exchange, self.max_bytes = sequence, scale, exchange, max_bytes
        self.prescribed = picks

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
        seq, scale, local = self.sequence, self.scale, implementation(q)
        sent_cmp = seq.compressed.start(pack(k_cmp, v_cmp))
        sent_win = seq.window_halo.start(pack(k_win, v_win))

        got_win = sent_win.wait()
        window = unpack(seq.window_halo.buffer(pack(k_win, v_win), got_win), k_win, v_win)
        o_win, lse_win = local.range_forward(q, *window, seq.window_view, scale)

        got_cmp = sent_cmp.wait()
        compressed = unpack(seq.compressed.buffer(pack(k_cmp, v_cmp), got_cmp), k_cmp, v_cmp)
        rule = seq.packing.spec, scale, seq.admitted(q, compressed[0], scale)
        o_cmp, lse_cmp, picks = local.compressed_forward(q, *compressed, seq.compressed_view, *rule)
        if self.prescribed is not None:
            picks = self.prescribed.clone()  # an operator's output is no tensor of somebody else's

        # The one time that the host waits for the device: the plan follows from the bitmaps. A GPU has the local
        # blocks to work on until the others' arrive; the CPU, which makes the plan itself, takes them after it.
        rows = head_rows(k_slc), head_rows(v_slc)
        both = torch.cat(rows, dim=-1)
        beside = aside(q.device)
        with beside:
            arriving = self._start_bitmaps(picks)
        of_own = picks, seq.token_S, seq.local_blocks(k_slc.shape[1]), scale
        found = local.selected_forward(q, *rows, *of_own) if q.is_cuda else None
        bits = arriving.wait()
        rounds, fetched = self._rounds(bits, k_slc, v_slc), q.new_empty(0)
        with beside:
            sent = rounds[0].start(both, "selected", "forward") if rounds else None
        found = found or local.selected_forward(q, *rows, *of_own)
        for fetch in rounds:
            sent = sent or fetch.start(both, "selected", "forward")
            fetched, sent = sent.wait(), None
            buffer = fetch.rows(fetched, k_slc.shape[2])
            found = local.selected_forward(q, *buffer, picks, seq.token_S, fetch.index, scale, found)
        (o_slc, lse_slc), kept = found, fetched if len(rounds) == 1 else q.new_empty(0)

        out = local.combine_forward(gates, [o_cmp, o_slc, o_win])
        return [out, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, picks, bits, got_cmp, got_win, kept]

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = inputs
        _, o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, picks, bits, got_cmp, got_win, kept = outputs
        seq, scale, local = self.sequence, self.scale, implementation(q)
        outs, lses = [o_cmp, o_slc, o_win], [lse_cmp, lse_slc, lse_win]
        # What wasn't kept comes again while the other branches are worked on.
        rounds = self._rounds(bits, k_slc, v_slc, last=True)
        again = self._fetch_again(rounds[0], k_slc, v_slc) if len(rounds) > 1 else None
        d_gates, (cmp, slc, win) = gated_branches(local, grad, gates, outs, lses)

        compressed = unpack(seq.compressed.buffer(pack(k_cmp, v_cmp), got_cmp), k_cmp, v_cmp)
        view = seq.compressed_view.ranges
        dq, *d_cmp = local.range_backward(cmp, q, *compressed, view, scale)
        own_cmp, sent_cmp = seq.compressed.start_return(pack(*d_cmp))

        window = unpack(seq.window_halo.buffer(pack(k_win, v_win), got_win), k_win, v_win)
        dq, *d_win = local.range_backward(win, q, *window, seq.window_view, scale, dq)
        own_win, sent_win = seq.window_halo.start_return(pack(*d_win))

        # What others computed for our rows comes back while we do our own part.
        own_slc, returned = self._selected_backward(slc, inputs, picks, rounds, again, kept, dq)
        home_cmp = unpack(seq.compressed.finish(own_cmp, sent_cmp), k_cmp, v_cmp)
        home_win = unpack(seq.window_halo.finish(own_win, sent_win), k_win, v_win)
        for returning in returned:
            returning.add_to(own_slc)
        by_token = own_slc.view(k_slc.shape[1], len(k_slc), own_slc.shape[1]).transpose(0, 1)
        home_slc = by_token.split([k_slc.shape[2], v_slc.shape[2]], dim=-1)
        return [dq, *home_cmp, *home_slc, *home_win, d_gates]

    def _selected_backward(
        self,
        branch: BranchGrad,
        inputs: Sequence[Tensor],
        picks: Tensor,
        rounds: list[Fetch],
        again: Fetching | None,
        kept: Tensor,
        dq: Tensor,
    ) -> tuple[Tensor, list[Returning]]:
        """Adds to dq; the own part of dk and dv [G * S, Dk + Dv], and the gradients on their way home."""
        q, k, v = inputs[0], *inputs[3:5]
        seq, local = self.sequence, implementation(q)
        rows = head_rows(k), head_rows(v)
        returned = []
        for i, fetch in enumerate(rounds):
            if i:
                again = self._fetch_again(fetch, k, v)
            fetched = again.wait() if again else kept
            buffer = fetch.rows(fetched, k.shape[2])
            _, *d_rows = local.selected_backward(branch, q, *buffer, picks, seq.token_S, fetch.index, self.scale, dq)
            returned.append(fetch.start_return(*d_rows))
        index = seq.local_blocks(k.shape[1])
        _, *d_rows = local.selected_backward(branch, q, *rows, picks, seq.token_S, index, self.scale, dq)
        return torch.cat(d_rows, dim=-1), returned

    def _fetch_again(self, fetch: Fetch, k: Tensor, v: Tensor) -> Fetching:
        return fetch.start(torch.cat([head_rows(k), head_rows(v)], dim=-1), "refetch", "backward")

    def _start_bitmaps(self, picks: Tensor) -> ToHost:
        """Starts gathering [P, G, ceil(NB / 8)] bits (numpy's order): which blocks a rank's queries selected."""
        seq = self.sequence
        if self.exchange != "nsa" or seq.axis.size == 1:
            return ToHost(torch.empty(0, dtype=torch.uint8))
        return ToHost(all_gather(seq.axis, block_bits(picks, seq.packing.blocks), "bitmap", "forward").wait())

    def _rounds(self, bits: Tensor, k: Tensor, v: Tensor, last: bool = False) -> list[Fetch]:
        """This rank's side of the exchange, in as many rounds as the bound needs: a pure function of bitmaps and
        layout. What the forward made is kept for the backward (`last`)."""
        plans = self.sequence.plans
        if self.sequence.axis.size == 1:
            return []
        key = self.exchange, self.max_bytes, k.shape[1:], v.shape[2], bits.untyped_storage().data_ptr()
        if key not in plans:
            made = [Fetch(self.sequence, plan) for plan in self._make_plans(bits, k, v)]
            plans[key] = bits, made  # the storage is held: no other has its address
        found: list[Fetch] = plans[key][1]
        if last and self.exchange == "nsa":
            del plans[key]
        return found

    def _make_plans(self, bits: Tensor, k: Tensor, v: Tensor) -> list[BlockPlan]:
        seq, row_bytes = self.sequence, (k.shape[2] + v.shape[2]) * k.element_size()
        wanted = [self.wanted(bits, k.shape[1])]
        if self.max_bytes:
            need = block_plan.whole(wanted[0], seq.pieces)
            rounds = block_plan.piece_rounds(seq.pieces, need, self.max_bytes // row_bytes)
            wanted = [block_plan.given(part) for part in rounds]
        axis = seq.axis
        return [
            block_plan.block_plan(seq.layout, seq.pieces, each, axis.rank, k.shape[1], axis.nodes) for each in wanted
        ]

    def wanted(self, bits: Tensor, groups: int) -> Wanted:
        """What each rank fetches."""
        if self.exchange != "nsa":
            return block_plan.dense(groups, causal=self.exchange == "groupcast")
        return block_plan.selected_bits(bits.numpy())


class WindowExchange(Operation):
    """Window attention alone, for `window` layers: only the halo travels. Inputs q, k, v."""

    def __init__(self, sequence: ShardedSequence, scale: float) -> None:
        self.sequence, self.scale = sequence, scale

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        q, k, v = inputs
        gather = self.sequence.window_halo
        got = gather.start(pack(k, v)).wait()
        buffer = unpack(gather.buffer(pack(k, v), got), k, v)
        return [*implementation(q).range_forward(q, *buffer, self.sequence.window_view, self.scale), got]

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        (q, k, v), (o, lse, got) = inputs, outputs
        gather = self.sequence.window_halo
        buffer = unpack(gather.buffer(pack(k, v), got), k, v)
        branch = ungated(grad, o, lse)
        dq, *d_kv = implementation(q).range_backward(branch, q, *buffer, self.sequence.window_view, self.scale)
        return [dq, *unpack(gather.finish(*gather.start_return(pack(*d_kv))), k, v)]


class CompressHalo(Operation):
    """The rank's vectors with those that follow its segments: what its compressed tokens are made of.

    Input [S, F], output [N, F] in ascending order of tokens.
    """

    def __init__(self, gather: Gather) -> None:
        self.gather = gather

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [self.gather.buffer(inputs[0], self.gather.start(inputs[0]).wait())]

    def backward(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        return [self.gather.finish(*self.gather.start_return(wide))]


def pack(k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
    """[N, G, Dk] and [N, G, Dv] as rows that travel together: [N, G * (Dk + Dv)]."""
    return torch.cat([k_NGD, v_NGD], dim=-1).flatten(1)


def unpack(x_NF: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `pack`, with the head sizes of k and v."""
    parts = x_NF.view(len(x_NF), k.shape[1], k.shape[2] + v.shape[2]).split([k.shape[2], v.shape[2]], dim=-1)
    return parts[0], parts[1]


def block_bits(picks_SGn: Tensor, blocks: int) -> Tensor:
    """[G, ceil(blocks / 8)] uint8, most significant bit first: the blocks that any query selected."""
    groups, width = picks_SGn.shape[1], -(-blocks // 8) * 8
    index = picks_SGn.permute(1, 0, 2).flatten(1).long()
    device = picks_SGn.device
    flags = torch.zeros(groups, width + 1, dtype=torch.uint8, device=device)
    flags.scatter_(1, torch.where(index < 0, width, index), 1)  # missing picks go to a column that is cut off
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=device)  # made there: a copy would wait for the device
    return (flags[:, :width].view(groups, -1, 8) << shifts).sum(-1, dtype=torch.uint8)
