"""A page for every registered method: what its source says, what it declares, what proves it."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import NoneType, UnionType

from griffe import Docstring, DocstringSectionKind, parse_google
from markup import from_docstring, table
from mkdocs.plugins import get_plugin_logger

from retour.api import cite
from retour.catalogue import TITLES
from retour.core.registry import Entry, entries

# A warning stops the strict build.
LOG = get_plugin_logger("methods")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FOLDER = "methods"
SOURCE = "a 3d render of a red apple on a sky blue background"
TARGET = "a 3d render of a green apple on a sky blue background"
ONE = {"solver": "Solver", "invert": "Inverter", "edit": "Editor", "attack": "Attack"}
KINDS = {
    "str": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "tuple": "tuple",
    "Mapping": "mapping",
    "Sequence": "list",
}
HELPER = re.compile(r":mod:`~?(?:retour)?\.?([\w.]*)`")


def pages() -> Iterator[tuple[str, str]]:
    """Path below docs/ and Markdown of each method's page."""
    for entry in entries():
        yield path(entry), page(entry)


def path(entry: Entry) -> str:
    """Where a method's page lies below docs/."""
    return f"{FOLDER}/{entry.task}/{entry.name}.md"


def navigation() -> list[dict[str, list[dict[str, str]]]]:
    """The methods' part of the menu: one section a task."""
    tasks = dict.fromkeys(entry.task for entry in entries())
    return [
        {TITLES.get(task, task.capitalize()): [{e.name: path(e)} for e in entries(task)]}
        for task in tasks
    ]


def page(entry: Entry) -> str:
    """Markdown of one method's page."""
    parts = [
        f"---\ntitle: {entry.name}\ndescription: {entry.summary!r}\n---",
        f"# {entry.name}",
        f"**{ONE.get(entry.task, TITLES.get(entry.task, entry.task))}:** {entry.summary}.",
        _facts(entry),
        _picture(entry),
        f"## Use it\n\n{_usage(entry)}",
        f"## Options\n\n{_options(entry)}",
        f"## What it does\n\n{_explained(entry)}",
        f"## What proves it\n\n{_proof(entry)}",
        f"## Cite\n\n```bibtex\n{cite(entry)}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- Facts ----------------------------------------------------------------------------------------


def _facts(entry: Entry) -> str:
    rows = [["evaluations an image", entry.nfe]]
    if entry.exact:
        tolerance = entry.facts.get("exact_to")
        rows.append(["exact", "up to rounding" if tolerance is None else f"to {tolerance:g}"])
    if entry.order is not None:
        rows.append(["order", entry.order])
    if entry.stochastic:
        rows.append(["stochastic", "draws noise, from the seed given"])
    rows.append(["needs of a model", _list(entry.needs) or "nothing"])
    rows.append(["embedded models", _links_to_models(entry)])
    if entry.requires:
        rows.append(["requires of an inversion", _list(entry.requires)])
        rows.append(["goes with", _list(_fitting(entry))])
    if entry.provides:
        rows.append(["offers to editors", _list(entry.provides)])
    if entry.task == "edit":
        rows.append(["inverter by default", _link(entry, "invert", entry.mate)])
        rows.append(["mask", "needed" if entry.facts.get("mask") else "optional"])
    mates = [e.name for e in entries("edit", mate=entry.name)] if entry.task == "invert" else []
    if mates:
        rows.append(["chosen by", ", ".join(_link(entry, "edit", name) for name in mates)])
    paper = f"{entry.paper.title} ({entry.paper.venue or entry.paper.year})"
    arxiv = entry.paper.arxiv
    rows.append(["paper", f"[{paper}](https://arxiv.org/abs/{arxiv})" if arxiv else paper])
    return table(["", ""], [[str(cell) for cell in row] for row in rows if row[1] != ""])


def _list(names: typing.Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _link(entry: Entry, task: str, name: str) -> str:
    above = "" if entry.task == task else f"../{task}/"
    return f"[`{name}`]({above}{name}.md)"


def _fitting(entry: Entry) -> list[str]:
    return [e.name for e in entries("invert") if entry.requires <= e.provides]


@lru_cache(1)
def _capabilities() -> dict[str, frozenset[str]]:
    import retour

    return {name: retour.load(name).capabilities for name in retour.embedded()}


def _links_to_models(entry: Entry) -> str:
    serving = [name for name, offered in _capabilities().items() if entry.needs <= offered]
    return _list(serving)


# Folder below docs/ of the methods' own pictures, and what is said of them.
PICTURES = {
    "edit": (
        "editors",
        "Before and after, made by the embedded models with default options; "
        "[the same edits by every editor](../../editors/README.md).",
    ),
    "invert": (
        "images/inverters",
        "The picture, what comes back from its noise without an edit, and an edit; emoji-unet, "
        "20 steps, default options (`python benchmarks/returns.py`).",
    ),
}
# Pictures of other pages that show a method.
BORROWED = {
    ("attack", "sca"): ("images/attack.png", "attack.md"),
    ("edit", "lazydrag"): ("images/tutorial/drag.png", "tutorial.md"),
    ("restore", "flowchef"): ("images/tutorial/restore.png", "tutorial.md"),
}


def _picture(entry: Entry) -> str:
    folder, said = PICTURES.get(entry.task, ("", ""))
    file = f"{folder}/{entry.name}.png"
    if not said or not (DOCS / file).is_file():
        file, page = BORROWED.get((entry.task, entry.name), ("", ""))
        if not (file and (DOCS / file).is_file()):
            return ""
        said = f"[How it was made](../../{page})."
    return f"![What {entry.name} makes](../../{file})\n\n{said}"


# --- Use ------------------------------------------------------------------------------------------


def _usage(entry: Entry) -> str:
    shell, python = example(entry)
    written = f"```python\n{python}\n```"
    return f"```sh\n{shell}\n```\n\n{written}" if shell else written


def example(entry: Entry) -> tuple[str, str]:
    """A command line ("" where there is none) and a Python program that use a method."""
    makers = {"solver": _sample, "invert": _invert, "edit": _edit, "restore": _restore}
    shell, python = makers.get(entry.task, _attack)(entry)
    return shell.strip(), python.strip()


def _sample(entry: Entry) -> tuple[str, str]:
    return (
        "",
        f'''
import torch

import retour
from retour.core.branches import Branch, Denoiser
from retour.core.loop import walk
from retour.core.registry import get

model = retour.load("emoji-unet")
words = model.embed(["{SOURCE}"])
nothing = model.embed([""])
denoiser = Denoiser(model, [Branch("source", words, nothing, model.default_guidance)])
solver = get("solver", "{entry.name}").make()
noise = torch.randn(1, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
end = walk(solver, denoiser, solver.start(noise), model.grid(20), down=True)
picture = model.decode(end.x)  # (1, 3, 64, 64), from -1 to 1
''',
    )


def _invert(entry: Entry) -> tuple[str, str]:
    model = _model(entry)
    told = "" if model == "emoji-unet" else f" --model {model}"
    return (
        f"""
retour invert examples/apple.png --inverter {entry.name}{told} -o apple.safetensors \\
    --source "{SOURCE}"
retour edit apple.safetensors --editor {_editor_for(entry)} -o green.png \\
    --target "{TARGET}"
""",
        f'''
import retour

model = retour.load("{model}")
inv = retour.invert(
    model,
    "examples/apple.png",
    prompt="{SOURCE}",
    method="{entry.name}",
)
inv.save("apple.safetensors")
out = retour.edit(
    inv,
    "{TARGET}",
    editor="{_editor_for(entry)}",
)
out.save("green.png")
''',
    )


def _editor_for(entry: Entry) -> str:
    """An editor that this inverter was made for and that needs only a prompt; else p2p."""
    made_for = [e for e in entries("edit", mate=entry.name) if _only_prompt(e)]
    own = [e for e in made_for if e.name == entry.name]
    return [*own, *made_for, *entries("edit", name="p2p")][0].name if made_for else "p2p"


def _only_prompt(entry: Entry) -> bool:
    return not entry.facts.get("mask") and "drags" not in _defaults(entry)


def _edit(entry: Entry) -> tuple[str, str]:
    model = _model(entry)
    if "drags" in _defaults(entry):
        return _drag(entry, model)
    told = "" if model == "emoji-unet" else f" --model {model}"
    masked = entry.facts.get("mask")
    mask_option = " --mask mask.png" if masked else ""
    mask_argument = ', mask="mask.png"' if masked else ""
    return (
        f"""
retour edit examples/apple.png --editor {entry.name}{told}{mask_option} -o green.png \\
    --source "{SOURCE}" \\
    --target "{TARGET}"
""",
        f'''
import retour

model = retour.load("{model}")
inv = retour.invert(
    model,
    "examples/apple.png",
    prompt="{SOURCE}",
    method="{entry.mate}",
)
out = retour.edit(
    inv,
    "{TARGET}",
    editor="{entry.name}"{mask_argument},
)
out.save("green.png")
''',
    )


def _drag(entry: Entry, model: str) -> tuple[str, str]:
    return (
        f"""
retour drag examples/apple.png --from 32,40 --to 44,40 --editor {entry.name} -o dragged.png \\
    --source "{SOURCE}" --model {model}
""",
        f'''
import retour

out = retour.drag(
    "{model}",
    "examples/apple.png",
    "32,40>44,40",
    prompt="{SOURCE}",
    editor="{entry.name}",
)
out.save("dragged.png")
''',
    )


def _restore(entry: Entry) -> tuple[str, str]:
    return (
        f"""
retour restore blurred.png --task deblur -O sigma=2 --method {entry.name} -o sharp.png \\
    --prompt "{SOURCE}"
""",
        f'''
import retour
from retour.restorers.operators import make_operator

out = retour.restore(
    "emoji-mmdit",
    "blurred.png",
    make_operator("deblur", sigma=2),
    prompt="{SOURCE}",
    method="{entry.name}",
)
out.save("sharp.png")
''',
    )


def _attack(entry: Entry) -> tuple[str, str]:
    return (
        f"""
retour attack {entry.name} examples/apple.png --label apple -o tested.png \\
    --source "{SOURCE}"
""",
        f'''
import retour

result = retour.attack(
    "emoji-unet",
    "examples/apple.png",
    "apple",
    prompt="{SOURCE}",
    method="{entry.name}",
)
result.save("tested.png")
''',
    )


def _model(entry: Entry) -> str:
    """The first embedded model that serves the method, and the inverter it goes with."""
    needs = entry.needs
    if entry.task == "edit":
        needs = needs | next(e.needs for e in entries("invert", name=entry.mate))
    fitting = [name for name, offered in _capabilities().items() if needs <= offered]
    return "emoji-unet" if "emoji-unet" in fitting else fitting[0]


# --- Options --------------------------------------------------------------------------------------


def _defaults(entry: Entry) -> dict[str, typing.Any]:
    return typing.cast("dict[str, typing.Any]", entry.describe()["options"])


def _options(entry: Entry) -> str:
    fields = dataclasses.fields(entry.options)
    if not fields:
        return "None."
    meanings, hints = _meanings(entry.options), typing.get_type_hints(entry.options)
    defaults = _defaults(entry)
    rows = [
        [f"`{f.name}`", meanings[f.name], f"`{_shown(defaults[f.name])}`", _type(hints[f.name])]
        for f in fields
    ]
    flag = {"invert": "-I", "edit": "-E", "restore": "-R", "attack": "-A"}.get(entry.task)
    given = f" On the command line: `{flag} {fields[0].name}=...`." if flag else ""
    return f"{table(['option', 'meaning', 'default', 'values'], rows)}\nKeyword arguments.{given}"


def _meanings(options: type) -> dict[str, str]:
    """What each option means, by its docstring or that of the class it is inherited from."""
    found: dict[str, str] = {}
    for cls in reversed(options.__mro__):
        text = cls.__dict__.get("__doc__")
        if not text or not dataclasses.is_dataclass(cls):
            continue
        for section in parse_google(Docstring(inspect.cleandoc(text)), warnings=False):
            if section.kind is DocstringSectionKind.attributes:
                found |= {a.name: from_docstring(a.description) for a in section.value}
    missing = [f.name for f in dataclasses.fields(options) if f.name not in found]
    if missing:
        LOG.warning("%s does not say what %s mean", options.__name__, ", ".join(missing))
    return {**dict.fromkeys(missing, ""), **found}


def _type(hint: typing.Any) -> str:
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return " or ".join(_type(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    if hint is NoneType:
        return "none"
    name = getattr(hint, "__name__", str(hint))
    return KINDS.get(name, f"`{name}`")


def _shown(value: typing.Any) -> str:
    return "none" if value is None else repr(value) if value == "" else str(value)


# --- Explanation and proof ------------------------------------------------------------------------


def _explained(entry: Entry) -> str:
    """The module's docstring, the class's where a module has several methods, and the helpers'."""
    name = entry.factory.__module__
    text = _module_doc(name)
    siblings = [e for e in entries() if e.factory.__module__ == name]
    parts = [from_docstring(text)]
    if len(siblings) > 1:
        parts.append(from_docstring(inspect.getdoc(entry.factory) or ""))
    for helper in _helpers(text, name):
        # A block of its own folds away what several methods share.
        body = from_docstring(_module_doc(helper)).replace("\n", "\n    ")
        parts.append(f'??? note "From `{helper}`"\n\n    {body}')
    return "\n\n".join(parts)


def _module_doc(name: str) -> str:
    return inspect.getdoc(importlib.import_module(name)) or ""


def _helpers(text: str, name: str) -> list[str]:
    """Modules of the same package that a docstring refers to and that have no page."""
    package = name.rpartition(".")[0]
    with_page = {e.factory.__module__ for e in entries()}
    found = dict.fromkeys(f"{package}.{m.rpartition('.')[2]}" for m in HELPER.findall(text))
    path = ROOT / "src" / Path(*package.split("."))
    return [m for m in found if m not in with_page and (path / f"{m.split('.')[-1]}.py").is_file()]


@lru_cache(1)
def _tests() -> dict[Path, tuple[str, list[tuple[str, str]]]]:
    """Every test file: its source, and the names and docstrings of its tests."""
    found = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        source = file.read_text(encoding="utf-8")
        tests = [
            (node.name, (ast.get_docstring(node) or "").split("\n\n")[0])
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        ]
        found[file.relative_to(ROOT)] = (source, tests)
    return found


def _proof(entry: Entry) -> str:
    """What the tests of the method's module assert, in the words of their names."""
    module = entry.factory.__module__
    package, _, short = module.removeprefix("retour.").rpartition(".")
    files = [f for f in _tests() if f == Path("tests", package, f"test_{short}.py")]
    files += [f for f in _importing(module) if f not in files]
    shared = (
        "Tests over the whole registry assert what is declared above: exactness, order, cost, "
        "batch equal to loop, equal seeds equal results "
        "(`tests/test_api.py`, `tests/solvers/test_declarations.py`)."
    )
    parts = [shared] + [_file_of_tests(file) for file in files]
    return "\n\n".join(parts)


def _importing(module: str) -> list[Path]:
    wanted = re.compile(rf"^\s*(?:from|import) {re.escape(module)}\b", re.M)
    return [file for file, (source, _) in _tests().items() if wanted.search(source)]


def _file_of_tests(file: Path) -> str:
    lines = [f'??? success "`{file.as_posix()}`"', ""]
    for name, said in _tests()[file][1]:
        sentence = name.removeprefix("test_").replace("_", " ")
        text = " ".join(from_docstring(said).split())
        lines.append(f"    - {sentence}{f': {text}' if text else ''}")
    return "\n".join(lines)
