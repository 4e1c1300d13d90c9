"""The application that every command is added to, in the order of the help."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Take anything back through a generative model, and return with an edit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
