"""The benchmark scripts run, on a tiny model, and their figures are the ones they name."""

import csv
import importlib.util
import math
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import retour
import tiny
from retour.core import loop
from retour.evaluate.stats import Interval
from retour.evaluate.suite import Suite

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@lru_cache
def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model():
    return retour.load(tiny.sd1())


@pytest.fixture(scope="module")
def measures(model):
    paired = script("paired")
    inversions = paired.Inversions(model, 3.0, 2)
    edited = {n: paired.method(inversions, n, "reprompt") for n in ("ddim", "direct")}
    methods = {paired.COPY: paired.copy, paired.CEILING: paired.ceiling(model), **edited}
    return paired.run_all(methods, Suite.paired().select(limit=3), 2)


def test_every_method_is_measured_on_every_pair(measures):
    assert len(measures) == 4 * 3
    assert [m.item for m in measures if m.method == "ddim"] == [
        m.item for m in measures if m.method == "direct"
    ]


def test_copying_keeps_the_background_and_makes_no_edit(measures):
    paired = script("paired")
    for measure in (m for m in measures if m.method == paired.COPY):
        item = next(i for i in Suite.paired() if i.id == measure.item)
        gap = (np.asarray(item.image) / 255 - np.asarray(item.edited) / 255)[item.mask()]
        assert measure.psnr_strict == measure.psnr_pie_compat == math.inf
        assert measure.edit_mse == pytest.approx((gap**2).mean(), rel=1e-5)
        assert measure.nfe == 0


def test_costs_are_those_of_the_run(measures):
    """2 steps: one evaluation up; down the target's two halves (reprompt carries no source)."""
    for measure in (m for m in measures if m.method in ("ddim", "direct")):
        assert measure.nfe == 2 * 1 + 2 * 2
        assert measure.seconds > 0


def test_tables_and_files(measures, tmp_path):
    paired = script("paired")
    names = list(dict.fromkeys(m.method for m in measures))
    text = paired.table("mean", paired.means(measures, names))
    assert all(name in text for name in names) and "inf" in text
    gaps = paired.differences(measures, ["ddim", "direct"])
    assert list(gaps) == ["ddim - direct"]
    assert gaps["ddim - direct"]["edit_mse"].count == 3
    assert len(paired.by_kind(measures, names)) == 3
    paired.write_csv(measures, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(measures) and rows[0]["item"] == measures[0].item


def test_cells_say_what_is_known():
    paired = script("paired")
    column = paired.Column("x", "x", 1e3, 1)
    assert paired._cell(Interval(math.nan, math.nan, math.nan, 0), column, True) == "-"
    assert paired._cell(Interval(0.002, 0.001, 0.003, 9), column, True) == "2.0* [1.0, 3.0]"
    assert paired._cell(Interval(0.002, -0.001, 0.003, 9), column, True) == "2.0 [-1.0, 3.0]"
    assert paired._cell(Interval(math.inf, math.nan, math.nan, 9), column, True) == "inf"


def test_overhead_replays_exactly_the_calls_of_the_run(model):
    overhead = script("overhead")
    items = Suite.paired().items[:2]
    with overhead.recording(model.net) as calls:
        overhead.run_case(model, items, "direct", "p2p", 3)
    shapes = [tuple(args[0].shape) for args, _ in calls]
    assert shapes == [(2, 4, 8, 8)] * 3 + [(8, 4, 8, 8)] * 3
    assert not model.net._forward_pre_hooks
    before = torch.get_rng_state()
    overhead.replay(model.net, calls)
    assert torch.equal(before, torch.get_rng_state())


def test_overhead_times_nest_and_leave_nothing_behind(model):
    overhead = script("overhead")
    times = overhead.repeat(model, Suite.paired().items[:1], "direct", "p2p", 2)
    wall = {name: pair[0] for name, pair in times.items()}
    assert wall["whole"] > wall["loop"] > wall["network"] > 0 < wall["bare"]
    assert "network" not in vars(model)
    assert retour.api.walk is loop.walk
    parts = overhead.split(times, 0)
    rebuilt = 1 + parts["network calls"] + parts["solver, guidance, controls"]
    assert parts["loop"] == pytest.approx(rebuilt)


def test_batch_rates(model):
    batch = script("batch")
    given = type("Given", (), {"inverter": "ddim", "editor": "reprompt", "steps": 2})
    assert batch.seconds(model, Suite.paired().items[:3], 2, given) > 0


def test_inverters_are_measured_on_their_way_up_and_back(model, capsys):
    inversion = script("inversion")
    items = inversion.distinct(Suite.paired(), 3)
    assert len({item.source for item in items}) == 3
    measures = inversion.run_all(model, items, ["ddim", "edict"], 2, 3.0, 2)
    rows = {m.method: [k for k in measures if k.method == m.method] for m in measures}
    assert {name: len(row) for name, row in rows.items()} == dict.fromkeys(
        [inversion.CEILING, inversion.WHITE, "ddim", "edict"], 3
    )
    assert max(m.latent for m in rows["edict"]) < 1e-12 < min(m.latent for m in rows["ddim"])
    assert [m.nfe for m in rows["ddim"]] == [2 + 4] * 3
    assert all(m.time > 0 for m in rows["ddim"])
    lines = inversion.table(measures).splitlines()
    assert len(lines) == 2 + 4 and lines[0].count("|") == 12
    assert "ddim" in lines[-1]
    capsys.readouterr()


def test_peak_memory_is_that_of_the_block():
    inversion = script("inversion")
    with inversion.Peak(torch.device("cpu")) as peak:
        held = torch.ones(2**24)  # 64 MiB
        del held
    assert math.isnan(peak.mib) or 60 < peak.mib < 120


def test_editors_share_the_inversions_of_a_batch(model):
    paired = script("paired")
    inversions = paired.Inversions(model, 3.0, 2)
    items = Suite.paired().select(limit=3).items
    first = inversions.of(items[:2], "ddim")
    assert inversions.of(items[:2], "ddim") is first
    assert inversions.of(items[:2], "direct") is not first
    inversions.of(items[2:], "ddim")
    assert inversions.of(items[:2], "ddim") is not first


def test_pairs_of_the_command_line():
    paired = script("paired")
    found = paired.chosen_pairs("ddim,direct", "p2p", "virtual+infedit,ddim+p2p")
    assert found == [("ddim", "p2p"), ("direct", "p2p"), ("virtual", "infedit")]
    assert paired.chosen_pairs("", "p2p", "ddim+reprompt") == [("ddim", "reprompt")]
