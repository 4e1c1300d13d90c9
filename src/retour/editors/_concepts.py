"""What the target of a semantic edit asks for: concepts to add or take away, or a whole prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import RetourError

KEPT = 0.5  # Least part of the source prompt's words that a whole prompt keeps.

Read = Literal["auto", "concepts", "prompt"]


@dataclass(frozen=True)
class Concept:
    """What to add to the picture, or (`sign` -1) to take away.

    Attributes:
        text: what the network is told.
        sign: 1 or -1.
        whole: whether it is a prompt, which takes the source's place.
        words: those whose attention makes the mask; "" for all.
    """

    text: str
    sign: float
    whole: bool = False
    words: str = ""


def concepts(prompt: str) -> tuple[Concept, ...]:
    """Read "green, -red".

    Raises:
        RetourError: a part between commas is empty.
    """
    parts = [part.strip() for part in prompt.split(",")]
    found = tuple(Concept(p.lstrip("- "), -1.0 if p.startswith("-") else 1.0) for p in parts)
    if not all(c.text for c in found):
        raise RetourError(
            f"the target {prompt!r} has an empty concept: separate concepts by commas, with a "
            "minus before those to remove (green, -red)"
        )
    return found


def edits(source: str, target: str, read: Read = "auto") -> tuple[Concept, ...]:
    """What a target asks of a picture of `source`: its concepts, or itself as a whole prompt."""
    old, new = source.casefold().split(), target.casefold().split()
    kept = sum(word in new for word in old)
    whole = not any(part.strip().startswith("-") for part in target.split(","))
    whole = whole and bool(old) and kept >= KEPT * len(old)
    if read == "concepts" or (read == "auto" and not whole):
        return concepts(target)
    words = " ".join(word for word in target.split() if word.casefold() not in old)
    return () if old == new else (Concept(target, 1.0, True, words),)


def numbers(name: str, value: float | str | None) -> list[float]:
    """Read one number, several separated by commas, or none."""
    if value is None or str(value).lower() in ("", "none"):
        return []
    try:
        return [float(part) for part in str(value).split(",")]
    except ValueError:
        raise RetourError(
            f"{name} is {value!r}: give a number, or one for each concept (5,3)"
        ) from None


def branches_for(prompts: Sequence[str], read: Read) -> int:
    """Branches that serve the concepts of all prompts, whatever the prompts turn out to be."""
    return 1 if read == "prompt" else max(prompt.count(",") + 1 for prompt in prompts)


def for_each(name: str, value: float | str | None, count: int) -> list[float]:
    """One number for each of `count` concepts; one alone is for all."""
    given = numbers(name, value)
    if len(given) == 1:
        return given * count
    if 0 < len(given) < count:
        raise RetourError(
            f"{len(given)} values of {name} for {count} concepts: give one, or one for each concept"
        )
    return given
