"""One process of a run: its device, its process group, and the words for its failure.

Shared by the workers that launch/ starts and by the processes that torchrun starts; knows neither.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nsa_dist.errors import ConfigError

_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def under_torchrun(environ: Mapping[str, str]) -> bool:
    """True in a process that torchrun, or what speaks its language, has started."""
    return all(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


class RunFailed(RuntimeError):
    """A run that ended early. The message is one line that names the first cause.

    rank: whose failure it was; cause: what happened, without the rank; bad_input: the cause was a fault of the input.
    """

    def __init__(self, rank: int, cause: str, log: Path, bad_input: bool = False) -> None:
        super().__init__(cause if bad_input else f"rank {rank}: {cause}; see {log}")
        self.rank, self.cause, self.bad_input = rank, cause, bad_input


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(wanted: str, local_ranks: int, key: str = "launch.device") -> str:
    """`cpu` or `cuda` for `key` = `auto`, `cpu` or `cuda`, with `local_ranks` processes on this machine.

    Raises ConfigError where there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return "cpu"
    if gpus < local_ranks:
        raise ConfigError(
            f"{key}={wanted}: {local_ranks} ranks (parallel.dp x parallel.cp) on this machine need a GPU "
            f"each, it has {gpus}; allowed: at most {gpus} ranks, or {key}=cpu"
            if gpus
            else f"{key}={wanted}: this machine has 0 GPUs that torch can use; allowed: auto, cpu"
        )
    return "cuda"


@contextmanager
def process_group(
    store: dist.Store, rank: int, world_size: int, device: str, local_gpu: int, timeout_s: float
) -> Iterator[None]:
    """The default process group: gloo on `cpu`; gloo for CPU tensors and NCCL for the others on `cuda`.

    local_gpu: index of this process's GPU among those it sees. timeout_s: of a collective, in seconds.
    After an error the group is left as it is: to take it down could wait for ranks that are gone.
    """
    if device == "cuda":
        torch.cuda.set_device(local_gpu)
        # What is sent must not wait for programs of a kernel that has filled the device.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    dist.init_process_group(
        _BACKENDS[device],
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    yield
    dist.destroy_process_group()


def is_collective_error(error: BaseException) -> bool:
    """True where the error tells of a connection to other ranks: most often another rank's failure."""
    if isinstance(error, dist.DistError):
        return True
    if isinstance(error, RuntimeError) and "gloo" in str(error).lower():  # gloo raises plain RuntimeErrors
        return True
    return error.__cause__ is not None and is_collective_error(error.__cause__)


def is_bad_input(error: BaseException) -> bool:
    """True where it was the input's fault."""
    return isinstance(error, ConfigError) and error.bad_input


def describe(error: BaseException) -> str:
    """An error in one line: its own words for bad input, else with its type before them."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"^\[\S+:\d+\] ", "", lines[0]) if lines else ""  # gloo begins with its source's line
    if isinstance(error, ConfigError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
