"""Tables of the docs: each has a command above it, and one command types them all."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = """# Figures

## First

<!-- not run: takes minutes -->
```sh
echo run >> count
python -c 'print("| x | wide a | b |\\n| --- | --- | --- |\\n| p | 1.5 | 2.5 |")'
echo "| q | 3.5 | 4.5 |"
```

| x | b |
| --- | --- |
| q | 0.5 |

## Second

Nothing was measured here.

| x | what |
| --- | --- |
| q | 12 |
"""


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    (folder / "figures.md").write_text(PAGE, encoding="utf-8")
    return folder


def call(tables, docs, out, *more):
    return tables.main(["--docs", str(docs), "-o", str(out), *more])


def test_every_table_of_figures_in_the_docs_has_its_command(tables):
    """Tables are counted another way: runs of lines with bars of which one holds a decimal."""
    found = tables.jobs(DOCS)
    assert {job.name: job.command for job in found if not job.command} == {}
    assert len({job.name for job in found}) == len(found)
    counts = {}
    for page in DOCS.rglob("*.md"):
        groups = re.split(r"\n(?!\|)", page.read_text(encoding="utf-8"))
        measured = [g for g in groups if re.search(r"\| -?\d*\.\d+\*?(?: \[| %| \|)", g)]
        if measured:
            counts[page] = len(measured)
    known = [place.page for job in found for place in job.places]
    assert counts == {page: known.count(page) for page in set(known)}
    assert sum(counts.values()) >= 11


def test_the_commands_lead_to_what_is_there(tables):
    """Those in blocks are parsed with their options by the tests of the docs."""
    for job in tables.jobs(DOCS):
        for line in job.command.splitlines():
            words = [w for w in line.split() if not re.match(r"[A-Z_]+=", w)]
            if words[:1] == ["python"] and words[1] != "-m":
                assert (ROOT / words[1]).is_file(), job.name


def test_a_table_is_rebuilt_and_what_is_done_is_left_out(tables, docs, tmp_path, capsys):
    out = tmp_path / "out"
    assert call(tables, docs, out) == 0
    assert "figures/first: 2 cells, 1 not as in the docs" in capsys.readouterr().out
    assert (out / "figures" / "first.md").read_text() == "| x | b |\n| --- | --- |\n| q | 4.5 |\n"
    assert "| q | 4.5 |\n\n- q, b: 0.5 -> 4.5" in (out / "tables.md").read_text()
    assert call(tables, docs, out) == 0
    assert "done before" in capsys.readouterr().out
    assert (out / "work" / "count").read_text() == "run\n"
    assert call(tables, docs, out, "--again", "--write") == 0
    assert (out / "work" / "count").read_text() == "run\nrun\n"
    assert (docs / "figures.md").read_text() == PAGE.replace("| q | 0.5 |", "| q | 4.5 |")


def test_several_tables_of_a_page_are_written(tables, docs, tmp_path):
    """The first one grows, and moves the second."""
    page = docs / "figures.md"
    first = PAGE.replace(
        "| x | b |\n| --- | --- |\n| q | 0.5 |",
        "| x | wide a | b |\n| - | - | - |\n| q | 0.5 | 1 |",
    )
    page.write_text(first + PAGE.replace("# Figures", "# More").replace("First", "Third"))
    assert call(tables, docs, tmp_path / "out", "--write") == 0
    text = page.read_text()
    assert "| p | 1.5 | 2.5 |\n| q | 3.5 | 4.5 |\n\n" in text and "| q | 4.5 |\n\n" in text
    assert "0.5 |" not in text.replace("| q | 3.5 | 4.5 |", "").replace("1.5 | 2.5", "")


def test_a_killed_block_is_run_again(tables, docs, tmp_path):
    """Nothing is done before its commands have ended well."""
    page, out = docs / "figures.md", tmp_path / "out"
    page.write_text(PAGE.replace("python -c", "[ -e there ] || { touch there; kill -9 $$; }\n: "))
    assert call(tables, docs, out) == 1
    assert not (out / "figures" / "first.json").exists()
    page.write_text(PAGE)
    assert call(tables, docs, out) == 0
    done = json.loads((out / "figures" / "first.json").read_text())
    page.write_text(PAGE.replace("echo run", "echo other"))
    assert call(tables, docs, out) == 0
    assert json.loads((out / "figures" / "first.json").read_text())["command"] != done["command"]


def test_a_command_may_write_the_page_itself(tables, docs, tmp_path):
    words = "mkdir -p docs; printf '| x | b |\\n| - | - |\\n| q | 7.5 |\\n' > docs/figures.md; :"
    page, out = docs / "figures.md", tmp_path / "out"
    page.write_text(PAGE.replace("python -c", f"{words} "), encoding="utf-8")
    assert call(tables, docs, out) == 0
    assert (out / "figures" / "first.md").read_text().endswith("| q | 7.5 |\n")


def test_what_fails_or_prints_something_else_is_said(tables, docs, tmp_path, capsys):
    page = docs / "figures.md"
    page.write_text(PAGE.replace("```sh", "```text"))
    assert call(tables, docs, tmp_path / "a") == 1
    assert "figures: has no command" in capsys.readouterr().out
    page.write_text(PAGE.replace("wide a", "b c").replace("| b |\\n", "| d |\\n"))
    assert call(tables, docs, tmp_path / "b") == 0  # "b" is a word of "b c"
    page.write_text(PAGE.replace("| q | 3.5", "| r | 3.5"))
    assert call(tables, docs, tmp_path / "c") == 1
    assert "1 not rebuilt" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"no table is called third:\n  figures/first"):
        call(tables, docs, tmp_path / "d", "--only", "third")


def test_retour_and_python_are_those_of_this_checkout(tables, docs, tmp_path):
    """A command of the docs finds the scripts by the path that is written there."""
    page, out = docs / "figures.md", tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / "work" / "benchmarks").symlink_to(tmp_path / "another checkout")
    text = PAGE.replace("echo run >> count", "retour cite direct > v; ls benchmarks/tables.py > t")
    page.write_text(text, encoding="utf-8")
    assert call(tables, docs, out) == 0
    assert "@misc" in (out / "work" / "v").read_text()
    assert (out / "work" / "t").read_text() == "benchmarks/tables.py\n"


def test_a_command_in_backticks_counts_for_a_page_without_blocks(tables, docs, capsys):
    page = PAGE.replace("# Figures\n", "# Figures\n\nMade by `retour\nmethods --json`.\n")
    page = re.sub(r"<!-- .*?```\n", "", page, flags=re.S, count=1)
    page = page.replace("echo", "").replace("```", "")
    (docs / "figures.md").write_text(page, encoding="utf-8")
    assert call(tables, docs, docs / "out", "--list") == 0
    assert "figures (1):\n  retour methods --json" in capsys.readouterr().out


def test_columns_and_turned_differences_are_taken_from_a_wider_table(tables):
    wide = tables.Table.read(
        "| run | background SSIM x 100 | CLIP similarity, whole x 100 | CLIP, part x 100 | NFE |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| a | 1.0 | 2.0 [1.0, 3.0] | 9 | 4 |\n"
        "| b | 5.0 | 6.0 | 9 | 8 |\n"
        "| a - b | -0.5* [-1.0, -0.25] | 0.0 [-2.0, 1.0] | 9 |  |\n"
    )
    wanted = tables.Table(
        ("run", "SSIM x 100", "CLIP x 100", "NFE"),
        (("b", "", "", ""), ("b - a", "", "", "")),
    )
    assert tables.rebuilt(wanted, [wide]).rows == (
        ("b", "5.0", "6.0", "8"),
        ("b - a", "0.5* [0.25, 1.0]", "0.0 [-1.0, 2.0]", ""),
    )
    assert tables.rebuilt(tables.Table(("run", "PSNR"), (("a", ""),)), [wide]) is None
    assert tables.rebuilt(tables.Table(("run", "NFE"), (("c", ""),)), [wide]) is None
    # One with the very heads stands as it is: methods that came since are in it.
    assert tables.rebuilt(tables.Table(wide.heads, ()), [wide]) == wide


def test_rows_of_one_name_are_told_apart_by_their_order(tables):
    """Flow solvers have a row for each number of steps."""
    heads = ("solver", "steps", "noise")
    old = tables.Table(heads, (("euler", "4", "0.5"), ("euler", "8", "0.3"), ("heun", "4", "0.1")))
    assert tables.differing(old, old) == []
    new = tables.Table(heads, (*old.rows[:1], ("euler", "8", "0.2"), *old.rows[2:]))
    assert tables.differing(old, new) == ["euler, noise: 0.3 -> 0.2"]
    more = tables.Table(heads, (*old.rows, ("heun", "8", "0.0")))
    assert [line.split(" -> ")[0] for line in tables.differing(old, more)] == [
        f"heun, {head}: none" for head in heads
    ]
    few = tables.Table(("solver", "noise"), (("euler", ""), ("euler", "")))
    assert tables.rebuilt(few, [old]).rows == (("euler", "0.5"), ("euler", "0.3"))


def test_rows_of_several_names_are_told_apart_by_all_of_them(tables):
    """Restoration has a row for each task and method, of which the docs may show some."""
    rows = (("sr", "none", "inf", "24.1"), ("sr", "ours", "2.0", "26.2"), ("blur", "ours", "-", ""))
    wide = tables.Table(("task", "method", "x", "PSNR"), rows)
    few = tables.Table(("task", "method", "PSNR"), (("blur", "ours", ""), ("sr", "ours", "25.0")))
    found = tables.rebuilt(few, [wide])
    assert found.rows == (("blur", "ours", ""), ("sr", "ours", "26.2"))
    assert tables.differing(few, found) == ["sr, ours, PSNR: 25.0 -> 26.2"]
    assert tables.rebuilt(tables.Table(few.heads, (("sr", "theirs", ""),)), [wide]) is None


def test_the_scripts_print_the_heads_of_their_tables_in_the_docs(tables):
    """What `retour bench` prints is tested with it; here the scripts with tables of their own."""
    found = {job.name: job for job in tables.jobs(DOCS)}
    text = (ROOT / "benchmarks" / "inversion.py").read_text(encoding="utf-8")
    for head in found["benchmarks/inverters-alone"].places[0].table.heads[:3]:
        assert head in text
    for name, script in (("batches", "batch"), ("exactness", "exactness")):
        [place] = found[f"benchmarks/{name}"].places
        assert place.table.heads[0] in (ROOT / "benchmarks" / f"{script}.py").read_text()


def test_the_sizes_of_the_embedded_models_are_those_of_their_files():
    """The one table of facts that is no measurement; a stored position table is no parameter."""
    import math
    import struct

    rows = re.findall(
        r"^\| `([\w-]+)` \|.*\| ([\d.]+) M \|$", (DOCS / "models.md").read_text(), re.M
    )
    own = {"emoji-unet": "unet", "emoji-mmdit": "transformer"}
    weights = ROOT / "src" / "retour" / "weights"
    assert {name for name, _ in rows} == {path.name for path in weights.iterdir() if path.is_dir()}
    for name, said in rows:
        count = 0
        for file in (weights / name / own.get(name, "")).glob("*.safetensors"):
            data = file.read_bytes()
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            header.pop("__metadata__", None)
            count += sum(math.prod(tensor["shape"]) for tensor in header.values())
        assert float(said) == pytest.approx(count / 1e6, abs=0.015), name
