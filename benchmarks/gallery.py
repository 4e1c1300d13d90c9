"""One sheet of edits for every editor, and the page that shows them.

    python benchmarks/gallery.py [--model emoji-unet] [--editors NAMES] [--out docs/editors]
    python benchmarks/gallery.py --model emoji-mmdit --flow --out docs/editors/flow

The edits of `retour demo` are made by every registered editor that the model can serve, each with
the inverter that it goes with, default options, and the model's steps and guidance. Writes
NAME.png for each, and README.md with the table of costs, from the registry and the runs' records.
Editors that live on a mask (`facts["mask"]`) are shown on pairs of the paired set, with its masks.
With `--editors` only those are made again; what the page says of others stays. A name is that of an
editor, or INVERTER+EDITOR; `--flow` stands for those of the flow family.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

import retour
from retour import api, demo
from retour.core.model import Model
from retour.core.progress import quiet
from retour.core.registry import Entry, get
from retour.errors import RetourError
from retour.evaluate.suite import Suite
from retour.io import atomic_write, save_image

SHOWN, STRIDE = 8, 9
OTHER = {
    False: "The flow family on a flow model has [a page of its own](flow/README.md).",
    True: "The same edits on a diffusion model are [on another page](../README.md).",
}
COLOURS = 256
FLOW = (
    "rf-inversion+reprompt",
    "otip+reprompt",
    "rf-edit",
    "flowedit",
    "otip",
    "flowchef",
    "flowopt",
    "uniedit",
)
HEAD = """# {title}

Made by `python benchmarks/gallery.py {command}` with the weights
`{fingerprint}`: the edits of `retour demo`, all with default options, {steps} steps, guidance
{guidance:g}. Pairs show the picture before and after; compare down the page, since all editors get
the same edits (those that live on a mask get pairs of the paired set). What an editor is good at
differs: many keep layout, some keep identity, `reprompt` keeps nothing on purpose.

{other}

| editor | with inverter | network evaluations | seconds a picture | paper |
| --- | --- | --- | --- | --- |
"""


@dataclass(frozen=True)
class Shown:
    """An editor of the page, with its inverter.

    Attributes:
        name: how the page calls the two.
        entry: the editor.
        mate: the inverter.
    """

    name: str
    entry: Entry
    mate: str

    @property
    def file(self) -> str:
        """Name of the sheet."""
        return self.name.replace("+", "-") + ".png"


def edits_for(shown: Shown, model: Model) -> list[demo.Edit]:
    """The demonstration's edits, made by this editor."""
    _, edits = demo.examples()
    entry, mate = shown.entry, shown.mate
    return [
        replace(e, model=model.name, inverter=mate, editor=entry.name, edit_options={})
        for e in edits
        if e.demo
    ]


def masked(shown: Shown, model: Model) -> list[demo.Done]:
    """Pairs of the paired set, edited inside their masks."""
    entry, mate = shown.entry, shown.mate
    items = [i for i in Suite.paired() if i.mask().any() and not i.mask().all()][::STRIDE][:SHOWN]
    done = []
    for item in items:
        inversion = api.invert(model, item.image, item.source, method=mate)
        mask = Image.fromarray(item.mask())
        result = api.edit(inversion, item.target, editor=entry.name, mask=mask)
        edit = demo.Edit(item.id, item.kind, item.target, model.name, mate, entry.name)
        done.append(demo.Done(edit, item.source, item.image, result.original_size(), result.record))
    return done


def make(shown: Shown, model: Model, out: Path) -> str:
    """Draw one editor's sheet; its line of the table."""
    entry = shown.entry
    if entry.facts.get("mask"):
        done = masked(shown, model)
    else:
        done = list(demo.make(edits_for(shown, model), demo.examples()[0]))
    save_image(demo.sheet(done).quantize(COLOURS), out / shown.file)
    record = done[0].record
    nfe, mate = record["nfe"], record["inverter"]
    # All edits of a sheet run as one batch with one record.
    seconds = (record["seconds"] + record["inversion"]["seconds"]) / record["images"]
    source = entry if shown.name == entry.name else get("invert", mate)
    paper = f"{source.paper.title}, {source.paper.year}"
    link = f"[{paper}](https://arxiv.org/abs/{source.paper.arxiv})" if source.paper.arxiv else paper
    # The anchor that Markdown makes of a heading has no plus.
    name = f"[{shown.name}](#{shown.name.replace('+', '')})"
    return f"| {name} | {mate} | {nfe:.0f} | {seconds:.1f} | {link} |"


def section(shown: Shown) -> str:
    """What the page says about an editor."""
    summary = shown.entry.summary
    if shown.name != shown.entry.name:
        summary = f"{get('invert', shown.mate).summary}; then {summary}"
    return f"## {shown.name}\n\n{summary}\n\n![{shown.name}]({shown.file})\n"


def chosen(model: Model, names: Sequence[str] | None) -> list[Shown]:
    """The editors asked for, or all that the model can serve."""
    if names is None:
        names = [e.name for e in retour.methods(task="edit")]
    found = []
    for name in names:
        mate, _, editor = name.rpartition("+")
        entry = get("edit", editor)
        if entry.needs <= model.capabilities:
            found.append(Shown(name, entry, mate or api.usual_inverter(editor, model)))
    return found


def parts(page: str) -> tuple[dict[str, str], dict[str, str]]:
    """Lines of the table and sections of a page, by editor."""
    lines = {m[1]: m[0] for m in re.finditer(r"^\| \[([\w+-]+)\]\(#.*$", page, re.MULTILINE)}
    sections = re.split(r"^(?=## )", page, flags=re.MULTILINE)[1:]
    return lines, {text.split()[1]: text.rstrip("\n") + "\n" for text in sections}


def main() -> None:
    """Make the sheets and the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="emoji-unet")
    parser.add_argument("--editors", help="names, with commas between; all that fit by default")
    parser.add_argument("--flow", action="store_true", help="the page of the flow family")
    parser.add_argument("--out", type=Path, default=Path("docs/editors"))
    given = parser.parse_args()
    model = retour.load(given.model)
    given.out.mkdir(parents=True, exist_ok=True)
    page = given.out / "README.md"
    lines, sections = parts(page.read_text(encoding="utf-8") if page.exists() else "")
    known = list(FLOW) if given.flow else [e.name for e in retour.methods(task="edit")]
    names = given.editors.split(",") if given.editors else known
    for shown in chosen(model, names):
        lines.pop(shown.name, None)
        try:
            with quiet():
                lines[shown.name] = make(shown, model, given.out)
        except RetourError as error:
            # An editor that needs more than a prompt: drag points, say.
            sections[shown.name] = (
                f"## {shown.name}\n\n{shown.entry.summary}\n\nNot shown here: {error}.\n"
            )
            continue
        sections[shown.name] = section(shown)
        print(lines[shown.name], flush=True)
    head = HEAD.format(
        title="What the flow editors make" if given.flow else "What every editor makes",
        command=f"--model {model.name}" + (" --flow" if given.flow else ""),
        fingerprint=model.fingerprint,
        other=OTHER[given.flow],
        steps=model.default_steps,
        guidance=model.default_guidance,
    )
    table = "\n".join(lines[name] for name in known if name in lines)
    text = head + table + "\n\n" + "\n".join(sections[n] for n in known if n in sections)
    with atomic_write(page) as path:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
