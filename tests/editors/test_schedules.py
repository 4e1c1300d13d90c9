"""Options of attention controls, read from text and values, and their tables."""

from editors.runs import model
from retour.editors._schedules import cross_schedule, parse_scales, schedule_table


def test_options_read_the_same_as_text_and_as_values():
    text = cross_schedule("0.8,red:0.1-0.2")
    assert text == cross_schedule({"default_": 0.8, "red": (0.1, 0.2)})
    assert text == ((0.0, 0.8), {"red": (0.1, 0.2)})
    assert cross_schedule("0.4") == cross_schedule(0.4) == ((0.0, 0.4), {})
    assert parse_scales("red:2, big cat:-0.5") == {"red": 2.0, "big cat": -0.5}
    assert parse_scales("none") == parse_scales(None) == {}


def test_schedule_tables_have_one_row_more_than_steps():
    tokens = model("sd1").tokens("a red pear")
    red = list(tokens.words[1].tokens)
    table = schedule_table("0.4,red:0.2-0.6", tokens, 50)
    assert table.shape == (51, 16)
    rest = [j for j in range(16) if j not in red]
    assert table[:, rest].sum(0).eq(int(0.4 * 51)).all()
    assert table[:, red].nonzero()[:, 0].unique().tolist() == list(range(10, 30))
    # T = 10: the eleven rows put 0.5 at step 5, and an end of 1 covers the last step.
    assert schedule_table(0.5, tokens, 10)[:, 0].tolist() == [1] * 5 + [0] * 6
    assert schedule_table({"default_": (0, 1)}, tokens, 10).all()
    assert schedule_table({"red": 0.0}, tokens, 10)[:, red].sum() == 0
