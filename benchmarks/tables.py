"""Rebuild the tables of the docs with the commands that stand above them.

    python benchmarks/tables.py [--list] [--only NAME ...] [--again] [--write] [--docs docs]
                                [-o runs/tables]

The commands are read from the docs themselves: the shell block in a table's own section, or, on a
page without one, the command in backticks in its first lines. So what is rebuilt is what a reader
is told to type. Every block is run in DIR/work, where `benchmarks` and `src` lead to this checkout
and `retour` is this Python's. The Markdown table that it prints (or writes into the page itself,
below DIR/work) is compared with the one in the docs: one with the same heads stands for it as it
is; from a wider one, such as a bench's with all metrics and all differences of two runs, the
columns and rows of the docs are taken, and a difference that the docs turn round is turned round.

Writes DIR/NAME.md (the table anew), DIR/NAME.txt (all that was printed) and DIR/tables.md (all with
the cells that differ), and says how many do; seconds and memory always will on another machine.
Killed and called again it goes on: blocks that are done are left out unless `--again`, a bench goes
on within. `--write` puts the new tables into the docs. Ends with 1 if a table could not be rebuilt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from retour.io import atomic_write, save_json

ROOT = Path(__file__).parents[1]
LINKED = ("benchmarks", "src")
SHELLS = ("sh", "console")
HEADING = re.compile(r"^#+ +(.+)$", re.M)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.M | re.S)
INLINE = re.compile(r"`((?:python benchmarks/|retour )[^`]+)`")
TABLE = re.compile(r"(?:^\|.*\|[ \t]*\n){2,}", re.M)
RULE = re.compile(r"^\|[\s|:-]+\|$")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.-])")
# A measured value: a decimal number with nothing but its interval, a star or a unit behind it.
FIGURE = re.compile(r"^-?\d*\.\d+(?:e-?\d+)?\*?(?: \[.*\])?(?: %)?$")
GAP = " - "
Key = tuple[tuple[str, ...], int]
# A cell that names its row: no number, and nothing that stands in a number's place.
NAME = re.compile(r"(?!(?:inf|nan|-|-?[\d.].*)$).+")


@dataclass(frozen=True)
class Table:
    """A Markdown table.

    Attributes:
        heads: of the columns.
        rows: cells, row by row.
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def read(cls, text: str) -> Table | None:
        """From its lines; None if they are none."""
        lines = [line.strip() for line in text.strip().splitlines()]
        if len(lines) < 2 or not RULE.match(lines[1]):
            return None
        cells = [tuple(c.strip() for c in line.strip("|").split("|")) for line in lines]
        heads, rows = cells[0], cells[2:]
        return cls(heads, tuple(rows)) if all(len(r) == len(heads) for r in rows) else None

    @property
    def figures(self) -> bool:
        """Whether anything in it was measured."""
        return any(FIGURE.match(cell) for row in self.rows for cell in row[1:])

    def keyed(self) -> dict[Key, tuple[str, ...]]:
        """Rows by the names that they begin with, and how often these stood above already."""
        seen: Counter[tuple[str, ...]] = Counter()
        rows = {}
        for row in self.rows:
            names = tuple(takewhile(NAME.fullmatch, row))
            rows[names, seen[names]] = row
            seen[names] += 1
        return rows

    def __str__(self) -> str:
        rule = tuple("---" for _ in self.heads)
        return "".join(f"| {' | '.join(row)} |\n" for row in (self.heads, rule, *self.rows))


@dataclass(frozen=True)
class Place:
    """A table in the docs.

    Attributes:
        page: its file.
        table: what stands there.
    """

    page: Path
    table: Table


@dataclass(frozen=True)
class Job:
    """A block of commands and the tables that it prints.

    Attributes:
        name: page and section.
        command: what to type; "" where the docs do not say.
        places: its tables.
    """

    name: str
    command: str
    places: tuple[Place, ...]


def jobs(docs: Path) -> list[Job]:
    """Every block of commands that stands above tables of figures, page by page."""
    found: dict[tuple[str, str], list[Place]] = {}
    for page in sorted(docs.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        bare = FENCE.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
        for match in TABLE.finditer(bare):
            table = Table.read(match[0])
            if table is None or not table.figures:
                continue
            heading = _last(HEADING, bare[: match.start()])
            where = page.relative_to(docs).with_suffix("")
            page_name = str(where.parent if where.stem == "README" else where)
            intro = heading is None or heading.start() == _first_heading(bare)
            slug = "" if intro or heading is None else "/" + _slug(heading[1])
            start = 0 if heading is None else heading.start()
            command = _command(text, bare, start, match.start())
            key = f"{page_name}{slug}" if command[1] else page_name, command[0]
            found.setdefault(key, []).append(Place(page, table))
    return [Job(name, command, tuple(places)) for (name, command), places in found.items()]


def _command(text: str, bare: str, start: int, stop: int) -> tuple[str, bool]:
    """The commands above a table and whether they stand in its own section."""
    blocks = [m for m in FENCE.finditer(text, start, stop) if m[2] in SHELLS]
    if blocks:
        return re.sub(rf"^{blocks[-1][1]}", "", blocks[-1][3], flags=re.M).strip(), True
    if any(m[2] in SHELLS for m in FENCE.finditer(text)):
        return "", True
    spans = list(INLINE.finditer(" ".join(bare[:stop].split("\n"))))
    return (spans[0][1] if spans else ""), False


def _last(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next(reversed(list(pattern.finditer(text))), None)


def _first_heading(text: str) -> int:
    found = HEADING.search(text)
    return -1 if found is None else found.start()


def _slug(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")


# --- What was printed -----------------------------------------------------------------------------


def printed(text: str) -> Iterator[Table]:
    """Tables in a program's output."""
    for match in TABLE.finditer(text + "\n"):
        table = Table.read(match[0])
        if table is not None:
            yield table


def rebuilt(wanted: Table, given: Sequence[Table]) -> Table | None:
    """A table of the docs anew from what was printed; None if it is not there."""
    for table in given:
        if table.heads == wanted.heads:
            return table
    for table in given:
        columns = [_column(head, table.heads) for head in wanted.heads]
        there = table.keyed()
        rows = [_row(key, there) for key in wanted.keyed()]
        if None not in columns and None not in rows:
            cells = [tuple(row[k] for k in columns) for row in rows]  # type: ignore[index]
            kept = (tuple([old[0], *new[1:]]) for old, new in zip(wanted.rows, cells, strict=True))
            return Table(wanted.heads, tuple(kept))
    return None


def _column(head: str, heads: Sequence[str]) -> int | None:
    """Of the same name; else the first whose words hold this head's in order."""
    if head in heads:
        return heads.index(head)
    words = head.split()
    return next((k for k, other in enumerate(heads) if _within(words, other.split())), None)


def _within(few: Sequence[str], many: Sequence[str]) -> bool:
    rest = iter(many)
    return all(word in rest for word in few)


def _row(key: Key, rows: Mapping[Key, tuple[str, ...]]) -> tuple[str, ...] | None:
    if key in rows:
        return rows[key]
    (label, *names), time = key
    first, gap, second = label.partition(GAP)
    turned = rows.get(((f"{second}{GAP}{first}", *names), time)) if gap else None
    return None if turned is None else (label, *map(_negated, turned[1:]))


def _negated(cell: str) -> str:
    """A difference turned round, with its interval."""
    found = NUMBER.findall(cell)
    if not found:
        return cell
    turned = [v[1:] if v.startswith("-") else v if float(v) == 0 else f"-{v}" for v in found]
    star = "*" if "*" in cell else ""
    return turned[0] + star + (f" [{turned[2]}, {turned[1]}]" if len(turned) == 3 else "")


def differing(old: Table, new: Table) -> list[str]:
    """The cells of a new table that are not in the old one: row, head, what was and what is."""
    before, heads = old.keyed(), {head: k for k, head in enumerate(old.heads)}
    found = []
    for key, row in new.keyed().items():
        for head, cell in zip(new.heads, row, strict=True):
            known = key in before and head in heads
            was = before[key][heads[head]] if known else None
            if was != cell:
                where = ", ".join([*key[0], head])
                found.append(f"{where}: {'none' if was is None else was} -> {cell}")
    return found


# --- Running --------------------------------------------------------------------------------------


def workplace(out: Path) -> dict[str, str]:
    """Make DIR/work; the environment of what runs there."""
    work = out / "work"
    tools = work / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    for name in LINKED:
        (work / name).unlink(missing_ok=True)  # It may lead to another checkout.
        (work / name).symlink_to(ROOT / name)
    for name, line in (("python", '"$@"'), ("retour", '-m retour "$@"')):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {line}\n')
        (tools / name).chmod(0o755)
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def run(job: Job, out: Path, again: bool) -> bool:
    """Run a job's commands unless they are done; whether they ended well."""
    file = out / job.name
    file.parent.mkdir(parents=True, exist_ok=True)
    done = file.with_suffix(".json")
    if not again and done.is_file() and json.loads(done.read_text())["command"] == job.command:
        print(f"{job.name}: done before", flush=True)
        return True
    print(f"{job.name}:\n{job.command}", flush=True)
    begun = time.monotonic()
    with atomic_write(file.with_suffix(".txt")) as path, path.open("w") as log:
        environment = workplace(out)
        ended = subprocess.run(
            ["bash", "-euc", job.command], cwd=out / "work", env=environment, stdout=log
        )
    if ended.returncode == 0:
        seconds = round(time.monotonic() - begun, 1)
        save_json({"command": job.command, "seconds": seconds}, done)
    return ended.returncode == 0


def settle(job: Job, out: Path, docs: Path, write: bool) -> tuple[list[str], list[str]]:
    """The job's tables anew with what differs, and a word on each; if asked, into the docs."""
    file = out / job.name
    pages = {out / "work" / "docs" / place.page.relative_to(docs) for place in job.places}
    sources = [file.with_suffix(".txt"), *filter(Path.is_file, pages)]
    given = [t for source in sources for t in printed(source.read_text(encoding="utf-8"))]
    tables, made, said = [], [], []
    for place in job.places:
        new = rebuilt(place.table, given)
        if new is None:
            said.append(f"not rebuilt: a table that {file.with_suffix('.txt')} does not print")
            continue
        cells = sum(map(len, new.rows))
        other = differing(place.table, new)
        tables.append(str(new))
        made.append("\n".join([str(new), *(f"- {line}" for line in other)]))
        said.append(f"{cells} cells, {len(other)} not as in the docs")
        if write:
            _replace(place, new)
    file.with_suffix(".md").write_text("\n".join(tables), encoding="utf-8")
    return made, said


def _replace(place: Place, new: Table) -> None:
    """Put a table into its page, where the old one stands."""
    text = place.page.read_text(encoding="utf-8")
    same = (m for m in TABLE.finditer(text) if Table.read(m[0]) == place.table)
    found = next(same, None)
    if found is None:
        raise SystemExit(f"{place.page} has changed meanwhile: call --write again")
    with atomic_write(place.page) as path:
        path.write_text(text[: found.start()] + str(new) + text[found.end() :], encoding="utf-8")


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="those whose names hold this")
    parser.add_argument("--again", action="store_true", help="run what is done, too")
    parser.add_argument("--write", action="store_true", help="put the new tables into the docs")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/tables"))
    return parser.parse_args(arguments)


def chosen(found: Sequence[Job], names: Sequence[str] | None) -> list[Job]:
    """The jobs that were asked for."""
    some = [j for j in found if names is None or any(name in j.name for name in names)]
    if not some:
        known = "\n  ".join(job.name for job in found)
        raise SystemExit(f"no table is called {' or '.join(names or ['anything'])}:\n  {known}")
    return some


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, compare, write; 1 if a table is missing."""
    given = options(arguments)
    some = chosen(jobs(given.docs), given.only)
    if given.list:
        for job in some:
            print(f"{job.name} ({len(job.places)}):\n  " + job.command.replace("\n", "\n  "))
        return 0
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    pages, notes, missing = [], [], 0
    for job in some:
        if not job.command or not run(job, out, given.again):
            notes.append(f"{job.name}: {'failed' if job.command else 'has no command'}")
            missing += len(job.places)
            continue
        made, said = settle(job, out, given.docs, given.write)
        missing += len(job.places) - len(made)
        notes += [f"{job.name}: {line}" for line in said]
        pages.append(f"## {job.name}\n\n```sh\n{job.command}\n```\n\n" + "\n".join(made))
    with atomic_write(out / "tables.md") as path:
        path.write_text("\n".join(["# Tables, rebuilt\n", *pages]), encoding="utf-8")
    print("\n".join(notes))
    print(f"written to {given.out}/tables.md" + (f"; {missing} not rebuilt" if missing else ""))
    return min(missing, 1)


if __name__ == "__main__":
    sys.exit(main())
