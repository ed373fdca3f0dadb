"""The rival that the drill compares with: the same training under Ray Train V2, as its documentation has it.

`python -m nsa_dist.launch.ray_train`, in a run's folder with its job.json and an environment that names the cluster.
Needs ray[train]. Checkpoints are this project's, and it goes on from the newest whole one: what is compared is who
places, watches and starts again.
"""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsa_dist.config import AUTO, Config, config_from_dict
from nsa_dist.data import prepare_all
from nsa_dist.launch.package import JOB
from nsa_dist.rundir import event, open_run

_FAILURES = 3


def main() -> None:
    """Trains to the end of the run."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    config = config_from_dict(json.loads(Path(JOB).read_text())["config"])
    prepare_all(config.data, print)
    open_run(config)
    ray.init(logging_level=logging.ERROR)
    workers: Any = (1, 2) if config.parallel.cp == AUTO else config.parallel.cp
    TorchTrainer(
        _train,
        train_loop_config={"config": config},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=workers),
        run_config=RunConfig(
            name="ray-train", storage_path=config.run.dir, failure_config=FailureConfig(max_failures=_FAILURES)
        ),
    ).fit()


def _train(options: dict[str, Any]) -> None:
    """In each of its workers."""
    import ray.train
    import torch.distributed as dist

    from nsa_dist.rundir import own_checkpoints
    from nsa_dist.train import train

    config: Config = options["config"]
    config = replace(config, parallel=replace(config.parallel, cp=dist.get_world_size()))
    pids: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    if dist.get_rank() == 0:
        event(config.run.dir, "ranks", ranks=[{"rank": rank, "pid": pid} for rank, pid in enumerate(pids)])

    def report(told: dict[str, Any]) -> None:
        if told["kind"] == "beat":
            ray.train.report({"step": told["step"]})

    train(config, own_checkpoints(config), report)


if __name__ == "__main__":
    main()
