"""Watching a run from outside: previews, progress, cancelling.

Whoever starts a run can see into it without passing anything down: within `watching(watcher)` every
walk of this thread shows its steps, and every network call announces itself. What a watcher raises
ends the run at that call; hooks come off as after any exception. Nothing is watched by default, and
then a run does nothing for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .loop import Event


class Watcher:
    """Base of watchers: sees nothing."""

    def called(self) -> None:
        """Before every network call, inner loops' too; what it raises ends the run."""

    def stepped(self, event: Event) -> None:
        """After every step of every walk."""


_watchers: ContextVar[tuple[Watcher, ...]] = ContextVar("retour_watchers", default=())


def watchers() -> tuple[Watcher, ...]:
    """Who watches in this context."""
    return _watchers.get()


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Let `watcher` see every run in this context."""
    token = _watchers.set((*watchers(), watcher))
    try:
        yield
    finally:
        _watchers.reset(token)
