"""Text towers: a tokenizer with its encoder, and where the words of a prompt lie among its tokens.

Placing words works for any tokenizer. Each token covers a span of characters of the prompt, told by
a fast tokenizer's offsets, or else found by tokenising each word alone, or else (byte-level
tokenizers) by decoding ever longer prefixes; a token belongs to each whitespace-separated word that
its span overlaps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import Tensor, nn

from ..core.model import Tokens, Word
from ..errors import RetourError
from .modules import execution_device

Span = tuple[int, int]

PENULTIMATE = -2

# Longer than any prompt; asking for no truncation at all would log a warning about the length.
UNCUT = 2**20


@dataclass(frozen=True)
class TextTower:
    """A tokenizer and the encoder that reads its ids.

    Attributes:
        tokenizer: a transformers tokenizer.
        encoder: the text model.
        limit: length L that prompts are padded and cut to.
        convert: rewrites a prompt before it is tokenised (multi-vector textual inversions).
    """

    tokenizer: Any
    encoder: Any
    limit: int
    convert: Callable[[str], str] = str

    def hidden(
        self, prompts: Sequence[str], *, penultimate: bool, blank: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Encode B prompts.

        Args:
            prompts: B texts.
            penultimate: take the last layer but one (SDXL, SD3), not the final normalised one.
            blank: hide the padding from the encoder and leave zeros in its place (Wan).

        Returns:
            hidden states (B, L, D) and, if the encoder has a projection, pooled embeddings (B, P).
        """
        batch = self._pad([self.convert(p) for p in prompts], return_tensors="pt")
        device = execution_device(self.encoder)
        uses_mask = blank or getattr(self.encoder.config, "use_attention_mask", False)
        mask = {"attention_mask": batch.attention_mask.to(device)} if uses_mask else {}
        with torch.no_grad():
            out = self.encoder(batch.input_ids.to(device), output_hidden_states=penultimate, **mask)
        states = out.hidden_states[PENULTIMATE] if penultimate else out.last_hidden_state
        if blank:
            states = states * mask["attention_mask"][..., None].to(states)
        return states.to(self.encoder.dtype), getattr(out, "text_embeds", None)

    def pooled(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts to (B, D): a CLIP text model's state at the end of the text."""
        batch = self._pad([self.convert(p) for p in prompts], return_tensors="pt")
        with torch.no_grad():
            out = self.encoder(batch.input_ids.to(execution_device(self.encoder)))
        vector: Tensor = out.pooler_output
        return vector.to(self.encoder.dtype)

    def tokens(self, prompt: str) -> Tokens:
        """Tokenise one prompt and place its words (positions 0 .. L-1)."""
        prompt = self.convert(prompt)
        ids = list(self._pad([prompt]).input_ids[0])
        content, spans = token_spans(self.tokenizer, prompt)
        kept = min(len(content), self.limit - self.tokenizer.num_special_tokens_to_add())
        start = _find(ids, content[:kept], self.tokenizer)
        cut = prompt[spans[kept][0] :].strip() if kept < len(content) else ""
        return Tokens(tuple(ids), place_words(prompt, spans[:kept], start), cut)

    def _pad(self, prompts: list[str], **options: Any) -> Any:
        return self.tokenizer(
            prompts, padding="max_length", max_length=self.limit, truncation=True, **options
        )


def text_limit(tokenizer: Any, encoder: nn.Module) -> int:
    """Number of tokens that both the tokenizer and the encoder's position table allow."""
    positions = getattr(encoder.config, "max_position_embeddings", None)
    limit: int = tokenizer.model_max_length
    return limit if positions is None else min(limit, positions)


def place_words(prompt: str, spans: Sequence[Span], start: int = 0) -> tuple[Word, ...]:
    """Give each word of `prompt` the tokens whose spans overlap it; the first is at `start`.

    A word that lost all its tokens (cut off, or dropped by the tokenizer) keeps an empty tuple.
    """
    words = []
    for match in re.finditer(r"\S+", prompt):
        low, high = match.span()
        owned = [start + i for i, (a, b) in enumerate(spans) if max(a, low) < min(b, high)]
        words.append(Word(match.group(), tuple(owned)))
    return tuple(words)


def token_spans(tokenizer: Any, prompt: str) -> tuple[list[int], list[Span]]:
    """Token ids of `prompt`, uncut, without special tokens, and the characters each covers."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    if fast:
        batch = _bare(tokenizer, prompt, return_offsets_mapping=True)
        return list(batch["input_ids"]), [(a, b) for a, b in batch["offset_mapping"]]
    ids = list(_bare(tokenizer, prompt)["input_ids"])
    return ids, _spans_by_word(tokenizer, prompt, ids) or _spans_by_decoding(tokenizer, prompt, ids)


def _bare(tokenizer: Any, text: str, **options: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, truncation=True, max_length=UNCUT, **options)


def _spans_by_word(tokenizer: Any, prompt: str, ids: list[int]) -> list[Span]:
    """The span of its word for each token; empty if words alone give other tokens."""
    alone, spans = [], []
    for match in re.finditer(r"\S+", prompt):
        part = _bare(tokenizer, match.group())["input_ids"]
        alone += part
        spans += [match.span()] * len(part)
    return spans if alone == ids else []


def _spans_by_decoding(tokenizer: Any, prompt: str, ids: list[int]) -> list[Span]:
    # Whitespace is compared nowhere: tokenizers disagree about it, and words contain none.
    shown = [i for i, char in enumerate(prompt) if not char.isspace()]
    if not shown:
        return [(0, 0)] * len(ids)
    texts = [_visible(tokenizer.decode(ids[: k + 1])) for k in range(len(ids))]
    place = _align(texts[-1], "".join(prompt[i] for i in shown).lower()) if texts else []
    spans, begin = [], 0
    for token, text in zip(ids, texts, strict=True):
        end = max(begin, min(len(text), len(place)))
        # A token that adds nothing is a space, or a further byte of the character before it.
        blank = end == begin and not _visible(tokenizer.decode([token]))
        covered = [] if blank else place[min(begin, max(end - 1, 0)) : end]
        spans.append((shown[covered[0]], shown[covered[-1]] + 1) if covered else (0, 0))
        begin = end
    return spans


def _visible(text: str) -> str:
    return "".join(text.split()).lower()


def _align(decoded: str, wanted: str) -> list[int]:
    """For each character of `decoded`, the index of its counterpart in `wanted`."""
    place = []
    for _, a0, a1, b0, b1 in SequenceMatcher(None, decoded, wanted, autojunk=False).get_opcodes():
        for i in range(a1 - a0):
            place.append(min(b0 + i * (b1 - b0) // (a1 - a0), len(wanted) - 1))
    return place


def _find(ids: list[int], part: list[int], tokenizer: Any) -> int:
    for start in range(len(ids) - len(part) + 1):
        if ids[start : start + len(part)] == part:
            return start
    raise RetourError(
        f"{type(tokenizer).__name__} does not keep a prompt's first tokens when it cuts: "
        "set its truncation_side to 'right'"
    )


def join_tokens(parts: Sequence[Tokens]) -> Tokens:
    """Tokens of several towers whose sequences follow each other; words gather all their positions.

    The `cut` is the longest: what at least one tower does not read.
    """
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part.ids))
    words = tuple(
        Word(
            same[0].text,
            tuple(starts[k] + i for k, word in enumerate(same) for i in word.tokens),
        )
        for same in zip(*[part.words for part in parts], strict=True)
    )
    ids = tuple(i for part in parts for i in part.ids)
    return Tokens(ids, words, max((part.cut for part in parts), key=len))
