"""Means with confidence intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# 97.5 % quantiles of Student's t for 1, 2, 3, ... degrees of freedom (any statistics table); beyond 30 the normal's is near.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T += (2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of the 95 % confidence interval); the width of a single value is NaN."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    quantile = _T[len(values) - 2] if len(values) <= len(_T) + 1 else 1.96
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: Sequence[float], digits: int = 3) -> str:
    """`0.123 ± 0.004`, or the mean alone where there is one value."""
    mean, half = mean_interval(values)
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"
