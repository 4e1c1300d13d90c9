"""A pair as PIE-Bench's mapping file tells of it: prompts, words, instruction, mask."""

from __future__ import annotations

import difflib
from dataclasses import replace

import numpy as np

from retour.data.scenes import (
    SCALES,
    STYLE_PHRASES,
    Pair,
    Scene,
    Studio,
    corner_phrase,
    relation,
    with_article,
)
from retour.evaluate.suite import encode_mask

TYPE_IDS = {
    "object": "1",
    "add": "2",
    "remove": "3",
    "colour": "6",
    "background": "8",
    "style": "9",
    "position": "10",
}
INSTRUCTIONS = {
    "object": "replace {old} with {new}",
    "add": "add {new}",
    "remove": "remove {old}",
    "colour": "make {old} {new}",
    "background": "put {old} on {new}",
    "style": "turn the picture into {new}",
    "position": "move {old} to {new}",
}


def prompts(studio: Studio, pair: Pair) -> tuple[str, str]:
    """Both prompts; an object that is small only to make room is not called so."""
    if pair.edit.kind not in ("add", "remove"):
        return pair.source_caption, pair.target_caption
    return _roomy(studio, pair.source), _roomy(studio, pair.target)


def _roomy(studio: Studio, scene: Scene) -> str:
    items = tuple(replace(item, scale=SCALES["regular"]) for item in scene.items)
    return studio.caption(replace(scene, items=items))


def bracketed(old: str, new: str) -> tuple[str, str]:
    """Both prompts with square brackets around the words that differ."""
    a, b = old.split(), new.split()
    left, right = [], []
    for tag, a0, a1, b0, b1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left.append(_marked(a[a0:a1], tag != "equal"))
        right.append(_marked(b[b0:b1], tag != "equal"))
    return " ".join(filter(None, left)), " ".join(filter(None, right))


def _marked(words: list[str], differs: bool) -> str:
    text = " ".join(words)
    return f"[{text}]" if differs and words else text


def blended(pair: Pair) -> str:
    """The word concerned in either prompt; for what comes or goes, the other is "background"."""
    kind, index = pair.edit.kind, pair.edit.index
    if kind == "background":
        return "background background"
    old = "background" if kind == "add" else _head(pair.source.items[index].concept)
    new = "background" if kind == "remove" else _head(pair.target.items[-1].concept)
    return f"{old} {new}"


def _head(concept: str) -> str:
    return concept.rstrip("*").split()[-1]


def instruction(pair: Pair) -> str:
    """The edit as an order."""
    kind, index = pair.edit.kind, pair.edit.index
    old = pair.source.items[-1 if kind == "remove" else index].concept.rstrip("*")
    new = {
        "object": lambda: with_article(pair.target.items[index].concept),
        "add": lambda: _place(pair),
        "remove": lambda: "",
        "colour": lambda: str(pair.edit.value),
        "background": lambda: with_article(f"{pair.edit.value} background"),
        "style": lambda: STYLE_PHRASES[str(pair.edit.value)].removesuffix(" of"),
        "position": lambda: corner_phrase(pair.target.items[index]).removeprefix("in "),
    }[kind]()
    return INSTRUCTIONS[kind].format(old=f"the {old}", new=new)


def _place(pair: Pair) -> str:
    first, second = pair.target.items
    noun, stays = with_article(second.concept), first.concept.rstrip("*")
    return f"{noun} {relation(second, first)} the {stays}"


def describe(studio: Studio, pair: Pair, name: str, folder: str) -> dict[str, object]:
    """The entry of a pair in the mapping file."""
    old, new = bracketed(*prompts(studio, pair))
    return {
        "image_path": f"{folder}/{name}.png",
        "edited_image_path": f"{folder}/{name}.png",
        "original_prompt": old,
        "editing_prompt": new,
        "editing_instruction": instruction(pair),
        "editing_type_id": TYPE_IDS[pair.edit.kind],
        "blended_word": blended(pair),
        "split": "train",
        "mask": encode_mask(changed(pair)),
    }


def changed(pair: Pair) -> np.ndarray:
    """The mask, (64, 64) bool, with what resampling touches just outside of an outline."""
    return pair.mask | (pair.source_image != pair.target_image).any(-1)
