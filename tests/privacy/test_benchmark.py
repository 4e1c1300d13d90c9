"""The attack benchmark, on an exact generator: what it counts and prints."""

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from privacy import cases
from retour.evaluate.suite import Suite
from retour.io import save_image, to_image, to_tensor

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "attack.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_attack", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Coloured:
    """An item that shows a red square."""

    def __init__(self, number, green):
        self.id, self.source = str(number), "red"
        self.image = to_image(to_tensor(cases.square(green=green, seed=number)))


@pytest.fixture(scope="module")
def shown(bench):
    return [bench.Shown(Coloured(k, 0.5 + 0.03 * k), "red") for k in range(3)]


@pytest.fixture(scope="module")
def run(bench, shown):
    plan = [(bench.FULL, 0.1), (bench.FULL, 2.0)] + [(name, 0.1) for name in bench.OTHERS]
    how = {"steps": 3, "iterations": 2, "step_size": 1.0, "victims": [cases.classifier()]}
    how |= {"reference": None, "strength": 1.0, "keep": "margin"}
    return bench.run_all(cases.model(), shown, plan, 2, classifier=cases.classifier(), **how)


def test_items_are_named_by_their_one_object(bench):
    items = Suite.paired().items
    found = {s.item.source: s.label for s in bench.labelled(items, ["car", "tree", "star", "fish"])}
    assert found["a 3d render of a car on a pale yellow background"] == "car"
    assert found["a 3d render of a yellow fish on a dark green background"] == "fish"
    assert not any("palm tree" in prompt or " of a tree to " in prompt for prompt in found)


def test_only_what_the_classifier_tells_right_is_attacked(bench, shown):
    wrong = [*shown, bench.Shown(Coloured(9, 0.9), "red")]
    assert bench.told_right(wrong, cases.classifier()) == shown


def test_every_picture_is_measured_at_every_point_of_the_plan(bench, run):
    measures, results = run
    assert len(measures) == 7 * 3 and {len(r) for r in results.values()} == {2}
    for variant, radius in results:
        assert [m.item for m in bench.pick(measures, variant, radius)] == ["0", "1", "2"]


def test_no_batch_begins_that_would_not_end_in_time(bench, shown):
    how = {"steps": 1, "iterations": 0, "victims": [cases.classifier()]}
    measures, _ = bench.run_all(
        cases.model(), shown, [(bench.FULL, 0.1)], 1, 0.0, classifier=cases.classifier(), **how
    )
    assert [m.item for m in measures] == ["0"]


def test_errors_are_counted_by_radius_and_by_iterations(bench, run):
    measures, _ = run
    errors = bench.by_radius(measures, bench.FULL)
    assert list(errors) == ["0", "0.1", "2"]
    assert errors["0"].mean == 0 and errors["2"].mean == 1
    turns = bench.by_turns(measures, bench.FULL, 2.0)
    assert list(turns) == ["0", "1", "2"]
    assert [t.mean for t in turns.values()] == sorted(t.mean for t in turns.values())
    assert turns["2"].mean == errors["2"].mean and turns["0"].mean == 0


def test_differences_are_paired(bench, run):
    measures, _ = run
    gap = bench.difference(measures, bench.DDIM, 0.1)
    first, second = (bench.pick(measures, v, 0.1) for v in (bench.FULL, bench.DDIM))
    wanted = np.mean([a.psnr - b.psnr for a, b in zip(first, second, strict=True)])
    assert gap["psnr"].mean == pytest.approx(wanted) and gap["psnr"].count == 3
    # The noise maps' way back is exact, DDIM's is not.
    assert gap["psnr"].mean > 0


def test_differences_at_equal_success_are_of_the_pictures_that_both_err_with(bench, run):
    measures, _ = run
    first, second = (bench.pick(measures, v, 0.1) for v in (bench.FULL, bench.DDIM))
    forced = [
        replace(m, success=float(m.item != left))
        for some, left in ((first, "0"), (second, "2"))
        for m in some
    ]
    gap = bench.difference(forced, bench.DDIM, 0.1, both_err=True)
    assert gap["psnr"].count == 1 and gap["psnr"].mean == first[1].psnr - second[1].psnr


def test_the_caption_is_the_judge_of_all_variants(bench, run):
    measures, _ = run
    assert not any(np.isnan(m.clip_caption) for m in measures)


def test_transfer_counts_the_others_errors(bench, run):
    """The one victim is the classifier itself here."""
    assert all(m.transfer == m.success for m in run[0])


def test_tables_sheet_and_file(bench, run, tmp_path):
    measures, results = run
    means = {name: bench.summary(measures, name, 0.1) for name in bench.VARIANTS}
    text = bench.table("mean", means, bench.MEASURES)
    assert all(name in text for name in bench.VARIANTS)
    gaps = {"SCA - DDIM": bench.difference(measures, bench.DDIM, 0.1)}
    assert "*" in bench.table("difference", gaps, bench.MEASURES)
    bench.write_csv(measures, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(measures)
    page = bench.sheet(results[bench.FULL, 0.1])
    assert page.width == 4 * (3 * bench.CELL + 8)
    save_image(page, tmp_path / "sheet.png")


def test_the_markdown_table_marks_what_differs(bench, run):
    measures, _ = run
    means = {name: bench.summary(measures, name, 0.1) for name in bench.VARIANTS}
    gaps = {f"{bench.FULL} - {o}": bench.difference(measures, o, 0.1) for o in bench.OTHERS}
    cost = {name: {"nfe": 12.0} for name in bench.VARIANTS}
    report = {"means": means, "differences": gaps, "cost": cost}
    lines = bench.markdown(report, "other").splitlines()
    assert lines[0].startswith("| | errs | `other` errs | PSNR, dB |") and lines[0].count("|") == 9
    assert len(lines) == 2 + len(bench.VARIANTS) and {x.count("|") for x in lines} == {9}
    starred = [line for line in lines[2:] if "*" in line]
    assert not lines[2].count("*")
    apart = {o for o in bench.OTHERS if any(v.apart for k, v in gaps[f"SCA - {o}"].items()
             if k in bench.COLUMNS)}  # fmt: skip
    assert {line.split(" | ")[0].removeprefix("| ") for line in starred} == apart
