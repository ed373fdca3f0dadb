"""Peak memory of this process over a stretch of work."""

import ctypes
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch


class Peak:
    """From now on. On a GPU what torch allocated there; on the CPU what became resident on top of what was."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back: else it would be used again unseen
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before = _status("VmRSS")

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return max(_status("VmHWM") - self._before, 0)


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0
