"""The block exchange as a rank takes part in it: rows of selected blocks there, their gradients back."""

from functools import cached_property

import torch
from torch import Tensor

from nsa_dist.kernels.packing import on_device
from nsa_dist.kernels.selected import BlockIndex
from nsa_dist.parallel.block_plan import BlockPlan, Hop, Runs
from nsa_dist.parallel.exchange import Pending, add_returned, exchange
from nsa_dist.parallel.sequence import ShardedSequence


class Fetch:
    """One round. Rows are those of single KV heads, head after head: own ones [G * S, D]."""

    def __init__(self, sequence: ShardedSequence, plan: BlockPlan) -> None:
        self.sequence, self.plan = sequence, plan

    @cached_property
    def index(self) -> BlockIndex:
        """Of the buffer's rows."""
        end = self.plan.rows_GB.cumsum().reshape(self.plan.rows_GB.shape)
        edges = [on_device(x, self.sequence.device) for x in (end - self.plan.rows_GB, end)]
        longest = int(self.plan.rows_GB.max(initial=0))
        return BlockIndex(edges[0], edges[1], run_rows(self.plan.tokens, self.sequence.device), longest)

    @cached_property
    def _order(self) -> Tensor:
        return run_rows(self.plan.buffer, self.sequence.device)

    def start(self, own_rows: Tensor, kind: str, phase: str) -> "Fetching":
        return Fetching(self, own_rows, kind, phase)

    def rows(self, arrived: Tensor, dk: int) -> tuple[Tensor, Tensor]:
        """Keys and values in the order of `index`."""
        ordered = arrived[self._order]
        return ordered[:, :dk], ordered[:, dk:]

    def start_return(self, dk_rows: Tensor, dv_rows: Tensor) -> "Returning":
        """From the gradients of the buffer's rows."""
        ordered = torch.cat([dk_rows, dv_rows], dim=-1)
        arrived = torch.empty_like(ordered)
        arrived[self._order] = ordered
        return Returning(self, arrived)


class Fetching:
    """Rows on their way."""

    def __init__(self, fetch: Fetch, own_rows: Tensor, kind: str, phase: str) -> None:
        self.fetch, self.kind, self.phase = fetch, kind, phase
        self.pending = self._send(own_rows, fetch.plan.direct)

    def wait(self) -> Tensor:
        """All that arrived, in the plan's order."""
        arrived = self.pending.wait()
        if self.fetch.plan.relay is None:
            return arrived
        return torch.cat([arrived, self._send(arrived, self.fetch.plan.relay).wait()])

    def _send(self, source: Tensor, hop: Hop) -> Pending:
        rows = source[run_rows(hop.send, source.device)]
        return exchange(self.fetch.sequence.axis, rows, hop.send_counts, hop.recv_counts, self.kind, self.phase)


class Returning:
    """Gradients on their way home: where there is a second hop first to the relays, which add up their node's."""

    def __init__(self, fetch: Fetch, arrived: Tensor) -> None:
        self.fetch = fetch
        plan = fetch.plan
        self.first, second = arrived.split([int(plan.direct.recv_counts.sum()), _received(plan.relay)])
        self.pending = self._send(self.first, plan.direct) if plan.relay is None else self._send(second, plan.relay)

    def add_to(self, own: Tensor) -> None:
        """Adds to the gradients of own rows, at least float32, what came back, rank after rank."""
        plan, pending = self.fetch.plan, self.pending
        if plan.relay is not None:
            self._add(self.first, pending, plan.relay)
            pending = self._send(self.first, plan.direct)
        self._add(own, pending, plan.direct)

    def _add(self, total: Tensor, pending: Pending, hop: Hop) -> None:
        add_returned(total, pending.wait(), run_rows(hop.send, total.device), hop.send_counts)

    def _send(self, grad: Tensor, hop: Hop) -> Pending:
        sequence = self.fetch.sequence
        counts = hop.recv_counts, hop.send_counts
        return exchange(sequence.axis, grad.to(sequence.grad_dtype), *counts, "selected", "backward")


def _received(hop: Hop | None) -> int:
    return int(hop.recv_counts.sum()) if hop else 0


def run_rows(runs: Runs, device: torch.device) -> Tensor:
    """The rows' numbers, made on the device from the runs alone."""
    rows = runs.rows
    start, length = (on_device(x, device) for x in (runs.start, runs.length))
    shift = start - (length.cumsum(0) - length)
    return torch.arange(rows, device=device) + torch.repeat_interleave(shift, length, output_size=rows)
