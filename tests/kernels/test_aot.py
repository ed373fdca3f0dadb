"""Every kernel compiles for every target at the paper's shape, inside its shared memory, without bad spills."""

import itertools
import os
import subprocess
import sys
from datetime import date
from unittest import mock

import pytest
import torch

from nsa_dist.kernels import tuning

pytest.importorskip("triton")


def test_compiles_for_every_target() -> None:
    """And one other configuration a target, another one each day."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "nsa_dist.kernels.aot", "--sample", str(date.today().toordinal())]
    found = subprocess.run(words, capture_output=True, text=True, env=env)
    print(found.stdout)
    assert found.returncode == 0, found.stderr
    lines = [line for line in found.stdout.splitlines() if "registers" in line]
    assert len(lines) == 5 * (14 + 1)


def test_a_kernel_that_takes_too_much_is_named() -> None:
    code = (
        "from nsa_dist.kernels import aot; aot.SHARED['sm_90'] = 100000; import sys; sys.argv = ['aot', '--target', "
    )
    code += "'sm_90']; sys.exit(aot.main())"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert found.returncode == 1
    assert "sm_90 192/128 bf16 R=16 range_forward_kernel" in found.stderr
    assert "bytes of shared memory; at most 100000" in found.stderr


@pytest.mark.parametrize(("dk", "dv"), [(256, 64), (192, 192)])
def test_head_sizes_that_a_target_cannot_hold_are_refused_by_name(dk: int, dv: int) -> None:
    x = torch.zeros(1, 1, dk, dtype=torch.bfloat16)
    words = f"head sizes {dk}/{dv} in torch.bfloat16 on sm_80: block_backward takes at most 192, 320 together, there"
    with mock.patch.object(tuning, "compile_target", "sm_80"), pytest.raises(ValueError, match=words):
        tuning.tuned("block_backward", x, dk, dv)


@pytest.mark.parametrize(("dk", "dv"), list(itertools.product((64, 96, 128, 192, 256), repeat=2)))
def test_tiles_fit_into_hopper_shared_memory(dk: int, dv: int) -> None:
    hopper = pytest.importorskip("nsa_dist.kernels.hopper")
    with mock.patch.object(tuning, "compile_target", "sm_90"):
        meta, slots = hopper._forward_tiles(torch.zeros(1, 1, dk, dtype=torch.bfloat16), dk, dv)
    assert slots in (1, 2)
    taken = meta["num_stages"] * meta["BN"] * (dk + dv) * 2 + slots * hopper.ROWS * dk * 2
    assert taken <= 232448 - 1024  # barriers, and what Triton keeps there: 472 bytes at most seen


@pytest.mark.parametrize(("heads", "module"), [(12, "ranged"), (64, "hopper")])
def test_hopper_forward_over_ranges_takes_powers_of_two_of_heads(heads: int, module: str) -> None:
    code = (
        "import torch; from nsa_dist.kernels import aot\n"
        f"launches = aot.record('sm_90', ((128, 128), torch.bfloat16, {heads}))\n"
        "print({x[0].fn.__module__ for n, x in launches.items() if n.split()[0] == 'range_forward_kernel'})"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert found.stdout.strip() == f"{{'nsa_dist.kernels.{module}'}}", found.stderr
