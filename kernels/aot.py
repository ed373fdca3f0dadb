"""Compiles every kernel for GPUs that aren't there, and says what each takes of one.

    python -m nsa_dist.kernels.aot                  one configuration: 192/128, bfloat16, groups of 16
    python -m nsa_dist.kernels.aot --sample 7       and one more kernel configuration a target, chosen by the number
    python -m nsa_dist.kernels.aot --all            head sizes x types x groups, each kernel with all its constants

Each of the branches' functions is called on a small input with its launches recorded instead of made: what is
compiled is what would be launched. Fails where a kernel exceeds a target's shared memory or spills more than
`SPILLS` bytes a thread. Triton's cache keeps what has been compiled.
"""

import argparse
import inspect
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from nsa_dist.kernels import tuning
from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.compressed import compressed_view
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.selected import block_index, head_rows
from nsa_dist.kernels.spec import NSASpec
from nsa_dist.kernels.tiled import make_ranges, window_ranges

# Shared memory of a program in bytes: CUDA programming guide, table of compute capabilities; CDNA 3 and 4 ISA.
SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536, "gfx950": 163840}
SPILLS = 1024  # on an H200 the fastest block_backward spills 740: nothing that spills less is as fast
SIZES = ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256))
TYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUPS = (1, 4, 16)
_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
Case = tuple[tuple[int, int], torch.dtype, int]


@contextmanager
def _recorded(target: str) -> Iterator[list[Launch]]:
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, args, kwargs))

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(tuning, "compile_target", target):
        yield launches


def record(target: str, case: Case) -> dict[str, Launch]:
    """The launches of all functions of a case, by the kernel's name and what distinguishes it."""
    from nsa_dist.kernels import blocks, gating, ranged, rows, scores

    (dk, dv), dtype, r = case
    spec, s, groups = NSASpec(window=32), 256, 2  # as in long sequences: few keys in a window, many compressed
    packing = Packing(np.array([0, s]), spec)
    tokens, cpu = np.arange(s), torch.device("cpu")
    view = compressed_view(packing, tokens, np.arange(packing.compressed), cpu)
    window = window_ranges(packing, tokens, tokens, spec.window, cpu)
    index = block_index(packing, [tokens] * groups, cpu)

    def zeros(rows: int, heads: int, size: int) -> Tensor:
        return torch.zeros(rows, heads, size, dtype=dtype)

    q, do, gates = zeros(s, r * groups, dk), zeros(s, r * groups, dv), zeros(s, r * groups, 3)
    k, v, k_cmp, v_cmp = (zeros(n, groups, d) for n in (s, packing.compressed) for d in (dk, dv))
    lse = torch.zeros(s, r * groups)
    picks = torch.zeros(s, groups, spec.select_count, dtype=torch.int32)
    token = torch.from_numpy(tokens)
    branch = BranchGrad(do, gates[..., 0], do, lse, lse)
    flat = head_rows(k), head_rows(v)
    with _recorded(target) as launches:
        ranged.range_forward(q, k, v, make_ranges(0 * tokens, 0 * tokens + 2048, tokens[:0], cpu), 1.0)
        ranged.range_forward(q, k, v, window, 1.0)
        ranged.range_backward(branch, q, k, v, window, 1.0)
        ranged.range_backward(branch, q, k_cmp, v_cmp, view.ranges, 1.0, q)
        scores.select_blocks(q, k_cmp, lse, view, spec, 1.0)
        blocks.selected_forward(q, *flat, picks, token, index, 1.0, (do, lse))
        blocks.selected_combined(gates, do, do, q, *flat, picks, token, index, 1.0)
        if tuning.holds("block_backward", q, dk, dv):  # else refused by name
            blocks.selected_backward(branch, q, *flat, picks, token, index, 1.0, q)
        gating.combine_forward(gates, [do] * 3)
        gating.row_deltas(do, [do] * 3)
        rows.sum_rows(k.flatten(0, 1), token[:, None])
    return _named(launches)


def _named(launches: list[Launch]) -> dict[str, Launch]:
    """By the kernel's name, and the constants in which its launches differ."""
    named: dict[str, Launch] = {}
    for kernel, args, kwargs in launches:
        same = [other[2] for other in launches if other[0] is kernel]
        differ = [n for n, x in kwargs.items() if any(repr(other[n]) != repr(x) for other in same)]
        named[" ".join([kernel.__name__, *(f"{n}={kwargs[n]}" for n in differ)])] = (kernel, args, kwargs)
    return named


def compile_launch(launch: Launch, target: str) -> Any:
    """The compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    kernel, args, kwargs = launch
    names = list(inspect.signature(kernel.fn).parameters)
    values = inspect.signature(kernel.fn).bind(*args, **{n: x for n, x in kwargs.items() if n in names}).arguments
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        if isinstance(value, TensorDescriptor):
            block = f"{_NAMES[value.base.dtype]}{list(value.block_shape)}"
            signature[parameter.name] = f"tensordesc<{block},{value.layout!r}>"
        elif parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = "*" + _NAMES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        by_16 = isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        if isinstance(value, Tensor) or (by_16 and (i,) not in constants):
            attributes[(i,)] = [["tt.divisibility", 16]]
    amd = target.startswith("gfx")
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
    options = {n: kwargs[n] for n in ("num_warps", "num_stages", "maxnreg") if n in kwargs}
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    return triton.compile(source(kernel, signature, constants, attributes), target=gpu, options=options)


def resources(compiled: Any, target: str) -> tuple[int, int, int]:
    """Registers a thread, shared memory in bytes, bytes spilled a thread."""
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        count = {n: int(x) for n, x in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", text)}
        return count["vgpr_count"], compiled.metadata.shared, 4 * count["vgpr_spill_count"]
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        )
    registers, stack = (int(re.findall(rf"{n}:(\d+)", told.stdout)[-1]) for n in ("REG", "STACK"))
    return registers, compiled.metadata.shared, stack


def check(
    target: str, case: Case, say: Callable[[str], None], every: bool = True, only: int | None = None
) -> list[str]:
    """Compiles a case; what is wrong with it. Not `every`: each kernel once; `only`: the kernel of that number."""
    wrong = []
    (dk, dv), dtype, r = case
    recorded = record(target, case)
    launches = sorted((recorded if every else {n.split()[0]: x for n, x in recorded.items()}).items())
    for name, launch in launches if only is None else [launches[only % len(launches)]]:
        label = f"{target} {dk}/{dv} {_NAMES[dtype]} R={r} {name}"
        try:
            registers, shared, spilled = resources(compile_launch(launch, target), target)
        except Exception as error:
            wrong.append(f"{label}: {type(error).__name__}: {str(error).strip().splitlines()[-1]}")
            say(wrong[-1])
            continue
        say(f"{label:72s} registers {registers:4d}  shared {shared:7d}  spilled {spilled:5d}")
        if shared > SHARED[target]:
            wrong.append(f"{label}: {shared} bytes of shared memory; at most {SHARED[target]}")
        if spilled > SPILLS:
            wrong.append(f"{label}: {spilled} bytes spilled a thread; at most {SPILLS}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m nsa_dist.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", action="append", choices=list(SHARED), help="may be given again; all unless given"
    )
    parser.add_argument("--all", action="store_true", help="every head size, type and group size")
    parser.add_argument("--sample", type=int, metavar="N", help="one more kernel a target, chosen by N")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1: kernels would be interpreted; allowed: unset")
    targets = args.target or list(SHARED)
    every: list[Case] = list(itertools.product(SIZES, TYPES, GROUPS))
    usual: Case = ((192, 128), torch.bfloat16, 16)
    wrong = []
    for target, case in itertools.product(targets, every if args.all else [usual]):
        wrong += check(target, case, print, every=args.all)
    if args.sample is not None:
        for i, target in enumerate(targets):
            number = args.sample + i
            wrong += check(target, every[number * 7 % len(every)], print, only=number)
    for line in wrong:
        print(f"nsa-dist: error: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
