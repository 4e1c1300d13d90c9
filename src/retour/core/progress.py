"""Progress bars: on a terminal only, and never when the caller asks for quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
_quiet: ContextVar[bool] = ContextVar("retour_quiet", default=False)


@contextmanager
def quiet(value: bool = True) -> Iterator[None]:
    """Silence (or allow) progress bars in this context."""
    token = _quiet.set(value)
    try:
        yield
    finally:
        _quiet.reset(token)


def is_quiet() -> bool:
    """Whether progress bars are silenced here."""
    return _quiet.get()


@contextmanager
def bar(items: Iterable[T], total: int, label: str) -> Iterator[Iterable[T]]:
    """Wrap `items` in a tqdm bar if standard error is a terminal and the run has a label."""
    if _quiet.get() or not label or not sys.stderr.isatty():
        yield items
        return
    from tqdm import tqdm

    with tqdm(items, total=total, desc=label, leave=False, dynamic_ncols=True) as wrapped:
        yield wrapped
