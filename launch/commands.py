"""The commands that speak with a Ray cluster: submit, status, logs, stop, list, cluster. Loads Ray when one runs."""

import argparse
import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from nsa_dist.console import Console

Command = Callable[..., argparse.ArgumentParser]

_SUBMIT = """\
Trains on a Ray cluster: sends this package, the configuration and the data that it names by relative paths,
and returns once the cluster has checked every node and has room. Nothing is started where it can't run.
The run's name is the last part of run.dir."""
_CLUSTER = """\
up starts a Ray cluster on this machine, which listens on 127.0.0.1 alone and asks for a token; the other
commands find it, token included. down ends it. For several machines: docs/cluster.md."""


_DRILL = """\
Starts a cluster of two Ray nodes on this machine, trains a few steps of the configuration on two CPU ranks, once
for each failure, makes it happen, and prints when it was seen, when the run trained again, how many steps were
lost, and whether the losses are those of a run without failure. Exit status 1 where one is not recovered."""


def add_commands(command: Command, load: Callable[[list[str]], Any]) -> None:
    """Adds the commands; `load` makes a configuration of words."""
    command = _needing_ray(command)
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="prints JSON")
    to_jobs = argparse.ArgumentParser(add_help=False, parents=[as_json])
    to_jobs.add_argument("--address", metavar="URL", help="http://HOST:8265 (none: the one that cluster up started)")

    submit = command(
        "submit",
        lambda args: _submit(args, load(args.words)),
        "trains on a Ray cluster",
        description=_SUBMIT,
        parents=[to_jobs],
    )
    submit.add_argument("words", nargs="*", metavar="[CONFIG] key=value", help="as those of train")
    submit.add_argument("--wait", action="store_true", help="waits in the cluster until it is large enough")
    for name, run, summary in (
        ("status", _status, "what a submitted run does"),
        ("logs", _logs, "what a submitted run has said"),
        ("stop", _stop, "ends a submitted run after its step, with a checkpoint"),
    ):
        parser = command(name, run, summary, parents=[to_jobs])
        parser.add_argument("run", metavar="RUN", help="its name (the last part of run.dir), or its job's id")
        if name == "logs":
            parser.add_argument("-f", "--follow", action="store_true", help="on until its end, with its exit status")
    command("list", _list, "the submitted runs of a cluster", parents=[to_jobs])

    cluster = command("cluster", _cluster, "a Ray cluster on this machine", description=_CLUSTER, parents=[as_json])
    cluster.add_argument("what", choices=["up", "down"])
    cluster.add_argument("--nodes", type=_positive, default=1, metavar="N", help="nodes that share this machine (1)")
    cluster.add_argument(
        "--cpus", type=_positive, metavar="N", help="places of a node (the cores, dealt to the nodes)"
    )

    drill = command(
        "drill",
        lambda args: _drill(args, load),
        "failures on purpose, on a cluster of this machine",
        description=_DRILL,
    )
    drill.add_argument("words", nargs="*", metavar="[CONFIG] key=value", help="as those of train")
    drill.add_argument("--list", action="store_true", help="the failures' names")
    drill.add_argument("--only", action="append", metavar="NAME", help="this failure (again: more of them)")
    drill.add_argument("--rival", action="store_true", help="two of them under Ray Train V2, too (ray[train])")
    drill.add_argument("--json", metavar="FILE", help="writes the table's rows there")
    drill.add_argument("--folder", metavar="DIR", help="keeps the runs there (else they are removed)")


def add_job_command(commands: Any) -> None:
    """What a submitted job runs in the cluster; help doesn't list it."""
    parser = commands.add_parser("job")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.set_defaults(command=_job)


def _needing_ray(command: Command) -> Command:
    def checked(name: str, run: Callable[..., None], summary: str, **more: Any) -> argparse.ArgumentParser:
        def run_with_ray(args: argparse.Namespace) -> None:
            if find_spec("ray") is None:
                from nsa_dist.config import ConfigError

                raise ConfigError(f"{name}: Ray isn't installed; must be (pip install 'ray[default]')")
            run(args)

        return command(name, run_with_ray, summary, **more)

    return checked


def _submit(args: argparse.Namespace, config: Any) -> None:
    from nsa_dist.launch.jobs import Jobs

    jobs, lines = Jobs(args.address), list[str]()
    job = jobs.submit(config, args.wait, lines.append if args.json else Console().say)
    facts = jobs.facts(job)
    _show(args, facts | {"said": lines}, f"job {facts['job']}; nsa-dist logs -f {facts['run']}")


def _status(args: argparse.Namespace) -> None:
    from nsa_dist.launch.jobs import Jobs

    jobs = Jobs(args.address)
    facts = jobs.facts(jobs.find(args.run))
    _show(args, facts, "\n".join(f"{name:<12}{value}" for name, value in facts.items()))


def _list(args: argparse.Namespace) -> None:
    from nsa_dist.launch.jobs import Jobs

    jobs = Jobs(args.address)
    every = [jobs.facts(job) for job in jobs.every()]
    lines = [f"{f['job']:<24}{f['state']:<11}{f['seconds']:>9.0f} s  {f['last_line']}" for f in every]
    _show(args, every, "\n".join(lines) or f"no runs at {jobs.address}")


def _logs(args: argparse.Namespace) -> None:
    from nsa_dist.launch.jobs import Jobs

    jobs, console = Jobs(args.address), Console()
    job = jobs.find(args.run)
    for part in jobs.follow(job) if args.follow else [jobs.logs(job)]:
        for line in part.splitlines():
            console.say(json.dumps({"job": job.id, "line": line}) if args.json else line)
    facts = jobs.facts(jobs.find(job.id))
    if args.follow and facts["state"] != "SUCCEEDED":  # its last line has said why
        raise SystemExit(1)


def _stop(args: argparse.Namespace) -> None:
    from nsa_dist.launch.jobs import Jobs

    jobs = Jobs(args.address)
    facts = jobs.facts(jobs.stop(jobs.find(args.run)))
    _show(args, facts, f"job {facts['job']}: {facts['state']}; {facts['last_line']}")


def _cluster(args: argparse.Namespace) -> None:
    from nsa_dist.launch.cluster import down, up

    if args.what == "down":
        cluster = down()
        _show(args, {"address": cluster.dashboard, "state": "down"}, f"{cluster.dashboard} is down")
        return
    import torch

    from nsa_dist.process import cores

    cpus = args.cpus or max(1, cores() // args.nodes)
    cluster = up(args.nodes, cpus, list(range(torch.cuda.device_count())))
    facts = {"address": cluster.dashboard, "nodes": args.nodes, "cpus": cpus * args.nodes}
    facts |= {"gpus": torch.cuda.device_count(), "folder": cluster.folder, "state": "up"}
    room = f"{args.nodes} nodes, {facts['cpus']} CPUs, {facts['gpus']} GPUs"
    _show(args, facts, f"{cluster.dashboard}: {room}; listens on 127.0.0.1 only, asks for a token")


def _job(args: argparse.Namespace) -> None:
    from nsa_dist.launch.driver import drive, supervise

    if args.child:
        drive(args.again)
    else:
        raise SystemExit(supervise())


def _drill(args: argparse.Namespace, load: Callable[[list[str]], Any]) -> None:
    from nsa_dist.launch.drill_table import drill

    drill(args, load)


def _show(args: argparse.Namespace, facts: Any, text: str) -> None:
    Console().say(json.dumps(facts) if args.json else text)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: must be an integer of at least 1")
    return int(word)
