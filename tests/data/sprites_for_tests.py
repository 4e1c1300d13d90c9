"""Drawn sprites in place of emoji: discs, squares and triangles in three styles."""

import numpy as np

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
