"""`python -m nsa_dist.recall`: a retrieval task under exact NSA, under the span rule, and with random selections.

A sequence's first half holds pairs of a key and one of 16 values, one pair a token; each token of its second half
asks for the value of a key. Only the block that holds the pair can answer: compressed tokens are means of 16 pairs,
and questions are shown to nobody. One NSA layer with projections and gates learns it. It starts with looking for the
asked key; what it makes of it, how sharply, and the gates, it learns. Two kinds of questions:

- `topics`: for a while all questions are about three blocks, then about three others, as text returns to what it
  treats;
- `scattered`: each question is about any pair. No rule that admits few blocks before the questions are known can
  answer these.
"""

import argparse
import json
import time
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from nsa_dist.kernels import NSASpec
from nsa_dist.kernels.compress import compress_mean
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel.exchanges import nsa_exchange
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.mesh import Axis
from nsa_dist.parallel.operator import apply
from nsa_dist.parallel.sequence import ShardedSequence
from nsa_dist.picks import prescribed

VALUES, KEYS, KEY_SIZE = 16, 8192, 96
HEADS, DK, DV = 4, 96, 32
EXACT = NSASpec(16, 8, 32, 6, 1, 1, 32)
TOPIC_BLOCKS, TOPIC_TOKENS = 3, 384


class Recall(nn.Module):
    """One NSA layer from key, value and kind of a token to the value asked for. selection: `nsa` or `random`."""

    def __init__(self, tokens: int, spec: NSASpec, selection: str, device: torch.device) -> None:
        super().__init__()
        packing, axis = (
            Packing(np.array([0, tokens]), spec),
            Axis(cast(dist.ProcessGroup, None), 0, 1, np.zeros(1, np.int64)),
        )
        layout = make_layout("contiguous", tokens, 1, spec.select_block)
        self.sequence = ShardedSequence(packing, layout, axis, device, torch.float32)
        picks = None
        if selection == "random":
            picks = torch.from_numpy(prescribed("random", np.arange(tokens), 1, spec, None)).to(device)
        self.operation = nsa_exchange("nsa", self.sequence, DK**-0.5, picks=picks)
        width = KEY_SIZE + VALUES + 1
        self.register_buffer("keys", F.normalize(torch.randn(KEYS, KEY_SIZE), dim=-1))
        self.query = nn.Linear(width, HEADS * DK, bias=False)
        self.key, self.value = nn.Linear(width, DK, bias=False), nn.Linear(width, DV, bias=False)
        self.gate, self.output = nn.Linear(width, HEADS * 3), nn.Linear(HEADS * DV, VALUES)
        with torch.no_grad():
            self.key.weight.copy_(torch.eye(DK, width))
            self.query.weight.copy_(3 * torch.eye(DK, width).repeat(HEADS, 1))

    def forward(self, key_T: Tensor, value_T: Tensor, asks_T: Tensor) -> Tensor:
        """Logits [T, VALUES]."""
        shown = F.one_hot(value_T, VALUES) * ~asks_T[:, None]
        x = torch.cat([cast(Tensor, self.keys)[key_T] * KEY_SIZE**0.5, shown, asks_T[:, None]], dim=-1)
        q, k, v = self.query(x).view(-1, HEADS, DK), self.key(x)[:, None], self.value(x)[:, None]
        k, v = (part * ~asks_T[:, None, None] for part in (k, v))
        chunks = self.sequence.compress_chunks(1)
        cmp = compress_mean(k, chunks), compress_mean(v, chunks)
        gates = self.gate(x).view(-1, HEADS, 3).sigmoid()
        return self.output(apply(self.operation, q, *cmp, k, v, k, v, gates).flatten(1))


def make_sequence(tokens: int, kind: str, rng: np.random.Generator, device: torch.device) -> tuple[Tensor, ...]:
    """key [T], value [T], asks [T] of one sequence."""
    half, block = tokens // 2, EXACT.select_block
    key, value = rng.permutation(KEYS)[:tokens], rng.integers(0, VALUES, tokens)
    asked = rng.integers(block, half, tokens)  # not in the initial block, which every query sees
    if kind == "topics":
        for start in range(half - int(rng.integers(0, TOPIC_TOKENS)), tokens, TOPIC_TOKENS):
            topic = rng.choice(np.arange(1, half // block), TOPIC_BLOCKS, replace=False)
            at = slice(max(start, half), start + TOPIC_TOKENS)
            asked[at] = rng.choice(topic, len(asked[at])) * block + rng.integers(0, block, len(asked[at]))
    key[half:], value[half:] = key[asked[half:]], value[asked[half:]]
    arrays = key, value, np.arange(tokens) >= half
    return tuple(torch.from_numpy(a).to(device) for a in arrays)


def run(tokens: int, kind: str, spec: NSASpec, selection: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Trains one model; its loss and share of right answers on held-out sequences."""
    torch.manual_seed(0)
    model, rng = Recall(tokens, spec, selection, device).to(device), np.random.default_rng(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    began = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / steps)
        key, value, asks = make_sequence(tokens, kind, rng, device)
        loss = F.cross_entropy(model(key, value, asks)[asks], value[asks])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses, right = [], []
    with torch.no_grad():
        for _ in range(8):
            key, value, asks = make_sequence(tokens, kind, rng, device)
            logits = model(key, value, asks)[asks]
            losses.append(float(F.cross_entropy(logits, value[asks])))
            right.append(float((logits.argmax(-1) == value[asks]).float().mean()))
    row: dict[str, Any] = {"tokens": tokens, "questions": kind, "selection": selection}
    row |= {"span": spec.span, "span_blocks": spec.span_blocks, "span_prefetch": spec.span_prefetch}
    row |= {"steps": steps, "loss": float(np.mean(losses)), "right": float(np.mean(right))}
    return row | {"seconds": time.perf_counter() - began, "device": str(device)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nsa_dist.recall", description=__doc__)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", default="topics,scattered")
    args = parser.parse_args()
    device = torch.device(args.device)
    bound = replace(EXACT, span=128, span_blocks=0.1, span_pool=64)
    runs = [(EXACT, "nsa"), (bound, "nsa"), (replace(bound, span_prefetch=0.5), "nsa")]
    runs += [(EXACT, "random"), (replace(EXACT, select_count=2), "nsa")]  # the last: forced blocks only
    for kind in args.questions.split(","):
        for spec, selection in runs:
            row = run(args.tokens, kind, spec, selection, args.steps, device)
            print(json.dumps(row | {"select_count": spec.select_count}), flush=True)


if __name__ == "__main__":
    main()
