"""The command line. Heavy modules are imported inside the commands, so that help comes at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence

from ..errors import RetourError
from . import editing, measuring, page, purposes, showing  # noqa: F401
from .application import app
from .remarks import remarks
from .support import say


class Stopped(BaseException):
    """Ctrl-C; a KeyboardInterrupt would become the command-line library's own abort, code 1."""


def _stop(*_: object) -> None:
    raise Stopped


def run(arguments: Sequence[str]) -> int:
    """Run a command; return 0, 2 for bad input (said in one sentence), or 130 for Ctrl-C."""
    before = signal.signal(signal.SIGINT, _stop)
    try:
        with remarks():
            app(list(arguments), prog_name="retour", obj=tuple(arguments))
    except RetourError as error:
        say(f"retour: {error}")
        return error.exit_code
    except Stopped:
        say("retour: stopped; nothing was left half-written")
        return 130
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        signal.signal(signal.SIGINT, before)
    return 0


def main() -> None:
    """Entry point of the `retour` command."""
    sys.exit(run(sys.argv[1:]))
