"""A benchmark as a whole: what its folder holds, resuming after kill -9, and hostile folders."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
from PIL import Image

import retour
import tiny
from evaluate import benches
from retour.core.progress import quiet
from retour.errors import RetourError
from retour.evaluate import folder as folders
from retour.evaluate import runner
from retour.evaluate.runner import bench
from retour.evaluate.stats import mean_interval, paired_difference
from retour.evaluate.suite import SPLITS, Suite


@pytest.fixture(scope="module")
def model():
    return retour.load(tiny.sd1())


def run(out, model, **changes):
    return bench(out, model=model, **{**benches.GIVEN, **changes})


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An uninterrupted run."""
    return run(tmp_path_factory.mktemp("bench") / "whole", model)


def rows_of(result, label):
    return [row for row in result.rows if row["run"] == label]


def test_every_run_meets_every_item_in_the_plans_order(whole):
    labels = list(dict.fromkeys(row["run"] for row in whole.rows))
    assert labels == ["copy-input", "vae-ceiling", *benches.RUNS]
    for label in labels:
        assert [row["item"] for row in rows_of(whole, label)] == whole.plan["items"]
    assert sorted(whole.plan["items"]) == sorted(benches.items())


def test_the_folder_holds_what_was_agreed(whole):
    table = parquet.read_table(whole.folder / "results.parquet")
    assert table.column_names == [
        *("run", "item", "kind", "split", "source", "target", "inverter", "editor"),
        *("steps", "guidance", "batch", "background_psnr", "truth_distance"),
        *("nfe_inversion", "nfe_edit", "nfe", "nfe_full", "seconds_inversion", "seconds_edit"),
        *("seconds", "seconds_full", "peak_mib", "image"),
    ]
    assert len(table) == 7 * 5
    sides = set()
    for row in table.to_pylist():
        item = row["item"]
        assert row["image"] == f"images/{row['run']}/{item}.png"
        sides.add((row["run"], Image.open(whole.folder / row["image"]).size))
        for name in ("inputs", "truth", "masks"):
            assert Image.open(whole.folder / name / f"{item}.png").size == (64, 64)
    copies = {("copy-input", (64, 64))}
    assert sides - copies == {(label, (16, 16)) for label in ("vae-ceiling", *benches.RUNS)}
    assert not list(whole.folder.glob("**/.[0-9a-f]*"))
    assert not (whole.folder / "cache").exists(), "of no use to a complete benchmark"


def test_exact_backgrounds_are_counted_from_what_the_vae_can(model, tmp_path):
    """Both rows that need no run are exact; to the input alone the VAE is not."""
    found = run(tmp_path, model, metrics="background_exact", inverters="ddim", pairs=None)
    values = {label: [row["background_exact"] for row in rows_of(found, label)] for label in
              ("copy-input", "vae-ceiling", "ddim+p2p")}  # fmt: skip
    known = [not math.isnan(v) for v in values["copy-input"]]
    assert 0 < sum(known)
    assert {v for v in values["copy-input"] + values["vae-ceiling"] if not math.isnan(v)} == {100}
    assert np.nanmean(values["ddim+p2p"]) < 100


def test_pictures_are_those_of_the_set(whole):
    item = next(iter(Suite.paired().select(limit=5)))
    read = {name: np.asarray(Image.open(whole.folder / name / f"{item.id}.png")) for name in
            ("inputs", "truth", "masks")}  # fmt: skip
    assert np.array_equal(read["inputs"], np.asarray(item.image))
    assert np.array_equal(read["truth"], np.asarray(item.edited))
    assert np.array_equal(read["masks"] > 0, item.mask()) and read["masks"].max() == 255


def test_the_plan_says_what_decides_results(whole):
    plan = json.loads((whole.folder / "plan.json").read_text())
    assert plan == whole.plan
    assert plan["suite"]["name"] == "paired" and len(plan["suite"]["fingerprint"]) == 16
    assert plan["model"]["fingerprint"] and plan["model"]["dtype"] == "torch.float32"
    assert [r["label"] for r in plan["runs"]][2:] == list(benches.RUNS)
    assert plan["batches"] == [plan["items"][0:2], plan["items"][2:4], plan["items"][4:]]
    assert {"seed", "negative", "versions", "created", "command", "metrics", "id"} < set(plan)


def test_a_second_editor_costs_no_inversion(whole):
    """2 steps at guidance 3: one row up; down two for reprompt, four with the source beside it."""
    costs = {r["run"]: r for r in whole.rows}
    assert costs["ddim+reprompt"]["nfe_inversion"] == 2 and costs["ddim+p2p"]["nfe_inversion"] == 0
    assert costs["ddim+p2p"]["nfe_edit"] == costs["ddim+p2p"]["nfe"] == 8
    assert costs["ddim+p2p"]["nfe_full"] == 10
    assert costs["ddim+reprompt"]["nfe"] == costs["ddim+reprompt"]["nfe_full"] == 2 + 4
    assert costs["copy-input"]["nfe_full"] == costs["vae-ceiling"]["nfe_full"] == 0
    assert costs["ddim+p2p"]["seconds_inversion"] == 0 < costs["ddim+reprompt"]["seconds_inversion"]
    assert costs["ddim+p2p"]["seconds_full"] > costs["ddim+p2p"]["seconds"]


def test_rows_are_what_the_api_gives(whole, model):
    """One batch edited by hand: same pictures; metrics as the metrics' own functions say."""
    chosen = whole.plan["batches"][1]
    items = [i for i in Suite.paired().select(limit=5) if i.id in chosen]
    items.sort(key=lambda i: chosen.index(i.id))
    inversion = retour.invert(
        model, [i.image for i in items], [i.source for i in items], method="direct", steps=2,
        guidance=3.0,
    )  # fmt: skip
    result = retour.edit(inversion, [i.target for i in items], editor="p2p")
    from retour.evaluate.metrics import pixels, psnr

    for k, item in enumerate(items):
        row = next(r for r in rows_of(whole, "direct+p2p") if r["item"] == item.id)
        saved = Image.open(whole.folder / row["image"])
        assert np.array_equal(np.asarray(saved), np.asarray(result.images[k]))
        wanted = psnr(pixels(item.image), pixels(result.original_size(k)), item.mask())
        assert row["background_psnr"] == wanted


def test_copying_is_perfect_and_edits_nothing(whole):
    assert all(math.isinf(row["background_psnr"]) for row in rows_of(whole, "copy-input"))
    assert all(row["truth_distance"] > 0 for row in rows_of(whole, "copy-input"))


def test_the_summary_is_that_of_the_rows(whole):
    summary = json.loads((whole.folder / "summary.json").read_text())
    distances = {
        label: [row["truth_distance"] for row in rows_of(whole, label)]
        for label in ("ddim+p2p", "direct+p2p", "vae-ceiling")
    }
    mean = mean_interval(distances["ddim+p2p"])
    assert summary["runs"]["ddim+p2p"]["truth_distance"] == pytest.approx(vars(mean), rel=1e-9)
    gap = paired_difference(distances["vae-ceiling"], distances["direct+p2p"])
    found = summary["differences"]["vae-ceiling - direct+p2p"]["truth_distance"]
    assert found == pytest.approx(vars(gap), rel=1e-9)
    assert len(summary["differences"]) == 7 * 6 / 2
    assert set(summary["kinds"]) == {row["kind"] for row in whole.rows}
    assert summary["metrics"]["background_psnr"]["better"] == "higher"
    assert summary["metrics"]["truth_distance"]["unit"]
    assert summary["runs"]["copy-input"]["background_psnr"]["mean"] == "inf"


def test_the_table_has_a_line_for_each_run_and_difference(whole):
    lines = whole.table().splitlines()
    assert len(lines) == 2 + 7 + 10
    assert lines[2].startswith("| copy-input | inf |") and len({x.count("|") for x in lines}) == 1
    assert "5 edits of 'paired'" in whole.heading() and "2 steps" in whole.heading()


# --- Stopping and going on ------------------------------------------------------------------------


def dying(out, model, renames):
    """In a process of its own: die by SIGKILL before the given rename, wherever that is."""
    real, left = os.replace, [renames]

    def replace(source, target):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        real(source, target)

    os.replace = replace
    # What the process says when it ends well is of no interest.
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with quiet():
        run(out, model)


def killed(out, model, renames):
    """Exit code of such a process."""
    child = multiprocessing.get_context("fork").Process(target=dying, args=(out, model, renames))
    child.start()
    child.join(120)
    return child.exitcode


def test_killed_again_and_again_it_ends_as_if_nothing_had_been(whole, model, tmp_path):
    """Each process dies at its own rename; whatever it had finished is never written again."""
    out, deaths, finished = tmp_path / "killed", 0, {}
    while killed(out, model, renames=1 + 5 * (deaths % 4)) == -signal.SIGKILL:
        deaths += 1
        now = benches.parts(out)
        assert finished.items() <= now.items(), "a finished piece was done twice"
        finished = now
        assert deaths < 60
    assert deaths > 5
    assert finished.items() <= benches.parts(out).items()
    assert benches.facts(out) == benches.facts(whole.folder)
    assert benches.pictures(out) == benches.pictures(whole.folder)
    assert not [p for p in out.rglob(".*") if folders.TEMPORARY.fullmatch(p.name)]


def test_a_finished_folder_is_read_not_run(whole, model, monkeypatch):
    def never(*_, **__):
        raise AssertionError("there was nothing left to do")

    before = benches.parts(whole.folder)
    monkeypatch.setattr(retour.api, "invert", never)
    monkeypatch.setattr(retour.api, "edit", never)
    again = run(whole.folder, model)
    assert json.dumps(again.rows) == json.dumps(whole.rows)
    assert benches.parts(whole.folder) == before and again.plan == whole.plan


def test_progress_counts_what_was_done_before(whole, model, copy, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    (copy / "parts" / "00002-direct+p2p.parquet").unlink()
    monkeypatch.setattr(sys, "stderr", Terminal())
    run(copy, model)
    assert "34/35" in sys.stderr.getvalue() and "35/35" in sys.stderr.getvalue()


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole.folder, tmp_path / "copy")


@pytest.mark.parametrize("damage", ["truncated", "empty", "another's", "picture gone", "gone"])
def test_a_damaged_piece_is_done_again(whole, model, copy, damage):
    part = copy / "parts" / "00001-ddim+p2p.parquet"
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:200])
    elif damage == "empty":
        part.write_bytes(b"")
    elif damage == "another's":
        shutil.copy(copy / "parts" / "00000-ddim+p2p.parquet", part)
    elif damage == "gone":
        part.unlink()
    else:
        (copy / "images" / "ddim+p2p" / f"{whole.plan['batches'][1][0]}.png").unlink()
    before = benches.parts(copy)
    run(copy, model)
    after = benches.parts(copy)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {part.name}
    assert benches.facts(copy) == benches.facts(whole.folder)


def test_a_cache_can_be_shared_between_benchmarks(model, tmp_path):
    given = {"cache": tmp_path / "cache", "pairs": None, "inverters": "ddim"}
    run(tmp_path / "a", model, **given, editors="reprompt")
    second = run(tmp_path / "b", model, **given, editors="p2p")
    costs = rows_of(second, "ddim+p2p")
    assert {(row["nfe_inversion"], row["nfe"], row["nfe_full"]) for row in costs} == {(0, 8, 10)}
    assert {row["seconds_inversion"] for row in costs} == {0}


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"another plan \(seed differs\)"),
        ({"steps": 3}, r"another plan \(runs differs\)"),
        ({"limit": 4}, r"another plan \(suite, items, batches differ\)"),
        ({"metrics": "background_psnr"}, r"another plan \(metrics differs\)"),
    ],
)
def test_another_plan_is_refused(whole, model, changes, message):
    before = benches.parts(whole.folder)
    with pytest.raises(RetourError, match=message):
        run(whole.folder, model, **changes)
    assert benches.parts(whole.folder) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"editors": "p2q"}, "unknown editor 'p2q'"),
        ({"inverters": "dimm"}, "did you mean 'ddim'"),
        ({"metrics": "beauty"}, "unknown metric 'beauty'"),
        ({"convention": "mine"}, "mine"),
        ({"suite": "/nowhere"}, "no mapping_file.json"),
        ({"suite": "pie"}, "RETOUR_PIE_BENCH"),
        ({"kinds": "magic"}, "unknown kind of edit 'magic'"),
        ({"batch": 0}, "batch is 0"),
        ({"limit": -1}, "limit is -1"),
        ({"suite": Suite("nothing", ())}, "'nothing' is empty"),
        ({"threads": 0}, "threads is 0"),
        ({"cache_limit": -1}, "size of the cache is -1"),
        ({"cluster": "local"}, "name or folder"),
        ({"pairs": "ddim+infedit"}, r"pair 'ddim\+infedit' cannot run"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(model, tmp_path, monkeypatch, changes, message):
    monkeypatch.delenv("RETOUR_PIE_BENCH", raising=False)
    monkeypatch.setattr(retour.api, "invert", None)
    with pytest.raises(RetourError, match=message):
        run(tmp_path / "out", model, **changes)
    assert not (tmp_path / "out" / "results.parquet").exists()


def test_strange_folders_are_refused(model, tmp_path):
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    file.write_text("mine")
    with pytest.raises(RetourError, match="other files"):
        run(full, model)
    with pytest.raises(RetourError, match="is a file"):
        run(file, model)
    with pytest.raises(RetourError, match="cannot write to"):
        run("/proc/retour", model)
    for text in ("{", "[]", "\xff"):
        broken = tmp_path / f"broken{ord(text[0])}"
        broken.mkdir()
        (broken / "plan.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(RetourError, match="plan"):
            run(broken, model)
    assert [p.name for p in full.iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_meet_in_a_folder(whole, model):
    with (
        folders.locked(whole.folder / ".lock"),
        pytest.raises(RetourError, match="another process"),
    ):
        run(whole.folder, model)


def test_an_id_that_is_no_file_name_is_refused(model, tmp_path):
    item = next(iter(Suite.paired()))
    for name in ("../up", "a/b", "", ".hidden", "x" * 200):
        with pytest.raises(RetourError, match="cannot name a file"):
            run(tmp_path, model, suite=Suite("s", (type(item)(**{**vars(item), "id": name}),)))


def test_without_pyarrow_it_says_what_brings_it(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(RetourError, match=r'pip install "retour\[eval\]"'):
        run(tmp_path / "out", model)


def test_a_method_that_refuses_a_picture_is_named(model, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RetourError("the latents burst")

    monkeypatch.setattr(retour.api, "edit", refuse)
    with pytest.raises(RetourError, match=r"ddim\+reprompt on \d+ to \d+: the latents burst"):
        run(tmp_path / "out", model)


def test_both_splits_of_the_paired_set_are_suites():
    for split, name in SPLITS.items():
        chosen = runner._suite(name, None)
        assert chosen.name == name and chosen.items == Suite.paired(split).items


def test_pie_bench_is_found_where_the_environment_says(monkeypatch):
    from importlib.resources import files

    monkeypatch.setenv("RETOUR_PIE_BENCH", str(files("retour") / "paired" / "public"))
    bordered = next(iter(runner._suite("pie", None)))
    assert bordered.border and not next(iter(runner._suite("pie", False))).border
