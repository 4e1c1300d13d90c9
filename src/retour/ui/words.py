"""Which words two prompts do not share."""

from __future__ import annotations

import difflib
from typing import Literal

Change = Literal["same", "gone", "new"]


def differences(source: str, target: str) -> list[tuple[Change, str]]:
    """Words of both prompts in reading order: `same`, `gone` from the source, `new` in the target.

    Neighbouring words of one kind come as one text.
    """
    before, after = source.split(), target.split()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    found: list[tuple[Change, str]] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            found.append(("same", " ".join(before[a:b])))
            continue
        found += [("gone", " ".join(before[a:b]))] if b > a else []
        found += [("new", " ".join(after[c:d]))] if d > c else []
    return found
