# SPDX-License-Identifier: Apache-2.0
"""Results of evaluations, as `evaluate_checkpoint` writes them, for a card and for the Hub's `.eval_results`."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from .repository_checks import without_local_paths


EVAL_RESULTS_FOLDER = ".eval_results"
SHAPE = (
    "A result is what `evaluate_checkpoint` returns and writes to `evaluation.json`: `task`, `metrics` (numbers by "
    "name, or `value`, `low`, `high` and `unit` of each), and `dataset`, `num_rows`, `confidence` and `command` where "
    "known."
)


@dataclass(frozen=True)
class Metric:
    """A number and, where it was computed, its interval."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str | None = None

    def __str__(self):
        unit = {None: "", "percent": " %"}.get(self.unit, f" {self.unit}")
        return f"{self.value:.6g}{unit}"

    @property
    def interval(self) -> str:
        """Its bounds as text, or a dash."""
        return "-" if self.low is None or self.high is None else f"{self.low:.6g} to {self.high:.6g}"


@dataclass(frozen=True)
class EvaluationResult:
    """One task on one data set, as a card tells of it; no path of the machine that it ran on is left in it."""

    task: str
    metrics: tuple[Metric, ...]
    dataset: dict[str, str]
    num_rows: int | None
    confidence: float | None
    command: str | None
    device: str | None
    date: str | None

    @property
    def data(self) -> str:
        """Name, configuration and split of the data."""
        parts = (self.dataset.get(key) for key in ("name", "config", "split"))
        return ", ".join(part for part in parts if part) or self.task

    @property
    def dataset_id(self) -> str:
        """What the Hub knows the data as; a task of our own goes by its name."""
        return self.dataset.get("name") or self.task


def read_results(results: Any) -> list[EvaluationResult]:
    """The results of evaluations, from a `dict`, the path of a JSON file, or a list of these.

    Args:
        results (`dict`, `str`, `Path` or a list of these, *optional*): `None` is no result.

    Raises:
        ValueError: A file cannot be read, or a result is of another shape.
        TypeError: Something is neither a `dict` nor a path.
    """
    if results is None:
        return []
    given = list(results) if isinstance(results, Sequence) and not isinstance(results, (str, bytes)) else [results]
    read = []
    for item in given:
        if isinstance(item, (str, Path)):
            content = _json_of(Path(item))
            parts = content if isinstance(content, list) else [content]
            read += [_result(part, f"{str(item)!r}") for part in parts]
        elif isinstance(item, dict):
            read.append(_result(item, f"`results[{len(read)}]`"))
        else:
            raise TypeError(f"`results` has a {type(item).__name__}, but takes dicts and paths of JSON files. {SHAPE}")
    return read


def _json_of(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`results` names {str(path)!r}, which is no JSON file that can be read ({type(error).__name__}). {SHAPE}"
        ) from error


def _result(content, name):
    if not isinstance(content, dict) or not content.get("task") or not isinstance(content.get("metrics"), dict):
        has = (
            f"has the keys {sorted(map(str, content))}"
            if isinstance(content, dict)
            else f"is a {type(content).__name__}"
        )
        raise ValueError(f"{name} {has}, but `task` and `metrics` are needed. {SHAPE}")
    if not content["metrics"]:
        raise ValueError(f"{name} has no `metrics`. {SHAPE}")
    dataset = content.get("dataset") or {}
    dataset = {"name": dataset} if isinstance(dataset, str) else dataset
    if not isinstance(dataset, dict):
        raise ValueError(f"`dataset` of {name} is a {type(dataset).__name__}, but a dict or a name is needed. {SHAPE}")
    command, device, date = (content.get(key) for key in ("command", "device", "date"))
    return EvaluationResult(
        task=str(content["task"]),
        metrics=tuple(_metric(key, value, name) for key, value in content["metrics"].items()),
        dataset={key: without_local_paths(str(value)) for key, value in dataset.items() if value is not None},
        num_rows=_number(content.get("num_rows"), f"`num_rows` of {name}"),
        confidence=_number(content.get("confidence"), f"`confidence` of {name}"),
        command=None if command is None else without_local_paths(" ".join(str(command).split())),
        device=None if device is None else without_local_paths(str(device)),
        date=None if date is None else str(date),
    )


def _metric(key, content, name):
    place = f"The metric {key!r} of {name}"
    content = content if isinstance(content, dict) else {"value": content}
    numbers = {part: _number(content.get(part), place) for part in ("value", "low", "high")}
    if numbers["value"] is None:
        raise ValueError(f"{place} has no `value`. {SHAPE}")
    return Metric(str(key), **numbers, unit=content.get("unit"))


def _number(value, place):
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{place} is {value!r}, but a finite number is needed. {SHAPE}")
    return value


def card_results(results: list[EvaluationResult], task_type: str) -> list[EvalResult]:
    """For the `model-index` of a card's metadata.

    Args:
        results (`list[EvaluationResult]`): As read.
        task_type (`str`): The card's `pipeline_tag`.
    """
    return [
        EvalResult(
            task_type=task_type,
            task_name=result.task,
            dataset_type=result.dataset_id,
            dataset_name=result.data,
            dataset_config=result.dataset.get("config"),
            dataset_split=result.dataset.get("split"),
            dataset_revision=result.dataset.get("revision"),
            metric_type=metric.name,
            metric_name=f"{metric.name} ({metric.unit})" if metric.unit else metric.name,
            metric_value=metric.value,
        )
        for result in results
        for metric in result.metrics
    ]


def write_eval_results(results: list[EvaluationResult], folder: Path) -> None:
    """Writes `.eval_results/<task>.yaml` for each task; nothing without results."""
    by_file: dict[str, list[EvalResultEntry]] = {}
    for result in results:
        name = re.sub(r"[^\w-]+", "_", result.task).strip("_") or "results"
        by_file.setdefault(f"{name}.yaml", []).extend(_entries(result))
    for name, entries in by_file.items():
        (folder / EVAL_RESULTS_FOLDER).mkdir(exist_ok=True)
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
        (folder / EVAL_RESULTS_FOLDER / name).write_text(text, encoding="utf-8")


def _entries(result):
    for metric in result.metrics:
        notes = [f"{metric.name} in {metric.unit}" if metric.unit else metric.name, f"data: {result.data}"]
        if result.num_rows is not None:
            notes.append(f"{result.num_rows} rows")
        if metric.interval != "-":
            confidence = "" if result.confidence is None else f"{result.confidence:.0%} "
            notes.append(f"{confidence}interval {metric.interval}")
        if result.command:
            notes.append(f"command: {result.command}")
        yield EvalResultEntry(
            dataset_id=result.dataset_id,
            task_id=result.task,
            value=metric.value,
            dataset_revision=result.dataset.get("revision"),
            date=result.date,
            notes="; ".join(notes),
        )
