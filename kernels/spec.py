"""NSASpec: the sizes that define NSA (arXiv 2502.11089, section 3.3)."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class NSASpec:
    """Sizes of one NSA layer, in tokens and blocks.

    compress_block (l) tokens make a compressed token, one every compress_stride (d) tokens; a query selects
    select_count (n) blocks of select_block (lp) tokens, among them the first initial_blocks and the last
    local_blocks up to its own; the window reaches over `window` (w) tokens, the query's own included.

    Raises ValueError naming field, value and what is allowed.
    """

    compress_block: int = 32
    compress_stride: int = 16
    select_block: int = 64
    select_count: int = 16
    initial_blocks: int = 1
    local_blocks: int = 2
    window: int = 512

    def __post_init__(self) -> None:
        least = {"initial_blocks": 0}
        for f in fields(self):
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
