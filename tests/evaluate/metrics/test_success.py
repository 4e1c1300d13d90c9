"""The verdict of an edit: on the shipped pairs, true edits pass and unchanged inputs do not."""

from collections import defaultdict

import pytest
import torch

from retour.data.palette import BACKGROUNDS, OBJECT_COLOURS
from retour.evaluate.metrics import Jury, Sample, edit_success
from retour.evaluate.metrics.success import Claim, border_colour, cut_out, vivid_colour
from retour.evaluate.suite import Suite


@pytest.fixture(scope="module")
def jury():
    return Jury()


def verdicts(items, jury):
    """kind -> [(verdict on the true edit, verdict on the input)]."""
    found = defaultdict(list)
    for item in items:
        sample = Sample.of(item, item.image)
        given = (item.source, item.target, item.kind, sample.edited, jury)
        pair = (edit_success(sample.truth, *given), edit_success(sample.source, *given))
        found[item.kind].append(pair)
    return found


MEASURED = ["change_attribute_color", "change_background", "change_position", "delete_object"]


def test_where_colours_are_measured_every_verdict_is_right(jury):
    found = verdicts(Suite.paired().select(MEASURED), jury)
    assert {kind: len(pairs) for kind, pairs in found.items()} == dict.fromkeys(MEASURED, 24)
    for pairs in found.values():
        assert all(true.success and not same.success for true, same in pairs)
        assert all(v.judge == "measured" for pair in pairs for v in pair)


@pytest.mark.slow
def test_the_networks_mostly_agree_with_the_truth(jury):
    """Counts of 24 that the module's text is based on."""
    found = verdicts(Suite.paired().select(["change_object", "add_object", "change_style"]), jury)
    passed = {
        k: [sum(v.success for v in side) for side in zip(*p, strict=True)] for k, p in found.items()
    }
    assert passed["change_object"][0] >= 23 and passed["change_object"][1] <= 2
    assert passed["add_object"][0] >= 23 and passed["add_object"][1] == 0
    assert passed["change_style"][0] >= 21 and passed["change_style"][1] <= 3


def test_known_objects_are_judged_by_the_classifier(jury):
    known = [i for i in Suite.paired().select(["add_object", "change_object"]) if _known(i, jury)]
    assert len(known) == 11
    for pairs in verdicts(known, jury).values():
        assert all(true.success and true.judge == "emoji-cnn" for true, _ in pairs)


def _known(item, jury):
    before, after = Claim.read(item.source), Claim.read(item.target)
    new = [noun for noun in after.objects if noun not in before.objects]
    return new[0].partition(" ")[2] in jury.classifier.labels


def test_every_prompt_of_the_set_is_read_and_written_back():
    for item in Suite.paired():
        for prompt in (item.source, item.target):
            claim = Claim.read(prompt)
            assert claim is not None and claim.caption == prompt
            assert len(claim.objects) == 1 + bool(claim.relation)


@pytest.mark.parametrize(
    "prompt",
    ["a cat on a mat", "a 3d render of a cat", "", "a photo of a cat on a white background"],
)
def test_other_prompts_are_not_read(prompt):
    assert Claim.read(prompt) is None


GOOD = "a 3d render of a {} car on a white background"


@pytest.mark.parametrize(
    ("source", "target", "kind"),
    [
        ("a red car on a road", "a blue car on a road", "change_attribute_color"),
        (GOOD.format("red"), GOOD.format("blue"), "change_attribute_pose"),
        (GOOD.format("red"), GOOD.format("red"), "change_attribute_color"),
        (GOOD.format("red"), GOOD.format("fast"), "change_position"),
    ],
)
def test_nobody_judges_what_nobody_can(source, target, kind, jury):
    image, mask = torch.rand(3, 64, 64), torch.ones(64, 64)
    assert edit_success(image, source, target, kind, mask, jury) is None


def test_no_region_no_verdict(jury):
    image, mask = torch.rand(3, 64, 64), torch.zeros(64, 64)
    given = (GOOD.format("red"), GOOD.format("blue"), "change_attribute_color")
    assert edit_success(image, *given, mask, jury) is None


def scene(ground="white", colour=None, place=slice(20, 44)):
    image = torch.tensor(BACKGROUNDS[ground])[:, None, None].expand(3, 64, 64) / 255
    image = image.clone()
    if colour is not None:
        image[:, place, place] = torch.tensor(OBJECT_COLOURS[colour])[:, None, None] / 255
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[place, place] = True
    return image, mask


@pytest.mark.parametrize("colour", OBJECT_COLOURS)
@pytest.mark.parametrize("shade", [0.4, 1.0])
def test_colours_are_read_in_light_and_shade(colour, shade):
    image, mask = scene("white", colour)
    image = torch.where(mask, image * shade, image)
    assert vivid_colour(image, mask) == colour


def test_a_region_of_the_backgrounds_colour_or_grey_has_no_colour():
    image, mask = scene("purple")
    assert vivid_colour(image, mask) is None
    image[:, mask] = 0.5
    assert vivid_colour(image, mask) is None


@pytest.mark.parametrize("left", [0.85, 0.95])
def test_what_was_removed_is_gone_by_nine_tenths(left, jury):
    image, mask = scene("white")
    places = mask.nonzero()
    for y, x in places[: int(len(places) * (1 - left))]:
        image[:, y, x] = 0
    source = "a 3d render of a car above a dog on a white background"
    given = (source, "a 3d render of a car on a white background", "delete_object", mask, jury)
    assert edit_success(image, *given).success == (left > 0.9)


def test_an_empty_picture_has_moved_nothing(jury):
    image, mask = scene("white")
    one = "a 3d render of a small car in the top {} on a white background"
    given = (one.format("left"), one.format("right"), "change_position", mask, jury)
    assert not edit_success(image, *given).success
    moved, _ = scene("white", "red", slice(4, 20))
    assert not edit_success(moved, *given).success
    assert edit_success(moved.flip(-1), *given).success


def test_cutting_out_leaves_the_rest_behind():
    image, mask = scene("pink", "red", slice(10, 26))
    image[:, 40:60, 40:60] = 0
    part = cut_out(image, mask)
    assert part.shape == (3, 16 + 2 * 2, 16 + 2 * 2)
    assert torch.equal(part[:, 2:-2, 2:-2], image[:, 10:26, 10:26])
    assert torch.allclose(part[:, 0, 0], border_colour(image))
