"""The registry as a page: every method, what it costs, what it goes with, whom to cite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .core.registry import TASKS, Entry, entries

TITLES = {
    "solver": "Solvers",
    "invert": "Inverters",
    "edit": "Editors",
    "attack": "Attacks",
    "restore": "Restoration",
}
HEAD = """# Methods

Every registered method, as `retour methods --markdown` prints it. N is the number of steps;
evaluations are network rows per image. *exact*: the round trip is exact up to rounding (or to the
tolerance that the method takes); *order*: of convergence in the step size; *needs*: what a model
must offer. The tests assert what is declared here.

| to | take |
| --- | --- |
| change a colour, a material or a thing, and keep the layout | `p2p`, the default |
| change a pose or a place, and keep the looks | `masactrl` |
| edit without an inversion | `infedit`; on a flow model also `flowedit` |
| add or remove several concepts | `ledits` |
| change only what you paint | any editor with a mask, or `mask-blend` |
| have variations | `retour vary`, which is `rival` |
| move or stretch | `retour drag`, which is `lazydrag` |
| get the same picture back to rounding | an inverter that is *exact*, such as `edict` |
| have something to compare with | `reprompt` from `ddim` |

An editor takes the inverter that it *goes with* unless you name another. *Solvers* are what
inverters walk with; nothing on the command line asks for one.
"""


def page(chosen: Iterable[Entry] | None = None) -> str:
    """Markdown of the given methods (all by default), one table for each task."""
    found = list(entries() if chosen is None else chosen)
    parts = [HEAD]
    for task in TASKS:
        rows = [entry for entry in found if entry.task == task]
        if rows:
            parts.append(f"## {TITLES.get(task, task.capitalize())}\n\n{_table(task, rows)}")
    return "\n".join(parts)


def _table(task: str, rows: Sequence[Entry]) -> str:
    names = ["name", "what it does", "evaluations", "exact", "order", "needs", "paper"]
    if task == "edit":
        names.insert(2, "goes with")
    lines = [_line(names), _line(["---"] * len(names))]
    for entry in rows:
        cells = [
            f"`{entry.name}`",
            entry.summary,
            *([f"`{entry.mate}`"] if task == "edit" else []),
            entry.nfe,
            "yes" if entry.exact else "",
            "" if entry.order is None else str(entry.order),
            ", ".join(sorted(entry.needs)),
            _reference(entry),
        ]
        lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def _reference(entry: Entry) -> str:
    who = entry.paper.authors.split(",")[0]
    label = f"{who} {entry.paper.year}"
    return f"[{label}](https://arxiv.org/abs/{entry.paper.arxiv})" if entry.paper.arxiv else label


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
