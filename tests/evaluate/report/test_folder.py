"""Reading a bench folder: what is damaged or missing is refused in one sentence, code 2."""

import json
import shutil
import sys

import numpy as np
import pytest

from evaluate.bench_folder import build, rows_of, write
from retour import cli
from retour.errors import RetourError
from retour.evaluate.report.folder import Bench


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build(tmp_path_factory.mktemp("bench"), limit=7)


@pytest.fixture
def folder(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "bench")


def test_a_folder_is_read_as_it_was_written(made):
    bench, rows = Bench.read(made), rows_of(made)
    assert [run.label for run in bench.runs][:2] == ["copy-input", "vae-ceiling"]
    assert len(bench.edits) == 7 and len(bench.kinds) == 7
    labels, items = [r.label for r in bench.runs], [e.id for e in bench.edits]
    for row in rows:
        place = labels.index(row["run"]), items.index(row["item"])
        assert bench.values["clip_edited"][place] == row["clip_edited"]
        assert bench.images[place] == made / row["image"]
    assert bench.facts["background_psnr"]["unit"] == "dB"
    assert bench.of_kind(None).all() and bench.of_kind("change_object").sum() == 1


def test_columns_without_a_figure_are_left_out_and_gaps_are_nan(folder):
    rows = rows_of(folder)
    for row in rows:
        row["clip_whole"] = None
    rows[0]["truth_distance"] = float("nan")
    write(folder, rows[:-1])
    bench = Bench.read(folder)
    assert "clip_whole" not in bench.values
    assert np.isnan(bench.values["truth_distance"]).sum() == 2


def refused(folder, capsys):
    """What the command says; it writes nothing, nor leaves a temporary file."""
    before = sorted(folder.rglob("*")) if folder.is_dir() else []
    assert cli.run(["report", str(folder)]) == 2
    assert (sorted(folder.rglob("*")) if folder.is_dir() else []) == before
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    return said


def test_no_folder_and_no_results(tmp_path, capsys):
    assert "there is no folder" in refused(tmp_path / "none", capsys)
    assert "holds no results" in refused(tmp_path, capsys)


@pytest.mark.parametrize("name", ["results.parquet", "summary.json"])
def test_an_unfinished_run_says_how_to_go_on(folder, capsys, name):
    (folder / name).unlink()
    said = refused(folder, capsys)
    assert f"has no {name}" in said and "unfinished" in said


def test_a_folder_of_retour_batch_is_told_apart(folder, capsys):
    (folder / "summary.json").unlink()
    (folder / "plan.json").write_text('{"format": "retour-batch/1"}')
    assert "is of `retour batch`, which measures nothing" in refused(folder, capsys)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_table(folder, capsys, keep):
    path = folder / "results.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged or no Parquet file" in refused(folder, capsys)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_a_damaged_summary(folder, capsys, text):
    (folder / "summary.json").write_text(text)
    assert "summary.json" in refused(folder, capsys)


@pytest.mark.parametrize("metrics", [None, 3, ["a"], {"background_psnr": 1}])
def test_odd_metadata_counts_as_none(folder, metrics):
    (folder / "summary.json").write_text(json.dumps({"metrics": metrics}))
    assert Bench.read(folder).facts == {}


def test_missing_columns_rows_and_double_rows(folder, capsys):
    rows = rows_of(folder)
    write(folder, [*rows, rows[3]])
    assert "twice" in refused(folder, capsys)
    write(folder, [{k: v for k, v in row.items() if k != "target"} for row in rows])
    assert "lacks the column 'target'" in refused(folder, capsys)
    write(folder, rows)
    table = folder / "results.parquet"
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"run": pyarrow.array([], pyarrow.string())}), table)
    assert "has no rows" in refused(folder, capsys)


@pytest.mark.parametrize("part", ["images/direct+p2p", "inputs", "truth"])
def test_missing_pictures_are_counted(folder, capsys, part):
    for path in sorted((folder / part).glob("*.png"))[:2]:
        path.unlink()
    said = refused(folder, capsys)
    assert "2 pictures are missing" in said and part in said


def test_a_damaged_picture(folder, capsys):
    path = next((folder / "inputs").glob("*.png"))
    path.write_bytes(path.read_bytes()[:60])
    assert "damaged" in refused(folder, capsys)


def test_masks_are_optional(folder):
    shutil.rmtree(folder / "masks")
    assert cli.run(["report", str(folder)]) == 0


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("image", "../secret.png"),
        ("item", "../../secret"),
        ("image", "a\0b"),
        ("image", "/etc/passwd"),
    ],
)
def test_no_file_outside_of_the_folder_is_read(folder, capsys, column, value):
    shutil.copy(next((folder / "inputs").glob("*.png")), folder.parent / "secret.png")
    rows = rows_of(folder)
    rows[0][column] = value
    write(folder, rows)
    assert "outside of itself" in refused(folder, capsys)


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, capsys):
    secret = shutil.copy(next((folder / "inputs").glob("*.png")), tmp_path / "secret.png")
    path = next((folder / "images" / "direct+p2p").glob("*.png"))
    path.unlink()
    path.symlink_to(secret)
    assert "outside of itself" in refused(folder, capsys)


def test_odd_values_of_text_columns_are_text(folder):
    odd = {"split": 3, "source": ["a"], "target": None, "steps": float("inf"), "guidance": "x"}
    write(folder, [{**row, **odd} for row in rows_of(folder)])
    bench = Bench.read(folder)
    assert bench.edits[0].source == "['a']" and bench.edits[0].target == ""
    assert bench.runs[2].steps is None and bench.runs[2].guidance is None
    assert cli.run(["report", str(folder)]) == 0


def test_labels_do_not_lead_out_either(folder):
    rows = [{**row, "run": f"../../{row['run']}"} for row in rows_of(folder)]
    write(folder, rows)
    from retour.evaluate.report.pictures import attention_path

    bench = Bench.read(folder)
    with pytest.raises(RetourError, match="outside of itself"):
        attention_path(bench, bench.runs[0].label, bench.edits[0].id)


@pytest.mark.parametrize("module", ["pyarrow", "jinja2"])
def test_a_missing_extra_is_named(folder, capsys, monkeypatch, module):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    assert 'pip install "retour[report]"' in refused(folder, capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "page.txt"], "end its name in .htm"),
        (["-o", "nowhere/page.html"], "nowhere"),
        (["--max-mib", "0"], "at least 1"),
    ],
)
def test_bad_options(made, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["report", str(made), *options]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
