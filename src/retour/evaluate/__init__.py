"""Benchmark sets, metrics of edits, the runner that measures methods, and its report.

    from retour.evaluate import bench
    print(bench("runs/first", inverters="ddim,direct", editors="p2p").table())

:func:`bench` measures inverters and editors on a set of edits, :func:`batch` edits a folder of
one's own pictures with the same engine; both can be stopped at any moment and called again.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import batch as batch
    from .runner import bench as bench

_WHERE = {"batch": "batches", "bench": "runner"}

__all__ = ["batch", "bench"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
