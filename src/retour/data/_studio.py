"""Draws scenes, captions them, and makes exact edit pairs of them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image

from retour.data._scene import (
    STYLE_PHRASES,
    Edit,
    Item,
    Scene,
    corner_phrase,
    edited,
    relation,
    size_word,
    with_article,
)
from retour.data.palette import BACKGROUNDS, natural_colour, recolour
from retour.data.sprites import SIZE, Sprites


@dataclass(frozen=True)
class Form:
    """Which optional phrases a caption has."""

    style: bool = True
    background: bool = True
    natural_colours: bool = False
    place: bool = True


@dataclass(frozen=True)
class Pair:
    """A scene before and after an edit.

    Images (64, 64, 3) uint8; mask (64, 64) bool, true where pixels may differ.
    """

    source: Scene
    target: Scene
    source_image: np.ndarray
    target_image: np.ndarray
    source_caption: str
    target_caption: str
    mask: np.ndarray
    edit: Edit


class Studio:
    """Draws and captions scenes with a set of sprites."""

    def __init__(self, sprites: Sprites) -> None:
        self.sprites = sprites
        self.paint = functools.lru_cache(4096)(self._paint)
        self.natural = functools.lru_cache(8192)(self._natural)

    def _paint(self, concept: str, style: str, colour: str | None) -> Image.Image:
        sprite = self.sprites.images[concept, style]
        rgba = sprite if colour is None else recolour(sprite, colour)
        return Image.fromarray(rgba).convert("RGBa")

    def _natural(self, concept: str, style: str) -> str | None:
        return natural_colour(self.sprites.images[concept, style])

    def layer(self, item: Item, style: str) -> tuple[np.ndarray, np.ndarray]:
        """Premultiplied colour (64, 64, 3) and alpha (64, 64, 1) of an item, in 0..1."""
        sprite = self.paint(item.concept, style, item.colour)
        if item.flip:
            sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        side = max(2, round(item.scale * SIZE))
        if side != SIZE:
            sprite = sprite.resize(
                (side, side), Image.Resampling.BOX if side < 40 else Image.Resampling.BICUBIC
            )
        canvas = Image.new("RGBa", (SIZE, SIZE))
        canvas.paste(sprite, (round(item.x * SIZE - side / 2), round(item.y * SIZE - side / 2)))
        rgba = np.asarray(canvas, dtype=np.float32) / 255.0
        return rgba[..., :3], rgba[..., 3:]

    def render(self, scene: Scene, backdrop: np.ndarray | None = None) -> np.ndarray:
        """The image (64, 64, 3) uint8, on `backdrop` (64, 64, 3) in 0..1 if given."""
        plain = np.array(BACKGROUNDS[scene.background], np.float32) / 255.0
        image = np.broadcast_to(plain if backdrop is None else backdrop, (SIZE, SIZE, 3))
        for item in scene.items:
            colour, alpha = self.layer(item, scene.style)
            image = colour + (1.0 - alpha) * image
        return np.clip(image * 255.0 + 0.5, 0, 255).astype(np.uint8)

    def masks(self, scene: Scene) -> np.ndarray:
        """Where each item has any paint, hidden parts included: (items, 64, 64) bool."""
        layers = [self.layer(item, scene.style)[1][..., 0] > 0 for item in scene.items]
        return np.stack(layers) if layers else np.zeros((0, SIZE, SIZE), bool)

    def noun(self, item: Item, style: str, natural_colours: bool, sized: bool = True) -> str:
        """Article, size, colour and noun of an item."""
        colour = item.colour or (self.natural(item.concept, style) if natural_colours else None)
        words = [size_word(item.scale) if sized else "", colour or "", item.concept]
        return with_article(" ".join(word for word in words if word))

    def caption(self, scene: Scene, form: Form = Form()) -> str:
        """What the scene shows, in words."""
        crowd = len(scene.items) > 1
        nouns = [self.noun(i, scene.style, form.natural_colours, not crowd) for i in scene.items]
        if crowd:
            nouns[:2] = [" ".join([nouns[0], relation(*scene.items[:2]), nouns[1]])]
        subject = " and ".join(nouns)
        place = corner_phrase(scene.items[0]) if form.place and len(scene.items) == 1 else ""
        ground = f"{with_article(scene.background)} background"
        parts = [STYLE_PHRASES[scene.style] if form.style else "", subject, place]
        if form.background or not nouns:
            parts.append(f"on {ground}" if nouns else ground)
        return " ".join(part for part in parts if part)

    def pair(self, scene: Scene, edit: Edit, form: Form = Form()) -> Pair:
        """Both sides of an edit; outside the mask the two images are equal."""
        target = edited(scene, edit)
        mask = self._changed_area(scene, target, edit)
        captions = (self.caption(scene, form), self.caption(target, form))
        return Pair(scene, target, self.render(scene), self.render(target), *captions, mask, edit)

    def _changed_area(self, source: Scene, target: Scene, edit: Edit) -> np.ndarray:
        before, after = self.masks(source), self.masks(target)
        if edit.kind == "background":
            layers = [self.layer(item, source.style)[1][..., 0] < 1 for item in source.items]
            return np.all([np.ones((SIZE, SIZE), bool), *layers], axis=0)
        if edit.kind == "style":
            return np.any(np.concatenate([before, after]), axis=0)
        if edit.kind == "add":
            return after[-1]
        if edit.kind == "remove":
            return before[edit.index]
        return before[edit.index] | after[edit.index]
