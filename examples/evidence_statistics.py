# SPDX-License-Identifier: Apache-2.0
"""Compare two arms of examples/evidence.py by the losses and metrics of their test rows."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


HOLDS, FAILS, UNKNOWN, MISSING = "holds here", "does not hold here", "cannot be told at this size", "missing"
MIN_SEEDS, NUM_BOOTSTRAP = 3, 10_000
# Student's t for 95 % intervals by the number of seeds; that of five is used for more, which widens the interval.
T_QUANTILES = {3: 4.303, 4: 3.182, 5: 2.776}


def measure_rows(result: Mapping, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a measure of each test row, and its weight: a loss is a mean over tokens, a metric over rows."""
    values = np.array(result["rows"][measure])
    weights = np.array(result["rows"]["num_tokens"]) if measure == "loss" else np.ones(len(values))
    return values, weights


def mean(result: Mapping, measure: str) -> float:
    values, weights = measure_rows(result, measure)
    return float(values.sum() / weights.sum())


def compare(first: Mapping[int, Mapping], second: Mapping[int, Mapping], measure: str) -> dict[str, Any] | None:
    """Compare two arms on their common seeds: `None` if there are too few.

    Returns:
        `dict`: `difference` of the means, first minus second; `rows`, its 95 % interval by a paired bootstrap over
        test rows, whose values are means over seeds; `seeds`, its 95 % interval by Student's t over seeds; `verdict`.
    """
    seeds = sorted(set(first) & set(second))
    if len(seeds) < MIN_SEEDS:
        return None
    runs = [arm[seed] for arm in (first, second) for seed in seeds]
    if len({str(run["rows"]["num_tokens"]) for run in runs}) > 1:
        raise ValueError("The results are of different test rows, but rows are compared in pairs. Repeat the runs.")
    weights = measure_rows(runs[0], measure)[1]
    pairs = [[measure_rows(arm[seed], measure)[0] for seed in seeds] for arm in (first, second)]
    row_differences = np.mean(pairs[0], axis=0) - np.mean(pairs[1], axis=0)
    drawn = np.random.default_rng(0).multinomial(len(weights), [1 / len(weights)] * len(weights), NUM_BOOTSTRAP)
    on_rows = np.percentile((drawn @ row_differences) / (drawn @ weights), [2.5, 97.5]).tolist()
    difference, *over_seeds = interval_over_seeds(
        [mean(first[seed], measure) - mean(second[seed], measure) for seed in seeds]
    )
    intervals = {"rows": on_rows, "seeds": over_seeds}
    return {"difference": difference, "num_seeds": len(seeds), **intervals, "verdict": judge(intervals, measure)}


def interval_over_seeds(values: Sequence[float]) -> list[float]:
    """Return the mean of the values of at least 3 seeds, and the edges of its 95 % interval by Student's t."""
    value = statistics.mean(values)
    quantile = T_QUANTILES[min(len(values), max(T_QUANTILES))]
    margin = quantile * statistics.stdev(values) / len(values) ** 0.5
    return [value, value - margin, value + margin]


def judge(intervals: Mapping[str, Sequence[float]], measure: str) -> str:
    """Return whether the claim that the first arm is better holds: both intervals must be on the same side of 0."""
    sign = -1 if measure == "loss" else 1
    lows, highs = zip(*(sorted(sign * edge for edge in interval) for interval in intervals.values()), strict=True)
    return HOLDS if min(lows) > 0 else FAILS if max(highs) < 0 else UNKNOWN


def format_number(value, measure):
    return f"{value:+.3f}" if measure == "loss" else f"{value:+.1f}"


def format_interval(interval, measure):
    return " to ".join(format_number(edge, measure) for edge in interval)


def format_mean(values, measure):
    """Format the mean over seeds and its standard error."""
    digits = 3 if measure == "loss" else 1
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"
