"""Draws the pairs of the paired set: at random, accepted only if people can see what changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from retour.data._pie import prompts
from retour.data.palette import BACKGROUNDS, OBJECT_COLOURS
from retour.data.scenes import (
    CORNERS,
    EDIT_KINDS,
    PAIR_SCALE,
    RELATIONS,
    SCALES,
    Edit,
    Form,
    Item,
    Pair,
    Scene,
    Split,
    Studio,
)

SEED = 2026
PER_STYLE = 8

# Objects that people would swap for each other, and that no one takes for each other.
FAMILIES = (
    ("cat", "dog", "bear", "panda", "tiger", "rabbit", "pig", "frog", "penguin", "owl", "lion"),
    ("apple", "lemon", "strawberry", "pineapple", "banana", "avocado", "kiwi", "grapes*"),
    ("car", "tractor", "bicycle", "scooter", "steam train", "fire engine"),
    ("dolphin", "octopus", "crab", "turtle", "shark", "jellyfish", "fish", "whale"),
    ("hamburger", "pizza slice", "taco", "doughnut", "ice cream cone", "birthday cake"),
    ("croissant", "cookie", "pretzel"),
    ("rose", "sunflower", "tulip", "cactus", "mushroom", "palm tree", "pine tree"),
    ("airplane", "helicopter", "ufo", "sailboat"),
    ("guitar", "trumpet", "drum"),
    ("basketball", "soccer ball", "football"),
    ("top hat", "crown", "t-shirt", "sneaker", "backpack", "umbrella"),
    ("teapot", "wine glass", "beer mug"),
    ("sun", "star", "rainbow", "cloud", "lightning bolt", "heart"),
    ("ghost", "alien", "robot", "jack-o-lantern", "snowman", "skull"),
    ("camera", "television", "alarm clock", "light bulb", "phone"),
    ("butterfly", "bee", "ladybug", "spider"),
    ("key", "padlock", "bell", "trophy", "magnet", "diamond"),
    ("house", "castle", "tent", "volcano"),
)

# Objects of one paint, on which a new colour looks right.
PAINTABLE = (
    "apple", "backpack", "balloon", "bell", "bicycle", "book", "butterfly", "car", "chair",
    "crab", "diamond", "dinosaur", "dolphin", "door", "fish", "flamingo", "guitar",
    "heart", "hibiscus", "jellyfish", "key", "lobster", "maple leaf",
    "octopus", "pear", "rose", "scooter", "sneaker", "star", "t-shirt", "teapot", "tent",
    "tulip", "umbrella", "water drop", "whale", "chili pepper", "puzzle piece", "squid",
    "turtle", "cat", "rabbit",
)  # fmt: skip

# Colours that could be taken for each other.
NEAR = (
    {"red", "orange"},
    {"orange", "yellow"},
    {"red", "pink"},
    {"pink", "purple"},
    {"purple", "blue"},
)

Drawn = tuple[Scene, Edit, Form]


@dataclass(frozen=True)
class Taste:
    """What a pair must satisfy; distances are Euclidean in (luma, blue and red difference), 0..1.

    Attributes:
        contrast: distance of an outline pixel from the background that makes it stand out.
        outline: share of the outline that must stand out.
        change: least mean distance between the images inside the mask.
        overlap: least intersection over union of an object's outlines in two styles.
        drift: largest distance between an object's mean colours in two styles.
    """

    contrast: float = 0.25
    outline: float = 0.8
    change: float = 0.16
    style_change: float = 0.08
    overlap: float = 0.78
    drift: float = 0.2


def perceived(rgb: np.ndarray) -> np.ndarray:
    """RGB (..., 3) in 0..255 as luma and colour differences in about 0..1."""
    red, green, blue = np.moveaxis(np.asarray(rgb, np.float64) / 255, -1, 0)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, 0.564 * (blue - luma), 0.713 * (red - luma)], -1)


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Perceived distance of colours (..., 3)."""
    return np.linalg.norm(perceived(a) - perceived(b), axis=-1)


class Builder:
    """Draws pairs of each kind, the least used concepts first.

    Args:
        studio: draws.
        split: what training saw.
        seed: of all choices.
        taste: what a pair must satisfy.
        apart: prompts (source, target) of edits that must not come again.
    """

    def __init__(
        self,
        studio: Studio,
        split: Split,
        seed: int = SEED,
        taste: Taste = Taste(),
        apart: Collection[tuple[str, str]] = (),
    ):
        self.studio, self.split, self.seed, self.taste = studio, split, seed, taste
        self.apart = frozenset(apart)
        self.used: Counter[str] = Counter()
        self.grounds: Counter[str] = Counter()
        self.nouns = sorted({noun for family in FAMILIES for noun in family})

    def pairs(self, kind: str, per_style: int = PER_STYLE) -> Iterator[Pair]:
        """`per_style` pairs of one kind for every style, styles in turn."""
        rng = np.random.default_rng([self.seed, EDIT_KINDS.index(kind)])
        draw: Callable[[np.random.Generator, str], Drawn] = getattr(self, f"_{kind}")
        seen: set[tuple[str, ...]] = set()
        for number in range(per_style * len(self.studio.sprites.styles)):
            style = self.studio.sprites.styles[number % len(self.studio.sprites.styles)]
            pair = self._first_good(rng, style, draw, seen)
            seen.add(_subjects(pair))
            self.used.update(_subjects(pair))
            self.grounds[pair.source.background] += 1
            yield pair

    def _first_good(
        self,
        rng: np.random.Generator,
        style: str,
        draw: Callable[[np.random.Generator, str], Drawn],
        seen: set[tuple[str, ...]],
    ) -> Pair:
        for _ in count():
            scene, edit, form = draw(rng, style)
            pair = self.studio.pair(scene, edit, form)
            known = _subjects(pair) in seen or prompts(self.studio, pair) in self.apart
            if not known and self.good(pair):
                return pair
        raise AssertionError

    def good(self, pair: Pair) -> bool:
        """Whether people can see what the pair is about, and training has seen its sprites."""
        scenes = (pair.source, pair.target)
        if any(self.split.held_out(i.concept, s.style) for s in scenes for i in s.items):
            return False
        if not all(self.stands_out(scene) for scene in scenes):
            return False
        style = pair.edit.kind == "style"
        least = self.taste.style_change if style else self.taste.change
        gap = distance(pair.source_image, pair.target_image)[pair.mask]
        return bool(gap.mean() >= least) and (not style or self._kin(pair))

    def stands_out(self, scene: Scene) -> bool:
        """Whether every object's outline differs from the background."""
        ground = np.array(BACKGROUNDS[scene.background])
        for item in scene.items:
            colour, alpha = self.studio.layer(item, scene.style)
            edge = outline(alpha[..., 0] > 0.5)
            rgb = 255 * (colour / np.maximum(alpha, 1e-6))[edge]
            if (distance(rgb, ground) > self.taste.contrast).mean() < self.taste.outline:
                return False
        return True

    def _kin(self, pair: Pair) -> bool:
        sides = []
        for scene in (pair.source, pair.target):
            colour, alpha = self.studio.layer(scene.items[0], scene.style)
            mean = 255 * colour.sum((0, 1)) / alpha.sum()
            sides.append((alpha[..., 0] > 0.5, mean))
        (before, old), (after, new) = sides
        overlap = (before & after).sum() / (before | after).sum()
        return bool(overlap >= self.taste.overlap and distance(old, new) <= self.taste.drift)

    def _concept(self, rng: np.random.Generator, choices: Sequence[str]) -> str:
        return _rarest(rng, choices, self.used)

    def _ground(self, rng: np.random.Generator) -> str:
        return _rarest(rng, list(BACKGROUNDS), self.grounds)

    def _single(self, rng: np.random.Generator, style: str, nouns: Sequence[str]) -> Scene:
        return Scene(style, self._ground(rng), (Item(self._concept(rng, nouns)),))

    def _object(self, rng: np.random.Generator, style: str) -> Drawn:
        old = self._concept(rng, self.nouns)
        family = next(family for family in FAMILIES if old in family)
        new = self._concept(rng, [noun for noun in family if noun != old])
        return Scene(style, self._ground(rng), (Item(old),)), Edit("object", new), Form()

    def _colour(self, rng: np.random.Generator, style: str) -> Drawn:
        scene = self._single(rng, style, PAINTABLE)
        natural = self.studio.natural(scene.items[0].concept, style)
        names = [str(name) for name in rng.permutation(list(OBJECT_COLOURS))]
        old = names.pop() if natural is None else natural
        if natural is None:
            scene = replace(scene, items=(replace(scene.items[0], colour=old),))
        new = next(name for name in names if name != old and {name, old} not in NEAR)
        return scene, Edit("colour", new), Form(natural_colours=True)

    def _background(self, rng: np.random.Generator, style: str) -> Drawn:
        scene = self._single(rng, style, self.nouns)
        choices = [name for name in BACKGROUNDS if name != scene.background]
        return scene, Edit("background", str(rng.choice(choices))), Form()

    def _style(self, rng: np.random.Generator, style: str) -> Drawn:
        scene = self._single(rng, style, self.nouns)
        styles = [name for name in self.studio.sprites.styles if name != style]
        return scene, Edit("style", str(rng.choice(styles))), Form()

    def _position(self, rng: np.random.Generator, style: str) -> Drawn:
        scene = self._single(rng, style, self.nouns)
        corners = list(CORNERS.values())
        start, end = (corners[k] for k in rng.permutation(len(corners))[:2])
        item = Item(scene.items[0].concept, None, SCALES["small"], *start)
        return replace(scene, items=(item,)), Edit("position", end), Form()

    def _two(self, rng: np.random.Generator, style: str) -> Scene:
        first = self._concept(rng, self.nouns)
        others = [noun for family in FAMILIES if first not in family for noun in family]
        places = list(RELATIONS.values())[rng.integers(len(RELATIONS))]
        nouns = (first, self._concept(rng, others))
        items = [Item(n, None, PAIR_SCALE, *p) for n, p in zip(nouns, places, strict=True)]
        return Scene(style, self._ground(rng), tuple(items))

    def _remove(self, rng: np.random.Generator, style: str) -> Drawn:
        return self._two(rng, style), Edit("remove", index=1), Form()

    def _add(self, rng: np.random.Generator, style: str) -> Drawn:
        scene = self._two(rng, style)
        return replace(scene, items=scene.items[:1]), Edit("add", scene.items[1]), Form()


def _rarest(rng: np.random.Generator, choices: Sequence[str], used: Counter[str]) -> str:
    """A random choice in which every use so far halves the chance."""
    chances = np.array([0.5 ** used[choice] for choice in choices])
    return choices[int(rng.choice(len(choices), p=chances / chances.sum()))]


def outline(shape: np.ndarray) -> np.ndarray:
    """Pixels of a shape (H, W) bool that touch its outside."""
    padded = np.pad(shape, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return shape & ~inner


def _subjects(pair: Pair) -> tuple[str, ...]:
    nouns = [i.concept for s in (pair.source, pair.target) for i in s.items]
    return tuple(dict.fromkeys(nouns))
