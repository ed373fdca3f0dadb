"""The collectives of an axis: rows there, rows' gradients back, counted in the ledger.

Every rank calls the same ones in the same order, with empty tensors where it has nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nsa_dist.kernels.packing import Ints
from nsa_dist.parallel.mesh import Axis


@dataclass
class Pending:
    """A collective under way."""

    work: Any
    result: Tensor
    record: Callable[[float], None]

    def wait(self) -> Tensor:
        """The result; the time spent here is the time exposed."""
        start = time.perf_counter()
        if self.work is not None:
            self.work.wait()
        self.record(time.perf_counter() - start)
        if self.result.is_cuda:  # it may have been made aside
            self.result.record_stream(torch.cuda.current_stream())
        return self.result


def add_returned(total_NF: Tensor, returned: Tensor, rows: Tensor, counts: Ints) -> Tensor:
    """Adds to the gradients of rows, in place, those that came back: `rows` were sent, counts[r] of them to rank r.

    Rank after rank: no row occurs twice in one rank's part, so that the sums have one order without atomics. `total`
    is at least float32, and so are the sums.
    """
    sizes = counts.tolist()
    for at, part in zip(rows.split(sizes), returned.split(sizes), strict=True):
        if len(at):
            total_NF.index_add_(0, at, part.to(total_NF.dtype))
    return total_NF


def exchange(axis: Axis, x: Tensor, send: Ints, receive: Ints, kind: str, phase: str) -> Pending:
    """Starts an uneven all-to-all of x's rows: `send[r]` of them to rank r, `receive[r]` from it."""
    result = x.new_empty((int(receive.sum()), *x.shape[1:]))
    row_bytes = x.element_size() * int(np.prod(x.shape[1:]))
    record = _recorder(axis, send * row_bytes, receive * row_bytes, kind, phase)
    if axis.size == 1:
        return Pending(None, x.clone(), lambda seconds: None)
    work = dist.all_to_all_single(
        result, x.contiguous(), receive.tolist(), send.tolist(), group=axis.group, async_op=True
    )
    return Pending(work, result, record)


def all_gather(axis: Axis, x: Tensor, kind: str, phase: str) -> Pending:
    """Starts gathering equal-sized tensors of all ranks: [P, *x.shape]."""
    result = x.new_empty((axis.size, *x.shape))
    if axis.size == 1:
        return Pending(None, x[None].clone(), lambda seconds: None)
    # Its name from torch 2.13 on, and before.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    work = gather(result.flatten(), x.contiguous().flatten(), group=axis.group, async_op=True)
    each = np.full(axis.size, x.numel() * x.element_size(), np.int64)
    return Pending(work, result, _recorder(axis, each, each, kind, phase))


def shift(axis: Axis, x: Tensor, result: Tensor, kind: str, phase: str) -> Pending:
    """Starts sending x to the next rank of the ring and receiving `result` from the one before."""
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    peers = dist.get_process_group_ranks(axis.group)
    # Even an empty part is sent: both sides know its size, and the order of messages stays the same.
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, x.contiguous(), peers[after], group=axis.group),
            dist.P2POp(dist.irecv, result, peers[before], group=axis.group),
        ]
    )
    send, receive = np.zeros(axis.size, np.int64), np.zeros(axis.size, np.int64)
    send[after], receive[before] = x.numel() * x.element_size(), result.numel() * result.element_size()
    return Pending(_All(works), result, _recorder(axis, send, receive, kind, phase))


def all_reduce(axis: Axis, x: Tensor, kind: str = "control", phase: str = "forward") -> Tensor:
    """Sums x over the axis in place; counted as the ring algorithm, 2 (P - 1) / P of its bytes."""
    if axis.size > 1:
        start = time.perf_counter()
        dist.all_reduce(x, group=axis.group)
        total = 2 * x.numel() * x.element_size() * (axis.size - 1) // axis.size
        count_ring(axis, total, kind, phase, time.perf_counter() - start)
    return x


def count_ring(axis: Axis, total_bytes: int, kind: str, phase: str, exposed_s: float = 0.0) -> None:
    """Records a collective of which a rank sends so many bytes to the next, and receives as many."""
    send, receive = np.zeros(axis.size, np.int64), np.zeros(axis.size, np.int64)
    send[(axis.rank + 1) % axis.size] = total_bytes
    receive[(axis.rank - 1) % axis.size] = total_bytes
    axis.ledger.record(kind, phase, send, receive, axis.other_node, exposed_s)


class _All:
    def __init__(self, works: list[Any]) -> None:
        self.works = works

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _recorder(axis: Axis, send: Ints, receive: Ints, kind: str, phase: str) -> Callable[[float], None]:
    send, receive = send.copy(), receive.copy()
    send[axis.rank] = receive[axis.rank] = 0

    def record(seconds: float) -> None:
        axis.ledger.record(kind, phase, send, receive, axis.other_node, seconds)

    return record
