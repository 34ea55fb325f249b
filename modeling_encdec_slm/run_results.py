# SPDX-License-Identifier: Apache-2.0
"""Results of training and evaluation runs: one schema, saved as JSON, from which cards, tables and plots are made."""

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from .checkpoints import write_file
from .errors import summarize_error


FORMAT = "encdec_slm.run_results"
FORMAT_VERSION = 1
METRIC_LABELS = {
    "loss": "loss",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeL_shuffled": "ROUGE-L, shuffled references",
    "exact": "exact match",
    "bleu": "BLEU",
    "f1": "F1",
    "vqa_accuracy": "VQA accuracy",
    "relaxed_accuracy": "relaxed accuracy",
    "teacher_agreement": "agreement with the teacher",
}
UNIT_LABELS = {"percent": "%", "nats": "nats per token"}


def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python, torch, transformers and other packages."""
    names = ("torch", "transformers", *packages)
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


@strict
@dataclass
class Metric:
    """A measured number.

    Args:
        value (`float`): The number, in `unit`.
        low (`float`, *optional*): Lower bound of the confidence interval.
        high (`float`, *optional*): Upper bound of the confidence interval.
        unit (`str`, *optional*): `"percent"`, `"nats"` (per token), or `None` for a plain number.
        num_rows (`int`, *optional*): Number of rows it was measured on, if these are not all rows of the run.
    """

    value: float | int
    low: float | int | None = None
    high: float | int | None = None
    unit: str | None = None
    num_rows: int | None = None

    def __str__(self):
        text = f"{self.value:.2f}" if self.unit == "percent" else f"{self.value:.4g}"
        return text if self.low is None or self.high is None else f"{text} [{self.low:.2f}, {self.high:.2f}]"


@strict
@dataclass
class ModelResults:
    """Measurements of one model or baseline.

    Args:
        name (`str`): Such as `"teacher"` or `"after training"`; unique within a run.
        metrics (`dict[str, Metric]`, *optional*): By the names in `METRIC_LABELS`, or others.
        num_parameters (`int`, *optional*): Tied weights count once.
        train_seconds (`float`, *optional*): Duration of its training.
        first_token_seconds (`float`, *optional*): Time until the first generated token.
        tokens_per_second (`float`, *optional*): Generated tokens after the first.
    """

    name: str
    metrics: dict[str, Metric] = field(default_factory=dict)
    num_parameters: int | None = None
    train_seconds: float | int | None = None
    first_token_seconds: float | int | None = None
    tokens_per_second: float | int | None = None


@strict
@dataclass
class DataSource:
    """The data set that a run was measured on.

    Args:
        name (`str`): Name on the Hub, of a file, or of a built-in task.
        config (`str`, *optional*): Configuration of the data set.
        split (`str`, *optional*): Split that was measured.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
    """

    name: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    def __str__(self):
        return ", ".join(part for part in (self.name, self.config, self.split) if part)


@strict
@dataclass
class RunResults:
    """Results of a training or evaluation run.

    Args:
        kind (`str`): Such as `"evaluation"`, `"fine-tuning"` or `"distillation"`.
        task (`str`): Name of the task, such as `"docstrings"`, or `"text"` for other rows of text.
        models (`list[ModelResults]`): Every measured model and baseline, in the order of tables.
        saved_model (`str`): Name of the entry in `models` that was saved, or evaluated.
        dataset (`DataSource`, *optional*): Where the measured rows come from.
        num_rows (`dict[str, int]`, *optional*): Rows by split. A streamed split is left out.
        num_cut_rows (`dict[str, int]`, *optional*): Rows that were shortened, by split or by what was cut, such as
            `"train sources"`.
        base_model (`str`, *optional*): Preset, folder or Hub name that the training started from.
        teacher (`str`, *optional*): Teacher of a distillation, for the model card.
        objective (`str`, *optional*): Training loss, for the model card.
        targets (`str`, *optional*): Where the training targets come from, for the model card.
        train_steps (`int`, *optional*): Optimizer steps.
        validation_losses (`list[dict]`, *optional*): Each with `step` and `loss` in nats per token.
        confidence (`float`, *optional*): Of the intervals in `metrics`, such as 0.95.
        settings (`dict`, *optional*): Other settings that decide the numbers, such as `max_new_tokens`.
        samples (`list[dict]`, *optional*): Some rows with texts such as `source`, `reference` and `prediction`.
        command (`str`, *optional*): Command that reproduces the run.
        seconds (`float`, *optional*): Duration of an evaluation.
        device (`str`, *optional*): Such as `"cpu"`.
        date (`str`, *optional*): ISO date, defaults to today.
        versions (`dict[str, str]`, *optional*): Of packages, defaults to [`package_versions`].
    """

    kind: str
    task: str
    models: list[ModelResults]
    saved_model: str
    dataset: DataSource | None = None
    num_rows: dict[str, int] = field(default_factory=dict)
    num_cut_rows: dict[str, int] = field(default_factory=dict)
    base_model: str | None = None
    teacher: str | None = None
    objective: str | None = None
    targets: str | None = None
    train_steps: int | None = None
    validation_losses: list[dict[str, float | int]] = field(default_factory=list)
    confidence: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    command: str | None = None
    seconds: float | int | None = None
    device: str | None = None
    date: str | None = field(default_factory=_today)
    versions: dict[str, str] = field(default_factory=package_versions)

    @property
    def saved(self) -> ModelResults:
        """The entry of `models` that was saved, or evaluated."""
        return self[self.saved_model]

    def __getitem__(self, name: str) -> ModelResults:
        """Return the entry of `models` with a name."""
        return {model.name: model for model in self.models}[name]

    def validate_saved_model(self):
        """Check that `saved_model` is one of the models (called by `strict`)."""
        names = [model.name for model in self.models]
        if self.saved_model not in names:
            raise ValueError(f"`saved_model` is {self.saved_model!r}, but must be one of {names}.")

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the file that [`save`] writes."""
        return {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Save as JSON."""
        write_file(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "RunResults":
        """Load a file that [`save`] wrote, or an `evaluation.json` of version 0.1.

        Raises:
            ValueError: It cannot be read, is damaged, or is not a file of run results.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} cannot be read as run results: {summarize_error(error)}.") from error

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "RunResults":
        """Build from the content of a file that [`save`] wrote, or of an `evaluation.json` of version 0.1.

        Raises:
            ValueError: The content has another form. The message names the field.
        """
        if not isinstance(content, dict):
            raise ValueError(f"an object is required, not a {type(content).__name__}")
        content = dict(content)
        if content.pop("format", None) != FORMAT:
            content = _convert_evaluation_0_1(content)
        elif (file_version := content.pop("version", None)) != FORMAT_VERSION:
            raise ValueError(f"the file has version {file_version!r} of the format, but {FORMAT_VERSION} is required")
        try:
            models = [_build_model(model) for model in content.pop("models")]
            dataset = content.pop("dataset", None)
            dataset = None if dataset is None else DataSource(**dataset)
            return cls(models=models, dataset=dataset, **content)
        except (StrictDataclassError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"a field is missing or has another form ({summarize_error(error)})") from error


def _build_model(content):
    metrics = {name: Metric(**metric) for name, metric in content.get("metrics", {}).items()}
    return ModelResults(**{**content, "metrics": metrics})


def _convert_evaluation_0_1(content):
    """Convert an `evaluation.json` of version 0.1, or any object with `task` and `metrics`, to the current fields."""
    if not isinstance(content.get("task"), str) or not isinstance(content.get("metrics"), dict):
        raise ValueError(
            f"it has no `format` {FORMAT!r}, and no `task` and `metrics` as files of version 0.1 have. Give a file "
            "that a training run or `encdec-slm evaluate` wrote"
        )
    metrics = {
        name: value if isinstance(value, dict) else {"value": value} for name, value in content["metrics"].items()
    }
    dataset = content.get("dataset")
    model = content.get("model", "model")
    rows = {name: content[name] for name in ("num_rows", "num_cut_rows") if content.get(name) is not None}
    kept = ("task", "confidence", "command", "seconds", "device", "settings")
    return {
        "kind": "evaluation",
        "models": [{"name": model, "metrics": metrics}],
        "saved_model": model,
        "dataset": {"name": dataset} if isinstance(dataset, str) else dataset,
        **{name: {"test": number} for name, number in rows.items()},
        **{name: content[name] for name in kept if content.get(name) is not None},
        "date": content.get("date"),
        "versions": content.get("versions", {}),
    }


def comparison_table(results: RunResults) -> list[list[str]]:
    """Return a table with one row per number and one column per model; the first row is the header."""
    header = [f"{results.num_rows['test']:,} held-out rows" if "test" in results.num_rows else ""]
    table = [header + [model.name for model in results.models]]
    names = dict.fromkeys(name for model in results.models for name in model.metrics)
    numbers = {"parameters": [_format(model.num_parameters, "{:,}") for model in results.models]}
    numbers |= {_metric_label(results, name): _metric_cells(results, name) for name in names}
    for label, attribute, template in (
        ("first token (s)", "first_token_seconds", "{:.3g}"),
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
        ("training (s)", "train_seconds", "{:,.0f}"),
    ):
        numbers[label] = [_format(getattr(model, attribute), template) for model in results.models]
    return table + [[label, *cells] for label, cells in numbers.items() if set(cells) != {"-"}]


def _format(value, template):
    return "-" if value is None else template.format(value)


def _metric_cells(results, name):
    return [str(model.metrics.get(name, "-")) for model in results.models]


def _metric_label(results, name):
    unit = next(model.metrics[name].unit for model in results.models if name in model.metrics)
    label = METRIC_LABELS.get(name, name)
    return f"{label} ({UNIT_LABELS.get(unit, unit)})" if unit else label


def format_table(table: Sequence[Sequence[str]], markdown: bool = False) -> str:
    """Format a table as aligned text or as Markdown; the first row is the header, the first column is left-aligned."""
    if markdown:
        rule = ["---", *["---:"] * (len(table[0]) - 1)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:]))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


__all__ = [
    "DataSource",
    "Metric",
    "ModelResults",
    "RunResults",
    "comparison_table",
    "format_table",
    "package_versions",
]
