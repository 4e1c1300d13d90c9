"""The store of inversions: what its keys see, that it gives back the same bits, and damage."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from PIL import Image

import retour
import tiny
from retour.core.cache import InversionCache, content_hash, inversion_inputs, pixel_hash
from retour.errors import RetourError

PROMPTS = ["a red apple", "a blue cat"]


@pytest.fixture(scope="module")
def model():
    return retour.load(tiny.sd1())


def pictures(*colours):
    return [Image.new("RGB", (16, 16), colour) for colour in colours]


def settings(**changes):
    return {"method": "ddim", "steps": 2, "guidance": 3.0, **changes}


def inputs(model, images=None, prompts=PROMPTS, **changes):
    images = pictures("red", "blue") if images is None else images
    return inversion_inputs(model, images, prompts, **settings(**changes))


def maker(model, calls, **changes):
    def make():
        calls.append(1)
        return retour.invert(model, pictures("red", "blue"), PROMPTS, **settings(**changes))

    return make


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 3},
        {"guidance": 3.5},
        {"seed": 1},
        {"negative": "ugly"},
        {"method": "direct"},
        {"inversion_guidance": 2.0},
        {"prompts": ["a red apple", "a cat"]},
        {"images": pictures("red", "navy")},
        {"images": pictures("blue", "red")},
        {"images": pictures("red"), "prompts": PROMPTS[:1]},
    ],
)
def test_every_input_decides_the_key(model, changes):
    assert content_hash(inputs(model, **changes)) != content_hash(inputs(model))


def test_the_model_decides_the_key(model):
    other = retour.load(tiny.sd2())
    assert content_hash(inputs(other)) != content_hash(inputs(model))


def test_defaults_said_aloud_are_the_same_key(model):
    assert content_hash(inputs(model, inversion_guidance=1.0)) == content_hash(inputs(model))


def test_pictures_of_the_same_bytes_and_other_shapes_differ():
    assert pixel_hash(Image.new("RGB", (4, 2))) != pixel_hash(Image.new("RGB", (2, 4)))


@pytest.mark.parametrize("method", ["ddim", "direct", "edict", "edit-friendly", "negative-prompt"])
def test_an_edit_from_the_store_is_that_of_a_fresh_inversion(model, tmp_path, method):
    """To the last bit, batch of two, whether the store just made it or had it."""
    given = settings(method=method)
    fresh = retour.invert(model, pictures("red", "blue"), PROMPTS, **given)
    wanted = retour.edit(fresh, "a green pear", editor="p2p").latents
    cache, calls = InversionCache(tmp_path), []
    for known in (False, True):
        found, hit = cache.fetch(inputs(model, method=method), maker(model, calls, **given), model)
        assert hit is known
        assert torch.equal(retour.edit(found, "a green pear", editor="p2p").latents, wanted)
    assert len(calls) == 1 == len(cache)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no facts", "bad facts", "empty"])
def test_a_damaged_entry_is_dropped_and_made_again(model, tmp_path, damage):
    cache, calls = InversionCache(tmp_path), []
    cache.fetch(inputs(model), maker(model, calls), model)
    (tensors,), (facts,) = tmp_path.glob("*.safetensors"), tmp_path.glob("*.json")
    content = bytearray(tensors.read_bytes())
    if damage == "truncated":
        tensors.write_bytes(content[:-7])
    elif damage == "flipped":
        content[-3] ^= 1
        tensors.write_bytes(content)
    elif damage == "empty":
        tensors.write_bytes(b"")
    elif damage == "no facts":
        facts.unlink()
    else:
        facts.write_text("[")
    assert cache.get(tensors.stem, model) is None
    _, hit = cache.fetch(inputs(model), maker(model, calls), model)
    assert not hit and len(calls) == 2
    assert cache.get(tensors.stem, model) is not None


def test_an_entry_of_another_model_is_dropped(model, tmp_path):
    cache = InversionCache(tmp_path)
    cache.put("key", maker(model, [])())
    assert cache.get("key", retour.load(tiny.sd2())) is None
    assert len(cache) == 0


def test_the_least_recently_used_goes_first(model, tmp_path):
    made = maker(model, [])()
    cache = InversionCache(tmp_path)
    for name in ("a", "b", "c"):
        cache.put(name, made)
    size = (tmp_path / "a.safetensors").stat().st_size
    for age, name in enumerate(("c", "b", "a")):
        os.utime(tmp_path / f"{name}.json", ns=(0, time.time_ns() - 10**9 * (age + 1)))
    assert cache.get("a", model) is not None
    cache.limit = 2 * size
    cache.evict()
    assert {p.stem for p in tmp_path.iterdir()} == {"a", "c"}


def test_an_inversion_larger_than_the_store_is_still_given(model, tmp_path):
    cache = InversionCache(tmp_path, limit=10)
    found, hit = cache.fetch(inputs(model), maker(model, []), model)
    assert not hit and found.model is model
    assert len(cache) == 0


def test_entries_say_what_they_were_made_from(model, tmp_path):
    InversionCache(tmp_path).fetch(inputs(model), maker(model, []), model)
    (facts,) = tmp_path.glob("*.json")
    assert json.loads(facts.read_text())["inputs"]["prompts"] == PROMPTS


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RetourError, match="choose another folder"):
        InversionCache(tmp_path / "file" / "cache")
