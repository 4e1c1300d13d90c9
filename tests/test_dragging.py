"""`retour.drag`: an inversion and an edit, in rounds if so asked."""

import numpy as np
import pytest
import torch
from PIL import Image

import retour
from editors.dragged import edit, invert, mask, model, picture
from retour.dragging import drag, moved_mask, read_rounds
from retour.editors._drags import Drag
from retour.errors import RetourError


def pull(*args, **options):
    given = {"prompt": "a red apple", "steps": 2, **options}
    return drag(model("sd3"), picture(), *args, **given)


def test_drag_is_invert_and_edit():
    found = pull("4,8>12,8", mask=mask(4, 0, 12, 8), mode="move", seed=3)
    inv = invert(steps=2)
    given = {"drags": "4,8>12,8", "mask": mask(4, 0, 12, 8), "mode": "move", "seed": 3}
    wanted = edit(inv, **given, strength=None)
    assert torch.equal(found.latents, wanted.latents)
    assert found.record["inverter"] == "uniinv" and len(found.record["rounds"]) == 1
    assert found.record["nfe"] == wanted.record["nfe"]


def test_rounds_start_from_the_last_picture():
    one, two = Drag((4, 8), (12, 8)), Drag((12, 8), (12, 4))
    both = pull([[one], [two]])
    first = pull(one)
    second = drag(model("sd3"), first.original_size(), two, prompt="a red apple", steps=2)
    assert torch.equal(both.latents, second.latents)
    assert len(both.record["rounds"]) == 2
    assert both.record["nfe"] == first.record["nfe"] + second.record["nfe"]


def test_a_moved_mask_follows_its_object():
    area = Image.fromarray((255 * mask(4, 0, 12, 8)).astype(np.uint8))
    after = moved_mask(area, [Drag((4, 8), (12, 8))])
    assert np.array_equal(np.asarray(after), 255 * mask(4, 8, 12, 16))
    larger = np.asarray(moved_mask(area, [Drag((4, 8), (8, 8), (1.5, 1.5))]))
    assert 1.3 * 1.3 < larger.sum() / np.asarray(area).sum() < 1.7 * 1.7
    chained = pull([[Drag((4, 8), (12, 8))], [Drag((12, 8), (4, 8))]], mode="move",
                   mask=mask(4, 0, 12, 8))  # fmt: skip
    alone = pull([[Drag((4, 8), (12, 8))], [Drag((12, 8), (4, 8))]], mode="move",
                 mask=[mask(4, 0, 12, 8), mask(4, 8, 12, 16)])  # fmt: skip
    assert torch.equal(chained.latents, alone.latents)


def test_new_words_guide_what_appears():
    same, other = (pull("4,8>12,8", target=t).latents for t in (None, "a blue cat"))
    assert (same - other).abs().max() > 1e-6


def test_rounds_are_read():
    one = Drag((1, 2), (3, 4))
    assert read_rounds(one) == read_rounds([one]) == read_rounds("1,2>3,4") == [(one,)]
    assert read_rounds([[one], "1,2>3,4"]) == [(one,), (one,)]


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        ("", {}, "nothing to drag"),
        ([], {}, "a list of drags"),
        ("1,1>40,1", {}, "40,1 lies outside"),
        ("1,1>4,4", {"mode": "move"}, "give a mask"),
        ("1,1>4,4", {"mask": [mask(0, 0, 8, 8)] * 2}, "2 masks for 1 rounds"),
        ("1,1>4,4", {"editor": "p2p"}, "'p2p' drags no points: use lazydrag"),
        ("1,1>4,4*2", {}, "only mode 'move'"),
    ],
)
def test_bad_drags_are_refused_before_any_work(given, options, says, monkeypatch):
    monkeypatch.setattr(retour.api, "invert", None)
    with pytest.raises(RetourError, match=says):
        pull(given, **options)
