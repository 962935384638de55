"""Intervals for measured figures: a figure without its uncertainty and its count invites wrong conclusions.

    low, high = ratio_interval(bits, num_bytes)     # bootstrap over documents
    low, high = mean_interval(scores)               # bootstrap over prompts
    low, high = wilson_interval(successes=7, count=20)
"""

from collections.abc import Hashable, Sequence

import numpy as np

RESAMPLES = 2000
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % point
CHUNK = 1 << 22  # numbers drawn at a time


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], *, strata: Sequence[Hashable] = (),
                   resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float] | None:
    """95 % interval of Σ numerator ÷ Σ denominator by a bootstrap over the items (percentiles, fixed seed).

    strata  what each item belongs to, where it is fixed how many of which there are: items are drawn within it

    None where no stratum has two items: one item says nothing about how others would differ. Resamples whose denominator
    is 0, all of whose items say nothing, are left out.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    count = len(above)
    members: dict[Hashable, list[int]] = {}
    for place in range(count):
        members.setdefault(strata[place] if strata else None, []).append(place)
    if all(len(places) < 2 for places in members.values()):
        return None
    generator = np.random.default_rng([seed, count])
    ratios = []
    rows = max(1, CHUNK // count)
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        times = np.empty((size, count), np.int64)
        for places in members.values():
            times[:, places] = generator.multinomial(len(places), np.full(len(places), 1 / len(places)), size=size)
        sums = times @ below
        ratios.append((times @ above)[sums != 0] / sums[sums != 0])
    found = np.concatenate(ratios)
    if not len(found):
        return None
    low, high = np.percentile(found, [2.5, 97.5])
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
