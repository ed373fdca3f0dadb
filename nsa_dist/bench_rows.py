"""Rows of the exchanges' benchmarks: bytes by kind as means and maxima over ranks, as shares of the all-gather."""

import json
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from nsa_dist.config import ConfigError
from nsa_dist.kernels.packing import Ints
from nsa_dist.parallel.ledger import FIELDS, KINDS, PHASES, summarise
from nsa_dist.parallel.traffic import Sizes, Traffic

APART = ("parameters", "control")  # kinds that belong to no exchange
Row = dict[str, Any]


def traffic_row(tables: Ints, tokens: int, sizes: Sizes, layers: int = 1) -> Row:
    """Keys `received_bytes_mean`, `_max` and `share_of_allgather`, `_max` (of all kinds together over (P-1) L kv, in
    the forward), the same with `backward_` before them, and `kinds`: each kind's and phase's part.

    tables: [ranks, kinds, phases, fields], as the ledger's `as_table` gives one; of so many layers.
    """
    ranks = len(tables)
    row: Row = {}
    for j, phase in enumerate(PHASES):
        received = np.array([tables[:, i, j, 1] for i, kind in enumerate(KINDS) if kind not in APART]).sum(0)
        element = sizes.element_bytes if phase == "forward" else sizes.grad_bytes
        whole = (ranks - 1) * tokens / ranks * sizes.kv * element * layers
        name = "" if phase == "forward" else "backward_"
        row[f"{name}received_bytes_mean"] = float(received.mean())
        row[f"{name}received_bytes_max"] = int(received.max())
        row[f"{name}share_of_allgather"] = float(received.mean()) / whole if whole else None
        row[f"{name}share_of_allgather_max"] = float(received.max()) / whole if whole else None
    return row | {"kinds": summarise(tables)}


def traffic_tables(traffic: Traffic, ranks: int) -> Ints:
    """The same tables of traffic that is computed, not run."""
    tables = np.zeros((ranks, len(KINDS), len(PHASES), len(FIELDS)), np.int64)
    for (kind, phase), flow in traffic.items():
        tables[:, KINDS.index(kind), PHASES.index(phase)] = flow.T
    return tables


class Rows:
    """Writes a JSON line for each row as soon as it is known; keeps them all. file None: only keeps them."""

    def __init__(self, file: Path | None, flag: str = "--json") -> None:
        self.rows: list[Row] = []
        try:
            self._out: TextIO | None = file.open("w") if file else None
        except OSError as error:
            raise ConfigError(f"{flag} {file}: {error.strerror}; must be a file that can be written") from None

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        if self._out:
            self._out.write(json.dumps(row) + "\n")
            self._out.flush()
        return row
