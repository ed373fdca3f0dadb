"""A run's opening and end, the same under every launcher, in the one process that holds the run's lock."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from nsa_dist.config import Config, ConfigError
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
    corpus, _ = prepare_all(config.data, console.say)
    _check_vocabulary(config, corpus.vocab_size)
    run_dir = config.run.dir
    with RunLock(run_dir):
        try:
            resume = open_run(config)
            event(run_dir, "start", world_size=world_size, device=device, config_sha256=_digest(config))
        except OSError as error:
            raise ConfigError(f"run.dir={run_dir}: must be a folder that can be written ({error})") from None

        def last(kind: str, **fields: Any) -> None:
            try:
                event(run_dir, kind, **fields)
            except OSError as error:  # a full disk, say, must not hide how the run ended
                console.say(f"run.dir={run_dir}: event '{kind}' not written ({error})")

        try:
            yield resume
        except RunFailed as error:
            last("failure", rank=error.rank, cause=error.cause)
            raise
        except SystemExit:  # another rank has failed first, and has written it
            raise
        except Stopped as stopped:
            last("stopped", signal=stopped.number)
            raise
        except BaseException as error:
            last("failure", rank=None, cause=type(error).__name__)
            raise
        finally:
            console.end_line()
        last("end")


def _check_vocabulary(config: Config, tokens: int) -> None:
    if 0 < config.model.vocab_size < tokens:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: must be 0, or at least the {tokens} tokens of "
            f"data.tokenizer={config.data.tokenizer}"
        )


def _digest(config: Config) -> str:
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()
