"""What is remarked while a command runs: a line each, once; and nothing of the libraries."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .support import say

PACKAGE = "retour"
HOME = Path(__file__).parents[1]
# Read by these libraries when they are imported.
VERBOSITY = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY")


@contextmanager
def remarks() -> Iterator[None]:
    """Say our own warnings as notes, and drop those of the libraries unless they are asked for."""
    for variable in VERBOSITY:
        os.environ.setdefault(variable, "error")
    said: set[str] = set()

    def note(text: str) -> None:
        if text not in said:
            said.add(text)
            say(f"note: {text}")

    def show(message: Any, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if category.__module__.startswith(PACKAGE) or HOME in Path(filename).parents:
            note(str(message))

    notes, logger = _Notes(note), logging.getLogger(PACKAGE)
    logger.addHandler(notes)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(notes)


class _Notes(logging.Handler):
    def __init__(self, note: Any):
        super().__init__(logging.WARNING)
        self.note = note

    def emit(self, record: logging.LogRecord) -> None:
        """A warning as a note; an error with its traceback, each time."""
        text = self.format(record)
        if record.levelno > logging.WARNING:
            say(text)
        else:
            self.note(text)
