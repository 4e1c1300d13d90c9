"""The page as text: complete, escaped, closed to the network."""

import base64
import hashlib
import json
import re

import pytest

from evaluate.bench_folder import build, rows_of, write
from retour.evaluate.report import page, report, tables

HOSTILE = '<script>alert("x")</script> "\' & </script><!-- \u2028 ]]>'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bench"), limit=7)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder where everything that is text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    plan = {"command": HOSTILE, "suite": HOSTILE, "versions": {HOSTILE: HOSTILE}, "seed": HOSTILE}
    build(folder, limit=2, prompts=(HOSTILE, HOSTILE + " b"), plan=plan)
    texts = {"kind": HOSTILE, "split": HOSTILE, "inverter": HOSTILE, "editor": HOSTILE}
    rows = [{**row, **texts, "run": f"{HOSTILE} {row['run']}"} for row in rows_of(folder)]
    write(folder, rows)
    facts = {"background_psnr": {key: HOSTILE for key in ("title", "unit", "backbone")}}
    (folder / "summary.json").write_text(json.dumps({"metrics": facts}))
    return folder


def text_of(folder, tmp_path, **options):
    return report(folder, tmp_path / "page.html", **options).path.read_text()


def blocks(text):
    """JSON blocks by id."""
    found = re.findall(r'<script type="application/json" id="(.+?)">(.*?)</script>', text, re.S)
    return {name: json.loads(body) for name, body in found}


def test_the_page_lies_in_the_folder_and_its_size_is_told(made):
    written = report(made)
    assert written.path == made.resolve() / "report.html"
    assert written.size == written.path.stat().st_size and written.notes == ()


def test_data_and_table_are_in_the_page(made, tmp_path):
    text = text_of(made, tmp_path)
    found = blocks(text)
    data = found["data"]
    assert len(found) == 1 + 7 and len(data["items"]) == 7 and len(data["kinds"]) == 8
    assert data["cells"][""][0][0]["mean"] == "inf"
    for run in data["runs"]:
        label = run["label"].replace("+", "+<wbr>")
        assert f'<span class="label">{label}</span>' in text
    assert "retour bench --suite paired -o bench" in text and "5a1e5a1e" in text


def test_text_that_is_hostile_stays_text(hostile, tmp_path):
    text = text_of(hostile, tmp_path)
    assert "<script>alert" not in text
    found = blocks(text)
    assert len(found) == 3
    assert found["data"]["kinds"][1]["key"] == HOSTILE
    source = found["data"]["items"][0]["source"]
    assert " ".join(word for word, _ in source) == " ".join(HOSTILE.split())
    # Of the scripts that end, all are ours.
    assert text.count("</script>") == len(found) + 1


def test_json_never_ends_its_element():
    told = page.escaped({"a": "</script><!--\u2028&", "b": float("inf")})
    assert not set("<>&\u2028") & set(told)
    assert json.loads(told) == {"a": "</script><!--\u2028&", "b": "inf"}


def test_the_policy_allows_the_own_script_and_style_alone(made, tmp_path):
    text = text_of(made, tmp_path)
    policy = re.search(r'Content-Security-Policy" content="(.+?)">', text)[1]
    parts = dict(part.split(" ", 1) for part in policy.replace("&#39;", "'").split("; "))
    assert parts["default-src"] == "'none'" and parts["img-src"] == "data:"
    for name, pattern in {
        "script": r"<script>(.*?)</script>",
        "style": r"<style>(.*?)</style>",
    }.items():
        (body,) = re.findall(pattern, text, re.S)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert parts[f"{name}-src"] == f"'sha256-{digest}'"


def test_nothing_is_fetched(made, tmp_path):
    text = text_of(made, tmp_path)
    text = text.replace("http://www.w3.org/2000/svg", "")  # The name of a namespace.
    assert not re.findall(r"https?://|@import|<link|<iframe|\bfetch\(", text)
    assert not re.findall(r'(?:src|href)="(?!#)', text)


def test_what_is_left_out_is_said(made, tmp_path, monkeypatch):
    whole = report(made, tmp_path / "whole.html").size
    pictures = page.gallery
    half = lambda bench, room: pictures(bench, room // 100)  # noqa: E731
    monkeypatch.setattr(page, "gallery", half)
    monkeypatch.setattr(tables, "MAX_RUNS_COMPARED", 3)
    written = report(made, tmp_path / "page.html", max_mib=8)
    assert written.size < whole
    kept = len(blocks(written.path.read_text())) - 1
    assert 0 < kept < 7
    assert written.notes[0] == (
        f"Pictures of {7 - kept} of 7 edits are left out, to keep the page below 8 MiB; "
        "the figures are of all of them."
    )
    assert "there are 5 runs" in written.notes[1]
    assert all(note in written.path.read_text() for note in written.notes)


def test_the_bound_is_kept_and_used(made, tmp_path, monkeypatch):
    whole = report(made, tmp_path / "whole.html").size
    monkeypatch.setattr(page, "MIB", 1)
    for bound in (whole - 1, whole - 20_000, whole // 2):
        written = report(made, tmp_path / "page.html", max_mib=bound)
        # One more edit would not have fitted: they have about 40 kB each.
        assert bound - 80_000 < written.size <= bound and written.notes
    assert report(made, tmp_path / "page.html", max_mib=whole + 2_000).notes == ()


def test_a_failure_leaves_an_older_page_as_it_was(tmp_path, monkeypatch):
    folder = build(tmp_path / "bench", limit=2)
    path = report(folder).path
    before = path.read_bytes()
    (folder / "results.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged"):
        report(folder)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("value", "digits", "told"),
    [(None, 1, "n/a"), ("inf", 1, "∞"), ("-inf", 1, "−∞"), (-1.25, 1, "−1.2"), (2, 2, "2.00")],
)
def test_figures(value, digits, told):
    assert page.figure(value, digits) == told
