"""What the base of all editors offers: a start of one's own."""

from __future__ import annotations

import pytest
import torch

import retour
import tiny
from retour.core import registry
from retour.core.control import Control
from retour.core.registry import Entry, NoOptions, Paper
from retour.editors.base import Editor, Start

SOURCE, TARGET = "a red apple on a blue background", "a cat"


class FromDepth(Editor):
    """Starts from the source's own state at a depth, after one evaluation of its own."""

    depth = 0

    def __init__(self, options):
        self.options = options

    def control(self, job):
        return Control()

    def prepare(self, job, denoiser, replay):
        x = job.inversion.states["x"][self.depth]
        denoiser(x, job.grid.times[1])
        return Start(replay.state.with_x(x), self.depth, {"began": self.depth})


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_an_editor_may_choose_where_to_start(depth, gradient, monkeypatch):
    entry = Entry("from-depth", "edit", FromDepth, "", Paper("", "", 2000), NoOptions)
    monkeypatch.setitem(registry._entries, ("edit", "from-depth"), entry)
    monkeypatch.setattr(FromDepth, "depth", depth)
    model = retour.load(tiny.sd1().to(torch.float64))
    inversion = retour.invert(model, gradient, SOURCE, method="ddim", steps=4, guidance=3.0)
    result = retour.edit(inversion, TARGET, editor="from-depth")
    assert result.record["began"] == depth
    assert result.record["nfe_edit"] == 2 + 2 * depth
    if depth == 0:
        assert torch.equal(result.latents, inversion.latents)
    if depth == 4:
        plain = retour.edit(inversion, TARGET, editor="reprompt")
        assert torch.equal(result.latents, plain.latents)
