"""The paired set: what ships is what it says, and building it again gives the same."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import retour
from retour.data import paired
from retour.data.palette import BACKGROUNDS, OBJECT_COLOURS
from retour.data.scenes import EDIT_KINDS, Item, Scene, Split, Studio
from retour.data.sprites import Sprites
from retour.errors import RetourError
from retour.evaluate.suite import SPLITS, Suite

FOLDER = Path(retour.__file__).parent / "paired"


@pytest.fixture(scope="module", params=SPLITS)
def shipped(request):
    return list(Suite.paired(request.param))


def test_size_and_balance(shipped):
    assert 140 <= len(shipped) <= 210
    assert set(Counter(i.kind for i in shipped).values()) == {len(shipped) // len(EDIT_KINDS)}
    styles = Counter(i.source.split()[1] for i in shipped)
    assert max(styles.values()) == min(styles.values())
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 3 * 2**20


def test_outside_the_mask_nothing_changes_and_inside_much_does(shipped):
    for item in shipped:
        before, after = (np.asarray(p).astype(int) for p in (item.image, item.edited))
        gap = np.abs(before - after).max(-1)
        assert gap[~item.mask()].max() == 0, item.id
        assert gap[item.mask()].mean() > 15, item.id


def test_prompts_are_good(shipped):
    for item in shipped:
        for prompt in (item.source, item.target):
            assert prompt.startswith(("a 3d render ", "a noto style ", "a flat twemoji ")), prompt
            assert prompt.endswith(" background") and "*" not in prompt
            words = prompt.split()
            for article, word in zip(words, words[1:], strict=False):
                if article in ("a", "an") and word not in ("ufo", "unicorn"):
                    assert (article == "an") == (word[0] in "aeiou"), prompt
        assert item.source != item.target
        assert item.words is not None and item.instruction
        assert item.words[0] in item.source.split() and item.words[1] in item.target.split()


def test_every_pair_is_another_one(shipped):
    assert len({(i.source, i.target) for i in shipped}) == len(shipped)
    assert {i.split for i in shipped} == {"train"}


def test_the_splits_share_no_edit():
    public, test = ({(i.source, i.target) for i in Suite.paired(name)} for name in SPLITS)
    assert len(public) == len(test) and not public & test
    with pytest.raises(RetourError, match=r"split of the paired set 'tests': did you mean 'test'"):
        Suite.paired("tests")


@pytest.mark.parametrize("split", SPLITS)
def test_brackets_mark_what_differs(split):
    mapping = json.loads((FOLDER / split / "mapping_file.json").read_text())
    assert all(isinstance(key, str) and len(key) == 12 for key in mapping)
    for entry in mapping.values():
        assert "[" in entry["original_prompt"] + entry["editing_prompt"]
    assert paired.bracketed("a red cat", "a blue cat") == ("a [red] cat", "a [blue] cat")
    assert paired.bracketed("a cat", "a cat above a dog") == ("a cat", "a cat [above a dog]")


# --- Building, with made-up sprites ---------------------------------------------------------------


def disc(colour, radius=28.0):
    y, x = np.mgrid[:64, :64] - 31.5
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., :3] = colour
    rgba[..., 3] = np.where(x**2 + y**2 < radius**2, 255, 0)
    return rgba


@pytest.fixture(scope="module")
def studio():
    nouns = sorted({n for family in paired.FAMILIES for n in family} | set(paired.PAINTABLE))
    rng, images = np.random.default_rng(0), {}
    for noun in nouns:
        base, radius = rng.integers(60, 200, 3), rng.uniform(20, 31)
        for k, style in enumerate(("3d", "noto", "twemoji")):
            images[noun, style] = disc(np.clip(base + 40 * (k - 1), 0, 255), radius)
    return Studio(Sprites(images, {}))


SPLIT = Split(frozenset({"cat", "apple"}), frozenset({("dog", "3d")}))


def test_building_twice_gives_the_same_and_another_seed_does_not(studio, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert paired.build(studio, SPLIT, tmp_path / name, seed, per_style=1) == 21
    read = {n: (tmp_path / n / "mapping_file.json").read_text() for n in ("one", "again", "other")}
    assert read["one"] == read["again"] != read["other"]
    suites = (Suite.load(tmp_path / "one"), Suite.load(tmp_path / "again"))
    for one, again in zip(*suites, strict=True):
        assert np.array_equal(np.asarray(one.edited), np.asarray(again.edited))


def test_edits_of_another_set_do_not_come_again(studio):
    def drawn(apart=()):
        builder = paired.Builder(studio, SPLIT, apart=apart)
        return [paired.prompts(studio, pair) for pair in builder.pairs("object", 2)]

    first = drawn()
    assert drawn() == first
    assert not {*drawn(apart=first[:1])} & {*first[:1]}
    assert not {*drawn(apart=first)} & {*first}


def test_nothing_held_out_is_shown(studio):
    builder = paired.Builder(studio, SPLIT)
    for kind in EDIT_KINDS:
        for pair in builder.pairs(kind, 2):
            for scene in (pair.source, pair.target):
                assert not any(SPLIT.held_out(i.concept, scene.style) for i in scene.items)


def test_an_object_of_the_background_does_not_stand_out(studio):
    sprites = Sprites({("sun", "3d"): disc(BACKGROUNDS["orange"])}, {})
    builder = paired.Builder(Studio(sprites), SPLIT)
    assert not builder.stands_out(Scene("3d", "orange", (Item("sun"),)))
    assert builder.stands_out(Scene("3d", "navy blue", (Item("sun"),)))


def test_near_colours_are_named():
    assert all(pair <= set(OBJECT_COLOURS) for pair in paired.NEAR)
    for pair in paired.NEAR:
        a, b = (np.array(OBJECT_COLOURS[name]) for name in pair)
        assert paired.distance(a, b) < 0.35


def test_outline():
    shape = np.zeros((5, 5), bool)
    shape[1:4, 1:4] = True
    assert paired.outline(shape).sum() == 8
    assert not paired.outline(shape)[2, 2]
