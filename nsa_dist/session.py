"""A run's opening and end, the same under every launcher, in the one process that holds the run's lock."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from nsa_dist.config import Config
from nsa_dist.console import Console
from nsa_dist.data import prepare_all
from nsa_dist.process import RunFailed
from nsa_dist.rundir import Resume, RunLock, event, open_run
from nsa_dist.stop import Stopped


@contextmanager
def session(config: Config, console: Console, world_size: int, device: str) -> Iterator[Resume]:
    """Prepares the data, holds the run folder's lock, and writes the run's start and its end to events.jsonl.

    Yields where the run goes on from. Raises ConfigError for data or a run folder that can't serve.
    """
    prepare_all(config.data, console.say)
    run_dir = config.run.dir
    with RunLock(run_dir):
        resume = open_run(config)
        event(run_dir, "start", world_size=world_size, device=device, config_sha256=_digest(config))
        try:
            yield resume
        except RunFailed as error:
            event(run_dir, "failure", rank=error.rank, cause=error.cause)
            raise
        except SystemExit:  # another rank has failed first, and has written it
            raise
        except Stopped as stopped:
            event(run_dir, "stopped", signal=stopped.number)
            raise
        except BaseException as error:
            event(run_dir, "failure", rank=None, cause=type(error).__name__)
            raise
        finally:
            console.end_line()
        event(run_dir, "end")


def _digest(config: Config) -> str:
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
