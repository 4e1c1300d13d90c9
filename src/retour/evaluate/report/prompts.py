"""Which words of two prompts differ."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

Marked = list[tuple[str, bool]]
# Words that stand for nothing to be seen; they are left out where others tell the edit.
EMPTY = {*("a", "an", "the", "and", "or", "of", "on", "in", "at", "to", "with", "by", "is", "its")}
_PUNCTUATION = re.compile(r"^\W+|\W+$")


def compare(source: str, target: str) -> tuple[Marked, Marked]:
    """Words of both prompts, each with whether the other prompt lacks it there."""
    before, after = source.split(), target.split()
    kept = SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    same_before = {block.a + k for block in kept for k in range(block.size)}
    same_after = {block.b + k for block in kept for k in range(block.size)}
    return (
        [(word, k not in same_before) for k, word in enumerate(before)],
        [(word, k not in same_after) for k, word in enumerate(after)],
    )


def changed(marked: Marked) -> list[str]:
    """The words that tell what differs, without punctuation around them, each once."""
    bare = (_PUNCTUATION.sub("", word) for word, differs in marked if differs)
    found = list(dict.fromkeys(word for word in bare if word))
    return [word for word in found if word.lower() not in EMPTY] or found


def told_by(source: str, target: str) -> tuple[str, list[str]]:
    """The prompt whose words tell the edit, and these words.

    The target's new words; where it has none (something is removed), the source's lost words;
    all words of the target where the two are the same.
    """
    before, after = compare(source, target)
    if new := changed(after):
        return target, new
    if lost := changed(before):
        return source, lost
    return target, changed([(word, True) for word, _ in after])
