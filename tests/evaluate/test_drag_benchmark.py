"""The drag benchmark: its cases are exact, and it runs on a tiny model."""

import argparse
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import retour
import tiny
from data.sprites_for_tests import make_sprites
from retour.data.scenes import Studio
from retour.evaluate.drag import Patches
from retour.evaluate.metrics import pixels

PATH = Path(__file__).parents[2] / "benchmarks" / "drag.py"


@lru_cache
def script():
    spec = importlib.util.spec_from_file_location("benchmark_drag", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def grown(count=2):
    return script().scaled(count, Studio(make_sprites()), ["ball", "box"])


def test_points_of_moved_objects_arrive_in_the_true_picture():
    for case in script().moved(4):
        before, after = pixels(case.before), pixels(case.after)
        assert Patches().distances(before, after, case.points, case.goals()) == [0.0] * 5
        assert all(case.area[int(y), int(x)] for x, y in case.points)
        outside = ~case.changed
        assert (np.asarray(case.before)[outside] == np.asarray(case.after)[outside]).all()


def test_scaled_objects_grow_about_their_middle():
    for case in grown():
        ends = [np.argwhere(script().object_of(p)) for p in (case.before, case.after)]
        low, high = ends[0].min(0), ends[0].max(0)
        (x0, y0), (x1, y1), (across, down) = case.drag.start, case.drag.end, case.drag.scale
        for place, true in ((low - 0.5, ends[1].min(0) - 0.5), (high + 0.5, ends[1].max(0) + 0.5)):
            found = y1 + down * (place[0] - y0), x1 + across * (place[1] - x0)
            assert np.abs(np.array(found) - true).max() <= 1.5  # edges are blended over a pixel
    assert {case.drag.scale[0] > 1 for case in grown()} == {True, False}


def test_it_measures_every_case_by_every_method():
    drag, model = script(), retour.load(tiny.flux())
    given = argparse.Namespace(options=[], steps=2, guidance=1.0, words=3.0, batch=2)
    cases = [*drag.moved(2), *grown(1)]
    matchers = Patches(), Patches(5)
    measures, shown = drag.run_all(model, cases, given, matchers)
    methods = {m.method for m in measures}
    assert len(measures) == len(cases) * len(methods) and len(methods) == 10
    untouched = [m for m in measures if m.method == drag.COPY and m.kind == "move"]
    ways = [np.hypot(*np.subtract(c.drag.start, c.drag.end)) for c in cases[:2]]
    assert [m.md_network for m in untouched] == pytest.approx(ways)
    assert all(m.fidelity == 1 for m in untouched)
    assert all(0 <= m.likeness <= 1 for m in measures)
    assert len(drag.table(measures).splitlines()) == 2 + 2 * 10
    assert len(drag.comparison(measures)) == 2 * len(drag.METRICS) * (1 + len(drag.PARTS))
    assert set(drag.PARTS) | {drag.OURS, drag.BASELINE} <= methods
    assert drag.sheet(shown).width == 10 * 116
    small = drag.figure([shown[0], shown[-1]])
    assert small.mode == "P" and small.width == 2 * (3 * 130 + 6) - 6


def test_arrows_lead_where_the_object_goes():
    drag = script()
    [case] = drag.moved(1)
    assert drag.arrows(case) == [(*case.drag.start, *case.drag.end)]
    [case] = grown(1)
    ways = np.array(drag.arrows(case))
    centre, ratio = np.array(case.drag.start), case.drag.scale[0]
    assert np.allclose(ways[:, 2:] - case.drag.end, ratio * (ways[:, :2] - centre))
