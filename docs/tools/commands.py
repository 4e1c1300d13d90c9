"""The page of the command line, from the application itself."""

from __future__ import annotations

import re
from typing import Any

import typer
from markup import table

from retour.cli import app

KINDS = {"str": "TEXT", "path": "PATH", "int": "NUMBER", "float": "NUMBER"}
HEAD = """# Command line

Everything that `retour COMMAND --help` says. Bad input is refused in one sentence before any work,
with exit code 2; Ctrl-C stops with 130 and leaves nothing half-written. Options of a method are
given as KEY=VALUE; [the methods' pages](../methods.md) list them.
"""


def page() -> str:
    """Markdown of all commands with their arguments and options."""
    group: Any = typer.main.get_command(app)
    return "\n".join([HEAD, *(_command(name, cmd) for name, cmd in group.commands.items())])


def _command(name: str, command: Any) -> str:
    context = typer.Context(command, info_name=f"retour {name}")
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [_row(parameter, context) for parameter in command.params]
    head = ["", "what it is", "default"]
    return (
        f"## retour {name}\n\n{command.help}\n\n```text\nretour {name} {usage}\n```\n\n"
        f"{table(head, rows)}"
    )


def _row(parameter: Any, context: Any) -> list[str]:
    name, meaning = parameter.get_help_record(context) or (parameter.name, "")
    meaning, _, notes = meaning.partition("  [")
    notes = [note.strip() for note in notes.rstrip("]").split("; ") if note.strip()]
    default = next((n.removeprefix("default: ") for n in notes if n.startswith("default: ")), "")
    default = default.strip("()")
    if parameter.required:
        default = "*required*"
    elif default:
        default = f"`{default}`" if parameter.default is not None else default
    return [f"`{_plain(name)}`", meaning, default]


def _plain(name: str) -> str:
    """The name of a parameter with the kind of its value in plain letters."""
    name = re.sub(r"^([A-Z]+) <.*>$", r"\1", " ".join(name.split()))
    for kind, shown in KINDS.items():
        name = name.replace(f"<{kind}>", shown).replace(f"<list[{kind}]>", shown)
    return name
