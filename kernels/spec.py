"""NSASpec: the sizes that define NSA (arXiv 2502.11089, section 3.3)."""

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class NSASpec:
    """Sizes of one NSA layer, in tokens and blocks.

    compress_block (l) tokens make a compressed token, one every compress_stride (d) tokens; a query selects
    select_count (n) blocks of select_block (lp) tokens, among them the first initial_blocks and the last
    local_blocks up to its own; the window reaches over `window` (w) tokens, the query's own included.

    span: 0, or the tokens of a span, counted in each document: outside its span a query then chooses only among
    the forced blocks and those that `kernels/span.py` admits for all queries of the span, at most span_blocks (a
    number of blocks; below 1 a share of the blocks before the span). span_prefetch of them (up to 1 a share of
    span_blocks; above, a number) are known before the span starts, by the scores of the span_pool queries before.

    Raises ValueError naming field, value and what is allowed.
    """

    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_count: int = 16
    initial_blocks: int = 1
    local_blocks: int = 2
    window: int = 512
    span: int = 0
    span_blocks: float = 0
    span_prefetch: float = 1.0
    span_pool: int = 1024

    def __post_init__(self) -> None:
        least = {"initial_blocks": 0, "span": 0}
        for f in fields(self):
            if f.name in ("span_blocks", "span_prefetch"):
                continue
            value = getattr(self, f.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least.get(f.name, 1):
                raise ValueError(f"{f.name}={value!r}: must be an integer of at least {least.get(f.name, 1)}")
        for name in ("compress_block", "select_block"):
            value = getattr(self, name)
            if value % self.compress_stride:
                raise ValueError(f"{name}={value}: must be a multiple of compress_stride={self.compress_stride}")
        forced = self.initial_blocks + self.local_blocks
        if self.select_count < forced:
            raise ValueError(
                f"select_count={self.select_count}: must be at least initial_blocks + local_blocks = {forced}"
            )
        self._check_span()

    def admissions(self, before: int) -> tuple[int, int]:
        """Of a span that `before` of its document's blocks precede: how many of them are admitted to it, and how
        many of those before its first query. A share rounds up: a whole block is the least."""
        bound = self.span_blocks if self.span_blocks >= 1 else math.ceil(before * self.span_blocks - 1e-6)
        budget = int(min(bound, max(before - self.initial_blocks, 0)))
        share = self.span_prefetch <= 1
        ahead = math.ceil(budget * self.span_prefetch - 1e-6) if share else self.span_prefetch
        return budget, int(min(ahead, budget))

    def _check_span(self) -> None:
        span, bound, prefetch = self.span, self.span_blocks, self.span_prefetch
        for name, value in (("span_blocks", bound), ("span_prefetch", prefetch)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**31:
                raise ValueError(f"{name}={value!r}: must be a number of blocks or a share, 0 or more")
            if value > 1 and value != int(value):
                raise ValueError(f"{name}={value!r}: must be a share up to 1, or a whole number of blocks")
        if not span and bound:
            raise ValueError(f"span_blocks={bound!r}: must be 0 without a span, or span at least select_block")
        if span and span < self.select_block:
            raise ValueError(f"span={span}: must be 0 or at least one block, select_block={self.select_block}")
        if span and not bound:
            raise ValueError(f"span_blocks={bound!r}: must be at least one block, or a share above 0 and below 1")
        if 1 <= bound < prefetch:
            raise ValueError(f"span_prefetch={prefetch!r}: must be at most span_blocks={bound!r}")
