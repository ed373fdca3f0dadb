"""Triton: the gated sum of the branches, and the row sums that its backward starts from."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_dist.kernels.tile_ops import load_rows, store_rows
from nsa_dist.kernels.tuning import check_launch, count_launch

_ROWS = 32


@triton.jit
def load_gates(gates_ptr, row_M, mask_M):
    """The gates of three branches of each row, in float32."""
    at = gates_ptr + row_M * 3
    gate1 = tl.load(at, mask=mask_M, other=0.0).to(tl.float32)
    gate2 = tl.load(at + 1, mask=mask_M, other=0.0).to(tl.float32)
    return gate1, gate2, tl.load(at + 2, mask=mask_M, other=0.0).to(tl.float32)


@triton.jit
def gated_sum(gate1, o1, gate2, o2, gate3, o3):
    total = gate1[:, None] * o1.to(tl.float32)
    total += gate2[:, None] * o2.to(tl.float32)
    return total + gate3[:, None] * o3.to(tl.float32)


@triton.jit
def combine_kernel(
    gates_ptr, o1_ptr, o2_ptr, o3_ptr, out_ptr, rows, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr
):
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = m < rows
    o1, o2, o3 = (
        load_rows(o1_ptr, m * D, here, D, 0, WIDTH),
        load_rows(o2_ptr, m * D, here, D, 0, WIDTH),
        load_rows(o3_ptr, m * D, here, D, 0, WIDTH),
    )
    gate1, gate2, gate3 = load_gates(gates_ptr, m, here)
    store_rows(out_ptr, m * D, here, gated_sum(gate1, o1, gate2, o2, gate3, o3), D, 0, WIDTH, False)


@triton.jit
def row_deltas_kernel(
    do_ptr, o1_ptr, o2_ptr, o3_ptr, delta_ptr, rows,
    BRANCHES: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = m < rows
    do = load_rows(do_ptr, m * D, here, D, 0, WIDTH).to(tl.float32)
    for i in tl.static_range(BRANCHES):
        o_ptr = o1_ptr
        if i == 1:
            o_ptr = o2_ptr
        if i == 2:
            o_ptr = o3_ptr
        o = load_rows(o_ptr, m * D, here, D, 0, WIDTH).to(tl.float32)
        tl.store(delta_ptr + i * rows.to(tl.int64) + m, tl.sum(do * o, 1), mask=here)


def combine_forward(gates_SH3: Tensor, branches: list[Tensor]) -> Tensor:
    """As `combine.combine_forward`."""
    gates, branches = gates_SH3.contiguous(), [o.contiguous() for o in branches]
    check_launch(*branches)
    out = torch.empty_like(branches[0])
    rows, d = out.shape[0] * out.shape[1], out.shape[2]
    if rows:
        count_launch("combine")
        width = triton.next_power_of_2(d)
        combine_kernel[(triton.cdiv(rows, _ROWS),)](gates, *branches, out, rows, D=d, WIDTH=width, BM=_ROWS)
    return out


def row_deltas(do_SHD: Tensor, branches: list[Tensor]) -> Tensor:
    """As `combine.row_deltas`, in float32; one branch or three."""
    do, branches = do_SHD.contiguous(), [o.contiguous() for o in branches]
    check_launch(do, *branches)
    delta = do.new_empty(len(branches), *do.shape[:2], dtype=torch.float32)
    rows, d = do.shape[0] * do.shape[1], do.shape[2]
    if rows:
        count_launch("row_deltas")
        three = (branches * 3)[:3]
        sizes = {"BRANCHES": len(branches), "D": d, "WIDTH": triton.next_power_of_2(d), "BM": _ROWS}
        row_deltas_kernel[(triton.cdiv(rows, _ROWS),)](do, *three, delta, rows, **sizes)
    return delta.permute(1, 2, 0)
