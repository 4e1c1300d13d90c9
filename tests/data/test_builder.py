"""Drawing pairs: nothing held out or unseen is shown, no edit of another set comes again."""

import numpy as np
import pytest

from data.sprites_for_tests import disc, make_discs
from retour.data._builder import NEAR, Builder, distance, outline
from retour.data._pie import prompts
from retour.data.palette import BACKGROUNDS, OBJECT_COLOURS
from retour.data.scenes import EDIT_KINDS, Item, Scene, Split, Studio
from retour.data.sprites import Sprites

SPLIT = Split(frozenset({"cat", "apple"}), frozenset({("dog", "3d")}))


@pytest.fixture(scope="module")
def studio():
    return Studio(make_discs())


def test_edits_of_another_set_do_not_come_again(studio):
    def drawn(apart=()):
        builder = Builder(studio, SPLIT, apart=apart)
        return [prompts(studio, pair) for pair in builder.pairs("object", 2)]

    first = drawn()
    assert drawn() == first
    assert not {*drawn(apart=first[:1])} & {*first[:1]}
    assert not {*drawn(apart=first)} & {*first}


def test_nothing_held_out_is_shown(studio):
    builder = Builder(studio, SPLIT)
    for kind in EDIT_KINDS:
        for pair in builder.pairs(kind, 2):
            for scene in (pair.source, pair.target):
                assert not any(SPLIT.held_out(i.concept, scene.style) for i in scene.items)


def test_an_object_of_the_background_does_not_stand_out(studio):
    sprites = Sprites({("sun", "3d"): disc(BACKGROUNDS["orange"])}, {})
    builder = Builder(Studio(sprites), SPLIT)
    assert not builder.stands_out(Scene("3d", "orange", (Item("sun"),)))
    assert builder.stands_out(Scene("3d", "navy blue", (Item("sun"),)))


def test_near_colours_are_named():
    assert all(pair <= set(OBJECT_COLOURS) for pair in NEAR)
    for pair in NEAR:
        a, b = (np.array(OBJECT_COLOURS[name]) for name in pair)
        assert distance(a, b) < 0.35


def test_outline():
    shape = np.zeros((5, 5), bool)
    shape[1:4, 1:4] = True
    assert outline(shape).sum() == 8
    assert not outline(shape)[2, 2]
