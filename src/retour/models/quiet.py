"""Loading without the libraries' bars and advice: what goes wrong is said by our own errors."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LIBRARIES = ("diffusers", "transformers")


@contextmanager
def quietly() -> Iterator[None]:
    """Silence progress bars and messages below errors of the libraries; as before afterwards."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    parts = (diffusers_logging, transformers_logging)
    bars = [part.is_progress_bar_enabled() for part in parts]
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    for part in parts:
        part.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # A keyword that newer releases rename is still the one that older releases know.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for part, enabled in zip(parts, bars, strict=True):
            if enabled:
                part.enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
