"""OIR's objects: phrases and masks, read from whatever is given."""

import numpy as np
import pytest
import torch
from PIL import Image

from retour.editors._oir_masks import pixel_mask, resized
from retour.editors._oir_pairs import Pair, all_replaced, changed_phrases, content, read_pairs


@pytest.mark.parametrize(
    ("source", "target", "old", "new"),
    [
        ("a red apple on grass", "a green apple on grass", "a red apple", "a green apple"),
        ("a photo of a cat on a mat", "a photo of a big dog on a mat", "a cat", "a big dog"),
        ("a cat on a red mat", "a cat on a blue mat", "a red mat", "a blue mat"),
        ("a cat", "a cat", "a cat", "a cat"),
        ("a cat on a mat", "a dog on a rug", "a cat on a mat", "a dog on a rug"),
    ],
)
def test_changed_phrases(source, target, old, new):
    assert changed_phrases(source, target) == (old, new)
    assert content("a red apple on the grass") == "red apple grass"


def test_pairs_are_read_from_anything(tmp_path):
    Image.new("L", (16, 16), "white").save(tmp_path / "cat.png")
    text = read_pairs(f"a cat -> a dog @ {tmp_path}/cat.png; ball -> cube")
    plain = read_pairs([("a cat", "a dog", np.ones((16, 16))), Pair("ball", "cube")])
    for found in (text, plain):
        assert [str(pair) for pair in found] == ["a cat -> a dog", "ball -> cube"]
        assert found[0].mask.size == (16, 16) and found[1].mask is None
        assert read_pairs(found) == found
    assert read_pairs({"ball": "cube"}) == (Pair("ball", "cube"),)
    assert read_pairs([]) == ()


def test_only_its_own_phrase_is_replaced():
    assert Pair("cat", "dog").guided("a caterpillar, a Cat and a cat") == (
        "a caterpillar, a dog and a cat"
    )
    assert all_replaced("a cat and a ball", read_pairs("cat -> dog; ball -> cube")) == (
        "a dog and a cube"
    )


def test_masks_meet_at_any_size():
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[4:12, 4:12] = True
    assert resized(mask, (8, 8)).sum() == 16
    tiny_spot = torch.zeros(16, 16, dtype=torch.bool)
    tiny_spot[0, 0] = True
    assert resized(tiny_spot, (4, 4)).nonzero().tolist() == [[0, 0]]
    assert torch.equal(pixel_mask(mask.float().expand(3, 16, 16), (16, 16)), mask)
