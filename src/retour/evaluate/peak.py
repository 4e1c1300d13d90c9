"""Peak memory of a block of work."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Peak memory of a block, in MiB above its start; NaN where it cannot be told.

    On a GPU its allocated memory, elsewhere the process's resident memory (Linux alone tells).
    """

    def __init__(self, device: torch.device):
        self.device, self.mib = device, math.nan

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.begun = torch.cuda.memory_allocated(self.device) / 2**20
        elif _resettable():
            self.begun = _resident("VmRSS")
        else:
            self.begun = math.nan
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2**20 - self.begun
        elif not math.isnan(self.begun):
            self.mib = _resident("VmHWM") - self.begun


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
