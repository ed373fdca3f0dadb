"""On a GPU: attention in each type against float64 on the CPU, and one training run. `make test-gpu`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nsa_dist.kernels import NSASpec, nsa_attention
from nsa_dist.kernels.full import full_backward, full_forward
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import reference_full
from nsa_dist.metrics import read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

T, H, G, DK, DV = 3000, 8, 2, 48, 32
CU = torch.tensor([0, 1500, 1531, 3000], dtype=torch.int32)
# Relative errors of whole tensors: a few units in the last place of the type that holds the products.
BOUND = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    compressed = Packing(CU.numpy(), NSASpec()).compressed
    shapes = [
        (T, H, DK),
        (compressed, G, DK),
        (compressed, G, DV),
        *[(T, G, DK), (T, G, DV)] * 2,
        (T, H, 3),
        (T, H, DV),
    ]
    return [torch.randn(1, *shape, generator=generator, dtype=torch.float64) for shape in shapes]


def attend(device: str, dtype: torch.dtype) -> list[Tensor]:
    *args, do = [x.to(device, dtype) for x in inputs()]
    args = [x.requires_grad_() for x in args]
    out = nsa_attention(*args, NSASpec(), cu_seqlens=CU.to(device))
    return [out.detach(), *torch.autograd.grad(out, args, do)]


def errors(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    return [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_nsa(dtype: torch.dtype) -> None:
    found = errors(attend("cuda", dtype), attend("cpu", torch.float64))
    print(f"\n{dtype}: relative errors of output and gradients", [f"{e:.1e}" for e in found])
    assert max(found) < BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_full_attention(dtype: torch.dtype) -> None:
    xs = inputs()
    q, k, v, do = (xs[i][0] for i in (0, 3, 4, 8))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wanted = reference_full(*leaves, Packing(np.array([0, T]), NSASpec()), DK**-0.5)
    grads = torch.autograd.grad(wanted, leaves, do)
    q, k, v, do = (x.to("cuda", dtype) for x in (q, k, v, do))
    o, lse = full_forward(q, k, v, True, DK**-0.5)
    found = [o, *full_backward(do, q, k, v, o, lse, True, DK**-0.5)]
    assert max(errors(found, [wanted.detach(), *grads])) < BOUND[dtype]


def test_a_run_under_torchrun(tmp_path: Path) -> None:
    words = ["train.dtype=bfloat16", "train.steps=8", "data.seq_len=16384", "model.attention=[nsa,full,window]"]
    words += ["train.activation_checkpoint=layer", f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    subprocess.run([*torchrun, "-m", "nsa_dist", "train", "parallel.cp=1", *words], check=True)
    losses = [record["loss"] for record in read_metrics(tmp_path / "run")]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 1
