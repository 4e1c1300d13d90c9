from pathlib import Path

from retour import catalogue
from retour.core.registry import TASKS, entries

DOCS = Path(__file__).parents[1] / "docs" / "methods.md"


def test_the_docs_page_is_what_the_registry_says():
    """If this fails: `retour methods --markdown > docs/methods.md`."""
    assert DOCS.read_text(encoding="utf-8") == catalogue.page()


def test_every_method_has_a_line_and_every_task_a_title():
    text = catalogue.page()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(lines) == len(entries())
    assert set(catalogue.TITLES) >= set(TASKS)
    widths = {line.count(" | ") for line in lines}
    assert widths == {6, 7}


def test_a_choice_of_methods():
    text = catalogue.page([e for e in entries("edit") if e.name == "p2p"])
    assert "## Editors" in text and "## Solvers" not in text
    assert "| `p2p` |" in text and "(https://arxiv.org/abs/2208.01626)" in text
