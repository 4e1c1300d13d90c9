"""Captioned scenes made of sprites, and exact edit pairs.

A `Scene` is plain data: a style, a background colour and one or two `Item`s. `Studio` draws it:
pixels, caption and one exact mask per object follow from the scene and the sprites alone. `Sampler`
maps (seed, number) to a scene, and `pair` changes one attribute of a scene, which gives the true
edited image and the exact mask of the change.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from retour.data.palette import BACKGROUNDS, OBJECT_COLOURS, natural_colour, recolour
from retour.data.sprites import SIZE, Sprites

STYLE_PHRASES = {
    "3d": "a 3d render of",
    "noto": "a noto style cartoon of",
    "twemoji": "a flat twemoji drawing of",
}
SCALES = {"small": 0.42, "regular": 0.80, "large": 0.97}
CORNERS = {
    "in the top left": (0.27, 0.27),
    "in the top right": (0.73, 0.27),
    "in the bottom left": (0.27, 0.73),
    "in the bottom right": (0.73, 0.73),
}
RELATIONS = {
    "to the left of": ((0.26, 0.5), (0.74, 0.5)),
    "to the right of": ((0.74, 0.5), (0.26, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
}
PAIR_SCALE = 0.46
SPLIT_SEED = 4


@dataclass(frozen=True)
class Item:
    """One object: centre `x`, `y` and longest side `scale`, as fractions of the image.

    `colour` None keeps the colours of the sprite.
    """

    concept: str
    colour: str | None = None
    scale: float = SCALES["regular"]
    x: float = 0.5
    y: float = 0.5
    flip: bool = False


@dataclass(frozen=True)
class Scene:
    """Items on a background, later items in front; all are drawn in one style."""

    style: str
    background: str
    items: tuple[Item, ...]


@dataclass(frozen=True)
class Edit:
    """One changed attribute: `kind` is object, colour, background, style, position, add or remove.

    `value` is the new concept, colour (None: natural), background, style, (x, y) or Item; `index`
    the item concerned.
    """

    kind: str
    value: Any = None
    index: int = 0


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


def with_article(phrase: str) -> str:
    """Put a or an before a noun phrase; a trailing * marks nouns that take none."""
    if phrase.endswith("*"):
        return phrase[:-1]
    word = phrase.split()[0]
    vowel = word[0] in "aeiou" and not word.startswith(("uni", "ufo", "eu", "one"))
    return f"{'an' if vowel else 'a'} {phrase}"


def size_word(scale: float) -> str:
    """The word of a scale, "" for the regular one."""
    name = min(SCALES, key=lambda key: abs(SCALES[key] - scale))
    return "" if name == "regular" else name


def corner_phrase(item: Item) -> str:
    """Where the item lies, "" near the middle."""
    if abs(item.x - 0.5) < 0.1 or abs(item.y - 0.5) < 0.1:
        return ""
    return min(
        CORNERS, key=lambda key: np.hypot(CORNERS[key][0] - item.x, CORNERS[key][1] - item.y)
    )


def relation(first: Item, second: Item) -> str:
    """How the first of two items lies to the second."""
    dx, dy = second.x - first.x, second.y - first.y
    if abs(dx) >= abs(dy):
        return "to the left of" if dx > 0 else "to the right of"
    return "above" if dy > 0 else "below"


@dataclass(frozen=True)
class Form:
    """Which optional phrases a caption has."""

    style: bool = True
    background: bool = True
    natural_colours: bool = False
    place: bool = True


@dataclass(frozen=True)
class Split:
    """What training must not see: whole concepts, and (concept, style) pairs."""

    concepts: frozenset[str]
    pairs: frozenset[tuple[str, str]]

    def held_out(self, concept: str, style: str) -> bool:
        """Whether a sprite is held out of training."""
        return concept in self.concepts or (concept, style) in self.pairs


def make_split(
    sprites: Sprites, seed: int = SPLIT_SEED, share: float = 0.1, pair_share: float = 0.06
) -> Split:
    """Hold out a share of the concepts, and of the (concept, style) pairs of the others."""
    rng = np.random.default_rng(seed)
    order = [str(name) for name in rng.permutation(sprites.concepts)]
    count = round(share * len(order))
    rest = order[count:]
    pairs = {
        (c, str(rng.choice(sprites.styles))) for c in rest[: round(3 * pair_share * len(rest))]
    }
    return Split(frozenset(order[:count]), frozenset(pairs))


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

    def change(self, scene: Scene, edit: Edit) -> Scene:
        """The scene after an edit."""
        if edit.kind in ("style", "background"):
            changes: dict[str, Any] = {edit.kind: edit.value}
            return replace(scene, **changes)
        return replace(scene, items=_changed_items(scene.items, edit))

    def pair(self, scene: Scene, edit: Edit, form: Form = Form()) -> Pair:
        """Both sides of an edit; outside the mask the two images are equal."""
        target = self.change(scene, edit)
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


def _changed_items(items: tuple[Item, ...], edit: Edit) -> tuple[Item, ...]:
    """Items after an edit of kind object, colour, position, add or remove."""
    if edit.kind == "add":
        return (*items, edit.value)
    if edit.kind == "remove":
        return items[: edit.index] + items[edit.index + 1 :]
    fields = {
        "object": lambda value: {"concept": value},
        "colour": lambda value: {"colour": value},
        "position": lambda value: {"x": value[0], "y": value[1]},
    }
    if edit.kind not in fields:
        raise ValueError(f"an edit must be one of {EDIT_KINDS}, not {edit.kind!r}")
    changed = replace(items[edit.index], **fields[edit.kind](edit.value))
    return items[: edit.index] + (changed,) + items[edit.index + 1 :]


EDIT_KINDS = ("object", "colour", "background", "style", "position", "add", "remove")


@functools.cache
def favourites() -> frozenset[str]:
    """The concepts that a first-time user is likeliest to ask for."""
    return frozenset((files("retour.data") / "favourites.txt").read_text("utf-8").splitlines())


@dataclass(frozen=True)
class Mix:
    """How often a sampler draws each layout, recoloured objects and favourites, and the jitter."""

    centred: float = 0.78
    large: float = 0.05
    small: float = 0.03
    corner: float = 0.06
    two: float = 0.08
    recoloured: float = 0.3
    jitter: float = 0.02
    favoured: float = 0.0


@dataclass
class Sampler:
    """Scenes by number: `scene(i)` depends on the seed and i alone.

    `part` is "train" (nothing held out), "pairs" (held-out concept-style pairs), "concepts"
    (held-out concepts) or "all".
    """

    studio: Studio
    split: Split
    seed: int = 0
    part: str = "train"
    mix: Mix = field(default_factory=Mix)

    def __post_init__(self) -> None:
        """List the sprites of the part by style."""
        tests = {
            "train": lambda c, s: not self.split.held_out(c, s),
            "pairs": lambda c, s: (c, s) in self.split.pairs,
            "concepts": lambda c, s: c in self.split.concepts,
            "all": lambda c, s: True,
        }
        if self.part not in tests:
            raise ValueError(f"part must be one of {sorted(tests)}, not {self.part!r}")
        keys = sorted(self.studio.sprites.images)
        self.keys = [key for key in keys if tests[self.part](*key)]
        self.by_style = {s: [c for c, t in self.keys if t == s] for s in self.studio.sprites.styles}

    def rng(self, number: int, stream: int = 0) -> np.random.Generator:
        """The random numbers of scene `number`."""
        return np.random.default_rng([self.seed, number, stream])

    def scene(self, number: int) -> Scene:
        """Scene `number`."""
        rng = self.rng(number)
        keys = self.keys
        if self.mix.favoured and rng.random() < self.mix.favoured:
            keys = [key for key in keys if key[0] in favourites()] or keys
        concept, style = keys[rng.integers(len(keys))]
        background = str(rng.choice(list(BACKGROUNDS)))
        kinds = ("centred", "large", "small", "corner", "two")
        kind = str(rng.choice(kinds, p=[getattr(self.mix, name) for name in kinds]))
        items = getattr(self, f"_{kind}")(rng, concept, style)
        return Scene(style, background, tuple(items))

    def caption(self, number: int) -> str:
        """A caption of scene `number`, with optional phrases left out at random."""
        scene, rng = self.scene(number), self.rng(number, 1)
        form = Form(
            style=rng.random() < 0.85,
            background=scene.background != "white" or rng.random() < 0.5,
            natural_colours=rng.random() < 0.4,
            place=True,
        )
        return self.studio.caption(scene, form)

    def edit(self, number: int, kind: str) -> Edit:
        """A random edit of the given kind that fits scene `number` and changes it."""
        scene, rng = self.scene(number), self.rng(number, 2)
        first = scene.items[0]
        if kind == "position":
            places = [place for place in CORNERS.values() if place != (first.x, first.y)]
            return Edit(kind, places[rng.integers(len(places))])
        if kind == "remove":
            return Edit(kind, index=len(scene.items) - 1)
        if kind == "add":
            return Edit(kind, Item(self._other(rng, scene), scale=SCALES["small"], x=0.76, y=0.76))
        choices = {
            "object": lambda: [c for c in self.by_style[scene.style] if c != first.concept],
            "colour": lambda: [c for c in OBJECT_COLOURS if c != self._shown_colour(scene)],
            "background": lambda: [b for b in BACKGROUNDS if b != scene.background],
            "style": lambda: [s for s in self.studio.sprites.styles if s != scene.style],
        }
        return Edit(kind, str(rng.choice(choices[kind]())))

    def _shown_colour(self, scene: Scene) -> str | None:
        first = scene.items[0]
        return first.colour or self.studio.natural(first.concept, scene.style)

    def _other(self, rng: np.random.Generator, scene: Scene) -> str:
        taken = {item.concept for item in scene.items}
        return str(rng.choice([c for c in self.by_style[scene.style] if c not in taken]))

    def _item(
        self, rng: np.random.Generator, concept: str, scale: float, place: tuple[float, float]
    ) -> Item:
        recoloured = rng.random() < self.mix.recoloured
        colour = str(rng.choice(list(OBJECT_COLOURS))) if recoloured else None
        x, y = (p + rng.uniform(-self.mix.jitter, self.mix.jitter) for p in place)
        scale *= 1.0 + rng.uniform(-self.mix.jitter, self.mix.jitter)
        return Item(concept, colour, float(scale), float(x), float(y))

    def _centred(self, rng: np.random.Generator, concept: str, style: str) -> list[Item]:
        return [self._item(rng, concept, SCALES["regular"], (0.5, 0.5))]

    def _large(self, rng: np.random.Generator, concept: str, style: str) -> list[Item]:
        return [self._item(rng, concept, SCALES["large"], (0.5, 0.5))]

    def _small(self, rng: np.random.Generator, concept: str, style: str) -> list[Item]:
        return [self._item(rng, concept, SCALES["small"], (0.5, 0.5))]

    def _corner(self, rng: np.random.Generator, concept: str, style: str) -> list[Item]:
        place = list(CORNERS.values())[rng.integers(len(CORNERS))]
        return [self._item(rng, concept, SCALES["small"], place)]

    def _two(self, rng: np.random.Generator, concept: str, style: str) -> list[Item]:
        others = [name for name in self.by_style[style] if name != concept]
        places = list(RELATIONS.values())[rng.integers(len(RELATIONS))]
        names = (concept, str(rng.choice(others)))
        return [self._item(rng, n, PAIR_SCALE, p) for n, p in zip(names, places, strict=True)]
