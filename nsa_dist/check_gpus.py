"""Context parallelism on this machine's devices against one of them: attention, and a model's loss and gradients."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_dist.bench_comm import DTYPES, every
from nsa_dist.bench_rows import Row
from nsa_dist.config import Config
from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.exchanges import FULL_EXCHANGES, NSA_EXCHANGES, full_exchange, nsa_exchange
from nsa_dist.parallel.layout import LAYOUTS, make_layout
from nsa_dist.parallel.mesh import Axis, Mesh
from nsa_dist.parallel.operator import apply
from nsa_dist.parallel.parameters import whole
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.train import Batch, build, forward_backward

# Of the norm of a difference to the norm of what one device computes: some units in the last place.
BOUNDS = {"bfloat16": 2e-2, "float32": 1e-5}
SPEC = NSASpec()


def check_attention(
    mesh: Mesh, dtype: str, tokens: int, groups: int, dk: int, dv: int, group_heads: int
) -> list[Row]:
    """A row for each exchange and layout: the greatest relative difference of output and gradients to one device.

    Packed documents, one of them shorter than a compressed token, cuts inside of others.
    """
    device, axis = torch.device(mesh.parameters.device_type), mesh.cp
    edges = np.array([0, tokens // 5 + 7, tokens // 5 + 38, 3 * tokens // 5 + 1, tokens])
    packing = Packing(edges, SPEC)
    xs = _inputs(packing, groups, dk, dv, group_heads, DTYPES[dtype], device)
    alone = Axis(axis.group, 0, 1, np.zeros(1, np.int64))
    single = ShardedSequence(packing, make_layout("contiguous", tokens, 1, 64), alone, device, torch.float32)
    wanted = {kind: _run(single, kind, name, xs) for kind, name in (("nsa", "nsa"), ("full", "ring"))}
    rows: list[Row] = []
    for layout in LAYOUTS:
        cut = make_layout(layout, tokens, axis.size, SPEC.select_block)
        sequence = ShardedSequence(packing, cut, axis, device, torch.float32)
        for kind, names in (("nsa", NSA_EXCHANGES), ("full", FULL_EXCHANGES)):
            for name in names:
                if name == "ulysses" and groups % axis.size:
                    continue
                found = _run(sequence, kind, name, xs)
                worst = max(every(_difference(sequence, kind, found, wanted[kind])))
                row: Row = {"part": "attention", "ranks": axis.size, "dtype": dtype, "layout": layout}
                row |= {"attention": kind, "exchange": name, "difference": worst}
                rows.append(row | {"bound": BOUNDS[dtype], "fine": worst <= BOUNDS[dtype]})
    axis.ledger.take()
    return rows


def check_model(mesh: Mesh, dtype: str, tokens: int, layout: str, exchange: str) -> tuple[float, Any]:
    """Loss and all gradients (float32, flat, on the host) of a small model of NSA, full and window layers."""
    device = torch.device(mesh.parameters.device_type)
    config = Config()
    config.model.width, config.model.heads, config.model.kv_heads, config.model.head_dim = 256, 32, 8, 32
    config.model.layers, config.model.attention = 3, ["nsa", "full", "window"]
    config.train.dtype, config.data.seq_len = dtype, tokens
    config.parallel.cp, config.parallel.exchange, config.parallel.layout = mesh.cp.size, exchange, layout
    model, _ = build(config, 256, mesh, device)
    loss, _ = forward_backward(config, model, [random_batch(mesh, tokens, layout, device, packed=True)], mesh)
    grads = [whole(p.grad).detach().float().cpu().flatten() for p in model.parameters() if p.grad is not None]
    mesh.ledger.take()
    return loss, torch.cat(grads).numpy() if mesh.world.rank == 0 else None


def random_batch(mesh: Mesh, tokens: int, layout: str, device: torch.device, packed: bool) -> Batch:
    """A sequence of random bytes, the same on any number of ranks; `packed`: of three documents."""
    ids = np.random.default_rng(0).integers(0, 256, tokens + 1)
    edges = [0, tokens // 3 + 5, tokens // 3 + 30, tokens] if packed else [0, tokens]
    packing = Packing(np.array(edges), SPEC)
    sequence = ShardedSequence(
        packing, make_layout(layout, tokens, mesh.cp.size, SPEC.select_block), mesh.cp, device, torch.float32
    )
    at = sequence.tokens
    return Batch(torch.from_numpy(ids[at]).to(device), torch.from_numpy(ids[at + 1]).to(device), sequence)


def _inputs(
    packing: Packing, groups: int, dk: int, dv: int, group_heads: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Those of an NSA layer and the output's gradient, whole, the same on every rank: made on the host."""
    t, c, heads = packing.tokens, packing.compressed, groups * group_heads
    shapes = [(t, heads, dk), (c, groups, dk), (c, groups, dv), *[(t, groups, dk), (t, groups, dv)] * 2]
    shapes += [(t, heads, 3), (t, heads, dv)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _run(sequence: ShardedSequence, kind: str, name: str, xs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of this rank's rows."""
    own = torch.from_numpy(sequence.tokens).to(sequence.device)
    compressed = torch.from_numpy(sequence.own_compressed).to(sequence.device)
    scale = xs[0].shape[2] ** -0.5
    pick = range(8) if kind == "nsa" else (0, 3, 4)
    operation = nsa_exchange(name, sequence, scale) if kind == "nsa" else full_exchange(name, sequence, scale)
    leaves = [xs[i][compressed if i in (1, 2) else own].requires_grad_() for i in pick]
    out = apply(operation, *leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, xs[8][own])]


def _difference(sequence: ShardedSequence, kind: str, found: list[Tensor], wanted: list[Tensor]) -> float:
    own = torch.from_numpy(sequence.tokens).to(sequence.device)
    compressed = torch.from_numpy(sequence.own_compressed).to(sequence.device)
    worst = 0.0
    for i, (got, want) in enumerate(zip(found, wanted, strict=True)):
        rows = compressed if kind == "nsa" and i in (2, 3) else own
        scale = max(float(want.float().norm()) * (len(rows) / max(len(want), 1)) ** 0.5, 1e-30)
        worst = max(worst, float((got.float() - want[rows].float()).norm()) / scale)
    return worst
