"""Context-parallel attention against the reference on one rank: outputs, every gradient, and the ledger."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.packing import Packing
from nsa_dist.kernels.reference import reference_attention, reference_full, reference_selection, reference_window
from nsa_dist.parallel.attention import CompressHalo, WindowExchange, pack
from nsa_dist.parallel.exchanges import FULL_EXCHANGES, NSA_EXCHANGES, full_exchange, nsa_exchange
from nsa_dist.parallel.layout import Layout, make_layout
from nsa_dist.parallel.ledger import FIELDS
from nsa_dist.parallel.mesh import make_mesh
from nsa_dist.parallel.operator import apply
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.parallel.traffic import Sizes, TrafficModel
from tests.conftest import run_ranks

SPEC = NSASpec(8, 4, 16, 5, 1, 2, 24)
H, G, DK, DV = 12, 6, 6, 4
CASES = {
    "one document": [0, 200],
    "packed, odd": [0, 1, 32, 95, 96, 201, 209],
    "all shorter than l": [0, 7, 12, 19, 21, 28, 35, 40],
    "long and tail": [0, 150, 151, 187],
}


def layouts(tokens: int, ranks: int) -> dict[str, Layout]:
    rng = np.random.default_rng(tokens)
    cuts = np.sort(rng.integers(0, tokens + 1, 2 * ranks))
    odd = Layout(np.concatenate([[0], cuts, [tokens]]), rng.integers(0, ranks, 2 * ranks + 1), ranks)
    return {"odd cuts": odd} | {kind: make_layout(kind, tokens, ranks, 16) for kind in ("contiguous", "zigzag")}


def inputs(packing: Packing, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    t, c = packing.tokens, packing.compressed
    shapes = [(t, H, DK), (c, G, DK), (c, G, DV), *[(t, G, DK), (t, G, DV)] * 2, (t, H, 3), (t, H, DV)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def reference(kind: str, xs: list[torch.Tensor], packing: Packing) -> list[torch.Tensor]:
    *args, do = [x.clone().requires_grad_() for x in xs]
    scale = DK**-0.5
    if kind == "nsa":
        out = reference_attention(*args, packing=packing, spec=packing.spec, scale=scale)
    elif kind == "window":
        args = [args[0], *args[5:7]]
        out = reference_window(*args, packing, packing.spec.window, scale)
    else:
        args = [args[0], *args[3:5]]
        out = reference_full(*args, packing, scale)
    return [out.detach(), *torch.autograd.grad(out, args, do, allow_unused=True)]


def needed_blocks(picks: torch.Tensor, layout: Layout, blocks: int) -> np.ndarray:
    """[P, G, NB]: the blocks that each rank's queries select, by the reference's choice."""
    bits = np.zeros((layout.ranks, G, blocks), bool)
    for rank, g in itertools.product(range(layout.ranks), range(G)):
        chosen = picks[torch.from_numpy(layout.own(rank)), g]
        bits[rank, g, chosen[chosen >= 0].numpy()] = True
    return bits


class Wire:
    """Stands between the program and torch.distributed, and counts what passes: bytes sent, received."""

    def __init__(self) -> None:
        self.sent = self.received = 0
        name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
        self.whole = dist.all_to_all_single, dist.batch_isend_irecv, getattr(dist, name)
        dist.all_to_all_single, dist.batch_isend_irecv = self.swap, self.peers
        setattr(dist, name, self.gather)

    def swap(self, out, x, receive, send, group, async_op):  # type: ignore[no-untyped-def]
        own = dist.get_rank(group)
        self.sent += sum(len(p) * p[:1].nbytes for i, p in enumerate(x.split(send)) if i != own)
        self.received += sum(len(p) * p[:1].nbytes for i, p in enumerate(out.split(receive)) if i != own)
        return self.whole[0](out, x, receive, send, group=group, async_op=async_op)

    def peers(self, operations):  # type: ignore[no-untyped-def]
        self.sent += sum(o.tensor.nbytes for o in operations if o.op is dist.isend)
        self.received += sum(o.tensor.nbytes for o in operations if o.op is dist.irecv)
        return self.whole[1](operations)

    def gather(self, out, x, group, async_op):  # type: ignore[no-untyped-def]
        self.sent += x.nbytes * (dist.get_world_size(group) - 1)
        self.received += out.nbytes - x.nbytes
        return self.whole[2](out, x, group=group, async_op=async_op)

    def take(self) -> tuple[int, int]:
        counted = self.sent, self.received
        self.sent = self.received = 0
        return counted


Case = tuple[Packing, list[torch.Tensor], dict[str, list[torch.Tensor]], torch.Tensor]


def make_case(cu: list[int]) -> Case:
    """A packing, inputs, what the reference makes of them, and its selection."""
    packing = Packing(np.array(cu), SPEC)
    xs = inputs(packing, len(cu))
    wanted = {kind: reference(kind, xs, packing) for kind in ("nsa", "full", "window")}
    return packing, xs, wanted, reference_selection(xs[0], xs[1], SPEC, packing, DK**-0.5)


def run_cases(ranks: int, cases: dict[str, Case]) -> list[str]:
    """Every case on this rank; what differs, in words."""
    wrong, mesh, wire = [], make_mesh(1, ranks, 0, "cpu"), Wire()
    row_bytes = (DK + DV) * 8
    for name, (packing, xs, wanted, picks) in cases.items():
        for cut, layout in layouts(packing.tokens, ranks).items():
            # With odd cuts on several nodes of two and more ranks, the last one smaller.
            nodes = np.arange(ranks) // (2 if ranks < 6 else 4) * (cut == "odd cuts")
            axis = replace(mesh.cp, nodes=nodes)
            seq = ShardedSequence(packing, layout, axis, torch.device("cpu"), torch.float64)
            model = TrafficModel(packing, layout, Sizes(H, G, DK, DV, 8, 8), nodes)
            bits = needed_blocks(picks, layout, packing.blocks)
            ulysses = G % ranks == 0
            runs = [("nsa", e, 0) for e in NSA_EXCHANGES if e != "ulysses" or ulysses]
            runs += [("nsa", e, 40 * row_bytes) for e in ("nsa", "groupcast")] + [("window", "", 0)]
            runs += [("full", e, 0) for e in FULL_EXCHANGES if e != "ulysses" or ulysses]
            wrong += [
                f"{ranks} ranks, {name}, {cut}, compression: {w}"
                for w in compare_halo(seq, model, pack(*xs[3:5]), wire)
            ]
            for kind, exchange, bound in runs:
                label = f"{ranks} ranks, {name}, {cut}, {kind} {exchange} bound {bound}"
                wrong += [f"{label}: {w}" for w in compare(seq, kind, exchange, bound, xs, wanted[kind])]
                wrong += [f"{label}: {w}" for w in compare_ledger(seq, model, kind, exchange, bound, bits, wire)]
    return wrong


def compare(seq, kind, exchange, bound, xs, wanted):  # type: ignore[no-untyped-def]
    scale = DK**-0.5
    own = torch.from_numpy(seq.tokens), torch.from_numpy(seq.own_compressed)
    if kind == "nsa":
        operation, pick = nsa_exchange(exchange, seq, scale, bound), [0, 1, 2, 3, 4, 5, 6, 7]
    elif kind == "window":
        operation, pick = WindowExchange(seq, scale), [0, 5, 6]
    else:
        operation, pick = full_exchange(exchange, seq, scale), [0, 3, 4]
    rows = [own[1] if i in (1, 2) else own[0] for i in pick]
    local = [xs[i][r].clone().requires_grad_() for i, r in zip(pick, rows, strict=True)]
    seq.axis.ledger.take()
    out = apply(operation, *local)
    grads = torch.autograd.grad(out, local, xs[8][own[0]])
    for i, (got, want, r) in enumerate(zip([out, *grads], wanted, [own[0], *rows], strict=True)):
        expected = torch.zeros_like(got) if want is None else want[r]
        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-11, atol=1e-12):
            yield f"{'out' if i == 0 else f'gradient {i}'} differs by {(got - expected).abs().max()}"


def compare_halo(seq, model, x, wire):  # type: ignore[no-untyped-def]
    """The compression's buffer holds each compressed token's sources; their gradients come home, all of them."""
    wire.take(), seq.axis.ledger.take()
    spec, layout, mine = seq.packing.spec, seq.layout, torch.from_numpy(seq.tokens)
    local = x[mine].clone().requires_grad_()
    buffer = apply(CompressHalo(seq.compress_halo), local)
    starts = seq.packing.cmp_start[seq.own_compressed][:, None] + np.arange(spec.compress_block)
    rows = seq.compress_first[:, None] + np.arange(spec.compress_block)
    if not torch.equal(buffer[rows], x[torch.from_numpy(starts)]):
        yield "sources differ"
    (grad,) = torch.autograd.grad(buffer, local, x[torch.from_numpy(seq.compress_halo.items)])
    holders = np.zeros(seq.packing.tokens)
    for rank in range(layout.ranks):
        sources = seq.packing.cmp_start[seq.cmp_layout.own(rank)][:, None] + np.arange(spec.compress_block)
        holders[np.union1d(layout.own(rank), sources)] += 1
    if not torch.allclose(grad, x[mine] * torch.from_numpy(holders)[mine, None], rtol=1e-12):
        yield "gradients differ"
    yield from compare_traffic(seq, model.compress_halo(), wire)


def over_bound(traffic, bound):  # type: ignore[no-untyped-def]
    return traffic["selected", "forward"][1].max() > bound


def compare_ledger(seq, model, kind, exchange, bound, bits, wire):  # type: ignore[no-untyped-def]
    if kind == "nsa":
        refetched = ("refetch", "backward") in seq.axis.ledger.entries
        traffic = model.nsa(exchange, bits, refetch=refetched)
        always = exchange == "allgather_heads" and seq.axis.size > 1
        assert refetched == (always or (bound > 0 and over_bound(traffic, bound)))
        traffic = {key: value for key, value in traffic.items() if key[0] != "compress_halo"}  # the layer's, before
    else:
        traffic = model.window() if kind == "window" else model.full(exchange)
    yield from compare_traffic(seq, traffic, wire)


def compare_traffic(seq, traffic, wire):  # type: ignore[no-untyped-def]
    """The ledger against the layout's figures, kind by kind, and against what torch.distributed was given."""
    found, rank = seq.axis.ledger.take(), seq.axis.rank
    counted = sum(e.sent_bytes for e in found.values()), sum(e.received_bytes for e in found.values())
    if (passed := wire.take()) != counted:
        yield f"the ledger counts {counted}, torch.distributed was given {passed}"
    for key in traffic.keys() | found.keys():
        planned = traffic.get(key, np.zeros((4, 9), int))[:, rank].tolist()
        entry = found.get(key)
        counted = [getattr(entry, field) if entry else 0 for field in FIELDS]
        if counted != planned:
            yield f"ledger {key} counts {counted}, the layout says {planned}"


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: make_case(cu) for name, cu in CASES.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_every_exchange_equals_the_reference_and_its_ledger_the_layout(ranks: int, cases: dict[str, Case]) -> None:
    wrong = list(itertools.chain.from_iterable(run_ranks(ranks, run_cases, ranks, cases)))
    assert not wrong, f"{len(wrong)} differences:\n" + "\n".join(wrong[:10])
