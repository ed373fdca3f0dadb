"""The ledger: what each rank hands to the collectives, by kind of traffic and phase.

Bytes that a rank keeps for itself are not traffic. What is counted here is the payload; what the wire adds
(headers, a collective's own algorithm) is not.
"""

from dataclasses import dataclass, field

import numpy as np

from nsa_dist.kernels.packing import Ints

KINDS = (
    "compress_halo",  # tokens that a segment's last compressed token is made of
    "window_halo",  # tokens of the windows that reach over a segment's start
    "compressed",  # compressed keys and values
    "span",  # sums of scores that decide what a span of queries is admitted
    "bitmap",  # which rank needs which block
    "selected",  # keys and values of blocks, for the selected branch
    "refetch",  # the same once more in the backward, where they were not kept
    "full_kv",  # keys and values for full attention
    "ulysses",  # everything that moves between a cut by tokens and a cut by heads
    "parameters",  # FSDP2's all-gathers, reduce-scatters and all-reduces
    "control",  # sums of losses, norms and counts
)
PHASES = ("forward", "backward")
FIELDS = ("sent_bytes", "received_bytes", "sent_between_nodes_bytes", "received_between_nodes_bytes")


@dataclass
class Totals:
    """Of one kind and phase on this rank."""

    sent_bytes: int = 0
    received_bytes: int = 0
    sent_between_nodes_bytes: int = 0
    received_between_nodes_bytes: int = 0
    calls: int = 0
    exposed_s: float = 0.0  # the program stood still for so long (measured on CPUs only)


@dataclass
class Ledger:
    """The record of one rank since the last `take`."""

    entries: dict[tuple[str, str], Totals] = field(default_factory=dict)

    def record(
        self, kind: str, phase: str, sent: Ints, received: Ints, other_node: Ints, exposed_s: float = 0.0
    ) -> None:
        """Adds one collective: bytes to and from each rank of its group (own entry 0).

        `other_node [P]` is 1 where that rank is on another node.
        """
        if kind not in KINDS or phase not in PHASES:
            raise ValueError(f"ledger kind {kind!r}, phase {phase!r}: must be one of {KINDS}, {PHASES}")
        totals = self.entries.setdefault((kind, phase), Totals())
        totals.sent_bytes += int(sent.sum())
        totals.received_bytes += int(received.sum())
        totals.sent_between_nodes_bytes += int((sent * other_node).sum())
        totals.received_between_nodes_bytes += int((received * other_node).sum())
        totals.calls += 1
        totals.exposed_s += exposed_s

    def take(self) -> dict[tuple[str, str], Totals]:
        """What was recorded, and starts anew."""
        entries, self.entries = self.entries, {}
        return entries


def as_table(entries: dict[tuple[str, str], Totals]) -> Ints:
    """[kinds, phases, fields] for a collective over ranks."""
    table = np.zeros((len(KINDS), len(PHASES), len(FIELDS)), np.int64)
    for (kind, phase), totals in entries.items():
        table[KINDS.index(kind), PHASES.index(phase)] = [getattr(totals, name) for name in FIELDS]
    return table


def summarise(tables: Ints) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """{kind: {phase: {field: {mean, max}}}} over ranks of tables [ranks, kinds, phases, fields].

    Kinds and phases without traffic are left out.
    """
    result: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for i, kind in enumerate(KINDS):
        for j, phase in enumerate(PHASES):
            cell = tables[:, i, j]
            if cell.any():
                figures = {
                    name: {"mean": float(cell[:, k].mean()), "max": int(cell[:, k].max())}
                    for k, name in enumerate(FIELDS)
                }
                result.setdefault(kind, {})[phase] = figures
    return result
