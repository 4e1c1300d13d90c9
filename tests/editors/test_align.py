"""Aligners against independent references, on any tokenizer."""

import random
from functools import cache

import pytest
import torch

import tiny
from retour.core.model import Tokens, Word
from retour.editors.align import align, differing, needleman_wunsch, positions, refine, replace
from retour.errors import RetourError
from retour.models.text import TextTower

STRANGE = (*tiny.WORDS, "strawberry,", "élan", "pearapple", "x")


class Sized:
    """Stands in for a text encoder: only tokens matter here."""


@cache
def tower(make):
    tokenizer = make()
    return TextTower(tokenizer, Sized(), tokenizer.model_max_length)


TOKENIZERS = [tiny.clip_tokenizer, tiny.byte_tokenizer, tiny.t5_tokenizer]


def reference(source, target):
    """Needleman-Wunsch by recursion over suffix-free prefixes, written apart from ours."""

    @cache
    def best(i, j):
        if i == 0 or j == 0:
            return 0
        match = 1 if source[i - 1] == target[j - 1] else -1
        return max(best(i, j - 1), best(i - 1, j), best(i - 1, j - 1) + match)

    def trace(i, j):
        if j == 0:
            return ()
        if i == 0 or best(i, j) == best(i, j - 1):
            return (*trace(i, j - 1), -1)
        if best(i, j) == best(i - 1, j):
            return trace(i - 1, j)
        return (*trace(i - 1, j - 1), i - 1)

    return list(trace(len(source), len(target)))


def prompts(count=200, longest=4):
    pick = random.Random(5)
    for _ in range(count):
        yield [" ".join(pick.choices(STRANGE, k=pick.randint(0, longest))) for _ in range(2)]


def test_refine_agrees_with_the_reference_on_200_prompt_pairs():
    for k, (old, new) in enumerate(prompts()):
        tokens = tower(TOKENIZERS[k % 3]).tokens
        source, target = tokens(old), tokens(new)
        ends = [min(2 + max([t for w in p.words for t in w.tokens], default=0), len(p.ids))
                for p in (source, target)]  # fmt: skip
        wanted = reference(source.ids[: ends[0]], target.ids[: ends[1]])
        assert needleman_wunsch(source.ids[: ends[0]], target.ids[: ends[1]]) == wanted
        found = refine(source, target)
        wanted += range(ends[1], len(target.ids))
        for j, i in enumerate(wanted):
            assert found.kept[j] == (i >= 0)
            assert found.matrix[:, j].nonzero().flatten().tolist() == [i] * (i >= 0)


def test_ties_prefer_the_later_source_token():
    assert needleman_wunsch([7, 8, 7], [7]) == reference([7, 8, 7], [7])
    assert needleman_wunsch([1, 2], [2, 1]) == reference([1, 2], [2, 1])
    assert needleman_wunsch([], [1]) == [-1] and needleman_wunsch([1], []) == []


@pytest.mark.parametrize("make", TOKENIZERS)
def test_replace_pairs_words_by_place(make):
    tokens = tower(make).tokens
    for old, new in prompts(60, 3):
        source, target = tokens(old), tokens(new)
        if len(source.words) != len(target.words):
            with pytest.raises(RetourError, match="mode 'replace' pairs words one to one"):
                replace(source, target)
            continue
        matrix = replace(source, target).matrix
        for a, b in zip(source.words, target.words, strict=True):
            block = matrix[list(a.tokens)][:, list(b.tokens)]
            if a.tokens and b.tokens:
                torch.testing.assert_close(block.sum(1), torch.ones(len(a.tokens)))
                torch.testing.assert_close(matrix[list(a.tokens)].sum(1), block.sum(1))
            if len(a.tokens) == len(b.tokens):
                assert torch.equal(block, torch.eye(len(a.tokens)))


@pytest.mark.parametrize("make", TOKENIZERS)
@pytest.mark.parametrize("mode", ["replace", "refine"])
def test_a_prompt_aligned_with_itself_is_the_identity(make, mode):
    for prompt in ("", "a", "a red apple on a red apple", "strawberry, pearapple x"):
        tokens = tower(make).tokens(prompt)
        found = align(tokens, tokens, mode)
        assert torch.equal(found.matrix, torch.eye(len(tokens.ids)))
        assert found.kept.all()


def test_tokens_after_a_longer_word_follow_their_own_words():
    tokens = tower(tiny.clip_tokenizer).tokens
    source, target = tokens("a cat on a background"), tokens("a catx on a background")
    matrix = replace(source, target).matrix
    for a, b in zip(source.words[2:], target.words[2:], strict=True):
        assert a.tokens[0] < b.tokens[0]
        assert matrix[a.tokens[0], b.tokens[0]] == 1
    end, new_end = source.words[-1].tokens[-1] + 1, target.words[-1].tokens[-1] + 1
    assert source.ids[end] == target.ids[new_end]
    assert matrix[end, new_end] == 1
    assert torch.equal(matrix.sum(0).bool(), torch.ones(len(target.ids), dtype=torch.bool))


def test_words_in_two_encoders_are_paired_encoder_by_encoder():
    source = Tokens((0, 5, 9, 9, 5, 9), (Word("cat", (1, 4)),))
    target = Tokens((0, 6, 7, 9, 6, 9), (Word("pear", (1, 2, 4)),))
    matrix = replace(source, target).matrix
    assert matrix[1, [1, 2]].tolist() == [0.5, 0.5]
    assert matrix[:, 4].tolist() == [0, 0, 0, 0, 1, 0]
    assert [matrix[:, j].argmax().item() for j in (0, 3, 5)] == [0, 2, 5]


def test_auto_replaces_where_word_counts_agree():
    tokens = tower(tiny.clip_tokenizer).tokens
    cat, pear, red = tokens("a cat"), tokens("a pear"), tokens("a red pear")
    assert torch.equal(align(cat, pear).matrix, replace(cat, pear).matrix)
    assert torch.equal(align(cat, red).matrix, refine(cat, red).matrix)
    assert not torch.equal(replace(cat, pear).matrix, refine(cat, pear).matrix)


def test_words_are_found_whatever_their_dress():
    tokens = tower(tiny.clip_tokenizer).tokens("A red apple, a pear")
    assert positions(tokens, "apple") == tokens.words[2].tokens
    assert positions(tokens, "A") == tokens.words[0].tokens + tokens.words[3].tokens
    assert positions(tokens, "red pear") == tokens.words[1].tokens + tokens.words[4].tokens
    assert positions(tokens, "re") == ()


def test_differing_words():
    tokens = tower(tiny.clip_tokenizer).tokens
    old, new = tokens("a red apple on a cat"), tokens("a green apple on a blue cat")
    assert differing(old, new) == (
        old.words[1].tokens,
        new.words[1].tokens + new.words[5].tokens,
    )
    assert differing(old, old) == ((), ())
