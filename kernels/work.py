"""Triton: the picks of the selected branch, in the order in which `blocks.py` computes them."""

from dataclasses import dataclass
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_dist.kernels.selected import BlockIndex

_KEYS = 1024  # picks of a program that finds their segments


@dataclass(frozen=True)
class Chunk:
    """Queries [first_query, first_query + queries) of KV heads [first_head, first_head + heads)."""

    number: int
    first_head: int
    heads: int
    first_query: int
    queries: int


@dataclass(frozen=True)
class Work:
    """The picks [G, S, n] in the order in which they are computed.

    A segment is a chunk's queries that picked one block of one KV head; segments are numbered by chunk, KV head of
    the chunk, block. `order [picks]` numbers of picks, by segment; `start [segments + 1]` of each segment in it;
    `item_start` the same in work items, of which a segment has one for each `width` picks; `split_start` in
    work items of segments that have more than one; `segment [items]` of each item; all int32, on the device.
    """

    order: Tensor
    start: Tensor
    item_start: Tensor
    split_start: Tensor
    segment: Tensor
    chunks: list[Chunk]
    queries: int  # of a chunk, at most
    picks: int  # of a chunk, at most
    segments: int  # of a chunk
    width: int
    items: int  # of a chunk, at most
    splits: int


@triton.jit
def key_kernel(
    picks_ptr, begin_ptr, end_ptr, key_ptr, all_picks, all_queries, count, blocks, chunk_queries, parts, chunk_heads,
    segments, total, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each pick's segment; `total`, after all of them, for a pick that is none or of a block without rows."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < all_picks
    pick = tl.load(picks_ptr + i, mask=there, other=-1)
    s, g = i // count % all_queries, i // count // all_queries
    here = pick >= 0
    begin = tl.load(begin_ptr + g * blocks + pick, mask=here, other=0)
    here &= tl.load(end_ptr + g * blocks + pick, mask=here, other=0) > begin
    chunk = g // chunk_heads * parts + s // chunk_queries
    segment = chunk * segments + g % chunk_heads * blocks + pick
    tl.store(key_ptr + i, tl.where(here, segment, total), mask=there)


def make_work(picks_GSn: Tensor, index: BlockIndex, queries: int, heads: int, width: int) -> Work:
    """queries, heads: of a chunk, at most. Raises ValueError where the numbers need more than 32 bits."""
    (groups, s, n), blocks, device = picks_GSn.shape, index.begin_GB.shape[1], picks_GSn.device
    queries, heads = _even(s, queries, 16), _even(groups, heads, 1)
    parts = -(-s // queries)
    chunks = [
        Chunk(i, g, min(heads, groups - g), a, min(queries, s - a))
        for i, (g, a) in enumerate(product(range(0, groups, heads), range(0, s, queries)))
    ]
    segments = heads * blocks
    total = len(chunks) * segments
    if max(total, picks_GSn.numel() + _KEYS) >= 2**31:
        raise ValueError(
            f"picks of shape {(s, groups, n)} over {blocks} blocks: more than 2**31 picks or segments; "
            "fewer queries at a time are allowed"
        )
    key = torch.empty_like(picks_GSn)
    key_kernel[(triton.cdiv(key.numel(), _KEYS),)](
        picks_GSn, index.begin_GB, index.end_GB, key, key.numel(), s, n, blocks, queries, parts, heads, segments,
        total, BLOCK=_KEYS, num_warps=4)  # fmt: skip
    key, order = key.flatten().sort(stable=True)
    start = torch.searchsorted(key, torch.arange(total + 1, device=device, dtype=torch.int32), out_int32=True)
    items_of = (start.diff() + width - 1) // width
    item_start, split_start = _starts(items_of), _starts(items_of.masked_fill(items_of == 1, 0))
    picked = heads * queries * n
    items = picked // width + min(segments, picked)
    numbers = torch.arange(min(len(chunks) * items, total + picks_GSn.numel()), device=device)
    segment = torch.searchsorted(item_start, numbers.int(), right=True, out_int32=True) - 1
    splits = 2 * picked // width + 1
    return Work(
        order.int(), start, item_start, split_start, segment, chunks, queries, picked, segments, width, items, splits
    )


def _even(total: int, most: int, multiple: int) -> int:
    """The size of equal parts of at most `most`, rounded up to a multiple."""
    parts = -(-total // max(1, most))
    return -(-total // (parts * multiple)) * multiple


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
