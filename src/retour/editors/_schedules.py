"""When which words are controlled, and how much: options of attention controls, in text or values.

A schedule is a range of fractions of the steps, from the noisy end, with ranges of their own for
chosen words: 0.4, "0.1-0.4", "0.4,lemon:0.2" or {"default_": 0.4, "lemon": (0.1, 0.2)}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.model import Tokens
from ..errors import RetourError
from .align import positions

Range = tuple[float, float]
Steps = float | str | tuple[float, float] | Mapping[str, Any]
DEFAULT_WORD = "default_"
OFF = (None, "", "none", "off")


def schedule_table(steps: Steps, target: Tokens, count: int) -> Tensor:
    """Return alpha, (count + 1, L): 1 where that token inherits its map at that step."""
    default, words = cross_schedule(steps)
    alpha = torch.zeros(count + 1, len(target.ids))
    alpha[_window(default, count + 1)] = 1
    for word, span in words.items():
        tokens = list(positions(target, word))
        alpha[:, tokens] = 0
        alpha[_window(span, count + 1), tokens] = 1
    return alpha


def _window(span: Range, rows: int) -> slice:
    return slice(int(span[0] * rows), int(span[1] * rows))


def cross_schedule(steps: Steps) -> tuple[Range, dict[str, Range]]:
    """Parse `cross_steps`: the default range and those of single words."""
    if isinstance(steps, str):
        parts = [part.strip() for part in steps.split(",")]
        named = dict(_split(part, "cross_steps") for part in parts if ":" in part)
        plain = [part for part in parts if ":" not in part]
        if len(plain) > 1:
            raise _bad_range("cross_steps", steps)
        steps = {**named, **({DEFAULT_WORD: plain[0]} if plain else {})}
    if not isinstance(steps, Mapping):
        return parse_range(steps, "cross_steps"), {}
    spans = {word: parse_range(value, "cross_steps") for word, value in steps.items()}
    return spans.pop(DEFAULT_WORD, (0.0, 1.0)), spans


def parse_range(value: Any, name: str) -> Range:
    """Read an end (0.4), "0.1-0.4" or (0.1, 0.4) as a range of fractions of the steps."""
    try:
        if isinstance(value, str):
            value = [float(part) for part in value.split("-")]
        ends = [float(value)] if isinstance(value, (int, float)) else [float(v) for v in value]
        low, high = ends if len(ends) == 2 else (0.0, *ends)
    except (TypeError, ValueError):
        raise _bad_range(name, value) from None
    if not 0 <= low <= high <= 1:
        raise _bad_range(name, value)
    return low, high


def _bad_range(name: str, value: object) -> RetourError:
    return RetourError(
        f"{name} is {value!r}: give a fraction of the steps from 0 to 1 (0.4) or a range (0.1-0.4)"
    )


def sides(words: str) -> tuple[str, str]:
    """Split "source words,target words"; one side alone counts for both."""
    old, comma, new = words.partition(",")
    return (old.strip(), new.strip()) if comma else (old.strip(), old.strip())


def parse_scales(value: str | Mapping[str, float] | None) -> dict[str, float]:
    """Read `reweight`: "fluffy:2,red:0.5" or a mapping from words to scales."""
    if value is None or value in OFF:
        return {}
    if isinstance(value, str):
        value = dict(_split(part, "reweight", float) for part in value.split(","))
    return dict(value)


def _split(part: str, name: str, read: Callable[[str], Any] = str) -> tuple[str, Any]:
    word, colon, number = part.rpartition(":")
    try:
        if not (colon and word.strip()):
            raise ValueError(part)
        return word.strip(), read(number.strip())
    except ValueError:
        raise RetourError(f"{name} has {part!r}: give word:number, such as fluffy:2") from None
