"""What a GPU does beside its main work: rows packed and sent, tables that the host waits for."""

from contextlib import AbstractContextManager
from functools import cache

import torch
from torch import Tensor


def aside(device: torch.device) -> AbstractContextManager[object]:
    """A context, to be entered as often as one likes: what a GPU is given inside follows what it had been given when
    this was called, and nothing since. On the CPU it changes nothing.

    A tensor made inside and used outside must be recorded with the stream that uses it (`Pending.wait` does).
    """
    if device.type != "cuda":
        return torch.cuda.stream(None)
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return torch.cuda.stream(stream)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=-1)  # before the programs of the main work that wait


class ToHost:
    """A tensor on its way to the host, which alone waits for it."""

    def __init__(self, x: Tensor) -> None:
        self._copy, self._event = x, None
        if x.is_cuda:
            self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._copy.copy_(x, non_blocking=True)
            self._event = torch.cuda.current_stream().record_event()

    def wait(self) -> Tensor:
        if self._event:
            self._event.synchronize()
        return self._copy
