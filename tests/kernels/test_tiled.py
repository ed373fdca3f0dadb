"""The two ways in which a tile is computed: separate operations, and on a CPU the FlashAttention of torch."""

import pytest
import torch

from nsa_dist.kernels.tiled import tile_backward, tile_forward, tile_softmax, tile_softmax_backward

G, M, R, N, SCALE = 2, 21, 3, 700, 0.3


@pytest.mark.parametrize(("dk", "dv"), [(6, 4), (5, 9), (16, 16)])
def test_a_tile_is_the_same_in_separate_operations(dk: int, dv: int) -> None:
    generator = torch.Generator().manual_seed(dk)
    shapes = [(G, M, R, dk), (G, N, dk), (G, N, dv), (G, M, R, dv)]
    q, k, v, do = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    mask = torch.rand(M, N, generator=generator) < 0.3
    mask[0], mask[1, :-1], mask[2, 1:] = False, False, False
    for seen in (mask, None):
        o, lse, _ = tile_softmax(q, k, v, seen, SCALE)
        found = tile_forward(q, k, v, seen, SCALE)
        torch.testing.assert_close(list(found), [o, lse], rtol=1e-12, atol=1e-13)
        # As of a softmax over more rows; a query that saw none of these may have seen others.
        whole = torch.logaddexp(lse, torch.zeros_like(lse)) if seen is None else lse
        arguments = do, q, k, v, o, whole
        finite = whole.masked_fill(whole == -torch.inf, 0)
        wanted = tile_softmax_backward(do, q, k, v, (do * o).sum(-1), finite, seen, SCALE)
        torch.testing.assert_close(tile_backward(*arguments, seen, SCALE), wanted, rtol=1e-11, atol=1e-12)
        assert all(x.isfinite().all() for x in wanted)
