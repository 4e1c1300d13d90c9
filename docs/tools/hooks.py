"""What mkdocs does beside reading the committed pages: it writes those that the code decides.

Generated at every build, never committed: a page for each method, the command line, the changelog.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(__file__))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import commands  # noqa: E402
import methods  # noqa: E402
from markup import Maths, from_docstring, table  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402

from retour.catalogue import TITLES  # noqa: E402
from retour.evaluate.metrics import METRICS  # noqa: E402

METRICS_MARK = "<!-- metrics -->"
CHANGELOG = Path(__file__).parents[2] / "CHANGELOG.md"
ROW = re.compile(r"^\| `([\w-]+)` \|(.*)$")
MATE = re.compile(r" `([\w-]+)` \|")


def on_config(config: Any) -> Any:
    """Formulas in all pages, and a menu entry for each method."""
    config.markdown_extensions.append(Maths())
    for section in config.nav:
        if "Methods" in section:
            section["Methods"].extend(methods.navigation())
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    pages = {
        **dict(methods.pages()),
        "reference/cli.md": commands.page(),
        "changelog.md": CHANGELOG.read_text(encoding="utf-8"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Names in the table of all methods lead to their pages; metrics are listed."""
    if page.file.src_uri == "methods.md":
        return linked(markdown)
    return markdown.replace(METRICS_MARK, metrics()) if METRICS_MARK in markdown else markdown


def metrics() -> str:
    """Table of the benchmark's columns."""
    head, rows = ["column", "what it is", "unit", "better"], []
    for name, metric in METRICS.items():
        said = (inspect.getdoc(metric) or metric.title).split("\n\n")[0]
        rows.append([f"`{name}`", from_docstring(said), metric.unit, metric.better])
    return table(head, rows)


def linked(markdown: str) -> str:
    """The page of all methods, with links to the page of each."""
    tasks = {title: task for task, title in TITLES.items()}
    task, lines = "", []
    for line in markdown.splitlines():
        if line.startswith("## "):
            task = tasks[line[3:]]
        row = ROW.match(line)
        if row:
            rest = row[2]
            if task == "edit":
                rest = MATE.sub(r" [`\1`](methods/invert/\1.md) |", rest, count=1)
            line = f"| [`{row[1]}`](methods/{task}/{row[1]}.md) |{rest}"
        lines.append(line)
    return "\n".join(lines)
