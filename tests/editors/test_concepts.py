"""Targets are read as concepts, or as whole prompts by the words they keep."""

from retour.editors._concepts import Concept, concepts, edits

SOURCE = "a red apple on a cat"


def test_concepts_are_read():
    assert concepts("green, -red apple ,- a cat") == (
        Concept("green", 1.0),
        Concept("red apple", -1.0),
        Concept("a cat", -1.0),
    )


def test_whole_prompts_are_told_by_the_words_they_keep():
    """Half of the source's words, and no minus; `read` decides where the words do not."""
    whole = (Concept("A green apple on a cat", 1.0, True, "green"),)
    assert edits(SOURCE, "A green apple on a cat") == whole
    assert edits(SOURCE, SOURCE) == ()
    assert edits(SOURCE, "an apple on a dog, -red") == concepts("an apple on a dog, -red")
    for target in ("sunglasses", "a green pear", "green, blue"):
        assert edits(SOURCE, target) == edits("", target) == concepts(target)
        assert edits(SOURCE, target, "prompt")[0].whole
    assert edits(SOURCE, whole[0].text, "concepts") == (Concept(whole[0].text, 1.0),)
