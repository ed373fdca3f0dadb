"""`nsa-dist drill`: the failures that were asked for, one after the other, as a table."""

import argparse
import difflib
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nsa_dist.config import ConfigError
from nsa_dist.console import Console
from nsa_dist.launch.drill import FAILURES, HEADER, RIVALS, Drill, as_line, fine


def drill(args: argparse.Namespace, load: Callable[[list[str]], Any]) -> None:
    """Prints the table. Raises SystemExit(1) where a failure wasn't recovered, ConfigError for an unknown one."""
    console = Console()
    if args.list:
        for name in [*FAILURES, *RIVALS]:
            console.say(name)
        return
    names = args.only or [*FAILURES, *(RIVALS if args.rival else ())]
    for name in names:
        if name not in FAILURES | RIVALS:
            near = difflib.get_close_matches(name, FAILURES | RIVALS, 1)
            raise ConfigError(
                f"--only {name}: must be one of {', '.join(FAILURES | RIVALS)}"
                + (f"; nearest: {near[0]}" if near else "")
            )
    config = load(args.words)
    with ExitStack() as stack:
        if args.folder:
            folder = Path(args.folder).absolute()
            if folder.exists() and any(folder.iterdir()):
                raise ConfigError(f"--folder {args.folder}: must be a new or empty folder")
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nsa-drill-")))
        runs, rows = Drill(config, folder), []
        stack.callback(runs.close)
        console.say(HEADER)
        for name in names:
            rows.append(runs.row(name))
            console.say(as_line(rows[-1]))
            if args.json:
                Path(args.json).write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if not all(fine(row) for row in rows if row.failure in FAILURES):
        raise SystemExit(1)
