"""The store keeps mean maps of conditional rows, by branch, image and resolution."""

import pytest
import torch

from attention.spies import Blur, Maps
from editors.runs import SOLVER, denoiser, model, noise
from retour.attention.store import AttentionStore
from retour.core.control import Attending
from retour.core.loop import walk
from retour.core.state import State
from retour.errors import RetourError

PROMPTS = {"source": ["a red apple", "a cat"], "target": ["a green pear", "a blue cat"]}
STEPS = 2


def run(family, controls, size=(8, 12)):
    den = denoiser(family, PROMPTS)
    grid = model(family).grid(STEPS)
    start = State(noise(4, size=size))
    walk(SOLVER, den, start, grid, down=True, controls=[Attending(*controls)])


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_maps_are_means_over_steps_layers_and_heads(family):
    store, maps = AttentionStore(), Maps(("cross", "joint"))
    run(family, [store, maps])
    for branch in PROMPTS:
        for image in range(2):
            assert store.factors(branch, image) == [2]
            parts = []
            for call, probs in maps.seen:
                if call.grid == (4, 6):
                    row = {(r.branch, r.half, r.image): k for k, r in enumerate(call.rows)}
                    part = probs[row[branch, "cond", image], :, call.image, call.text].mean(0)
                    parts.append(part.unflatten(0, (4, 6)))
            found = store.maps(branch, image)
            torch.testing.assert_close(found, torch.stack(parts).mean(0).float())
            words = store.word(branch, image, (1, 3))
            torch.testing.assert_close(words, found[..., 1] + found[..., 3])


def test_resolutions_are_chosen_by_size():
    store = AttentionStore(largest=1.0)
    run("sd1", [store])
    assert store.factors("target", 1) == [1, 2]
    assert store.maps("target", 1, factor=4).shape == (4, 6, 16)
    assert store.maps("target", 1, factor=1).shape == (8, 12, 16)


def test_it_sees_what_comes_before_it():
    before, after, bare = AttentionStore(), AttentionStore(), AttentionStore()
    run("sd1", [before, Blur(), after])
    run("sd1", [bare])
    first = (before.maps("source", 0) - after.maps("source", 0)).abs().max()
    assert first > 1e-4
    # Later layers and steps feel the change, so only the order within a layer is compared.
    assert not torch.equal(before.maps("source", 0), bare.maps("source", 0))


def test_an_unknown_row_is_refused():
    with pytest.raises(RetourError, match="branch 'target', image 3"):
        AttentionStore().maps("target", 3)
