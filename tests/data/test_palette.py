import colorsys

import numpy as np
import pytest

from data.sprites_for_tests import COLOURS, shape
from retour.data.palette import (
    BACKGROUNDS,
    OBJECT_COLOURS,
    natural_colour,
    nearest_background,
    recolour,
)


def hue(rgb):
    return colorsys.rgb_to_hsv(*(value / 255 for value in rgb))[0]


@pytest.mark.parametrize("name", OBJECT_COLOURS)
@pytest.mark.parametrize("concept", COLOURS)
def test_recoloured_sprites_read_as_their_colour(concept, name):
    sprite = shape(concept, "twemoji")
    painted = recolour(sprite, name)
    centre = painted[32, 32, :3]
    turn = abs(hue(centre) - hue(OBJECT_COLOURS[name]))
    assert min(turn, 1 - turn) < 0.03
    assert natural_colour(painted) == name


def test_recolouring_keeps_the_outline_and_dark_lines():
    sprite = shape("ball", "3d")
    painted = recolour(sprite, "blue")
    assert (painted[..., 3] == sprite[..., 3]).all()
    line = sprite[..., :3].max(-1) == 20
    assert (painted[line] == sprite[line]).all()


@pytest.mark.parametrize(("concept", "colour"), [("ball", "red"), ("box", "green"), ("owl", None)])
def test_natural_colours(concept, colour):
    assert natural_colour(shape(concept, "twemoji")) == colour


def test_an_empty_sprite_has_no_colour():
    assert natural_colour(np.zeros((64, 64, 4), np.uint8)) is None


@pytest.mark.parametrize("name", BACKGROUNDS)
def test_backgrounds_are_told_apart(name):
    near = np.array(BACKGROUNDS[name]) + np.array([6, -6, 6])
    assert nearest_background(near) == name
