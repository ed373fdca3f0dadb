"""Failures that can't be brought about from outside; the drill has them in its runs."""

import math
from collections.abc import Collection
from typing import Any

import nsa_dist.train as training
from nsa_dist.config import Config
from nsa_dist.rundir import Resume


def train_not_finite(
    step: int, config: Config, resume: Resume, report: training.Report, skip: Collection[int] = ()
) -> bool:
    """train, but the loss of this step's batch is not a number."""
    read, forward, current = training.Reader.training, training.forward_backward, [0]

    def reading(self: training.Reader, corpus: Any, number: int) -> list[training.Batch]:
        current[0] = number
        return read(self, corpus, number)

    def forward_backward(*args: Any) -> Any:
        loss, rivals = forward(*args)
        return math.nan if current[0] == step else loss, rivals

    # In this process, which ends with the run.
    setattr(training.Reader, "training", reading)  # noqa: B010
    setattr(training, "forward_backward", forward_backward)  # noqa: B010
    return training.train(config, resume, report, skip)
