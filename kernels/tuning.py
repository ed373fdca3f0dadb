"""What each kernel is launched with on each target, and what the kernels take at all."""

import os
from functools import cache

import torch
from torch import Tensor

# Products and sums fused, as all that is measured here; later Tritons won't unless told, and 3.9 warns of it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_SIZES = range(16, 257, 8)
# Arguments that differ from one chunk of the selected branch to the next: one compiled kernel for all.
CHUNK = ("chunk", "first_head", "first_query", "queries")

launches: dict[str, int] = {}


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (TRITON_INTERPRET=1 when triton is imported)."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def count_launch(name: str) -> None:
    launches[name] = launches.get(name, 0) + 1


def check_launch(*xs: Tensor) -> None:
    """Raises ValueError for what no kernel is made for."""
    for x in xs:
        if x.dtype not in DTYPES:
            raise ValueError(f"type {x.dtype}: the Triton kernels take float16, bfloat16, float32")
        if x.shape[-1] not in HEAD_SIZES:
            raise ValueError(f"head size {x.shape[-1]}: the Triton kernels take 16 to 256, a multiple of 8")


@cache
def pieces(name: str, size: int) -> dict[str, int]:
    """A head size as two powers of two, the second 0 where one is enough: 192 = 128 + 64."""
    first = 1 << (size.bit_length() - 1)
    rest = size - first
    return {f"D{name}": size, f"D{name}1": first, f"D{name}2": max(16, 1 << (rest - 1).bit_length()) if rest else 0}


def head_sizes(dk: int, dv: int) -> dict[str, int]:
    return pieces("K", dk) | pieces("V", dv)


compile_target: str | None = None  # set while kernels are compiled ahead of time


def precision(x: Tensor) -> str:
    """float32 products: three TF32 products on NVIDIA (Triton's default is one), IEEE on AMD, the CPU and sm_80,
    where the backward of the selected branch would spill kilobytes."""
    where = target(x.device)
    three = where.startswith("sm_") and where != "sm_80" and x.dtype == torch.float32
    return "tf32x3" if three else "ieee"


def target(device: torch.device) -> str:
    return compile_target or _target(device)


@cache
def _target(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def programs(tiles: int, keys: int, device: torch.device) -> int:
    """Of a kernel whose programs go from tile to tile of queries that see so many keys: at least one for each
    multiprocessor; each has some 16k keys to go over, no more: NCCL's kernels wait for a program, not for all."""
    most = 132 if compile_target else torch.cuda.get_device_properties(device).multi_processor_count
    each = max(1, min(16, 16384 // max(1, keys)))
    return min(tiles, max(most, -(-tiles // each)))


def on_hopper(q: Tensor, *kv: Tensor) -> bool:
    """Whether the Gluon kernels compute such tensors. Their modules are loaded only then: some Tritons lack Gluon."""
    if target(q.device) != "sm_90" or q.element_size() != 2 or any(len(x) == 0 for x in kv):
        return False
    for x in kv:
        parts = pieces("", x.shape[-1])
        aligned = x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:-1]) and x.stride(-1) == 1
        if not aligned or x.shape[-1] not in (64, 96, 128, 192, 256) or parts["D1"] + parts["D2"] != x.shape[-1]:
            return False
    return True


def tuned(kernel: str, x: Tensor, dk: int, dv: int) -> dict[str, int]:
    """Tile sizes, warps and stages of a kernel. Raises ValueError for head sizes that it isn't made for there."""
    where = target(x.device)
    if not holds(kernel, x, dk, dv):
        most, both = _LARGEST[where, kernel]
        raise ValueError(
            f"head sizes {dk}/{dv} in {x.dtype} on {where}: {kernel} takes at most {most}, {both} together, there"
        )
    return dict(configuration(kernel, where, x.dtype == torch.float32, max(dk, dv)))


def holds(kernel: str, x: Tensor, dk: int, dv: int) -> bool:
    """Whether a kernel is made for such head sizes where x is."""
    most, both = _LARGEST.get((target(x.device), kernel), (256, 512))
    return max(dk, dv) <= most and dk + dv <= both


# The largest head size, the largest sum of both, where they aren't 256 and 512: above, ptxas spills 3 to 4 KB in
# 16-bit types, 6 KB in float32.
_LARGEST = {("sm_80", "block_backward"): (192, 320)}

# (target or its family, kernel): BM, BN, warps, stages at head sizes up to 128, up to 192, above it; 16-bit types.
# kernels/NOTES.md says what was measured; what hasn't been is chosen by the compiled code's registers and spills.
_TABLE = {
    ("sm_90", "range_forward"): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2)),
    ("sm_90", "range_dq"): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
    ("sm_90", "range_dkv"): ((32, 64, 4, 3), (32, 64, 4, 3), (32, 64, 8, 2)),
    ("sm_90", "scores"): ((128, 64, 4, 2),) * 3,
    ("sm_90", "hopper_scores"): ((128, 64, 4, 6),) * 3,
    ("sm_90", "hopper_forward"): ((128, 128, 4, 2), (128, 128, 4, 2), (128, 64, 4, 2)),
    ("sm_90", "block_forward"): ((64, 64, 4, 1),) * 3,
    ("sm_90", "block_backward"): ((32, 64, 4, 3), (32, 64, 4, 3), (32, 64, 8, 2)),
    ("sm_80", "range_dkv"): ((64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("sm_80", "block_backward"): ((16, 64, 8, 1),) * 3,
    ("sm", "range_dkv"): ((32, 64, 8, 2),) * 3,
    ("sm", "block_forward"): ((64, 64, 4, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
    ("sm", "block_backward"): ((32, 64, 8, 1),) * 3,
    ("sm", ""): ((64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("gfx", "range_dkv"): ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 8, 1)),
    ("gfx", "block_forward"): ((64, 64, 4, 1), (32, 64, 4, 1), (32, 64, 4, 1)),
    ("gfx", "block_backward"): ((32, 64, 4, 1), (32, 64, 4, 1), (16, 64, 4, 1)),
    ("gfx", ""): ((64, 32, 4, 1),) * 3,
}


@cache
def configuration(kernel: str, where: str, wide: bool, size: int) -> tuple[tuple[str, int], ...]:
    """`wide`: float32."""
    if where == "interpreter":
        bm, bn, warps, stages = 32, 16, 4, 1
    elif wide:
        bm, bn, warps, stages = (32, 32, 4, 1) if size <= 64 else (16, 16, 4, 1)
    else:
        family = "gfx" if where.startswith("gfx") else "sm"
        keys = ((where, kernel), (family, kernel), (family, ""))
        row = next(_TABLE[key] for key in keys if key in _TABLE)
        bm, bn, warps, stages = row[(size > 128) + (size > 192)]
    return (("BM", bm), ("BN", bn), ("num_warps", warps), ("num_stages", stages))
