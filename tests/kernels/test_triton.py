"""`backend="triton"`: equal bits, selected blocks from buffers, what is refused, torch's rules for operators."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nsa_dist.kernels import NSASpec, blocks, compress, gating, nsa_attention, selected, tuning
from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.combine import row_deltas
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.rows import sum_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() and not tuning.interpreted(), reason="no interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(
    lengths: list[int], heads: int, groups: int, dk: int, dv: int, spec: NSASpec
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    cu = np.concatenate([[0], np.cumsum(lengths)])
    tokens, rows = int(cu[-1]), Packing(cu, spec).compressed
    shapes = [
        (tokens, heads, dk),
        (rows, groups, dk),
        (rows, groups, dv),
        *[(tokens, groups, dk), (tokens, groups, dv)] * 2,
    ]
    shapes += [(tokens, heads, 3), (tokens, heads, dv)]
    made = [torch.randn(1, *shape, generator=generator) for shape in shapes]
    return torch.tensor(cu, dtype=torch.int32), made


def run(cu: Tensor, xs: list[Tensor], spec: NSASpec, backend: str, recompute: bool = False) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in xs[:-1]]
    out = nsa_attention(*leaves, spec, cu_seqlens=cu, backend=backend, recompute=recompute)
    return [out.detach(), *torch.autograd.grad(out, leaves, xs[-1])]


def test_branches_that_are_recomputed_give_equal_bits() -> None:
    spec = NSASpec(8, 4, 16, 4, 1, 2, 24)
    cu, xs = inputs([20, 33], 4, 2, 16, 24, spec)
    xs = [x.to(DEVICE) for x in xs]
    tuning.launches.clear()
    for a, b in zip(run(cu, xs, spec, "triton"), run(cu, xs, spec, "triton", recompute=True), strict=True):
        assert torch.equal(a, b)
    assert tuning.launches["row_deltas"] == 1 + 3 and tuning.launches["block_forward"] == 1 + 2
    assert tuning.launches["scores"] == 2  # the selection is kept


@pytest.mark.parametrize("held", [0.5, 0.0])
def test_selected_blocks_from_two_buffers_are_one_softmax(held: float) -> None:
    """Buffers that lack blocks, or parts of them, as a rank's shard and what it fetched do."""
    spec, heads, groups, dk, dv = NSASpec(8, 4, 16, 5, 1, 2, 24), 6, 2, 24, 16
    packing = Packing(np.array([0, 75, 130]), spec)
    generator = torch.Generator().manual_seed(3)
    mine = torch.rand(130, generator=generator).numpy() < held
    rows = [np.flatnonzero(mine), np.flatnonzero(~mine)]
    picks = torch.full((130, groups, spec.select_count), -1, dtype=torch.int32)
    for s in range(130):
        block = int(packing.block(np.array([s]))[0])
        first = 0 if s < 75 else int(packing.blk_cu[1])
        for g in range(groups):
            some = (torch.randperm(block - first, generator=generator) + first)[: spec.select_count - 1]
            chosen = torch.cat([some, torch.tensor([block])]).sort().values
            picks[s, g, : len(chosen)] = chosen
    shapes = (130, heads, dk), (130, groups, dk), (130, groups, dv), (130, heads, dv)
    q, k, v, do = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    gate, picks = torch.rand(130, heads, generator=generator).to(DEVICE), picks.to(DEVICE)
    token = torch.arange(130, device=DEVICE)
    every = selected.block_index(packing, [np.arange(130)] * groups, DEVICE)
    flat = selected.head_rows(k), selected.head_rows(v)
    o, lse = selected.selected_forward(q, *flat, picks, token, every, 0.2)
    branch = BranchGrad(do, gate, o, lse, row_deltas(do, [o])[..., 0])
    want = selected.selected_backward(branch, q, *flat, picks, token, every, 0.2)
    dq, grads = torch.zeros_like(q), [torch.zeros_like(x) for x in flat]
    state: tuple[torch.Tensor, torch.Tensor] | None = None
    for part in rows:
        index = selected.block_index(packing, [part] * groups, DEVICE)
        at = torch.from_numpy(np.concatenate([part, 130 + part])).to(DEVICE)
        buffer = [x[at] for x in flat]
        state = blocks.selected_forward(q, *buffer, picks, token, index, 0.2, state)
        _, *d = blocks.selected_backward(branch, q, *buffer, picks, token, index, 0.2, dq)
        for grad, x in zip(grads, d, strict=True):
            grad[at] += x
    assert state is not None
    for a, b in zip((*state, dq, *grads), (o, lse, *want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows", [70, 0])
def test_the_sum_made_with_the_selected_branch_is_the_sum_made_after_it(rows: int, dtype: torch.dtype) -> None:
    spec, heads, groups, dk, dv = NSASpec(8, 4, 16, 5, 1, 2, 24), 6, 2, 24, 40
    packing, generator = Packing(np.array([0, 70]), spec), torch.Generator().manual_seed(4)
    index = selected.block_index(packing, [np.arange(rows)] * groups, DEVICE)
    shapes = (70, heads, 3), (70, heads, dv), (70, heads, dv), (70, heads, dk), (rows, groups, dk), (rows, groups, dv)
    gates, o_cmp, o_win, q, k, v = (torch.randn(*n, generator=generator).to(DEVICE, dtype) for n in shapes)
    own = torch.arange(70, device=DEVICE) // spec.select_block
    picks = torch.stack([own * 0, own, own * 0 - 1], -1).int()[:, None].expand(-1, groups, -1).contiguous()
    branch = q, selected.head_rows(k), selected.head_rows(v), picks, torch.arange(70, device=DEVICE), index, 0.2
    o, lse = blocks.selected_forward(*branch)
    found = blocks.selected_combined(gates, o_cmp, o_win, *branch)
    want = o, lse, gating.combine_forward(gates, [o_cmp, o, o_win])
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    other = selected.selected_combined(gates, o_cmp, o_win, *branch)[2]
    torch.testing.assert_close(found[2], other, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU an assertion of the device, which ends the process")
@pytest.mark.parametrize("wrong", [3, -2])
@pytest.mark.parametrize("forward", [blocks.selected_forward, selected.selected_forward])
def test_a_selection_out_of_range_is_refused(forward: Callable[..., Any], wrong: int) -> None:
    index = selected.block_index(Packing(np.array([0, 40]), NSASpec(8, 4, 16, 4)), [np.arange(40)] * 2, DEVICE)
    picks = torch.zeros(40, 2, 4, dtype=torch.int32)
    picks[7, 0, 2] = wrong  # 3: a block of the next KV head, were it not refused
    with pytest.raises(ValueError, match=f"from 0 to 2, or -1; 1 aren't, the first is {wrong}"):
        forward(torch.zeros(40, 2, 16), torch.zeros(80, 16), torch.zeros(80, 16), picks, torch.arange(40), index, 1.0)


@pytest.mark.parametrize(
    ("dtype", "size", "words"),
    [(torch.float64, 16, "backend='triton' with q of torch.float64"), (torch.float32, 20, "head size 20")],
)
def test_what_no_kernel_is_made_for_is_refused(dtype: torch.dtype, size: int, words: str) -> None:
    spec = NSASpec(8, 4, 16, 4, 1, 2, 24)
    _, xs = inputs([40], 2, 1, size, size, spec)
    with pytest.raises(ValueError, match=words):
        nsa_attention(*(x.to(DEVICE, dtype) for x in xs[:-1]), spec, backend="triton")


@pytest.mark.parametrize("recompute", [False, True])
def test_the_operators_keep_torchs_rules(recompute: bool) -> None:
    spec = NSASpec(8, 4, 16, 4, 1, 2, 24)
    cu, xs = inputs([9, 14], 2, 2, 16, 24, spec)
    leaves = [x[0].to(DEVICE).requires_grad_() for x in xs[:-1]]
    arguments = (leaves, cu, 1, [float(getattr(spec, f.name)) for f in fields(spec)], 0.25, "triton", recompute)
    torch.library.opcheck(torch.ops.nsa_dist.attention.default, arguments)


def test_compiles_without_a_graph_break() -> None:
    spec = NSASpec(8, 4, 16, 4, 1, 2, 24)
    _, xs = inputs([53], 4, 2, 16, 24, spec)

    def loss(*leaves: Tensor) -> Tensor:
        return (nsa_attention(*leaves, spec) * 2).square().sum()

    results = []
    for fn in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [x.to(DEVICE).requires_grad_() for x in xs[:-1]]
        results.append([fn(*leaves), *torch.autograd.grad(fn(*leaves), leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("rows", "parts", "size"), [(700, 1, 24), (130, 3, 40), (0, 2, 16), (5, 2, 600)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_that_are_looked_up_are_added(rows: int, parts: int, size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(90, size, generator=generator, dtype=torch.float64).to(dtype)
    which = torch.randint(-1, 90, (rows, parts), generator=generator)
    found = sum_rows(x.to(DEVICE), which.to(DEVICE))
    want = torch.nn.functional.pad(x, (0, 0, 0, 1)).double()[which].sum(1)
    bound = {torch.float16: 1e-3, torch.float32: 1e-6, torch.float64: 1e-15}[dtype]
    torch.testing.assert_close(found.cpu().double(), want, rtol=bound, atol=bound)
    assert torch.equal(found.cpu(), compress.sum_rows(x, which))
