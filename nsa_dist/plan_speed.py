"""`python -m nsa_dist.plan_speed`: how long a rank's host takes to plan a layer's block exchange, from the bitmaps.

The selection is random: each rank wants so many of the blocks that it may see. Only numpy runs, on one core: its
time on the processor counts.
"""

import argparse
import statistics
import time

import numpy as np

from nsa_dist.bench_comm import SPEC
from nsa_dist.kernels.packing import Packing
from nsa_dist.parallel import block_plan, needs
from nsa_dist.parallel.layout import make_layout
from nsa_dist.parallel.plan import make_pieces


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nsa_dist.plan_speed", description=__doc__)
    for flag, default, what in (
        ("tokens", 1 << 20, "of the sequence"),
        ("ranks", 64, "that share it"),
        ("kv-heads", 4, ""),
        ("per-node", 8, "ranks of a node; as many as --ranks: one node"),
        ("repeats", 21, "the median counts"),
    ):
        parser.add_argument(f"--{flag}", type=int, default=default, help=f"{what} ({default})")
    parser.add_argument("--union", type=float, default=0.9, help="share of the visible blocks (0.9)")
    args = parser.parse_args()
    packing = Packing(np.array([0, args.tokens]), SPEC)
    nodes = np.arange(args.ranks) // args.per_node
    selected = np.random.default_rng(0).random((args.ranks, args.kv_heads, packing.blocks)) < args.union
    wanted = block_plan.selected_bits(np.packbits(selected, axis=-1))
    for kind in ("contiguous", "zigzag"):
        layout = make_layout(kind, args.tokens, args.ranks, SPEC.select_block)
        pieces = make_pieces(layout, packing, needs.causal(layout, packing))
        for rank in (0, args.ranks // 2, args.ranks - 1):
            times = []
            for _ in range(args.repeats):
                start = time.thread_time()
                plan = block_plan.block_plan(layout, pieces, wanted, rank, args.kv_heads, nodes)
                times.append(time.thread_time() - start)
            rows = plan.buffer.rows
            middle, least = 1e3 * statistics.median(times), 1e3 * min(times)
            print(f"{kind} rank {rank}: {middle:.2f} ms (least {least:.2f}), {rows:,} rows of single KV heads")


if __name__ == "__main__":
    main()
