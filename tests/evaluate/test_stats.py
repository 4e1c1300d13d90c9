"""Bootstrap intervals against theory."""

import math

import numpy as np
import pytest

from retour.errors import RetourError
from retour.evaluate.stats import mean_interval, mean_intervals, paired_difference


def test_interval_of_a_normal_sample_is_the_textbook_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(values.size)
    assert found.mean == pytest.approx(values.mean())
    # 10,000 resamples know the ends to about 2 % of the half width.
    assert found.high - found.mean == pytest.approx(half, rel=0.08)
    assert found.mean - found.low == pytest.approx(half, rel=0.08)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    samples = rng.normal(0, 1, (200, 40))
    ends = [mean_interval(sample, resamples=500) for sample in samples]
    covered = np.mean([e.low <= 0 <= e.high for e in ends])
    # 0.95 with a standard error of 0.015; the percentile interval is a little narrow at 40 values.
    assert 0.89 <= covered <= 0.99


def test_same_seed_same_interval():
    values = np.random.default_rng(2).random(20)
    assert mean_interval(values, seed=5) == mean_interval(values, seed=5)
    assert mean_interval(values, seed=5) != mean_interval(values, seed=6)


def test_pairing_cancels_what_is_hard_for_both():
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 10, 50)
    a, b = hard + 0.5 + rng.normal(0, 0.1, 50), hard + rng.normal(0, 0.1, 50)
    gap = paired_difference(a, b)
    assert gap.apart and gap.low < 0.5 < gap.high
    assert mean_interval(a).low < mean_interval(b).high
    assert not paired_difference(a, a).apart


def test_values_that_are_not_numbers_are_left_out_and_counted():
    assert mean_interval([1.0, math.nan, 3.0]).count == 2
    assert mean_interval([]).count == 0 and math.isnan(mean_interval([]).mean)
    assert mean_interval([4.0]).mean == 4 and math.isnan(mean_interval([4.0]).low)
    assert mean_interval([math.inf, 1.0]).mean == math.inf
    both = paired_difference([math.inf, 2.0, 3.0, math.nan], [math.inf, 1.0, 1.0, 1.0])
    assert both.count == 2 and both.mean == 1.5


def test_unequal_items_are_refused():
    with pytest.raises(RetourError, match="cannot pair 2 values with 3"):
        paired_difference([1, 2], [1, 2, 3])
    with pytest.raises(RetourError, match="confidence"):
        mean_interval([1, 2], confidence=95)


def test_a_table_gives_what_its_rows_give():
    table = np.random.default_rng(0).normal(3, 2, (7, 30))
    table[1, :4] = np.nan
    table[2] = np.nan
    table[3, 1:] = np.nan
    table[4, 5] = np.inf
    table[5] = 2.0
    for row, found in zip(table, mean_intervals(table, resamples=1500), strict=True):
        one = mean_interval(row, resamples=1500)
        assert found.count == one.count
        # The same resamples, summed in another order.
        ends = (found.mean, found.low, found.high), (one.mean, one.low, one.high)
        assert np.allclose(*ends, rtol=1e-12, equal_nan=True)
