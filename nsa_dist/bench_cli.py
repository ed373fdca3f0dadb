"""`nsa-dist bench`: its words, checked, to the benchmark that they name."""

import argparse
import itertools
from pathlib import Path
from typing import Any

from nsa_dist.console import Console
from nsa_dist.errors import ConfigError

_GPU_PARTS = ("results", "layer", "longest", "recovery", "recipe", "more")
_KERNELS_EPILOG = """\
examples:
  nsa-dist bench kernels                        8k and 64k tokens at the paper's shape, against full attention
  nsa-dist bench kernels --parts --tokens 65536 --rows rows.jsonl --chart times.png
  nsa-dist bench kernels --kv-heads 64,16,8,4 --tokens 8192,65536,262144 --full-max 1
  nsa-dist bench kernels --draw rows.jsonl --chart times.png"""
_COMM = """\
Runs one attention layer, forward and backward, on N ranks under each exchange: bytes by kind inside and between
nodes, time, time exposed, memory. Ranks are processes of this machine (gloo; NCCL with a GPU for each); under
torchrun those that are there."""
_COMM_EPILOG = """\
examples:
  nsa-dist bench comm --ranks 4 --tokens 8192 --heads 4 --dims 32,32
  nsa-dist bench comm --ranks 8 --layout contiguous,zigzag --selection trained,adversarial --json rows.jsonl
  torchrun --nproc-per-node 8 -m nsa_dist bench comm --tokens 65536 --heads 64 --kv-heads 4
  nsa-dist bench comm --simulate --tokens 65536 --ranks 8,64 --selection trained --trace picks.npz
  nsa-dist bench comm --simulate --tokens 1048576 --ranks 16 --selection random --span 65536 --span-blocks 0.05"""
_GPUS = """\
All that several GPUs of one machine can show, in one command and a bounded time: results against one GPU, a layer
under every exchange, a recipe's step, a rank killed in the middle of a run (under Ray, where it is
installed, and under torchrun)."""
_GPUS_EPILOG = """\
examples:
  nsa-dist bench gpus --json gpus.jsonl --chart gpus.png
  nsa-dist bench gpus --device cpu --gpus 2     the same on gloo, at tiny sizes: shows that it works"""


def add_bench(whats: Any, form: Any) -> None:
    """Adds the parsers of each benchmark; `args.bench(args, console)` runs it."""

    def add(name: str, run: Any, summary: str, **more: Any) -> argparse.ArgumentParser:
        parser = whats.add_parser(name, help=summary, formatter_class=form, **{"description": summary} | more)
        parser.set_defaults(bench=run)
        return parser

    kernels = add("kernels", _kernels, "NSA and full attention on one GPU", epilog=_KERNELS_EPILOG)
    kernels.add_argument("--tokens", default="8192,65536", metavar="T,...", help="lengths (8192,65536)")
    kernels.add_argument("--heads", default="64", metavar="H,...", help="query heads (64)")
    kernels.add_argument("--kv-heads", default="4", metavar="G,...", help="KV heads (4), each with each of --heads")
    kernels.add_argument("--dims", default="192,128", metavar="DK,DV", help="head sizes (192,128)")
    kernels.add_argument("--dtype", default="bfloat16", metavar="TYPE", help="bfloat16, float16 or float32")
    kernels.add_argument("--parts", action="store_true", help="also each branch, on four kinds of selections")
    kernels.add_argument("--full-max", default="131072", metavar="T", help="no full attention above (131072)")
    kernels.add_argument(
        "--rivals", default="all", metavar="R,...", help="NSA of others: names, none, all importable"
    )
    kernels.add_argument(
        "--full", default="all", metavar="F,...", help="full attention: all, none, cudnn, fa2, flex, flash-attn"
    )
    kernels.add_argument(
        "--recompute", action="store_true", help="also with the branches' outputs computed again in the backward"
    )
    kernels.add_argument("--rows", type=Path, metavar="FILE", help="writes a JSON line for each measurement")
    kernels.add_argument("--chart", type=Path, metavar="FILE.png", help="draws time against length")
    kernels.add_argument("--draw", type=Path, metavar="ROWS", help="measures nothing: draws a file of rows (--chart)")
    comm = add("comm", _comm, "every exchange, on several ranks", description=_COMM, epilog=_COMM_EPILOG)
    comm.add_argument("--ranks", default="4", metavar="N,...", help="ranks that share the sequence (4)")
    comm.add_argument("--tokens", default="4096", metavar="T,...", help="lengths (4096)")
    comm.add_argument("--heads", metavar="H", help="query heads (16 times the KV heads)")
    comm.add_argument("--kv-heads", metavar="G", help="KV heads (2, those of the packaged trace)")
    comm.add_argument("--dims", default="192,128", metavar="DK,DV", help="head sizes (192,128)")
    comm.add_argument("--dtype", default="bfloat16", metavar="TYPE", help="bfloat16 or float32")
    comm.add_argument("--layout", default="contiguous", metavar="L,...", help="contiguous, zigzag (contiguous)")
    comm.add_argument("--exchange", default="all", metavar="E,...", help="which ones (all)")
    comm.add_argument("--selection", default="random", metavar="S,...", help="random, trained, adversarial (random)")
    comm.add_argument("--trace", type=Path, metavar="FILE", help=".npz of trained selections (the packaged one)")
    comm.add_argument(
        "--simulate", action="store_true", help="plans and counts without running; any --tokens, --ranks"
    )
    comm.add_argument("--span", metavar="N", help="with --simulate: the span rule, N tokens a span")
    comm.add_argument(
        "--span-blocks", metavar="X", help="its bound: blocks, or below 1 a share of those before a span"
    )
    comm.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda")
    comm.add_argument("--hosts", action="store_true", help="each rank on a host of its own: a network namespace")
    comm.add_argument("--gbit", default="0", metavar="X", help="Gbit/s that a host sends at most (0: no limit)")
    comm.add_argument("--repeats", default="3", metavar="R", help="timed runs; the median counts (3); 0: no times")
    comm.add_argument("--timeout-s", default="600", metavar="S", help="of one exchange's measurement (600)")
    comm.add_argument("--json", type=Path, metavar="FILE", help="writes a JSON line for each measurement")
    gpus = add("gpus", _gpus, "all of it on the GPUs of this machine", description=_GPUS, epilog=_GPUS_EPILOG)
    gpus.add_argument("--gpus", default="0", metavar="N", help="how many at most (all)")
    gpus.add_argument("--device", default="auto", metavar="D", help="auto, cpu, cuda")
    gpus.add_argument("--minutes", default="9", metavar="M", help="time for all of it (9)")
    gpus.add_argument("--parts", default="all", metavar="P,...", help="some of " + ", ".join(_GPU_PARTS) + " (all)")
    gpus.add_argument("--json", type=Path, metavar="FILE", help="writes a JSON line for each measurement")
    gpus.add_argument("--chart", type=Path, metavar="FILE.png", help="draws the times of a layer (needs matplotlib)")


def _kernels(args: argparse.Namespace, console: Console) -> None:
    from nsa_dist.bench_inputs import TYPES, Shape
    from nsa_dist.bench_kernels import bench_kernels, draw, read_rows
    from nsa_dist.bench_rivals import nsa_rivals

    if args.draw and not args.chart:
        raise ConfigError(f"--draw {args.draw}: needs --chart FILE.png")
    dtype = choices("--dtype", args.dtype, TYPES, 1)[0]
    dk, dv = numbers("--dims", args.dims, 2)
    heads_and_groups = itertools.product(numbers("--heads", args.heads), numbers("--kv-heads", args.kv_heads))
    shapes = []
    for heads, groups in heads_and_groups:
        _check_heads(heads, groups)
        shapes += [Shape(t, heads, groups, dk, dv, dtype) for t in numbers("--tokens", args.tokens)]
    longest, rivals, say = numbers("--full-max", args.full_max, 1)[0], nsa_rivals(args.rivals), console.say
    if args.draw:
        rows = read_rows(args.draw)
    else:
        rows = bench_kernels(shapes, say, args.rows, args.parts, longest, rivals, args.full, args.recompute)
    if args.chart:
        draw(rows, args.chart)


def _comm(args: argparse.Namespace, console: Console) -> None:
    from nsa_dist.bench_comm import DTYPES, EXCHANGES, Case, bench_comm
    from nsa_dist.kernels import NSASpec
    from nsa_dist.parallel.layout import LAYOUTS
    from nsa_dist.picks import SELECTIONS, open_trace
    from nsa_dist.simulate import SIMULATED, simulate
    from nsa_dist.traces import NEEDS_64K

    (groups,) = numbers("--kv-heads", args.kv_heads or "2", 1)
    (heads,) = numbers("--heads", args.heads or str(16 * groups), 1)
    dk, dv = numbers("--dims", args.dims, 2)
    _check_heads(heads, groups)
    dtype = choices("--dtype", args.dtype, DTYPES, 1)[0]
    exchanges = choices("--exchange", ",".join(EXCHANGES) if args.exchange == "all" else args.exchange, EXCHANGES)
    device = choices("--device", args.device, ("auto", "cpu", "cuda"), 1)[0]
    selections = choices("--selection", args.selection, SIMULATED if args.simulate else SELECTIONS)
    spec = _span(args)
    bounded = "trained" in selections and not args.simulate
    longest = open_trace(args.trace or NEEDS_64K).tokens if bounded else 0
    cases = []
    for ranks in numbers("--ranks", args.ranks):
        for tokens in numbers("--tokens", args.tokens):
            if bounded and tokens > longest:
                raise ConfigError(
                    f"--tokens {tokens}: must be at most {longest}, the trace's, for --selection trained"
                )
            for layout in choices("--layout", args.layout, LAYOUTS):
                least = (ranks * (2 if layout == "zigzag" else 1) - 1) * NSASpec().select_block + 1
                if tokens < least:
                    raise ConfigError(f"--tokens {tokens}: must be at least {least} for {ranks} ranks, {layout}")
                for selection in selections:
                    cases += [
                        Case(name, ranks, layout, selection, tokens, heads, groups, dk, dv, dtype, args.trace)
                        for name in exchanges
                    ]
    if args.simulate:
        simulate(cases, spec, args.json, console.say)
        return
    gbit = None
    if args.hosts:
        gbit = 0.0 if args.gbit == "0" else float(numbers("--gbit", args.gbit, 1)[0])
    elif args.gbit != "0":
        raise ConfigError(f"--gbit {args.gbit}: needs --hosts")
    repeats = 0 if args.repeats == "0" else numbers("--repeats", args.repeats, 1)[0]
    timeout_s = numbers("--timeout-s", args.timeout_s, 1)[0]
    bench_comm(cases, device, repeats, args.json, console.say, gbit, timeout_s)


def _span(args: argparse.Namespace) -> Any:
    """NSA's sizes with --span and --span-blocks."""
    from nsa_dist.simulate import span_spec

    if (args.span or args.span_blocks) and not args.simulate:
        raise ConfigError(f"--span {args.span}: needs --simulate; a prescribed selection isn't bounded in a real run")
    try:
        blocks = float(args.span_blocks or 0)
    except ValueError:
        raise ConfigError(
            f"--span-blocks {args.span_blocks}: must be a number of blocks, or a share below 1"
        ) from None
    return span_spec(numbers("--span", args.span, 1)[0] if args.span else 0, blocks)


def _gpus(args: argparse.Namespace, console: Console) -> None:
    from nsa_dist.bench_gpus import bench_gpus

    device = choices("--device", args.device, ("auto", "cpu", "cuda"), 1)[0]
    most = 0 if args.gpus == "0" else numbers("--gpus", args.gpus, 1)[0]
    minutes = numbers("--minutes", args.minutes, 1)[0]
    parts = list(_GPU_PARTS) if args.parts == "all" else choices("--parts", args.parts, _GPU_PARTS)
    bench_gpus(device, most, minutes, parts, args.json, args.chart, console.say)


def _check_heads(heads: int, groups: int) -> None:
    if heads % groups:
        raise ConfigError(f"--heads {heads}: must be a multiple of --kv-heads {groups}")


def numbers(flag: str, text: str, count: int = 0) -> list[int]:
    """Positive integers with commas between them, `count` of them (0: any number). Raises ConfigError."""
    words = text.split(",")
    if not all(w.isdecimal() and int(w) > 0 for w in words) or (count and len(words) != count):
        many = (
            ("a positive integer" if count == 1 else f"{count} positive integers") if count else "positive integers"
        )
        raise ConfigError(f"{flag} {text}: must be {many}")
    return [int(w) for w in words]


def choices(flag: str, text: str, allowed: Any, count: int = 0) -> list[str]:
    """Words with commas between them, each one of `allowed`. Raises ConfigError."""
    words = text.split(",")
    if not all(w in allowed for w in words) or (count and len(words) != count):
        raise ConfigError(f"{flag} {text}: must be {'one' if count == 1 else 'some'} of {', '.join(allowed)}")
    return words
