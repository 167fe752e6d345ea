"""95 % intervals of a share, and of a mean over few values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A value and the ends of its interval, 95 % unless stated otherwise; the ends are None for a single
    observation."""

    value: float
    low: float | None
    high: float | None


def wilson(share: float, n: int) -> Estimate:
    """A share observed in ``n >= 1`` independent trials, with Wilson's score interval (1927, JASA 22, p. 209).

    ``share`` may also be the mean of ``n`` values in [0, 1]: their variance is at most that of as many 0s and 1s with
    the same mean, so the interval is wide enough for them too.
    """
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half))


def mean_of(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """The mean of independent values with Student's t interval; None for no values."""
    if not values:
        return None
    mean = fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, None)
    from scipy.special import stdtrit  # quantiles of Student's t; only toolx compare needs it

    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)
