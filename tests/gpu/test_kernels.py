"""The kernels at 8k to 64k tokens on a GPU: errors against plain bfloat16, the selection, equal bits, launches."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from nsa_dist.kernels import NSASpec, branch, nsa_attention, selected, tiled, tuning
from nsa_dist.kernels.attention import local_views
from nsa_dist.kernels.branch import BranchGrad
from nsa_dist.kernels.combine import row_deltas
from nsa_dist.kernels.compressed import CompressedView, compressed_forward
from nsa_dist.kernels.implementations import VECTORISED, Implementation, implementation
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.select import block_scores
from nsa_dist.kernels.selected import head_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SPEC = NSASpec()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def make_picks(kind: str, tokens: int, groups: int) -> Tensor:
    """Every query's own block, and 15 more: any, the nearest, the same for all, or different from its neighbours'."""
    own = torch.arange(tokens, device="cuda") // 64
    block = torch.arange(int(own[-1]) + 1, device="cuda")
    picks = []
    for g in range(groups):
        if kind == "random":
            rank = torch.rand(tokens, len(block), generator=torch.Generator("cuda").manual_seed(g), device="cuda")
        elif kind == "local":
            rank = block.float().repeat(tokens, 1)
        elif kind == "same":
            rank = -block.float().repeat(tokens, 1)
        else:
            rank = -((block + 16 * torch.arange(tokens, device="cuda")[:, None]) % len(block)).float()
        rank[block == own[:, None]] = torch.inf
        rank[block > own[:, None]] = -torch.inf
        best, pick = rank.topk(16, dim=1)
        pick = pick.masked_fill(best == -torch.inf, 1 << 30).sort(1).values
        picks.append(pick.masked_fill(pick == 1 << 30, -1).int())
    return torch.stack(picks, 1)


@pytest.mark.parametrize("tokens", [8192, 65536])
@pytest.mark.parametrize("kind", ["random", "local", "same", "different"])
def test_selected_has_at_most_twice_the_error_of_plain_bfloat16(kind: str, tokens: int) -> None:
    heads, groups, dk, dv = 16, 1, 192, 128
    packing = Packing(np.array([0, tokens]), SPEC)
    index = selected.block_index(packing, [np.arange(tokens)] * groups, torch.device("cuda"))
    token, picks = torch.arange(tokens, device="cuda"), make_picks(kind, tokens, groups)
    shapes = (tokens, heads, dk), (tokens, groups, dk), (tokens, groups, dv), (tokens, heads, dv)
    q, k, v, do = (random(*shape, seed=i).bfloat16() for i, shape in enumerate(shapes))
    gate = torch.rand(tokens, heads, device="cuda").bfloat16()

    def run(local: Implementation, dtype: torch.dtype) -> list[Tensor]:
        x, y = q.to(dtype), [head_rows(k.to(dtype)), head_rows(v.to(dtype))]
        o, lse = local.selected_forward(x, *y, picks, token, index, dk**-0.5)
        grad = BranchGrad(do.to(dtype), gate.to(dtype), o, lse, row_deltas(do.to(dtype), [o])[..., 0])
        return [o, *local.selected_backward(grad, x, *y, picks, token, index, dk**-0.5)]

    with mock.patch.object(selected, "CHUNK_BYTES", 4 << 30), mock.patch.object(selected, "_BATCH", 1 << 26):
        want = run(VECTORISED, torch.float64)

    def errors(found: list[Tensor]) -> list[float]:
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, want, strict=True)]

    ours = errors(run(implementation(q), torch.bfloat16))
    with (
        mock.patch.object(selected, "CHUNK_BYTES", 4 << 30),  # fewer and larger steps than a CPU likes
        mock.patch.object(selected, "_BATCH", 1 << 26),
        mock.patch.object(branch, "work_dtype", lambda x: x.dtype),
        mock.patch.object(tiled, "work_dtype", lambda x: x.dtype),
        mock.patch.object(selected, "work_dtype", lambda x: x.dtype),
    ):
        plain = errors(run(VECTORISED, torch.bfloat16))
    print(f"\n{kind} {tokens}: ours", [f"{e:.1e}" for e in ours], "plain", [f"{e:.1e}" for e in plain])
    assert all(a <= 2 * b for a, b in zip(ours, plain, strict=True))


def gaps(q: Tensor, k: Tensor, view: CompressedView, rows: Tensor) -> Tensor:
    """For each of these queries of one document: how far, relative, the last chosen score is above the next."""
    p = []
    for s in rows.tolist():
        seen = int(view.ranges.hi[s])
        p.append(
            torch.nn.functional.pad(
                torch.softmax(q[s] @ k[:seen, 0].T * q.shape[-1] ** -0.5, -1).sum(0), (0, len(k) - seen)
            )
        )
    score = block_scores(torch.stack(p)[None], int(view.own_S.max()) + 1, SPEC)[0].double()
    block, own = torch.arange(score.shape[1], device="cuda"), view.own_S[rows, None]
    score[(block < SPEC.initial_blocks) | (block > own - SPEC.local_blocks)] = -1
    best = score.sort(1, descending=True).values
    free = SPEC.select_count - SPEC.initial_blocks - SPEC.local_blocks
    return (best[:, free - 1] - best[:, free]) / best[:, free - 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_selection_at_64k_is_the_references(dtype: torch.dtype) -> None:
    tokens, heads = 65536, 16
    packing = Packing(np.array([0, tokens]), SPEC)
    view = local_views(packing, torch.device("cuda")).compressed
    q, k = random(tokens, heads, 128).to(dtype), random(packing.compressed, 1, 128, seed=1).to(dtype)
    found = implementation(q).compressed_forward(q, k, k, view, SPEC, 128**-0.5)[2]
    wide = q.double(), k.double()
    want = compressed_forward(*wide, wide[1], view, SPEC, 128**-0.5)[2]
    rows = (found != want).flatten(1).any(1).nonzero()[:, 0]
    gap = gaps(*wide, view, rows) if len(rows) else torch.zeros(0)
    worst = float(gap.max()) if len(gap) else 0.0
    print(f"\n{dtype}: {len(rows)} of {tokens} queries differ: {rows.tolist()[:20]}, gaps at most {worst}")
    assert (gap <= 1e-5).all()


@pytest.mark.parametrize(("heads", "groups"), [(32, 2), (32, 4), (64, 16)])
def test_equal_bits_at_64k_from_the_kernels_alone(heads: int, groups: int) -> None:
    tokens, dk, dv = 65536, 192, 128
    rows = Packing(np.array([0, tokens]), SPEC).compressed
    shapes = [
        (tokens, heads, dk),
        (rows, groups, dk),
        (rows, groups, dv),
        *[(tokens, groups, dk), (tokens, groups, dv)] * 2,
    ]
    xs = [
        random(1, *shape, seed=i).bfloat16().requires_grad_() for i, shape in enumerate([*shapes, (tokens, heads, 3)])
    ]
    do, runs = random(1, tokens, heads, dv, seed=9).bfloat16(), []
    for _ in range(2):
        tuning.launches.clear()
        out = nsa_attention(*xs, SPEC)
        runs.append([out, *torch.autograd.grad(out, xs, do)])
        assert tuning.launches == {
            "range_forward": 2,
            "range_dq": 2,
            "range_dkv": 2,
            "scores": 1,
            "block_forward": 1,
            "block_backward": 1,
            "combine": 1,
            "row_deltas": 1,
        }
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(x.isfinite().all() for x in runs[0])


def test_compiles_without_a_graph_break() -> None:
    tokens, heads, groups, d = 2048, 16, 2, 64
    rows = Packing(np.array([0, tokens]), SPEC).compressed
    shapes = [(tokens, heads, d), *[(rows, groups, d)] * 2, *[(tokens, groups, d)] * 4, (tokens, heads, 3)]
    xs = [random(1, *shape, seed=i).bfloat16().requires_grad_() for i, shape in enumerate(shapes)]

    def loss(*leaves: Tensor) -> Tensor:
        return nsa_attention(*leaves, SPEC).float().square().sum()

    found = [torch.autograd.grad(fn(*xs), xs) for fn in (loss, torch.compile(loss, fullgraph=True))]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
