r"""Aligning two prompts: which source token does each target token inherit its attention from?

An alignment is a matrix :math:`R` (source tokens x target tokens) and :math:`\beta\in\{0,1\}` per
target token: the inherited map of target token j is :math:`\sum_i M_{src,i} R_{ij}` where
:math:`\beta_j = 1`; token j has no counterpart where :math:`\beta_j = 0`.

*Replace* (equal word counts) pairs words by place: word k of the source with word k of the target.
*Refine* pairs equal token ids by a Needleman-Wunsch alignment (gap 0, match 1, mismatch -1; on ties
the target token goes unpaired first, then the source token, then they are paired).

Deviation: when a replaced word changes its number of tokens, the tokens after it keep following
*their own words*. The published code does so only up to the last replaced word and then falls back
to equal positions, which shifts the rest of the prompt by the difference. With several text
encoders in one sequence each word is paired encoder by encoder.

Reference: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", 2022,
arXiv 2208.01626.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.model import Tokens, Word
from ..errors import RetourError


@dataclass(frozen=True)
class Alignment:
    """How target tokens inherit from source tokens.

    Attributes:
        matrix: R, (L_source, L_target) float32.
        kept: beta, (L_target,) float32, 1 where a token inherits.
    """

    matrix: Tensor
    kept: Tensor


def align(source: Tokens, target: Tokens, mode: str = "auto") -> Alignment:
    """Align two tokenised prompts by ``replace``, ``refine`` or (``auto``) whichever fits."""
    same = len(source.words) == len(target.words)
    if mode == "refine" or (mode == "auto" and not same):
        return refine(source, target)
    return replace(source, target)


def replace(source: Tokens, target: Tokens) -> Alignment:
    """Pair words by place; an unequal number of tokens shares equally, 1 / n_target each.

    Raises:
        RetourError: the prompts have different numbers of words.
    """
    if len(source.words) != len(target.words):
        raise RetourError(
            f"mode 'replace' pairs words one to one, but {_said(source)} has {len(source.words)} "
            f"words and {_said(target)} has {len(target.words)}: use mode 'refine' or 'auto'"
        )
    matrix = torch.zeros(len(source.ids), len(target.ids))
    paired = zip(source.words, target.words, strict=True)
    anchors = [runs for old, new in paired for runs in _pair_runs(old, new)]
    for old, new in anchors:
        if len(old) == len(new):
            matrix[list(old), list(new)] = 1
        else:
            matrix[old.start : old.stop, new.start : new.stop] = 1 / len(new)
    _pair_gaps(matrix, anchors)
    return Alignment(matrix, matrix.any(0).float())


def _pair_runs(old: Word, new: Word) -> list[tuple[range, range]]:
    """Pair the stretches of adjacent tokens of two words: one for each text encoder."""
    return list(zip(_runs(old.tokens), _runs(new.tokens), strict=False))


def _runs(tokens: Sequence[int]) -> list[range]:
    runs: list[range] = []
    for t in tokens:
        if runs and runs[-1].stop == t:
            runs[-1] = range(runs[-1].start, t + 1)
        else:
            runs.append(range(t, t + 1))
    return runs


def _pair_gaps(matrix: Tensor, anchors: Sequence[tuple[range, range]]) -> None:
    """Pair what lies between words (start, end, padding) by distance from the word before."""
    rows, columns = matrix.shape
    ends = [(range(0), range(0)), *sorted(anchors, key=lambda a: a[1].start)]
    starts = [*ends[1:], (range(rows, rows), range(columns, columns))]
    for (old, new), (old_next, new_next) in zip(ends, starts, strict=True):
        for offset in range(new_next.start - new.stop):
            if old.stop < old_next.start:
                matrix[min(old.stop + offset, old_next.start - 1), new.stop + offset] = 1


def refine(source: Tokens, target: Tokens) -> Alignment:
    """Pair equal tokens in order; padding of the target inherits from the same place."""
    length = len(target.ids)
    matrix = torch.zeros(len(source.ids), length)
    pairs = needleman_wunsch(source.ids[: _text_end(source)], target.ids[: _text_end(target)])
    for j, i in enumerate(pairs):
        if i >= 0:
            matrix[i, j] = 1
    for j in range(len(pairs), length):
        matrix[min(j, len(source.ids) - 1), j] = 1
    return Alignment(matrix, matrix.any(0).float())


def needleman_wunsch(source: Sequence[int], target: Sequence[int]) -> list[int]:
    """For each target token the index of its source token, or -1.

    A mismatch (-1) never beats two gaps (0), so only equal ids are ever paired.
    """
    score = _scores(source, target)
    pairs = [-1] * len(target)
    i, j = len(source), len(target)
    while i and j:
        best = score[i][j]
        if best == score[i][j - 1]:
            j -= 1
        elif best == score[i - 1][j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            pairs[j] = i
    return pairs


def _scores(source: Sequence[int], target: Sequence[int]) -> list[list[int]]:
    score = [[0] * (len(target) + 1)]
    for a in source:
        above, row = score[-1], [0]
        for j, b in enumerate(target):
            row.append(max(row[j], above[j + 1], above[j] + (1 if a == b else -1)))
        score.append(row)
    return score


def _text_end(tokens: Tokens) -> int:
    """Position after the end-of-text token, which follows the last word (or the start token)."""
    last = max([t for word in tokens.words for t in word.tokens], default=0)
    return min(last + 2, len(tokens.ids))


def _said(tokens: Tokens) -> str:
    return repr(" ".join(word.text for word in tokens.words))


def _plain(text: str) -> str:
    return text.strip(".,;:!?\"'()[]").casefold()


def positions(tokens: Tokens, phrase: str) -> tuple[int, ...]:
    """Token positions of every occurrence of each word of `phrase`, case and punctuation aside."""
    wanted = {_plain(word) for word in phrase.split()}
    return _tokens_of(word for word in tokens.words if _plain(word.text) in wanted)


def differing(source: Tokens, target: Tokens) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token positions of the words that only the source has, and of those only the target has."""
    ids = {text: k for k, text in enumerate({w.text for w in (*source.words, *target.words)})}
    pairs = needleman_wunsch(
        [ids[w.text] for w in source.words], [ids[w.text] for w in target.words]
    )
    gone = [w for i, w in enumerate(source.words) if i not in pairs]
    come = [w for j, w in enumerate(target.words) if pairs[j] < 0]
    return _tokens_of(gone), _tokens_of(come)


def _tokens_of(words: Iterable[Word]) -> tuple[int, ...]:
    return tuple(t for word in words for t in word.tokens)
