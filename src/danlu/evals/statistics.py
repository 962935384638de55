"""Intervals for measured figures: a figure without its uncertainty and its count invites wrong conclusions.

    low, high = ratio_interval(bits, num_bytes)     # bootstrap over documents
    low, high = mean_interval(scores)               # bootstrap over prompts
    low, high = wilson_interval(successes=7, count=20)
"""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
CHUNK = 1 << 22  # numbers drawn at a time


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], *, resamples: int = RESAMPLES,
                   seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of Σ numerator ÷ Σ denominator by a bootstrap over the items (percentiles, fixed seed).

    None for fewer than two items: one item says nothing about how others would differ.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    count = len(above)
    if count < 2:
        return None
    generator = np.random.default_rng([seed, count])
    ratios = []
    rows = max(1, CHUNK // count)
    for start in range(0, resamples, rows):
        times = generator.multinomial(count, np.full(count, 1 / count), size=min(rows, resamples - start))
        ratios.append((times @ above) / (times @ below))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of a mean by a bootstrap over the items; None for fewer than two."""
    return ratio_interval(values, np.ones(len(values)).tolist(), resamples=resamples, seed=seed)


def wilson_interval(successes: float, count: float) -> tuple[float, float] | None:
    """95 % Wilson interval of a share; None where nothing was counted."""
    if count == 0:
        return None
    share, square = successes / count, Z_95 ** 2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = Z_95 / (1 + square / count) * np.sqrt(share * (1 - share) / count + square / (4 * count ** 2))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))
