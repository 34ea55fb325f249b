# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals, and the command that reproduces an evaluation."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...run_results import Metric


UNIT = "percent"


def mean_with_interval(
    rows: Sequence[Mapping[str, float | None]], num_bootstrap: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, Metric]:
    """Compute means over rows in percent, with bootstrap confidence intervals.

    Args:
        rows (`Sequence[Mapping]`): Metrics of each row, from 0 to 1; `None` if a metric does not apply to a row.
        num_bootstrap (`int`, *optional*, defaults to 1000): Resamples of the rows, with replacement.
        confidence (`float`, *optional*, defaults to 0.95): Share of the resampled means in the interval.
        seed (`int`, *optional*, defaults to 0): Draws the resamples.

    Returns:
        `dict[str, Metric]`: The metrics that apply to at least one row.
    """
    names = list(rows[0])
    values = np.array([[np.nan if row[name] is None else row[name] for name in names] for row in rows], dtype=float)
    present = ~np.isnan(values)
    values = np.where(present, values, 0.0)
    generator = np.random.default_rng(seed)
    drawn = np.full((num_bootstrap, len(names)), np.nan)
    for number in range(num_bootstrap):
        weights = np.bincount(generator.integers(len(rows), size=len(rows)), minlength=len(rows))
        counts = weights @ present
        np.divide(weights @ values, counts, out=drawn[number], where=counts > 0)
    edges = [50 * (1 - confidence), 50 * (1 + confidence)]
    metrics = {}
    for place, name in enumerate(names):
        if present[:, place].any():
            low, high = np.nanpercentile(drawn[:, place], edges)
            value = values[:, place].sum() / present[:, place].sum()
            numbers = (round(100 * float(number), 2) for number in (value, low, high))
            num_rows = int(present[:, place].sum())
            metrics[name] = Metric(*numbers, UNIT, num_rows if num_rows < len(rows) else None)
    return metrics


def build_command(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Build the command line of an evaluation from its options; those that equal their default are left out."""
    words = ["encdec-slm", "evaluate"]
    for name, value in options.items():
        if value != defaults.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def public_path(path: str | Path) -> str:
    """Return a path for publication: relative to the working directory, or else only its last part."""
    path = Path(path)
    if not path.is_absolute():
        return path.as_posix()
    if path != Path.cwd() and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return path.name
