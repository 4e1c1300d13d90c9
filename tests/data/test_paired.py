"""The paired set: what ships is what it says, and building it again gives the same."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import retour
from data.sprites_for_tests import make_discs
from retour.data import paired
from retour.data._pie import bracketed
from retour.data.scenes import EDIT_KINDS, Split, Studio
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
    assert bracketed("a red cat", "a blue cat") == ("a [red] cat", "a [blue] cat")
    assert bracketed("a cat", "a cat above a dog") == ("a cat", "a cat [above a dog]")


# --- Building, with made-up sprites ---------------------------------------------------------------


@pytest.fixture(scope="module")
def studio():
    return Studio(make_discs())


SPLIT = Split(frozenset({"cat", "apple"}), frozenset({("dog", "3d")}))


def test_building_twice_gives_the_same_and_another_seed_does_not(studio, tmp_path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert paired.build(studio, SPLIT, tmp_path / name, seed, per_style=1) == 21
    read = {n: (tmp_path / n / "mapping_file.json").read_text() for n in ("one", "again", "other")}
    assert read["one"] == read["again"] != read["other"]
    suites = (Suite.load(tmp_path / "one"), Suite.load(tmp_path / "again"))
    for one, again in zip(*suites, strict=True):
        assert np.array_equal(np.asarray(one.edited), np.asarray(again.edited))
