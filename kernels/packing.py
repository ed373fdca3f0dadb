"""Where documents, compressed tokens and selection blocks lie in one packed sequence.

Tables on the host (numpy, int64), made once for a sequence and used by every layer. Compressed tokens and
blocks are numbered document after document (DESIGN section 2, packed documents).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nsa_dist.kernels.spec import NSASpec

Ints = NDArray[np.int64]


def on_device(table: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Without waiting for the device, as a copy of pageable memory would, for all that it still has to do."""
    on_host = torch.from_numpy(table)
    return (on_host.pin_memory() if device.type == "cuda" else on_host).to(device, non_blocking=True)


class Packing:
    """Tables of one packed sequence of `tokens` tokens.

    `cu [documents + 1]` token at which each document starts; `cmp_cu`, `blk_cu [documents + 1]` the same in
    compressed tokens and in blocks; `cmp_start [C]` first source token of each compressed token;
    `blk_start`, `blk_end [NB]` tokens of each block (a document's last block may be short).
    """

    def __init__(self, cu_seqlens: Ints, spec: NSASpec) -> None:
        self.spec = spec
        self.cu: Ints = np.asarray(cu_seqlens, dtype=np.int64)
        lengths = np.diff(self.cu)
        if self.cu.ndim != 1 or len(self.cu) < 1 or self.cu[0] != 0 or (lengths < 1).any():
            raise ValueError(
                f"cu_seqlens={self.cu.tolist()[:8]}: must be [documents + 1], start at 0 and rise strictly"
            )
        self.tokens = int(self.cu[-1])
        l, d, lp = spec.compress_block, spec.compress_stride, spec.select_block
        counts = np.where(lengths >= l, (lengths - l) // d + 1, 0)
        self.cmp_cu = _cumulative(counts)
        self.cmp_start: Ints = _within(counts) * d + np.repeat(self.cu[:-1], counts)
        blocks = -(-lengths // lp)
        self.blk_cu = _cumulative(blocks)
        self.blk_start: Ints = _within(blocks) * lp + np.repeat(self.cu[:-1], blocks)
        self.blk_end: Ints = np.minimum(self.blk_start + lp, np.repeat(self.cu[1:], blocks))

    @property
    def compressed(self) -> int:
        """C: compressed tokens of all documents."""
        return int(self.cmp_cu[-1])

    @property
    def blocks(self) -> int:
        """NB: selection blocks of all documents."""
        return int(self.blk_cu[-1])

    def document(self, tokens: Ints) -> Ints:
        """The document of each token."""
        return np.searchsorted(self.cu, tokens, side="right") - 1

    def position(self, tokens: Ints) -> Ints:
        """Each token's position inside its document."""
        return tokens - self.cu[self.document(tokens)]

    def visible_compressed(self, tokens: Ints) -> tuple[Ints, Ints]:
        """For each query the compressed tokens [first, end) that it sees: those with i*d + l - 1 <= t."""
        document = self.document(tokens)
        position = tokens - self.cu[document]
        count = (position + 1 - self.spec.compress_block) // self.spec.compress_stride + 1
        first = self.cmp_cu[document]
        return first, first + np.maximum(count, 0)

    def block(self, tokens: Ints) -> Ints:
        """The block in which each token lies."""
        document = self.document(tokens)
        return self.blk_cu[document] + (tokens - self.cu[document]) // self.spec.select_block


def overlap_weights(spec: NSASpec) -> list[int]:
    """Tokens that compressed token `j*lp/d - (l/d - 1) + o` shares with block j, over d, for o = 0, 1, …

    Equation 9 of the paper with its indices read from 1: for 32/16/64 the weights are 1, 2, 2, 2, 1.
    """
    l, d, lp = spec.compress_block, spec.compress_stride, spec.select_block
    first = -(l // d - 1)
    starts = [(first + o) * d for o in range(lp // d + l // d - 1)]
    return [(min(s + l, lp) - max(s, 0)) // d for s in starts]


def _cumulative(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _within(counts: Ints) -> Ints:
    """0, 1, … counts[0] - 1, 0, 1, … counts[1] - 1, …"""
    starts = np.cumsum(counts) - counts
    return np.arange(counts.sum(), dtype=np.int64) - np.repeat(starts, counts)
