"""OIR's choice of a depth: which candidate wins, and which are tried."""

from retour.editors import _oir_search as choice


def scores(fit, kept):
    return {d + 1: pair for d, pair in enumerate(zip(fit, kept, strict=True))}


FIT, KEPT = [0.1, 0.2, 0.6, 0.7, 0.72], [0.0, -0.1, -0.2, -0.6, -1.0]


def test_the_best_sum_wins_whatever_the_scales():
    assert choice.best(scores(FIT, KEPT)) == 3
    for shift, scale in [(5.0, 1.0), (0.0, 100.0), (-3.0, 0.01)]:
        moved = [shift + scale * v for v in FIT]
        assert choice.best(scores(moved, KEPT)) == 3
        assert choice.best(scores(FIT, [shift + scale * v for v in KEPT])) == 3


def test_ties_are_no_numbers_to_divide_by():
    assert choice.best(scores([0.5] * 5, KEPT)) == 1
    assert choice.best(scores(FIT, [0.0] * 5)) == 5
    assert choice.best(scores([0.5] * 5, [0.0] * 5)) == 1
    assert choice.best({4: (0.0, 0.0)}) == 4


def test_coarse_then_fine():
    assert choice.coarse_depths(50, 5) == [1, *range(5, 51, 5)]
    assert choice.coarse_depths(7, 1) == list(range(1, 8))
    assert choice.coarse_depths(3, 9) == [1, 3]
    assert choice.near_depths(10, 50, 5) == list(range(6, 15))
    assert choice.near_depths(50, 50, 5) == list(range(46, 51))
    assert choice.near_depths(3, 50, 1) == [3]
