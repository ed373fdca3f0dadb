"""The command line: words to a checked configuration, a launcher to run it, and an exit status.

Exit status: 0 done, 1 a run that failed, 2 bad input, 130 after Ctrl-C, 143 after SIGTERM. Heavy imports wait
until a command needs them: help is quick.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from nsa_dist import __version__
from nsa_dist.bench_cli import add_bench
from nsa_dist.console import Console
from nsa_dist.launch.commands import add_commands, add_job_command
from nsa_dist.stop import Stopped, Terminated

_EPILOG = """\
examples:
  nsa-dist train                                a small model on the text of Python's library, in minutes
  nsa-dist train configs/cpu-demo.yaml train.steps=20 run.dir=runs/short
  nsa-dist report runs/cpu-demo                 what the run did and what it sent, against every rival
  torchrun --nproc-per-node=8 -m nsa_dist train my.yaml parallel.cp=8
  nsa-dist submit my.yaml parallel.dp=auto parallel.cp=auto --address http://head:8265

Settings are key=value, e.g. parallel.cp=4 or 'model.attention=[nsa,full]'; they win over the recipe.
All keys with their values are in the config.yaml that a run leaves."""
_TRAIN = """\
Trains on this machine, in parallel.dp x parallel.cp processes. The run's folder (run.dir) then holds
config.yaml, metrics.jsonl, events.jsonl, checkpoints and logs; the same command goes on where it ended.
Ctrl-C or SIGTERM ends it after its step, with a checkpoint; a second one at once.
Under torchrun the processes that are there are used."""
_TRAIN_EPILOG = """\
examples:
  nsa-dist train                                the recipe cpu-demo: no GPU, no download
  nsa-dist train run.dir=runs/zigzag parallel.layout=zigzag
  nsa-dist train my.yaml data.source=corpus.jsonl data.seq_len=65536 parallel.cp=8"""
_PREPARE_EPILOG = """\
examples:
  nsa-dist prepare configs/cpu-demo.yaml
  nsa-dist prepare my.yaml data.source=corpus.jsonl data.tokenizer=tokenizer.json"""


_PLAN = {
    "description": """\
Without running it: bytes by kind, memory of a GPU by part, a step's time with what is hidden and exposed; and which
choices of cp, dp, layout and checkpointing fit the cluster. Rates are those that are reached.""",
    "epilog": """\
examples:
  nsa-dist plan my.yaml --gpus 64 --union 0.9
  nsa-dist plan my.yaml data.seq_len=1048576 --gpus 1024 --trace picks.npz --json plan.json
  nsa-dist plan my.yaml --run runs/short --cluster h100 --between-gb-s 20""",
}
_CLUSTER = {
    "--gpus": "GPUs in all (dp x cp of the configuration; a node's where they are auto)",
    "--per-node": "GPUs of a node",
    "--memory-gb": "memory of a GPU",
    "--tflops": "TFLOP/s of a GPU in matrix products",
    "--attention-tflops": "TFLOP/s of a GPU in attention",
    "--inside-gb-s": "GB/s that a GPU receives inside a node",
    "--between-gb-s": "GB/s that a GPU receives from other nodes",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; its exit status. Errors are one line on stderr."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    if any("=" not in word or word.startswith("-") for word in more) or (more and "words" not in args):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if more:  # settings behind an option
        args.words += more
    from nsa_dist.errors import ConfigError
    from nsa_dist.process import RunFailed, under_torchrun

    torchrun = under_torchrun(os.environ)
    try:
        with _sigterm_raises(not torchrun):
            args.command(args)
    except ConfigError as error:
        if not torchrun or os.environ["RANK"] == "0":  # the other ranks have found the same
            _complain(str(error))
        return 2
    except RunFailed as error:
        _complain(str(error))
        return 2 if error.bad_input else 1
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except Terminated:
        _complain("terminated")
        return 143
    except Stopped as stopped:
        if not torchrun or os.environ["RANK"] == "0":
            _complain(str(stopped))
        return 128 + stopped.number
    return 0


def _complain(text: str) -> None:
    print(f"nsa-dist: error: {text}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nsa-dist: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="nsa-dist",
        description="Trains language models on long sequences with Native Sparse Attention over many GPUs.",
        epilog=_EPILOG,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"nsa-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., None], summary: str, **more: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=summary, formatter_class=raw, **{"description": summary} | more)
        made.set_defaults(command=run)
        return made

    train = command("train", _train, "trains a model", description=_TRAIN, epilog=_TRAIN_EPILOG)
    prepare = command("prepare", _prepare, "turns text into token files, once", epilog=_PREPARE_EPILOG)
    for parent in (train, prepare):
        parent.add_argument(
            "words",
            nargs="*",
            metavar="[CONFIG] key=value",
            help="a recipe (YAML; none: the recipe cpu-demo), then settings that win over it",
        )
    report = command("report", _report, "prints what a run did and what it sent, against every rival")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="a run's folder (run.dir)")
    report.add_argument("--picture", type=Path, metavar="FILE.png", help="also draws losses and bytes received")
    planner = command("plan", _plan, "predicts bytes, memory and time on a cluster", **_PLAN)
    planner.add_argument("words", nargs="*", metavar="[CONFIG] key=value", help="as `train` takes them")
    planner.add_argument("--cluster", default="h200", metavar="NAME", help="h200, h100, a100 or b200 (h200), with")
    for flag, what in _CLUSTER.items():
        planner.add_argument(flag, metavar="X", help=what)
    planner.add_argument("--trace", type=Path, metavar="FILE", help="measured selections: .npz of picks or needs")
    planner.add_argument("--run", type=Path, metavar="RUN_DIR", help="measured selections: a run's metrics")
    planner.add_argument("--union", metavar="X", help="stated: share of the visible KV that a rank fetches")
    planner.add_argument("--top", default="10", metavar="N", help="choices that are listed (10)")
    planner.add_argument("--json", type=Path, metavar="FILE", help="writes it all, every choice too")
    bench = command("bench", _bench, "measures kernels and exchanges against their rivals")
    add_bench(bench.add_subparsers(title="what", metavar="WHAT", required=True), raw)
    add_commands(command, _load)
    add_job_command(commands)
    return parser


def _bench(args: argparse.Namespace) -> None:
    args.bench(args, Console())


def _train(args: argparse.Namespace) -> None:
    from nsa_dist.auto import has_auto
    from nsa_dist.errors import ConfigError
    from nsa_dist.process import under_torchrun
    from nsa_dist.torchrun import train_torchrun

    config, console = _load(args.words), Console()
    if under_torchrun(os.environ):
        train_torchrun(config, console)
        return
    if config.launch.backend == "torchrun":
        ranks = "N" if has_auto(config) else config.parallel.dp * config.parallel.cp
        words = " ".join(args.words)
        raise ConfigError(
            f"launch.backend=torchrun: this process wasn't started by torchrun; allowed: launch.backend=ray, or "
            f"torchrun --nproc-per-node={ranks} -m nsa_dist train {words}".rstrip()
        )
    if find_spec("ray") is None:
        raise ConfigError("launch.backend=ray: Ray isn't installed; allowed: pip install ray, or torchrun")
    from nsa_dist.launch.local import train_local

    train_local(config, console)


def _prepare(args: argparse.Namespace) -> None:
    from nsa_dist.data import prepare_all

    prepare_all(_load(args.words).data, Console().say)


def _report(args: argparse.Namespace) -> None:
    from nsa_dist.report import report

    report(args.run_dir, Console().say, args.picture)


def _plan(args: argparse.Namespace) -> None:
    from nsa_dist.auto import has_auto
    from nsa_dist.bench_cli import numbers
    from nsa_dist.cluster import make_cluster
    from nsa_dist.errors import ConfigError
    from nsa_dist.plan_text import plan

    config = _load(args.words)
    fields = {flag: flag[2:].replace("-", "_") for flag in _CLUSTER}
    given = {field: getattr(args, field) for field in fields.values() if getattr(args, field) is not None}
    if not has_auto(config):
        given = {"gpus": str(config.parallel.dp * config.parallel.cp)} | given
    cluster = make_cluster(args.cluster, given)
    try:
        union = None if args.union is None else float(args.union)
    except ValueError:
        raise ConfigError(f"--union {args.union}: must be a share above 0, at most 1") from None
    plan(config, cluster, (args.trace, args.run, union), args.json, numbers("--top", args.top, 1)[0], Console().say)


def _load(words: list[str]) -> Any:
    """The configuration that the words say: a recipe first, unless the first word is a setting already."""
    from nsa_dist.config import load_config

    if words and ("=" not in words[0] or Path(words[0]).is_file()):
        return load_config(words[0], words[1:])
    return load_config(str(files("nsa_dist") / "configs" / "cpu-demo.yaml"), words)


@contextmanager
def _sigterm_raises(wanted: bool) -> Iterator[None]:
    """Not under torchrun: a rank that waits in a collective would never see the exception."""
    if not wanted:
        yield
        return

    def handler(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
