"""One sheet of edits for every editor, and the page that shows them.

    python benchmarks/gallery.py [--model emoji-unet] [--editors NAMES] [--out docs/editors]

The edits of `retour demo` are made by every registered editor that the model can serve, each with
the inverter that it goes with, default options, and the model's steps and guidance. Writes
NAME.png for each, and README.md with the table of costs, from the registry and the runs' records.
Editors that live on a mask (`facts["mask"]`) are shown on pairs of the paired set, with its masks.
With `--editors` only those are made again; what the page says of others stays.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

import retour
from retour import api, demo
from retour.core.model import Model
from retour.core.progress import quiet
from retour.core.registry import Entry
from retour.errors import RetourError
from retour.evaluate.suite import Suite
from retour.io import atomic_write, save_image

SHOWN, STRIDE = 8, 9
HEAD = """# What every editor makes

Made by `python benchmarks/gallery.py --model {model}` with the weights `{fingerprint}`: the
edits of `retour demo`, all with default options, {steps} steps, guidance {guidance:g}. Pairs show
the picture before and after; compare down the page, since all editors get the same edits (those
that live on a mask get pairs of the paired set). What an editor is good at differs: many keep
layout, some keep identity, `reprompt` keeps nothing on purpose.

| editor | with inverter | network evaluations | seconds a picture | paper |
| --- | --- | --- | --- | --- |
"""


def edits_for(entry: Entry, model: Model) -> list[demo.Edit]:
    """The demonstration's edits, made by this editor."""
    _, edits = demo.examples()
    mate = api.usual_inverter(entry.name, model)
    return [
        replace(e, model=model.name, inverter=mate, editor=entry.name, edit_options={})
        for e in edits
        if e.demo
    ]


def masked(entry: Entry, model: Model) -> list[demo.Done]:
    """Pairs of the paired set, edited inside their masks."""
    items = [i for i in Suite.paired() if i.mask().any() and not i.mask().all()][::STRIDE][:SHOWN]
    mate = api.usual_inverter(entry.name, model)
    done = []
    for item in items:
        inversion = api.invert(model, item.image, item.source, method=mate)
        mask = Image.fromarray(item.mask())
        result = api.edit(inversion, item.target, editor=entry.name, mask=mask)
        edit = demo.Edit(item.id, item.kind, item.target, model.name, mate, entry.name)
        done.append(demo.Done(edit, item.source, item.image, result.original_size(), result.record))
    return done


def make(entry: Entry, model: Model, out: Path) -> str:
    """Draw one editor's sheet; its line of the table."""
    if entry.facts.get("mask"):
        done = masked(entry, model)
    else:
        done = list(demo.make(edits_for(entry, model), demo.examples()[0]))
    save_image(demo.sheet(done), out / f"{entry.name}.png")
    record = done[0].record
    nfe, mate = record["nfe"], record["inverter"]
    # All edits of a sheet run as one batch with one record.
    seconds = (record["seconds"] + record["inversion"]["seconds"]) / record["images"]
    paper = f"{entry.paper.title}, {entry.paper.year}"
    link = f"[{paper}](https://arxiv.org/abs/{entry.paper.arxiv})" if entry.paper.arxiv else paper
    name = f"[{entry.name}](#{entry.name})"
    return f"| {name} | {mate} | {nfe:.0f} | {seconds:.1f} | {link} |"


def section(entry: Entry) -> str:
    """What the page says about an editor."""
    return f"## {entry.name}\n\n{entry.summary}\n\n![{entry.name}]({entry.name}.png)\n"


def fitting(model: Model, names: Sequence[str] | None) -> list[Entry]:
    """The editors asked for, or all that the model can serve."""
    found = [e for e in retour.methods(task="edit") if e.needs <= model.capabilities]
    return [e for e in found if names is None or e.name in names]


def parts(page: str) -> tuple[dict[str, str], dict[str, str]]:
    """Lines of the table and sections of a page, by editor."""
    lines = {m[1]: m[0] for m in re.finditer(r"^\| \[([\w-]+)\]\(#.*$", page, re.MULTILINE)}
    sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]
    return lines, {text.split()[1]: text.rstrip("\n") + "\n" for text in sections}


def main() -> None:
    """Make the sheets and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--editors", help="names, with commas between; all that fit by default")
    parser.add_argument("--out", type=Path, default=Path("docs/editors"))
    given = parser.parse_args()
    model = retour.load(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    page = given.out / "README.md"
    lines, sections = parts(page.read_text(encoding="utf-8") if page.exists() else "")
    for entry in fitting(model, given.editors.split(",") if given.editors else None):
        lines.pop(entry.name, None)
        try:
            with quiet():
                lines[entry.name] = make(entry, model, given.out)
        except RetourError as error:
            # An editor that needs more than a prompt: drag points, say.
            sections[entry.name] = (
                f"## {entry.name}\n\n{entry.summary}\n\nNot shown here: {error}.\n"
            )
            continue
        sections[entry.name] = section(entry)
        print(lines[entry.name], flush=True)
    head = HEAD.format(
        model=model.name,
        fingerprint=model.fingerprint,
        steps=model.default_steps,
        guidance=model.default_guidance,
    )
    known = [e.name for e in retour.methods(task="edit")]
    table = "\n".join(lines[name] for name in known if name in lines)
    text = head + table + "\n\n" + "\n".join(sections[n] for n in known if n in sections)
    with atomic_write(page) as path:
        path.write_text(text, encoding="utf-8")
    print("\n" + "\n".join(head.splitlines()[-2:]) + "\n" + table)


if __name__ == "__main__":
    main()
