"""Intervals: known values, coverage, and the same numbers each time."""

import math

import numpy as np
import pytest

from danlu.evals.statistics import ratio_interval, wilson_interval


def test_wilson_known_values() -> None:
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) is None


def test_ratio_interval_is_fixed_and_holds_the_ratio() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(10, 1000, 200)
    bits = sizes * generator.normal(2.0, 0.3, 200)
    first = ratio_interval(bits, sizes)
    assert first is not None and first == ratio_interval(bits, sizes)
    assert first[0] < bits.sum() / sizes.sum() < first[1]
    # the classical standard error of a ratio
    ratio = bits.sum() / sizes.sum()
    error = np.sqrt(((bits - ratio * sizes) ** 2).sum()) / sizes.sum()
    assert (first[1] - first[0]) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_ratio_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        sizes = generator.integers(50, 150, 60)
        low, high = ratio_interval(sizes * generator.normal(3.0, 1.0, 60), sizes, resamples=1000)
        hits += low < 3.0 < high
    assert 180 <= hits <= 199


def test_one_item_has_no_interval() -> None:
    assert ratio_interval([3.0], [1.0]) is None
    assert ratio_interval([3.0, 3.0], [1.0, 1.0]) == (3.0, 3.0)


def test_strata_keep_their_shares() -> None:
    bits, size, strata = [10.0, 20.0, 90.0, 180.0], [10, 20, 30, 60], ["en", "en", "zh", "zh"]
    assert ratio_interval(bits[:2], size[:2]) == (1.0, 1.0) and ratio_interval(bits[2:], size[2:]) == (3.0, 3.0)
    mixed, kept = ratio_interval(bits, size), ratio_interval(bits, size, strata=strata)
    assert mixed is not None and kept is not None
    assert mixed[0] == 1.0 and mixed[1] == 3.0, "without strata a sample may be of one language alone"
    # drawn within the languages, the lightest is en 20 with zh 30 of each, the heaviest the other way round
    assert kept == pytest.approx(((2 * 20 + 2 * 90) / (2 * 20 + 2 * 30), (2 * 10 + 2 * 180) / (2 * 10 + 2 * 60)))
    assert ratio_interval([1.0, 2.0], [1, 1], strata=["a", "b"]) is None, "one of each says nothing"
    assert ratio_interval(bits, size, strata=["x"] * 4) == mixed


def test_resamples_that_say_nothing_are_left_out() -> None:
    low, high = ratio_interval([6.0, 4.0, 1.0], [3.0, 4.0, 0.0])
    assert 1.0 <= low < 11 / 7 < high < math.inf, "a third item alone is 1 ÷ 0"
    assert ratio_interval([1.0, 1.0], [0.0, 0.0]) is None
