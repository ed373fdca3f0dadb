"""`nsa_attention`: the vectorised path against the reference, full attention, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nsa_dist.kernels import NSASpec, nsa_attention, selected
from nsa_dist.kernels.attention import local_views
from nsa_dist.kernels.combine import merge
from nsa_dist.kernels.compressed import compressed_forward
from nsa_dist.kernels.full import full_backward, full_forward
from nsa_dist.kernels.implementations import implementation
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import reference_full, reference_selection

NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")


def make(
    spec: NSASpec, lengths: list[int], heads: int, groups: int, dk: int, dv: int, batch: int = 1
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = sum(lengths)
    rows = Packing(np.concatenate([[0], np.cumsum(lengths)]), spec).compressed
    shapes = [(tokens, heads, dk), (rows, groups, dk), (rows, groups, dv)]
    shapes += [(tokens, groups, dk), (tokens, groups, dv)] * 2 + [(tokens, heads, 3)]
    made = [torch.randn(batch, *s, generator=generator, dtype=torch.float64) for s in shapes]
    return [x.requires_grad_() for x in made]


@st.composite
def cases(draw: st.DrawFn) -> tuple[NSASpec, list[int], tuple[int, int, int, int]]:
    d = draw(st.sampled_from([2, 4, 8]))
    local, initial = draw(st.integers(1, 3)), draw(st.integers(0, 2))
    count = local + initial + draw(st.integers(0, 4))
    block = d * draw(st.integers(1, 4))
    spec = NSASpec(d * draw(st.integers(1, 3)), d, block, count or 1, initial, local, draw(st.integers(1, 70)))
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=4))
    groups = draw(st.integers(1, 3))
    sizes = groups * draw(st.integers(1, 4)), groups, draw(st.integers(1, 6)), draw(st.integers(1, 6))
    return spec, lengths, sizes


@settings(max_examples=40, deadline=None)
@given(cases())
def test_the_vectorised_path_is_the_reference(case: Any) -> None:
    spec, lengths, sizes = case
    xs = make(spec, lengths, *sizes)
    cu = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    outs = [nsa_attention(*xs, spec, cu_seqlens=cu, backend=backend) for backend in ("auto", "reference")]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-11, atol=1e-12)
    do = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [torch.autograd.grad(out, xs, do) for out in outs]
    for name, a, b in zip(NAMES, *grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_the_selected_branch_is_the_same_in_chunks_and_items_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also twice the same, to the bit, where blocks are picked by many queries and by one."""
    spec, lengths = NSASpec(8, 4, 16, 5, 1, 2, 24), [150, 75]
    xs = make(spec, lengths, 4, 2, 6, 5)
    cu = torch.tensor([0, 150, 225], dtype=torch.int32)

    def run(backend: str) -> list[Tensor]:
        out = nsa_attention(*xs, spec, cu_seqlens=cu, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), xs)]

    want = run("reference")
    for chunk, item, batch in ((1, 1, 1), (2000, 2, 100), (2000, 6, 1 << 19), (1 << 25, 128, 1 << 19)):
        monkeypatch.setattr(selected, "CHUNK_BYTES", chunk)
        monkeypatch.setattr(selected, "_ITEM_ROWS", item)
        monkeypatch.setattr(selected, "_BATCH", batch)
        found = run("auto")
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(found, run("auto"), strict=True))


@settings(max_examples=10, deadline=None)
@given(cases())
def test_recomputed_branches_aren_t_kept_and_give_the_same(case: Any) -> None:
    spec, lengths, sizes = case
    xs = make(spec, lengths, *sizes)
    cu = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    found, kept = [], []
    for recompute in (False, True):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x) or x, lambda x: x):
            out = nsa_attention(*xs, spec, cu_seqlens=cu, recompute=recompute)
        found.append([out, *torch.autograd.grad(out.square().sum(), xs)])
        kept.append(sum(x.numel() for x in saved))
    assert kept[0] - kept[1] == 3 * found[0][0].numel()
    for name, a, b in zip(("out", *NAMES), *found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("levels", [1, 2])
def test_equal_scores_take_the_lower_block_first(levels: int) -> None:
    """Equal compressed keys make equal probabilities; keys of few values tie in parts."""
    packing = Packing(np.array([0, 150, 333]), spec := NSASpec(8, 4, 8, 5, 1, 2, 20))
    q = torch.ones(333, 4, 2, dtype=torch.float64)
    k = torch.arange(packing.compressed * 2).view(-1, 2, 1).expand(-1, -1, 2) % levels * torch.ones_like(q[:1, :1])
    view = local_views(packing, q.device, 2).compressed
    _, _, picks = compressed_forward(q, k, k, view, spec, 1.0)
    assert torch.equal(picks.long(), reference_selection(q, k, spec, packing, 1.0))
    if levels == 1:  # all alike inside a document: after block 0 those that weigh fully, 1 and 2, are first
        assert picks[149].tolist() == [[0, 1, 2, 17, 18]] * 2


@pytest.mark.parametrize(("heads", "tokens"), [(16, 1500), (8, 1700)])
def test_equal_scores_are_equal_in_float32_wherever_they_lie(heads: int, tokens: int) -> None:
    """A vectorised sum adds a row's last elements in another order than the others."""
    packing = Packing(np.array([0, tokens]), spec := NSASpec())
    q, k = torch.zeros(tokens, heads, 32), torch.randn(packing.compressed, 1, 32)
    view = local_views(packing, q.device).compressed
    found, want = (compressed_forward(*xs, xs[1], view, spec, 1.0)[2] for xs in ((q, k), (q.double(), k.double())))
    assert torch.equal(found, want)


def test_a_batch_is_as_many_sequences() -> None:
    spec = NSASpec(8, 4, 16, 4, 1, 2, 20)
    xs = make(spec, [75], 4, 2, 6, 4, batch=3)
    whole = nsa_attention(*xs, spec)
    for i in range(3):
        alone = nsa_attention(*(x[i : i + 1] for x in xs), spec)
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=1e-12, atol=1e-13)


def test_equal_inputs_give_equal_bits() -> None:
    spec = NSASpec()
    xs = [x.detach().float().requires_grad_() for x in make(spec, [700, 333], 8, 2, 16, 16)]
    cu = torch.tensor([0, 700, 1033], dtype=torch.int32)
    runs = []
    for _ in range(2):
        out = nsa_attention(*xs, spec, cu_seqlens=cu)
        runs.append([out, *torch.autograd.grad(out.square().sum(), xs)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(("dk", "dv"), [(16, 16), (24, 10)])
def test_full_attention_in_parts_that_are_merged(dk: int, dv: int) -> None:
    xs = make(NSASpec(), [97], 6, 2, dk, dv)
    q, k, v = (xs[i][0].detach().requires_grad_() for i in (0, 3, 4))
    scale = dk**-0.5
    wanted = reference_full(q, k, v, Packing(np.array([0, 97]), NSASpec()), scale)
    do = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grads = torch.autograd.grad(wanted, (q, k, v), do)
    # The last 40 queries see the first 57 keys wholly and their own causally.
    last, first = slice(57, 97), slice(0, 57)
    parts = [
        full_forward(q[last], k[rows], v[rows], causal, scale) for rows, causal in ((first, False), (last, True))
    ]
    o, lse = merge(*parts[0], *parts[1])
    torch.testing.assert_close(o, wanted[last], rtol=1e-11, atol=1e-12)
    found = [
        full_backward(do[last], q[last], k[r], v[r], o, lse, c, scale) for r, c in ((first, False), (last, True))
    ]
    torch.testing.assert_close(found[0][0] + found[1][0], grads[0][last], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found[1][1], grads[1][last], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(found[1][2], grads[2][last], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, "backend='cuda': must be one of auto, reference"),
        ({"q": torch.zeros(1, 64, 3, 4)}, "q with H=3 heads: must be a multiple of the G=2 KV heads"),
        ({"k_cmp": torch.zeros(1, 7, 2, 4)}, "k_cmp of shape (1, 7, 2, 4): must be (1, 3, 2, 4)"),
        ({"gates": torch.zeros(1, 64, 4, 2)}, "gates of shape (1, 64, 4, 2): must be (1, 64, 4, 3)"),
        ({"v_win": torch.zeros(1, 64, 2, 4, dtype=torch.float64)}, "v_win of torch.float64"),
        ({"cu_seqlens": torch.tensor([0, 60], dtype=torch.int32)}, "cu_seqlens[-1]=60: must be T=64"),
        ({"cu_seqlens": torch.tensor([0, 64, 64], dtype=torch.int32)}, "cu_seqlens=[0, 64, 64]: must be"),
        ({"q": torch.zeros(64, 4, 4)}, "q of shape (64, 4, 4): must be [B, T, H, Dk]"),
        ({"scale": 0.0}, "scale=0.0: must be a finite number above 0"),
        ({"scale": float("nan")}, "scale=nan: must be a finite number above 0"),
    ],
)
def test_what_cannot_be_served_is_named(change: dict[str, Any], words: str) -> None:
    kv = torch.zeros(1, 64, 2, 4)
    arguments: dict[str, Any] = {"q": torch.zeros(1, 64, 4, 4), "k_cmp": kv[:, :3], "v_cmp": kv[:, :3]}
    arguments |= dict.fromkeys(NAMES[3:7], kv) | {"gates": torch.zeros(1, 64, 4, 3)} | change
    with pytest.raises(ValueError) as error:
        nsa_attention(**arguments, spec=NSASpec())
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_device_without_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="q on meta: must be on cpu or cuda"):
        implementation(torch.empty(1, device="meta"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("select_block", 40, "select_block=40: must be a multiple of compress_stride=16"),
        ("select_count", 2, "select_count=2: must be at least initial_blocks + local_blocks = 3"),
        ("window", 0, "window=0: must be an integer of at least 1"),
        ("local_blocks", 0, "local_blocks=0: must be an integer of at least 1"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(field: str, value: int, words: str) -> None:
    with pytest.raises(ValueError) as error:
        NSASpec(**{field: value})
    assert str(error.value) == words
