"""Triton: rows looked up by number and added, for the compression.

torch's own lookup gives each row a block of threads: at 384 bytes a row a third of an H200's memory rate.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_dist.kernels.tile_ops import load_rows, store_rows
from nsa_dist.kernels.tuning import count_launch

_ELEMENTS = 8192  # of a program


@triton.jit
def sum_rows_kernel(
    x_ptr, rows_ptr, out_ptr, count, P: tl.constexpr, F: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """For each row of the result the sum of P rows of x; -1 is no row. WIDE: in float64."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = m < count
    total = tl.zeros([BM, WIDTH], tl.float64 if WIDE else tl.float32)
    for p in tl.static_range(P):
        row = tl.load(rows_ptr + m * P + p, mask=here, other=-1)
        total += load_rows(x_ptr, row * F, row >= 0, F, 0, WIDTH).to(total.dtype)
    store_rows(out_ptr, m * F, here, total, F, 0, WIDTH, False)


def sum_rows(x_NF: Tensor, rows_MP: Tensor) -> Tensor:
    """As `compress.sum_rows`, on the device."""
    x, out = x_NF.contiguous(), x_NF.new_empty(len(rows_MP), x_NF.shape[1])
    if out.numel():
        count_launch("sum_rows")
        width = triton.next_power_of_2(x.shape[1])
        bm = max(1, _ELEMENTS // width)
        sum_rows_kernel[(triton.cdiv(len(out), bm),)](
            x, rows_MP, out, len(out), P=rows_MP.shape[1], F=x.shape[1], WIDTH=width, BM=bm,
            WIDE=x.dtype == torch.float64)  # fmt: skip
    return out
