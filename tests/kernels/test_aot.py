"""Every kernel compiles for every target at the paper's shape, inside its shared memory, without bad spills."""

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
    assert len(lines) == 5 * (13 + 1)


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


def test_a_head_size_that_a_target_cannot_hold_is_refused_by_name() -> None:
    x = torch.zeros(1, 1, 256, dtype=torch.bfloat16)
    with (
        mock.patch.object(tuning, "compile_target", "sm_80"),
        pytest.raises(
            ValueError, match=r"head sizes 256/256 in torch.bfloat16 on sm_80: block_backward takes at most 192"
        ),
    ):
        tuning.tuned("block_backward", x, 256, 256)


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
