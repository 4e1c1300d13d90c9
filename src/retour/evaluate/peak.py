"""Peak memory of a block of work."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import re
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Peak memory of a block, in MiB above its start; NaN where it cannot be told.

    On a GPU its allocated memory, elsewhere the process's resident memory (Linux alone tells). What
    earlier work has freed is given back to the system first: the allocator keeps it otherwise, and
    a block that lives on it would seem to need nothing.
    """

    def __init__(self, device: torch.device):
        self.device, self.mib = device, math.nan

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.begun = torch.cuda.memory_allocated(self.device) / 2**20
            return self
        _give_back()
        self.begun = _resident("VmRSS") if _resettable() else math.nan
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2**20 - self.begun
        elif not math.isnan(self.begun):
            self.mib = _resident("VmHWM") - self.begun


def _give_back() -> None:
    """Return freed memory to the system, where the C library can."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resettable() -> bool:
    """Set the process's peak back to what it holds now; containers may forbid it."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    return int(found[1]) / 1024 if found else math.nan
