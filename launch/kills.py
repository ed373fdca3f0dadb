"""Kills at random moments of one long run, and whether its losses are those of a run without them.

`python -m nsa_dist.launch.kills CONFIG [key=value …] --kills 50`. On two CPU ranks of a cluster of two Ray nodes on
this machine, four steps for each kill. Strikes a rank, all ranks, a rank that then hangs, the process that ranks are
forked from, or (four times at most) the launcher; also while the run is starting again.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from nsa_dist.checkpoint import checkpoints, verify
from nsa_dist.config import check_config, load_config
from nsa_dist.launch.cluster import running_cluster
from nsa_dist.launch.drill_run import DrillRun
from nsa_dist.launch.package import absolute

_LAUNCHERS = 4  # it is started again five times


def main(words: list[str]) -> int:
    """0 where all losses are equal to the bit and every checkpoint that is left is whole."""
    parser = argparse.ArgumentParser(prog="python -m nsa_dist.launch.kills", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_intermixed_args(words)
    config = absolute(load_config(args.config, args.words))
    train = replace(config.train, steps=4 * args.kills + 20, checkpoint_every=3, validate_every=0)
    train = replace(train, validation_sequences=0, keep_checkpoints=3)
    launch = replace(config.launch, device="cpu", heartbeat_s=min(config.launch.heartbeat_s, 15), max_failures=10_000)
    parallel = replace(config.parallel, dp=1, cp=2)
    config = replace(config, train=train, launch=launch, parallel=parallel)
    with tempfile.TemporaryDirectory(prefix="nsa-kills-") as folder, running_cluster(2) as cluster:

        def run(name: str) -> DrillRun:
            here = replace(config, run=replace(config.run, dir=f"{folder}/{name}", store=""))
            return DrillRun(cluster, check_config(here), limit_s=7200)

        quiet = run("undisturbed")
        quiet.finish()
        struck = run("struck")
        try:
            counts = _strike(struck, args.kills, random.Random(args.seed))
            struck.finish()
        finally:
            struck.close()
        left = checkpoints(struck.dir)
        for path in left:
            verify(path)
        recoveries = struck.events("recovery")
        lost = sum(row["steps_lost"] for row in recoveries)
        equal = struck.losses() == quiet.losses()
        facts = {"kills": sum(counts.values()), "by_kind": dict(counts), "steps": train.steps, "steps_lost": lost}
        facts |= {"recoveries": len(recoveries), "checkpoints": len(left), "losses_equal": equal}
        print(json.dumps(facts))
        return 0 if equal else 1


def _strike(run: DrillRun, kills: int, chance: random.Random) -> Counter[str]:
    """So many blows, each some tenths of a second to some seconds after the one before, while the run goes on."""
    counts: Counter[str] = Counter()
    done = 0
    while sum(counts.values()) < kills and run.process.poll() is None:
        kind = chance.choices(["rank", "all ranks", "hang", "forker", "launcher"], [60, 15, 10, 10, 5])[0]
        if kind == "launcher" and counts[kind] >= _LAUNCHERS:
            continue
        time.sleep(chance.uniform(0.0, 4.0))
        ranks = run.events("ranks")
        # A blow in three falls on a run that is starting again; else it would never come to its end.
        if not ranks or (max(run.losses(), default=0) <= done and chance.random() < 0.7):
            continue
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError):
            _blow(run, kind, [int(row["pid"]) for row in ranks[-1]["ranks"]], chance)
            counts[kind] += 1
            done = max(run.losses(), default=0)
            print(f"{sum(counts.values())}: {kind}, after step {done}", file=sys.stderr, flush=True)
    return counts


def _blow(run: DrillRun, kind: str, pids: list[int], chance: random.Random) -> None:
    if kind == "launcher":
        os.kill(run.launcher(), signal.SIGKILL)
        return
    if kind == "forker":
        stat = Path(f"/proc/{chance.choice(pids)}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        return
    for pid in pids if kind == "all ranks" else [chance.choice(pids)]:
        if b"nsa_dist.launch.forker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            raise ProcessLookupError(pid)
        os.kill(pid, signal.SIGSTOP if kind == "hang" else signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
