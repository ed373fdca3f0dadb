"""`python -m nsa_dist.exchange_table DOCUMENT --trace PICKS`: writes the table of the exchanges' bytes.

Simulated (`nsa_dist/simulate.py`) at 64k, 256k and 1M tokens on 4, 8, 16 and 64 ranks, in both layouts. The table
goes between the document's lines `<!-- exchange table -->` and `<!-- end of exchange table -->`.
"""

import argparse
import itertools
from pathlib import Path

from nsa_dist.bench_comm import SPEC, Case
from nsa_dist.bench_rows import Row
from nsa_dist.config import ConfigError
from nsa_dist.simulate import simulate, span_spec

LENGTHS = (1 << 16, 1 << 18, 1 << 20)
RANKS = (4, 8, 16, 64)
SHARE = 0.1  # of the blocks before a span, in the bounded column
_MARKS = "<!-- exchange table -->", "<!-- end of exchange table -->"
_HEADS = ("nsa", "nsa, a tenth", "kept", "groupcast", "allgather", "allgather_heads", "ring")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nsa_dist.exchange_table", description=__doc__)
    parser.add_argument("document", type=Path)
    parser.add_argument("--trace", type=Path, required=True, help=".npz of a trained model's picks, 65,536 tokens")
    parser.add_argument("--kv-heads", type=int, default=2, help="those of the trace (2)")
    args = parser.parse_args()
    before, mark, rest = args.document.read_text().partition(_MARKS[0])
    if not mark or _MARKS[1] not in rest:
        raise ConfigError(f"{args.document}: must hold the lines {_MARKS[0]} and {_MARKS[1]}")
    lines = table(args.trace, args.kv_heads)
    args.document.write_text("\n".join([before + mark, *lines, _MARKS[1] + rest.partition(_MARKS[1])[2]]))


def table(trace: Path, groups: int) -> list[str]:
    """Lines of two tables, forward and backward, and what stands out."""
    found: dict[tuple[int, str, str, int], list[Row]] = {}
    for tokens in LENGTHS:
        for selection in ("trained" if tokens == LENGTHS[0] else "stretched", "random", "adversarial"):
            for layout, ranks in itertools.product(("contiguous", "zigzag"), RANKS):
                key = tokens, selection, layout, ranks
                found[key] = _rows(*key, trace, groups)
                print(*key, flush=True)
    worst = [
        max(rows[0][name] - rows[2][name] for rows in found.values())
        for name in ("share_of_allgather", "share_of_allgather_max")
    ]
    lines = [
        "",
        f"Exact NSA against the group cast, forward, over all rows below: at most {100 * worst[0]:+.1f} points of "
        f"the all-gather in the mean, {100 * worst[1]:+.1f} in the maximum.",
    ]
    for prefix, title in (("", "Forward"), ("backward_", "Backward")):
        lines += ["", f"{title}: received by a rank, % of the full-KV all-gather, mean / maximum over ranks.", ""]
        lines += ["| tokens | selection | layout | ranks | " + " | ".join(_HEADS) + " |", "|" + "---|" * 11]
        lines += [_line(key, rows, prefix) for key, rows in found.items()]
    return [*lines, ""]


def _rows(tokens: int, selection: str, layout: str, ranks: int, trace: Path, groups: int) -> list[Row]:
    """Of exact NSA, of NSA with the rule (a span is a segment), of the rivals."""
    cases = [
        Case(name, ranks, layout, selection, tokens, 16 * groups, groups, 192, 128, "bfloat16", trace)
        for name in ("nsa", "groupcast", "allgather", "allgather_heads", "ring")
    ]
    span = tokens // ranks // (2 if layout == "zigzag" else 1)
    exact, *rivals = simulate(cases, SPEC, None, _quiet)
    return [exact, simulate(cases[:1], span_spec(span, SHARE), None, _quiet)[0], *rivals]


def _quiet(text: str) -> None:
    """The table says it."""


def _line(key: tuple[int, str, str, int], rows: list[Row], prefix: str) -> str:
    tokens, selection, layout, ranks = key
    cells = [_cell(row, prefix) for row in rows]
    cells.insert(2, f"{rows[1]['kept_picks']:.0%}")
    return f"| {tokens // 1024}k | {selection} | {layout} | {ranks} | " + " | ".join(cells) + " |"


def _cell(row: Row, prefix: str) -> str:
    return " / ".join(f"{100 * row[f'{prefix}share_of_allgather{end}']:.1f}" for end in ("", "_max"))


if __name__ == "__main__":
    main()
