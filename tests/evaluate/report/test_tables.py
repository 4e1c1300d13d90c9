"""Figures of the page: those of the statistics module, marked by what they can tell."""

import dataclasses

import numpy as np
import pytest

from evaluate.bench_folder import build
from retour.evaluate.report import tables
from retour.evaluate.report.folder import Bench
from retour.evaluate.stats import mean_interval, paired_difference


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench.read(build(tmp_path_factory.mktemp("bench"), limit=21, steps=(10, 20)))


def with_values(bench, **values):
    """The same bench with other figures in some columns."""
    return dataclasses.replace(bench, values={k: np.array(v, float) for k, v in values.items()})


def test_means_and_intervals_are_those_of_the_statistics(bench):
    columns = tables.columns(bench)
    for kind in (None, "add_object"):
        keep = bench.of_kind(kind)
        for run, row in enumerate(tables.cells(bench, columns, kind)):
            for cell, column in zip(row, columns, strict=True):
                wanted = mean_interval(bench.values[column.key][run, keep])
                assert cell["mean"] == tables.json_number(wanted.mean)
                if not column.cost and cell["low"] is not None:
                    # Six digits are kept.
                    assert cell["low"] == pytest.approx(wanted.low, rel=1e-5)
                    assert cell["high"] == pytest.approx(wanted.high, rel=1e-5)
                if column.cost:
                    assert cell["low"] is None


def test_differences_are_the_paired_ones(bench):
    columns = tables.columns(bench)
    found = tables.differences(bench, columns, None)
    count = len(bench.runs)
    assert len(found) == count * (count - 1) // 2
    values = bench.values["truth_distance"]
    place = [c.key for c in columns if not c.cost].index("truth_distance")
    wanted = paired_difference(values[2], values[5])
    told = found["2-5"][place]
    assert told == pytest.approx([wanted.mean, wanted.low, wanted.high], rel=1e-5)


def test_a_difference_from_infinity_is_none(bench):
    found = tables.differences(bench, tables.columns(bench), None)
    psnr = [c.key for c in tables.columns(bench)].index("background_psnr")
    assert found["0-3"][psnr] == [None, None, None]  # The copied input has an infinite one.


def test_marks_follow_the_better_way_and_leave_references_out(bench):
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (len(bench.runs), 21))
    means = np.array([99, 99, 5, 5, 9, 1, 4, 3])[:, None]
    high = with_values(bench, background_psnr=means + 0.1 * noise)
    low = with_values(bench, truth_distance=-means + 0.1 * noise)
    for made in (high, low):
        cells = tables.cells(made, tables.columns(made), None)
        assert [row[0]["mark"] for row in cells] == ["", "", "", "", "best", "", "", ""]


def test_what_the_interval_cannot_tell_from_the_best_is_close(bench):
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 21)
    values = np.stack([hard, hard, hard + 1, hard + 1 + rng.normal(0, 0.1, 21), *[hard - 5] * 4])
    values[3] -= values[3].mean() - values[2].mean() + 0.001
    made = with_values(bench, background_psnr=values)
    marks = [row[0]["mark"] for row in tables.cells(made, tables.columns(made), None)]
    # Means differ by far less than the items do, but the items are the same: pairing tells.
    assert marks == ["", "", "best", "close", "", "", "", ""]


def test_equal_runs_are_all_best(bench):
    made = with_values(bench, background_psnr=np.full((8, 21), 3.0))
    cells = tables.cells(made, tables.columns(made), None)
    assert [row[0]["mark"] for row in cells] == ["", ""] + ["best"] * 6


def test_a_column_nobody_ranks_has_no_marks(bench):
    made = with_values(bench, odd=np.random.default_rng(0).normal(size=(8, 21)))
    (column,) = tables.columns(made)
    assert (column.title, column.better, column.shown) == ("Odd", "", True)
    assert {row[0]["mark"] for row in tables.cells(made, (column,), None)} == {""}


@pytest.mark.parametrize(
    ("value", "digits"), [(0.0123, 4), (0.5, 3), (3.2, 2), (27.3, 1), (150.0, 1), (0.0, 1)]
)
def test_digits_give_three_that_count(bench, value, digits):
    made = with_values(bench, odd=np.full((8, 21), value))
    assert tables.columns(made)[0].digits == digits


def test_whole_costs_have_no_decimals(bench):
    made = with_values(bench, nfe_full=np.full((8, 21), 7.0), seconds=np.full((8, 21), 0.5))
    assert [column.digits for column in tables.columns(made)] == [0, 3]


def test_units_and_numbers():
    assert tables.spoken_unit("x 1e-3") == "× 10⁻³"
    assert tables.spoken_unit("dB") == "dB"
    told = [tables.json_number(v) for v in (np.nan, np.inf, -np.inf, 1 / 3)]
    assert told == [None, "inf", "-inf", 0.333333]


def test_many_runs_are_not_compared(bench, monkeypatch):
    monkeypatch.setattr(tables, "MAX_RUNS_COMPARED", 3)
    assert tables.differences(bench, tables.columns(bench), None) == {}


def test_axes_are_two_columns_that_exist(bench):
    axes = tables.default_axes(bench, tables.columns(bench))
    assert axes == {
        "x": "background_psnr",
        "y": "clip_edited",
        "cost": "nfe_full",
        "error": "truth_distance",
    }
    alone = with_values(bench, odd=np.ones((8, 21)))
    axes = tables.default_axes(alone, tables.columns(alone))
    assert axes == {"x": "odd", "y": "odd", "cost": None, "error": "odd"}
