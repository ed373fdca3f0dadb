"""Runs a function on several gloo ranks of this machine."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist


def _interpret_faster() -> None:
    """Triton's interpreter replaces the functions of `triton.language` anew wherever one jitted function calls
    another, which is half of its time. Here it does so only where they aren't replaced yet."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if tl.core.is_builtin(tl.load) or tl.core.is_builtin(tl.core.load):
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    _interpret_faster()

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["nsa_dist.train", "torch.utils.tensorboard", "torch.distributed.checkpoint"])


def run_ranks(ranks: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """`fn(*args)` in each of `ranks` processes with gloo initialised; its results in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        queue = _context.SimpleQueue()
        processes = [
            _context.Process(
                target=_entry, args=(rank, ranks, f"file://{folder}/store", queue, fn, args), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        results: dict[int, Any] = {}
        try:
            for _ in processes:
                rank, value, error = queue.get()
                if error:
                    pytest.fail(f"rank {rank}:\n{error}")
                results[rank] = value
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
    return [results[rank] for rank in range(ranks)]


def _entry(rank: int, ranks: int, store: str, queue: Any, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        queue.put((rank, fn(*args), None))
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
