"""Commands that tell what there is, and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..core.registry import Entry

from .application import app
from .arguments import JsonOpt, TaskOpt
from .support import print_json, print_record, print_table, say


@app.command()
def methods(
    task: TaskOpt = None,
    exact: Annotated[bool | None, typer.Option(help="Only (in)exact ones.")] = None,
    order: Annotated[int | None, typer.Option(help="Only of this order.")] = None,
    needs: Annotated[str | None, typer.Option(help="Only those that need this capability.")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page of the docs.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """List the methods and their declared facts."""
    from ..core.registry import entries

    facts = {"exact": exact, "order": order, "needs": needs}
    found = entries(task, **{k: v for k, v in facts.items() if v is not None})
    if as_json:
        print_json([entry.describe() for entry in found])
    elif markdown:
        from ..catalogue import page

        typer.echo(page(found), nl=False)
    else:
        head = ("task", "name", "goes with", "order", "exact", "NFE", "what it does")
        print_table(head, map(_row, found))
        say(LEGEND if found else "no method is like that: ask for less")


LEGEND = """
N: steps. NFE: network evaluations an image. exact: what is inverted returns exactly.
Not sure? `retour edit` takes p2p and the inverter that it goes with.
`retour methods --markdown` begins with what to take for what, and says what a model must offer."""


def _row(entry: Entry) -> tuple[str, ...]:
    mate = entry.mate if entry.task == "edit" else ""
    order = "" if entry.order is None else str(entry.order)
    exact = "yes" if entry.exact else ""
    return entry.task, entry.name, mate, order, exact, entry.nfe, entry.summary


@app.command()
def models(as_json: JsonOpt = False) -> None:
    """List the embedded models."""
    from ..models.load import embedded

    found = embedded()
    if as_json:
        print_json(found)
    else:
        rows = [(name, str(facts.get("summary", ""))) for name, facts in found.items()]
        print_table(("name", "what it is"), rows)


@app.command()
def cite(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a method.")]) -> None:
    """Print the BibTeX of a method."""
    from ..api import cite as bibtex

    typer.echo(bibtex(name))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write to.")] = Path(
        "retour-demo"
    ),
    full: Annotated[bool, typer.Option("--full", help="The whole gallery of the README.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Run the main job on the embedded models and write a contact sheet."""
    from ..demo import run

    record = run(out, full=full)
    print_record(record, [Path(record["sheet"])], as_json)
