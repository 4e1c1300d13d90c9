"""Every code block of README and docs runs; those that cannot say why, and at least parse.

The blocks of a page run in order in one folder that holds the example pictures; its Python blocks
share one namespace. A block is left out by the comment `<!-- not run: reason -->` before it. A
block titled like a file (```csv title="jobs.csv") is written as that file. Pages say what a reader
would type, with default steps; here the embedded models take few.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from retour import _inputs, cli
from retour.core import registry
from retour.models import load as loading

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "src" / "retour" / "examples"
STEPS = 2
FENCE = re.compile(r"^( *)```(\w*)(?: +title=\"([^\"]+)\")?[^\n]*\n(.*?)^\1```$", re.M | re.S)
MARK = re.compile(r"<!-- not run: (.+?) -->\s*\Z")
SHELL = ("sh", "console")
RUN = (*SHELL, "python")
# Shown, and nothing that could run.
SHOWN = ("bibtex", "csv", "json", "text", "yaml")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    title: str
    text: str
    reason: str

    def __str__(self):
        return f"{self.page}:{self.line}"

    @property
    def commands(self):
        """Lines of a shell block, continued ones joined; of a console, those with a prompt."""
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks_of(page, text):
    for found in FENCE.finditer(text):
        mark = MARK.search(text[: found.start()])
        line = text[: found.start()].count("\n") + 1
        body = textwrap.dedent(found[4])
        yield Block(page, line, found[2], found[3] or "", body, mark[1] if mark else "")


def all_pages():
    docs = sorted((ROOT / "docs").rglob("*.md"))
    return [Path("README.md"), *(page.relative_to(ROOT) for page in docs)]


BLOCKS = [
    block
    for page in all_pages()
    for block in blocks_of(page, (ROOT / page).read_text(encoding="utf-8"))
]
PAGES = sorted({b.page for b in BLOCKS if b.language in RUN and not b.reason})


@functools.lru_cache
def load_once(load):
    """Models of the pages, each loaded once, with few default steps."""
    kept = {}

    def loaded(model, **options):
        key = (str(model), *sorted(options.items()))
        if not isinstance(model, (str, os.PathLike)):
            return load(model, **options)
        if key not in kept:
            kept[key] = load(model, **options)
            kept[key].default_steps = STEPS
        return kept[key]

    return loaded


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as the pages expect it, and nothing left behind in this process."""
    for folder in ("examples", "src/retour/examples"):
        shutil.copytree(EXAMPLES, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    loaded = load_once(loading.load)
    for module in (loading, _inputs):
        monkeypatch.setattr(module, "load", loaded)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_the_blocks_of_a_page_run(page, place, monkeypatch):
    name = f"page_{page.stem.replace('-', '_').lower()}"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    done = []
    for block in (b for b in BLOCKS if b.page == page and not b.reason):
        if block.title:
            (place / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # Blank lines before it, so that errors name the page's own lines.
            source = "\n" * block.line + block.text
            exec(compile(source, str(ROOT / page), "exec"), vars(module))
        for command in block.commands if block.language in SHELL else ():
            run_command(command, block)
        done.append(block)
    assert any(block.language in RUN for block in done)


def run_command(command, block):
    words = shlex.split(command)
    if words[0] == "retour" and not {"|", ">", "&&", "<"}.intersection(words):
        assert cli.run(words[1:]) == 0, f"{block}: {command}"
    else:
        subprocess.run(["bash", "-ec", command], check=True, timeout=120)


def test_every_block_is_of_a_known_kind():
    """A block without a language, or of a strange one, would go untested unnoticed."""
    strange = {str(b): b.language for b in BLOCKS if b.language not in (*RUN, *SHOWN)}
    assert strange == {}
    for page in all_pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        fences = len(re.findall(r"^ *```", text, re.M))
        assert fences == 2 * len([b for b in BLOCKS if b.page == page]), page
        assert not re.search(r"\n\n    (?:retour|python|pip|import) ", FENCE.sub("", text)), page


def test_blocks_that_do_not_run_say_why():
    """Prints them (`pytest -rP`); a mark before anything else would leave nothing out."""
    marked = [b for b in BLOCKS if b.reason]
    for block in marked:
        print(f"{block}: {block.reason}")
    assert all(len(b.reason.split()) > 1 and b.language in RUN for b in marked)
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in all_pages()]
    assert len(marked) == sum(text.count("<!-- not run: ") for text in texts)


def shell_commands():
    found = [(b, c) for b in BLOCKS if b.language in SHELL for c in b.commands]
    return [pytest.param(b, c, id=f"{b}-{k}") for k, (b, c) in enumerate(found)]


class Parsed(Exception):
    """Stops a script once it has read its arguments."""


@pytest.mark.parametrize("block, command", shell_commands())
def test_every_command_of_the_docs_parses(block, command, monkeypatch):
    """Commands that take too long to run, too: their options exist."""
    check_command(shlex.split(command, comments=True), monkeypatch)


def check_command(words, monkeypatch):
    while words and re.match(r"^[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "retour":
        check_retour(words[1:])
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{word}:", makefile, re.M) for word in words[1:])
    elif words[0] == "python" and words[1] != "-c":
        check_script(words[1:], monkeypatch)


@functools.lru_cache(1)
def retours_commands():
    return typer.main.get_command(cli.app).commands


def check_retour(words):
    name, rest = words[0], words[1:]
    assert name in retours_commands(), f"there is no command {name!r}"
    stops = [k for k, word in enumerate(rest) if word in (">", "|", "&&")]
    retours_commands()[name].make_context(name, rest[: stops[0]] if stops else rest)


def check_script(words, monkeypatch):
    real = argparse.ArgumentParser.parse_args

    def parse(self, *given, **named):
        real(self, *given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    module = words[0] == "-m"
    monkeypatch.setattr(sys, "argv", words[module:])
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        if module:
            sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__")
        else:
            monkeypatch.syspath_prepend(str((ROOT / words[0]).parent))
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")


# --- The site's own code, where its extra is installed --------------------------------------------


@pytest.fixture
def tools(monkeypatch):
    for name in ("latex2mathml", "mkdocs", "griffe"):
        pytest.importorskip(name)
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))


def test_formulas_are_drawn(tools):
    import markdown
    from markup import Maths, from_docstring, mathml

    text = "For :math:`x_{src}` of\n\n.. math::\n    a &= b \\\\\n    c &= d\n\nsee :class:`~a.B`."
    plain = from_docstring(text)
    assert "$x_{src}$" in plain and r"\begin{align*}" in plain and plain.endswith("see `a.B`.")
    html = markdown.markdown(plain + "\n\n`$5` and $6 or $7.", extensions=[Maths()])
    assert html.count("<math") == 2 and html.count("<mtr>") == 2
    assert "<mtext>src</mtext>" in html and "<code>$5</code>" in html and "$6 or $7" in html
    with pytest.raises(ValueError, match="nosuch"):
        mathml(r"\nosuch x")


def test_every_method_has_a_page_whose_formulas_are_drawn(tools):
    import markdown
    import methods
    from markup import Maths

    for path, text in methods.pages():
        assert "## What it does" in text and "## What proves it" in text and "@misc{" in text
        html = markdown.markdown(text, extensions=[Maths(), "tables", "fenced_code"])
        bare = re.sub(r"<(code|pre|math).*?</\1>", "", html, flags=re.S)
        assert not re.search(r"\$\$|:math:|\\[a-z]+\{", bare), path


def test_examples_of_the_methods_pages_are_sound(tools, monkeypatch):
    import methods

    for entry in registry.entries():
        shell, python = methods.example(entry)
        compile(python, entry.name, "exec")
        for command in shell.replace("\\\n", " ").splitlines():
            check_command(shlex.split(command), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("entry", registry.entries(), ids=lambda e: f"{e.task}-{e.name}")
def test_examples_of_the_methods_pages_run(entry, tools, place):
    import methods
    from PIL import Image

    picture = Image.open("examples/apple.png").convert("RGB")
    picture.save("blurred.png")
    picture.convert("L").point(lambda v: 255 * (v < 140)).save("mask.png")
    _, python = methods.example(entry)
    exec(compile(python.replace("grid(20)", "grid(4)"), entry.name, "exec"), {})


def test_the_table_of_methods_leads_to_their_pages(tools):
    import hooks
    import methods

    from retour import catalogue

    linked = hooks.linked(catalogue.page())
    for entry in registry.entries():
        assert f"| [`{entry.name}`]({methods.path(entry)}) |" in linked


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tools, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=600)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(registry.entries())
    outside = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//")
    styles = re.compile(r"<link\b[^>]*\bhref=\"(?:https?:)?//")
    for page in pages:
        html = page.read_text(encoding="utf-8")
        assert not outside.search(html) and not styles.search(html), page
    formulas = (tmp_path / "methods" / "edit" / "p2p" / "index.html").read_text(encoding="utf-8")
    assert formulas.count("<math") > 5 and "@misc{p2p2022" in re.sub(r"<[^>]*>", "", formulas)
