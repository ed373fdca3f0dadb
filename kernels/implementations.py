"""Which functions compute the branches: vectorised, in plain torch operations, or Triton's kernels.

Both take and return the same; the vectorised ones say what.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nsa_dist.kernels import combine, compressed, selected, tiled, tuning
from nsa_dist.kernels.compressed import CompressedView
from nsa_dist.kernels.select import Admitted
from nsa_dist.kernels.span import select_admitted
from nsa_dist.kernels.spec import NSASpec

BACKENDS = ("auto", "reference", "triton")


@dataclass(frozen=True)
class Implementation:
    range_forward: Callable[..., tuple[Tensor, Tensor]]
    range_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    compressed_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    selected_forward: Callable[..., tuple[Tensor, Tensor]]
    selected_combined: Callable[..., tuple[Tensor, Tensor, Tensor]]
    selected_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    combine_forward: Callable[..., Tensor]
    row_deltas: Callable[..., Tensor]


VECTORISED = Implementation(
    tiled.range_forward,
    tiled.range_backward,
    compressed.compressed_forward,
    selected.selected_forward,
    selected.selected_combined,
    selected.selected_backward,
    combine.combine_forward,
    combine.row_deltas,
)


def implementation(q: Tensor, backend: str = "auto") -> Implementation:
    """`auto`: Triton on a GPU in 16 and 32 bit types, else (CPU, float64) vectorised.

    Raises ValueError where `triton` can't compute q, and where `auto` means Triton and it isn't installed.
    """
    if backend == "triton" and q.device.type == "cpu" and not (_triton_installed() and tuning.interpreted()):
        raise ValueError(
            "backend='triton' on a CPU: needs a GPU, or TRITON_INTERPRET=1 set before triton is imported"
        )
    if backend == "triton" and q.dtype not in tuning.DTYPES:
        raise ValueError(f"backend='triton' with q of {q.dtype}: must be float16, bfloat16 or float32")
    if backend == "auto" and q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"q on {q.device}: must be on cpu or cuda (ROCm too), or backend='triton' where Triton runs")
    on_gpu = q.device.type == "cuda" and q.dtype != torch.float64
    if not on_gpu and backend != "triton":
        return VECTORISED
    if not _triton_installed():
        raise ValueError(f"q on {q.device}: needs triton, which isn't installed (pip install triton)")
    return _triton()


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _triton() -> Implementation:
    from nsa_dist.kernels import blocks, gating, ranged, scores

    def compressed_forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        view: CompressedView,
        spec: NSASpec,
        scale: float,
        admitted: Admitted | None = None,
    ) -> tuple[Any, ...]:
        o, lse = ranged.range_forward(q, k, v, view.ranges, scale)
        if admitted is not None:
            return o, lse, select_admitted(q, k, view, spec, scale, admitted)
        return o, lse, scores.select_blocks(q, k, lse, view, spec, scale)

    return Implementation(
        ranged.range_forward,
        ranged.range_backward,
        compressed_forward,
        blocks.selected_forward,
        blocks.selected_combined,
        blocks.selected_backward,
        gating.combine_forward,
        gating.row_deltas,
    )
