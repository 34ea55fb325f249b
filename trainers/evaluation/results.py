# SPDX-License-Identifier: Apache-2.0
"""Metrics with confidence intervals, and how a result is shown and reproduced."""

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
    """Means over rows in percent, with bootstrap intervals: how far other rows of the same kind may move them.

    Args:
        rows (`Sequence[Mapping]`): Of each row its metrics, from 0 to 1; `None` leaves a row out of a metric.
        num_bootstrap (`int`, *optional*, defaults to 1000): How often rows are drawn anew, with replacement.
        confidence (`float`, *optional*, defaults to 0.95): Share of the drawn means that the interval holds.
        seed (`int`, *optional*, defaults to 0): The same seed gives the same intervals.

    Returns:
        `dict[str, Metric]`: For each metric that a row has.
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


def reproducing_command(arguments: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """The command line of a run: what was given, less what is so anyway.

    Args:
        arguments (`Mapping`): Options by their names.
        defaults (`Mapping`): What they are when left out.
    """
    words = ["encdec-slm", "evaluate"]
    for name, value in arguments.items():
        if value != defaults.get(name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def public_path(path: str | Path) -> str:
    """A path that can be published: as it was given where it is relative, else from the working directory.

    Of an absolute path that lies elsewhere the last part is left: the rest says things of a machine.
    """
    path = Path(path)
    if not path.is_absolute():
        return path.as_posix()
    if path != Path.cwd() and path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return path.name
