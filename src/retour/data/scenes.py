"""Captioned scenes made of sprites, and exact edit pairs.

A `Scene` is plain data: a style, a background colour and one or two `Item`s. `Studio` draws it:
pixels, caption and one exact mask per object follow from the scene and the sprites alone. `Sampler`
maps (seed, number) to a scene, and `pair` changes one attribute of a scene, which gives the true
edited image and the exact mask of the change.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from importlib.resources import files

import numpy as np

from retour.data._scene import (
    CORNERS,
    EDIT_KINDS,
    PAIR_SCALE,
    RELATIONS,
    SCALES,
    STYLE_PHRASES,
    Edit,
    Item,
    Scene,
    corner_phrase,
    edited,
    relation,
    with_article,
)
from retour.data._studio import Form, Pair, Studio
from retour.data.palette import BACKGROUNDS, OBJECT_COLOURS
from retour.data.sprites import SIZE, Sprites

__all__ = [
    "CORNERS",
    "EDIT_KINDS",
    "PAIR_SCALE",
    "RELATIONS",
    "SCALES",
    "SIZE",
    "SPLIT_SEED",
    "STYLE_PHRASES",
    "Edit",
    "Form",
    "Item",
    "Mix",
    "Pair",
    "Sampler",
    "Scene",
    "Split",
    "Studio",
    "corner_phrase",
    "edited",
    "favourites",
    "make_split",
    "relation",
    "with_article",
]

SPLIT_SEED = 4


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
