"""The benchmark scripts run, on a tiny model, and their figures are the ones they name."""

import importlib.util
import math
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import retour
import tiny
from retour.core import loop
from retour.evaluate.peak import Peak
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


def test_paired_prints_the_table_of_a_bench(tmp_path, monkeypatch, capsys):
    """Each set of arguments has a folder of its own, which is gone on with."""
    monkeypatch.chdir(tmp_path)
    tiny.sd1().save_pretrained("tiny-sd")
    given = ["--model", "./tiny-sd", "--inverters", "ddim,direct", "--editors", "reprompt"]
    given += ["--limit", "2", "--steps", "2", "--guidance", "3", "--metrics", "truth_distance"]
    for _ in range(2):
        script("paired").main(given)
        printed = capsys.readouterr().out
        assert "2 edits of 'paired', tiny-sd" in printed
        assert "| ddim+reprompt - direct+reprompt |" in printed
    assert len(list(Path("runs/paired").iterdir())) == 1
    script("paired").main([*given, "--limit", "1"])
    assert len(list(Path("runs/paired").iterdir())) == 2


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


def test_a_strip_shows_pictures_their_returns_and_edits(model):
    returns = script("returns")
    entries = {e.name: e for e in retour.methods(task="invert")}
    assert returns.editor_for(entries["ddim"], model) == "p2p"
    strip = returns.make(entries["ddim"], model, 2)
    images, captions, targets = returns.chosen()
    assert len(images) == len(captions) == len(set(targets)) == returns.PICTURES
    group = 3 * (returns.CELL + returns.GAP)
    assert strip.size == (4 * group + 3 * returns.BETWEEN, returns.CELL)
    shown = strip.crop((0, 0, returns.CELL, returns.CELL))
    assert shown.tobytes() == images[0].resize(shown.size, 1).tobytes()


def test_peak_memory_is_that_of_the_block():
    with Peak(torch.device("cpu")) as peak:
        held = torch.ones(2**24)  # 64 MiB
        del held
    assert math.isnan(peak.mib) or 60 < peak.mib < 120


def test_peak_memory_does_not_depend_on_what_ran_before():
    """A block that fits into memory which the allocator has kept needs as much as before."""

    def block():
        with Peak(torch.device("cpu")) as peak:
            held = [torch.ones(2**17) for _ in range(128)]  # 64 MiB in pieces
            del held
        return peak.mib

    first = block()
    if math.isnan(first):
        pytest.skip("this system does not tell")
    larger = [torch.ones(2**17) for _ in range(512)]
    last = torch.ones(2**17)  # Above them in the heap, so that it cannot shrink.
    del larger
    assert 60 < first < 80 and block() == pytest.approx(first, abs=8)
    del last
