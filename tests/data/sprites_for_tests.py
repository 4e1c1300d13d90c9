"""Drawn sprites in place of emoji: discs, squares and triangles in three styles."""

import numpy as np

from retour.data._builder import FAMILIES, PAINTABLE
from retour.data.sprites import SIZE, Sprites

COLOURS = {
    "ball": (220, 40, 40),
    "box": (40, 160, 70),
    "owl": (240, 240, 240),
    "scissors*": (250, 210, 40),
}


def shape(name: str, style: str) -> np.ndarray:
    """A sprite (64, 64, 4) uint8: the outline tells the name, the border the style."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2
    reach = {"ball": np.hypot(x, y), "box": np.maximum(abs(x), abs(y)), "owl": abs(x) + abs(y)}
    distance = reach.get(name, np.hypot(x, 2 * y))
    alpha = np.clip(32 - distance, 0, 1)
    edge = {"3d": 6, "noto": 3, "twemoji": 0}[style]
    rgb = np.where((distance < 32 - edge)[..., None], COLOURS[name], (20, 20, 20))
    return np.dstack([rgb, 255 * alpha]).astype(np.uint8)


def make_sprites() -> Sprites:
    """Four concepts in three styles."""
    images = {(c, s): shape(c, s) for c in COLOURS for s in ("3d", "noto", "twemoji")}
    return Sprites(images, dict.fromkeys(COLOURS, "objects"))


def disc(colour: object, radius: float = 28.0) -> np.ndarray:
    """A sprite (64, 64, 4) uint8 of one colour."""
    y, x = np.mgrid[:64, :64] - 31.5
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., :3] = colour
    rgba[..., 3] = np.where(x**2 + y**2 < radius**2, 255, 0)
    return rgba


def make_discs() -> Sprites:
    """Every concept of the paired set as a disc of its own size, of a colour for each style."""
    nouns = sorted({n for family in FAMILIES for n in family} | set(PAINTABLE))
    rng, images = np.random.default_rng(0), {}
    for noun in nouns:
        base, radius = rng.integers(60, 200, 3), rng.uniform(20, 31)
        for k, style in enumerate(("3d", "noto", "twemoji")):
            images[noun, style] = disc(np.clip(base + 40 * (k - 1), 0, 255), radius)
    return Sprites(images, {})
