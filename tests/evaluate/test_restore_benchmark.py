"""The restoration benchmark: its classical methods restore, and it runs on a tiny model."""

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

import retour
import tiny
from retour.evaluate.metrics import pixels, psnr
from retour.evaluate.suite import Suite
from retour.restorers.operators import OPERATORS

PATH = Path(__file__).parents[2] / "benchmarks" / "restore.py"
pytest.importorskip("skimage")


@lru_cache
def script():
    spec = importlib.util.spec_from_file_location("benchmark_restore", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_operator_has_its_task():
    assert {task.operator((64, 64)).name for task in script().TASKS.values()} == set(OPERATORS)


@pytest.mark.parametrize(("side", "first"), [(20, 22), (30, 17)])
def test_holes_are_in_the_middle(side, first):
    missing = script().hole((64, 64), side).known == 0
    assert missing.sum() == side**2 and missing[first : first + side, first : first + side].all()


def test_kernels_are_the_operators_own():
    for name in ("deblur", "motion"):
        psf = script().kernel(script().TASKS[name].operator((64, 64)))
        assert psf.sum() == pytest.approx(1) and psf.min() >= 0
        centre = np.unravel_index(psf.argmax(), psf.shape)
        assert abs(centre[0] - 16) <= 1 and abs(centre[1] - 16) <= 1


@pytest.mark.parametrize("name", ["inpaint", "deblur", "motion", "identity"])
def test_classical_methods_restore(name):
    """Nearer to the truth than the damaged picture."""
    task, gains = script().TASKS[name], []
    for item in Suite.paired().select(limit=3):
        true = pixels(item.image)
        operator = task.operator((64, 64))
        y = operator.measure(2 * true[None] - 1, task.noise, torch.Generator().manual_seed(0))
        damaged = (operator.guess(y)[0] / 2 + 0.5).clamp(0, 1)
        guess = damaged
        if name == "inpaint":
            damaged = y[0] / 2 + 0.5
        done = task.classical(guess.permute(1, 2, 0).numpy(), operator)
        found = torch.from_numpy(done).permute(2, 0, 1).clamp(0, 1)
        gains.append(psnr(true, found) - psnr(true, damaged))
    assert min(gains) > 0.5


def test_it_measures_every_picture_by_every_method():
    restore, model = script(), retour.load(tiny.flux())
    items = list(Suite.paired().select(limit=2))
    measures, shown = restore.run_all(model, items, ["inpaint", "motion"], 2, steps=2)
    methods = {t: {m.method for m in measures if m.task == t} for t in ("inpaint", "motion")}
    assert methods["inpaint"] - methods["motion"] == {restore.PROJECTED}
    assert len(measures) == 2 * (6 + 5)
    # What was measured is back: only the hole differs, so the error is all in it.
    (one,) = (m for m in measures if m.method == restore.PROJECTED and m.item == items[0].id)
    share = 20 * 20 / 64**2
    assert one.psnr == pytest.approx(one.hole_psnr - 10 * np.log10(share), abs=0.1)
    assert len(restore.table(measures).splitlines()) == 2 + 11
    assert len(restore.comparison(measures)) == 3 * 3 + 2 * 2
    assert [restore.sheet(shown, each).height for each in (1, 4)] == [32 + 2 * 100, 32 + 4 * 100]
