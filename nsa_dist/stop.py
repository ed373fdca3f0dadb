"""Asking a run to stop: the first signal ends it after its step, with a checkpoint; the second at once."""

import ctypes
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM, as an exception, so that what was started is taken down."""


class Stopped(BaseException):
    """The run has stopped as it was asked to, by signal `number`, and has left a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__("stopped, with a checkpoint; the same command goes on")
        self.number = number


class StopRequest:
    """Called, says whether a signal has asked for the end; raises Terminated after a second SIGTERM.

    (Not in the signal's handler: Ray's calls take no exception from there but KeyboardInterrupt.)
    """

    number = 0
    terminate = False

    def __call__(self) -> bool:
        if self.terminate:
            raise Terminated
        return self.number != 0


@contextmanager
def stop_on_signal(insist: bool = True) -> Iterator[StopRequest]:
    """SIGINT and SIGTERM ask to stop. `insist`: a second one raises, KeyboardInterrupt or Terminated.

    Raises Stopped where the block ends by itself after a signal.
    """
    request = StopRequest()

    def handler(number: int, frame: FrameType | None) -> None:
        if request.number and insist:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            request.terminate = True
        request.number = request.number or number

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, old in before.items():
            signal.signal(number, old)
    if request.number:
        raise Stopped(request.number)


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, however it ends (on Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # <sys/prctl.h>
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
