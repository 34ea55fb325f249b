# SPDX-License-Identifier: Apache-2.0
"""Results of evaluations for the metadata of a card and for `.eval_results` on the Hub."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from ..run_results import RunResults
from .repository_checks import remove_local_paths


EVAL_RESULTS_FOLDER = ".eval_results"


def load_evaluations(results: Any) -> list[RunResults]:
    """Load the results of evaluations.

    Args:
        results ([`RunResults`], `str`, `Path`, `dict` or a list of these, *optional*): Results, the path of an
            `evaluation.json`, or its content. `None` for no results.

    Raises:
        ValueError: A file cannot be read, or holds no results or numbers that are not finite.
        TypeError: It is something else.
    """
    items = results if isinstance(results, Sequence) and not isinstance(results, str) else [results]
    return [_load_evaluation(item) for item in items if item is not None]


def _load_evaluation(item):
    if isinstance(item, (str, Path)):
        item = RunResults.load(item)
    elif isinstance(item, dict):
        try:
            item = RunResults.from_dict(item)
        except ValueError as error:
            raise ValueError(f"`results` cannot be read: {error}.") from error
    elif not isinstance(item, RunResults):
        raise TypeError(f"`results` has a {type(item).__name__}, but must be RunResults or paths of evaluation.json.")
    metrics = item.saved.metrics
    wrong = [name for name, metric in metrics.items() if not math.isfinite(metric.value)]
    if wrong or not metrics:
        problem = f"has {wrong[0]!r} = {metrics[wrong[0]].value}" if wrong else "has no metrics"
        raise ValueError(f"An evaluation of {item.task!r} in `results` {problem}, but finite numbers are required.")
    return item


def _dataset_id(result):
    return remove_local_paths(result.dataset.name) if result.dataset else result.task


def _dataset_label(result):
    return remove_local_paths(str(result.dataset)) if result.dataset else result.task


def card_results(results: Sequence[RunResults], task_type: str) -> list[EvalResult]:
    """Build the `model-index` of a card's metadata.

    Args:
        results (`Sequence[RunResults]`): Of evaluations.
        task_type (`str`): The `pipeline_tag` of the card.
    """
    return [
        EvalResult(
            task_type=task_type,
            task_name=result.task,
            dataset_type=_dataset_id(result),
            dataset_name=_dataset_label(result),
            dataset_config=result.dataset and result.dataset.config,
            dataset_split=result.dataset and result.dataset.split,
            dataset_revision=result.dataset and result.dataset.revision,
            metric_type=name,
            metric_name=f"{name} ({metric.unit})" if metric.unit else name,
            metric_value=metric.value,
        )
        for result in results
        for name, metric in result.saved.metrics.items()
    ]


def write_eval_results(results: Sequence[RunResults], folder: Path) -> None:
    """Write `.eval_results/<task>.yaml` for each task; nothing without results."""
    entries_by_file: dict[str, list[EvalResultEntry]] = {}
    for result in results:
        name = re.sub(r"[^\w-]+", "_", result.task).strip("_") or "results"
        entries_by_file.setdefault(f"{name}.yaml", []).extend(_build_entries(result))
    for name, entries in entries_by_file.items():
        (folder / EVAL_RESULTS_FOLDER).mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        (folder / EVAL_RESULTS_FOLDER / name).write_text(text, encoding="utf-8")


def _build_entries(result) -> Iterator[EvalResultEntry]:
    for name, metric in result.saved.metrics.items():
        notes = [f"{name} in {metric.unit}" if metric.unit else name, f"data: {_dataset_label(result)}"]
        num_rows = metric.num_rows or result.num_rows.get("test")
        notes += [f"{num_rows} rows"] if num_rows else []
        if metric.low is not None and metric.high is not None:
            confidence = "" if result.confidence is None else f"{result.confidence:.0%} "
            notes.append(f"{confidence}interval {metric.low:.6g} to {metric.high:.6g}")
        if result.command:
            notes.append(f"command: {remove_local_paths(' '.join(result.command.split()))}")
        yield EvalResultEntry(
            dataset_id=_dataset_id(result),
            task_id=result.task,
            value=metric.value,
            dataset_revision=result.dataset.revision if result.dataset else None,
            date=result.date,
            notes="; ".join(notes),
        )
