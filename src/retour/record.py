"""The record that every run leaves: what was asked, with what, at which cost."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.model import Ledger, Model

PACKAGES = ("retour", "torch", "diffusers", "transformers", "numpy")


@lru_cache(1)
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def peak_memory(model: Model) -> dict[str, int]:
    """Peak memory so far, in bytes: of the process, and of its GPU if it uses one."""
    import torch

    peak: dict[str, int] = {}
    if model.device.type == "cuda":
        peak["cuda"] = int(torch.cuda.max_memory_allocated(model.device))
    if sys.platform != "win32":
        import resource

        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def describe_run(
    task: str, model: Model, ledger: Ledger, images: int, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Facts of one run, as JSON values.

    Args:
        task: ``invert``, ``reconstruct`` or ``edit``.
        model: the model that ran.
        ledger: its counts.
        images: number of inputs, which NFE is given per.
        asked: everything that was asked for: methods, options, prompts, seeds.
    """
    return {
        "task": task,
        "model": model.name,
        "fingerprint": model.fingerprint,
        "device": str(model.device),
        **asked,
        "images": images,
        "nfe": ledger.nfe(images),
        "network_calls": ledger.calls,
        "network_seconds": ledger.network_seconds,
        "seconds": ledger.seconds,
        "peak_memory_bytes": peak_memory(model),
        "versions": versions(),
    }
