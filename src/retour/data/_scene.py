"""What a scene is, in plain data and in words, and what an edit makes of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

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
EDIT_KINDS = ("object", "colour", "background", "style", "position", "add", "remove")


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


def edited(scene: Scene, edit: Edit) -> Scene:
    """The scene after an edit."""
    if edit.kind in ("style", "background"):
        changes: dict[str, Any] = {edit.kind: edit.value}
        return replace(scene, **changes)
    return replace(scene, items=_changed_items(scene.items, edit))


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


# --- In words -----------------------------------------------------------------------------------


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
