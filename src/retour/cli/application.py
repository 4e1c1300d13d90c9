"""The application that every command is added to, in the order of the help."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(
    help="Take anything back through a generative model, and return with an edit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"retour {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say which it is."),
    ] = False,
) -> None:
    """Options of `retour` itself, before any command."""
