"""Words and their tokens for every tokenizer; prompts that are cut; the store of prompts."""

import logging

import pytest
import torch

import tiny
from retour.core.model import Word
from retour.errors import RetourError
from retour.models.load import load
from retour.models.text import TextTower, token_spans

PROMPTS = [
    "a red apple",
    "A  Photo of\ta Red apple, on blue",
    "un café noir",
    "苹果 on blue",
    "  a cat. ",
    "red-apple!!! 🍏",
    "",
]
TOKENIZERS = {
    "clip": tiny.clip_tokenizer,
    "byte": tiny.byte_tokenizer,
    "t5": tiny.t5_tokenizer,
}


class Slow:
    """A tokenizer without offsets, as the Python ones of transformers are."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, *args, **options):
        if options.pop("return_offsets_mapping", False):
            raise NotImplementedError
        return self.inner(*args, **options)


def tower(tokenizer, limit):
    return TextTower(tokenizer, torch.nn.Identity(), limit)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_words_own_their_tokens(kind, prompt):
    tokenizer = TOKENIZERS[kind]()
    tokens = tower(tokenizer, 48).tokens(prompt)
    assert [word.text for word in tokens.words] == prompt.split()
    assert len(tokens.ids) == 48 and tokens.cut == ""
    owned = [i for word in tokens.words for i in word.tokens]
    assert owned == sorted(set(owned))
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    special = {i for i in ends if i is not None}
    content = [i for i, token in enumerate(tokens.ids) if token not in special]
    # Sentencepiece may have tokens for the space alone, which belong to no word.
    spaces = [i for i in content if not tokenizer.decode([tokens.ids[i]]).strip()]
    assert set(content) - set(spaces) <= set(owned) <= set(content)
    for word in tokens.words:
        shown = tokenizer.decode([tokens.ids[i] for i in word.tokens])
        if kind != "t5" or tokenizer.unk_token not in shown:
            assert "".join(shown.lower().split()) == word.text.lower()


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("prompt", PROMPTS)
def test_decoding_finds_what_offsets_say(kind, prompt):
    tokenizer = TOKENIZERS[kind]()
    fast = tower(tokenizer, 48).tokens(prompt)
    slow = tower(Slow(tokenizer), 48).tokens(prompt)
    assert slow.ids == fast.ids
    assert slow.words == fast.words


@pytest.mark.parametrize("prompt", PROMPTS)
def test_decoding_alone_finds_clip_tokens(prompt, monkeypatch):
    monkeypatch.setattr("retour.models.text._spans_by_word", lambda *_: [])
    tokenizer = tiny.clip_tokenizer()
    assert tower(Slow(tokenizer), 48).tokens(prompt) == tower(tokenizer, 48).tokens(prompt)


def test_exact_positions():
    words = tower(tiny.clip_tokenizer(), 16).tokens("A red apple, on blue").words
    expected = [("A", (1,)), ("red", (2,)), ("apple,", (3, 4)), ("on", (5,)), ("blue", (6,))]
    assert words == tuple(Word(text, at) for text, at in expected)


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("wrap", [lambda t: t, Slow])
def test_what_does_not_fit_is_told(kind, wrap):
    tokenizer = wrap(TOKENIZERS[kind]())
    prompt = "a red apple on blue background of a green pear"
    tokens = tower(tokenizer, 7).tokens(prompt)
    room = 7 - tokenizer.num_special_tokens_to_add()
    _, spans = token_spans(tokenizer, prompt)
    assert tokens.cut == prompt[spans[room][0] :].strip()
    assert prompt.endswith(tokens.cut) and tokens.cut
    assert [word.text for word in tokens.words] == prompt.split()
    assert tokens.words[0].tokens and not tokens.words[-1].tokens
    assert max(i for word in tokens.words for i in word.tokens) < 7


def test_sd3_counts_along_both_sequences():
    model = load(tiny.sd3())
    prompt = " ".join(["a red apple"] * 6)
    tokens = model.tokens(prompt)
    assert len(tokens.ids) == model.embed([prompt]).tensors["embeds"].shape[1]
    assert tokens.words[1].tokens == (2, tiny.TOKENS + 1)
    # CLIP has room for 14 tokens, T5 for all 18 words.
    assert tokens.words[17].tokens == (tiny.TOKENS + 17,)
    assert tokens.cut == "apple a red apple"
    assert load(tiny.sd3((1, 2))).tokens(prompt).words[17].tokens == ()


@pytest.mark.parametrize("family", sorted(tiny.PIPELINES))
def test_cut_prompts_are_reported_and_match_the_pipeline(family, caplog):
    model = load(tiny.PIPELINES[family]())
    prompt = " ".join(["a red apple"] * 6)
    with caplog.at_level(logging.WARNING):
        model.embed([prompt])
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("retour")]
    assert len(messages) == 1 and "'apple a red apple' is not read" in messages[0]
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        model.embed(["a red apple"])
    assert not caplog.records


def test_a_long_prompt_is_no_matter_of_the_tokenizer(capfd):
    model = load(tiny.sd1())
    model.embed([" ".join(["a red apple"] * 600)])
    assert "Token indices" not in capfd.readouterr().err


def test_a_word_of_several_vectors_has_them_all():
    pipe = tiny.sd1()
    model = load(pipe)
    assert len(model.tokens("a <cat>").words) == 2
    pipe.tokenizer.add_tokens(["<cat>", "<cat>_1"])
    assert [word.text for word in model.tokens("a <cat>").words] == ["a", "<cat>", "<cat>_1"]


def test_what_is_no_text_is_refused():
    with pytest.raises(RetourError, match=r"'caf.udce9' has a character that is none \(number 4"):
        load(tiny.sd1()).embed(["caf\udce9"])


def test_prompts_are_encoded_once_and_the_store_is_bounded():
    from retour.models.base import PROMPTS_KEPT

    pipe = tiny.sd1()
    calls = []
    pipe.text_encoder.register_forward_hook(lambda _, args, out: calls.append(len(args[0])))
    model = load(pipe)
    first = model.embed(["a cat", "a cat", "a pear"])
    assert calls == [2] and len(first) == 3
    again = model.embed(["a pear", "a cat"])
    assert calls == [2]
    assert torch.equal(first.tensors["embeds"][2], again.tensors["embeds"][0])
    many = [f"a cat {k}" for k in range(PROMPTS_KEPT + 9)]
    assert len(model.embed(many)) == len(many)
    assert len(model._prompts) == PROMPTS_KEPT
    model.embed(["a cat"])
    assert calls == [2, len(many), 1]


def test_training_the_text_encoder_forgets_its_prompts():
    model = load(tiny.sd1())
    before = model.embed(["a cat"]).tensors["embeds"]
    with torch.no_grad():
        next(model.pipe.text_encoder.parameters()).mul_(1.5)
    assert not torch.equal(before, model.embed(["a cat"]).tensors["embeds"])


def test_a_returned_condition_may_be_changed_in_place():
    model = load(tiny.sd1())
    first = model.embed(["a cat"]).tensors["embeds"]
    kept = first.clone()
    first.zero_()
    assert torch.equal(model.embed(["a cat"]).tensors["embeds"], kept)


def test_textual_inversions_are_written_out():
    pipe = tiny.sd1()
    extra = {"<mine>": torch.randn(2, tiny.WIDTH)}
    pipe.load_textual_inversion(extra["<mine>"], token="<mine>")
    model = load(pipe)
    tokens = model.tokens("a <mine> apple")
    assert [word.text for word in tokens.words] == ["a", "<mine>", "<mine>_1", "apple"]
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(["a <mine> apple"], "cpu", 1, False)
    assert torch.equal(model.embed(["a <mine> apple"]).tensors["embeds"], expected)
