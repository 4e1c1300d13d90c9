"""Which words differ, and which prompt tells the edit."""

import pytest

from retour.evaluate.report.prompts import compare, told_by


def test_compare_marks_words_in_their_places():
    before, after = compare("a red car on a road", "a green car on the road")
    assert [word for word, differs in before if differs] == ["red", "a"]
    assert [word for word, differs in after if differs] == ["green", "the"]
    assert " ".join(word for word, _ in after) == "a green car on the road"


@pytest.mark.parametrize(
    ("source", "target", "prompt", "words"),
    [
        ("an orange cat", "a green cat", "a green cat", ["green"]),
        ("a cat with a hat", "a cat", "a cat with a hat", ["hat"]),
        ("a cat", "a cat", "a cat", ["cat"]),
        ("a cat", "the cat", "the cat", ["the"]),
        ("", "a dog, sitting", "a dog, sitting", ["dog", "sitting"]),
        ("", "", "", []),
    ],
)
def test_told_by(source, target, prompt, words):
    assert told_by(source, target) == (prompt, words)
