"""The flow benchmark runs on a tiny model, and its figures are the ones it names."""

import importlib.util
import math
import sys
from functools import lru_cache
from pathlib import Path

import pytest

import retour
import tiny
from retour.evaluate.suite import Suite

PATH = Path(__file__).parents[2] / "benchmarks" / "flow.py"


@lru_cache
def script():
    spec = importlib.util.spec_from_file_location("benchmark_flow", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def measures():
    model = retour.load(tiny.flux())
    items = list(Suite.paired().select(limit=2))
    names = ["euler", "rf-solver", "fireflow"]
    groups = script().run_all(model, items, names, [2, 4], [0.05], 1.0)
    return [m for group in groups for m in group]


def test_its_inverters_exist():
    names = {name.split(":")[0] for name in script().INVERTERS.split(",")}
    assert names <= {e.name for e in retour.methods(task="invert")}


def test_options_stand_behind_a_name():
    item = list(Suite.paired().select(limit=1))
    found = script().invert(retour.load(tiny.flux()), item, "rf-solver:probe=0.01", 1.0, 2)
    assert found.method == "rf-solver" and found.options["probe"] == 0.01


def test_every_image_is_measured_at_every_setting_with_its_cost(measures):
    assert len(measures) == (3 * 2 + 1) * 2
    costs = {(m.method, m.setting): (m.nfe_up, m.nfe) for m in measures}
    assert costs["euler", 4] == (4, 8)
    assert costs["rf-solver", 4] == (8, 16)
    assert costs["fireflow", 4] == (5, 10)
    assert all(0 < e < math.inf for m in measures for e in (m.noise, m.latents, m.pixels))


def test_curves_table_and_picture(measures, tmp_path):
    flow = script()
    found = flow.curves(measures, "noise")
    assert [cost for cost, _ in found["rf-solver"]] == [4, 8]
    assert found["euler"][0][1] > found["rf-solver"][1][1]
    assert len(flow.table(measures).splitlines()) == 2 + 7
    flow.draw(measures, "tiny", tmp_path / "flow.png")
    assert (tmp_path / "flow.png").stat().st_size > 1000


def test_cost_at_equal_error_is_read_between_the_points():
    flow = script()
    curve = [(4.0, 1.0), (16.0, 1 / 16)]
    assert flow.cost_at(curve, 1 / 4) == pytest.approx(8.0)
    assert flow.cost_at(curve, 1.0) == 4.0
    assert math.isnan(flow.cost_at(curve, 2.0)) and math.isnan(flow.cost_at(curve, 0.01))
    assert math.isnan(flow.cost_at([], 1.0))


def test_comparison_says_what_equal_error_costs():
    flow = script()
    make = lambda name, n, cost, e: flow.Measure(name, n, "0", cost, 2 * cost, e, e, e)  # noqa: E731
    measures = [
        make("rf-solver", 8, 16, 0.01),
        make("fireflow", 8, 9, 0.02),
        make("fireflow", 16, 18, 0.005),
    ]
    lines = flow.comparison(measures, "fireflow", "rf-solver")
    assert len(lines) == 6 and lines[1] == "noise error: fireflow needs 0.80 of rf-solver's " + (
        "evaluations"
    )
    assert lines[0].startswith("noise error 1.00e-02: rf-solver 16 evaluations, fireflow 12.7")
