"""Docstrings to Markdown, and formulas to MathML, which browsers draw without any script.

The sources write formulas and cross references as reStructuredText does; the site is Markdown.
`from_docstring` translates the few roles in use; the `Maths` extension draws what stands between
dollar signs, in docstrings and pages alike.
"""

from __future__ import annotations

import re
import textwrap
import xml.etree.ElementTree as etree
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

FORMULA = re.compile(r":math:`([^`]*)`")
DISPLAY = re.compile(
    r"^( *)\.\. math::[ \t]*(.*\n(?:\1[ \t]+\S.*\n|[ \t]*\n(?=\1[ \t]+\S))*)", re.M
)
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([^`]*)`")
INDEX = re.compile(r"(?<=[_^]\{)[^{}\\]*(?=\})")
WORD = re.compile(r"[a-zA-Z]{2,}")
INLINE = r"(?<![\\$\w])\$(?=[^\s$])([^$\n]*(?:\n[^$\n]+)*?)(?<=[^\s\\])\$(?![\w$])"
BLOCK = r"\$\$\s*([^$]+?)\s*\$\$"
# Code spans have 190, escapes 180: formulas may hold backslashes, code may hold dollars.
PRIORITY = 185


def from_docstring(text: str) -> str:
    """Markdown of a docstring: roles become code spans or formulas between dollars."""
    text = DISPLAY.sub(_display, text + "\n")
    text = FORMULA.sub(lambda m: f"${' '.join(m[1].split())}$", text)
    return ROLE.sub(lambda m: f"`{m[1].lstrip('.')}`", text).strip()


def _display(found: re.Match[str]) -> str:
    indent, body = found[1], textwrap.dedent(found[2]).strip()
    body = "\n".join(line.strip() for line in body.splitlines())
    # Sphinx aligns a formula of several lines at its ampersands; LaTeX wants that said.
    if r"\\" in body and r"\begin{cases}" not in body:
        body = rf"\begin{{align*}}{body}\end{{align*}}"
    return "\n" + textwrap.indent(f"$$\n{body}\n$$\n\n", indent)


def mathml(formula: str, *, block: bool = False) -> str:
    """MathML of a LaTeX formula; several letters in an index are a word, not a product.

    Raises:
        ValueError: a command that the converter does not know.
    """
    plain = INDEX.sub(lambda m: WORD.sub(r"\\text{\g<0>}", m[0]), " ".join(formula.split()))
    plain = plain.replace(r"\arg", r"\operatorname{arg}")
    drawn = convert(plain, display="block" if block else "inline")
    drawn = drawn.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \sim
    unknown = re.search(r">(&|\\[a-zA-Z]*)<", drawn)
    if unknown:
        raise ValueError(f"{unknown[1]!r} is not drawn in the formula {formula!r}")
    return f'<div class="formula">{drawn}</div>' if block else drawn


class _Formula(InlineProcessor):
    def __init__(self, pattern: str, md: Markdown, *, block: bool) -> None:
        super().__init__(pattern, md)
        self.block = block

    def handleMatch(  # type: ignore[override]  # noqa: N802
        self, m: re.Match[str], data: str
    ) -> tuple[etree.Element | str, int, int]:
        """Keep the drawn formula away from other patterns."""
        drawn = mathml(m[1], block=self.block)
        return self.md.htmlStash.store(drawn), m.start(0), m.end(0)


class Maths(Extension):
    """`$inline$` and `$$display$$` formulas."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Register both patterns."""
        md.inlinePatterns.register(_Formula(BLOCK, md, block=True), "maths-block", PRIORITY + 1)
        md.inlinePatterns.register(_Formula(INLINE, md, block=False), "maths", PRIORITY)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
