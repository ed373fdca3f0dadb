"""Text tables for a terminal: bytes in one unit, shares, titles over several columns."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

Lines = list[str]


def wrapped(text: str, width: int = 112) -> Lines:
    """Words in lines of at most `width`; a longer word, such as a path, stays whole."""
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


@dataclass(frozen=True)
class Unit:
    """Writes bytes in one unit with a fixed number of digits, the same throughout a table."""

    name: str
    bytes: int
    digits: int

    @staticmethod
    def fitting(values: Iterable[float]) -> "Unit":
        """KiB up to 10,000 of them, then MiB."""
        large = max(values, default=0) >= 10_000 * 1024
        return Unit("MiB", 1 << 20, 3) if large else Unit("KiB", 1 << 10, 2)

    def __call__(self, value: float) -> str:
        return f"{value / self.bytes:,.{self.digits}f}"


def share(value: float, base: float) -> str:
    """`52.2%`; `-` where the base is nothing."""
    return f"{value / base:.1%}" if base else "-"


def table(groups: list[tuple[str, int]], header: Lines, rows: list[Lines], first: int = 0) -> Lines:
    """Lines of a table: the first column, at least `first` wide, to the left, numbers to the right.

    groups: titles over that many columns each. An empty row is an empty line.
    """
    lines = [header, *(row for row in rows if row)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    widths[0] = max(widths[0], first)
    titles, at = [], 0
    for title, span in groups:
        widths[at + span - 1] += max(0, len(title) + 2 - sum(widths[at : at + span]) - 2 * (span - 1))
        width = sum(widths[at : at + span]) + 2 * (span - 1)
        titles.append(f" {title} ".center(width, "-") if span > 1 else title.rjust(width))
        at += span

    def line(cells: Lines) -> str:
        return "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))

    body = ["  " + line(row) if row else "" for row in [header, *rows]]
    return ["  " + "  ".join(titles), body[0].rstrip(), *(text.rstrip() for text in body[1:])]
