"""Which objects an edit changes: phrases, masks, and the prompt that changes one of them only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
from PIL import Image
from torch import Tensor

from ..errors import RetourError
from ..io import read_image
from .align import differing, positions
from .base import EditJob

# Words that end a noun phrase.
JOINTS = frozenset(
    "of on in at and with without to by near over under beside behind above below next from "
    "wearing holding".split()
)
ARTICLES = frozenset(("a", "an", "the"))


@dataclass(frozen=True)
class Pair:
    """One object to change.

    Attributes:
        source: phrase of the source prompt that names it.
        target: what it shall be.
        mask: where it is (white): anything that shows a picture; None asks the attention.
    """

    source: str
    target: str
    mask: Any = None

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"

    def guided(self, prompt: str) -> str:
        """Return the source prompt with this phrase alone replaced, where it first occurs."""
        found = re.search(rf"(?<!\w){re.escape(self.source)}(?!\w)", prompt, re.IGNORECASE)
        if found is None:
            raise RetourError(
                f"the pair {str(self)!r} names the phrase {self.source!r}, which is not in the "
                f"source prompt {prompt!r}"
            )
        return prompt[: found.start()] + self.target + prompt[found.end() :]


def read_pairs(given: Any) -> tuple[Pair, ...]:
    """Read `pairs`: Pair objects, tuples (source, target[, mask]), a mapping, or text.

    Text is "old phrase -> new phrase @ mask.png; ...", each mask being optional. Masks are read.

    Raises:
        RetourError: what is none of these; a mask that cannot be read, or is black everywhere.
    """
    if isinstance(given, str):
        pairs = [_read_text(part) for part in given.split(";") if part.strip()]
    else:
        items = list(given.items()) if isinstance(given, Mapping) else list(given)
        pairs = [item if isinstance(item, Pair) else _read_tuple(item) for item in items]
    return tuple(replace(pair, mask=_read_mask(pair)) for pair in pairs)


def _read_mask(pair: Pair) -> Image.Image | None:
    if pair.mask is None:
        return None
    mask = read_image(pair.mask)
    if numpy.asarray(mask.convert("L")).max() < 128:
        raise RetourError(f"the mask of {str(pair)!r} is black everywhere: paint its object white")
    return mask


def _read_text(text: str) -> Pair:
    phrases, _, mask = text.partition("@")
    old, arrow, new = (part.strip() for part in phrases.partition("->"))
    if not (arrow and old and new):
        raise RetourError(
            f"pairs has {text.strip()!r}: write old phrase -> new phrase, and @ mask.png if "
            "you have one"
        )
    return Pair(old, new, mask.strip() or None)


def _read_tuple(item: Any) -> Pair:
    phrases = tuple(item[:2]) if isinstance(item, Sequence) else ()
    if len(phrases) != 2 or not all(isinstance(p, str) and p.strip() for p in phrases):
        raise RetourError(f"pairs holds {item!r}: give (old phrase, new phrase, mask)")
    return Pair(*item[:3])


def all_replaced(prompt: str, pairs: Sequence[Pair]) -> str:
    """The prompt with every pair's phrase replaced."""
    for pair in pairs:
        prompt = pair.guided(prompt)
    return prompt


def changed_phrases(source: str, target: str) -> tuple[str, str]:
    """Noun phrases around the words that differ, in the source and in the target.

    The words that differ are widened to the next word that joins phrases ("on", "of", "and", ...),
    so that "a red apple on grass" and "a green apple on grass" give their apples.
    """
    old, new = source.split(), target.split()
    changed = [
        op
        for op in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
        if op[0] != "equal"
    ]
    if not changed:
        return source, target
    return (
        _widen(old, min(op[1] for op in changed), max(op[2] for op in changed)),
        _widen(new, min(op[3] for op in changed), max(op[4] for op in changed)),
    )


def _widen(words: Sequence[str], start: int, stop: int) -> str:
    while start > 0 and words[start - 1].lower() not in JOINTS:
        start -= 1
    while stop < len(words) and words[stop].lower() not in JOINTS:
        stop += 1
    return " ".join(words[start:stop])


def content(phrase: str) -> str:
    """A phrase without its articles and joining words."""
    return " ".join(w for w in phrase.split() if w.lower() not in ARTICLES | JOINTS)


@dataclass(frozen=True)
class Thing:
    """An object of one picture.

    Attributes:
        pair: its phrases, and the mask that the user gave.
        prompt: the source prompt with this object alone changed.
        tokens: positions of the words that name it in the source prompt.
        mask: (H, W) bool at the picture's size, once it is known.
    """

    pair: Pair
    prompt: str
    tokens: tuple[int, ...]
    mask: Tensor | None = None


def things(job: EditJob, image: int, target: str, pairs: Sequence[Pair] | None) -> list[Thing]:
    """The objects of one picture: those of the pairs, or the one in which its prompts differ.

    Raises:
        RetourError: a phrase that is not in the source prompt; no mask, and no words to find one.
    """
    source = job.sources[image]
    words = job.model.tokens(source)
    if pairs is None:
        pair = Pair(*changed_phrases(source, target))
        differ = differing(words, job.model.tokens(target))[0]
        found = [Thing(pair, target, differ or positions(words, content(pair.source)))]
    else:
        prompts = [pair.guided(source) for pair in pairs]
        tokens = [positions(words, content(pair.source)) for pair in pairs]
        found = [Thing(*parts) for parts in zip(pairs, prompts, tokens, strict=True)]
    for thing in found:
        given = thing.pair.mask is not None or (job.mask is not None and len(found) == 1)
        attends = bool(thing.tokens) and "attention" in job.model.capabilities
        if not given and not attends:
            raise RetourError(
                f"nothing says where {str(thing.pair)!r} is: give a mask, or name words of the "
                f"source prompt {source!r} to a model with attention"
            )
    return found
