# SPDX-License-Identifier: Apache-2.0
"""The card of a published repository: facts from the files of its training, and nothing that nobody recorded."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..configuration import list_presets
from .eval_results import EvaluationResult, card_results
from .repository_checks import without_local_paths


TEMPLATE = Path(__file__).parent / "published_card.md"
NOT_RECORDED = "not recorded"
# What a publisher may state that no file of a run records.
TEXT_FACTS = (
    *("description", "training_data", "teacher", "objective", "hardware", "energy", "limits", "example"),
    *("license", "name"),
)
LIST_FACTS = ("language", "datasets", "base_model", "tags")
# First parts of relative paths that look like names on the Hub.
LOCAL_FOLDERS = ("outputs", "output", "checkpoints", "runs", "models", "tmp", "data", "results", "work")
RUN_FILE = "results.json"


@dataclass(frozen=True)
class RunFacts:
    """What the files beside a model tell of its training; `None` and empty where they do not."""

    data: str | None = None
    teacher: str | None = None
    objective: str | None = None
    targets: str | None = None
    begun_with: str | None = None
    num_steps: int | None = None
    train_seconds: float | None = None
    hardware: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    scores: dict[str, str] = field(default_factory=dict)
    energy: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def run_facts(folder: Path | None) -> RunFacts:
    """What `results.json` and the card in the folder of a run tell.

    Args:
        folder (`Path`, *optional*): Of the model. `None` is a model without one, of which nothing is known.
    """
    if folder is None:
        return RunFacts()
    results, (metadata, table) = _run_results(folder), _card_of(folder)
    seconds = results.get("train_seconds", _student(results).get("train_seconds"))
    device = _clean(results.get("device"))
    return RunFacts(
        data=_clean(table.get("data")) or _counted_rows(results),
        teacher=_clean(table.get("teacher")),
        objective=_clean(table.get("loss") or table.get("objective")) or _objective(results),
        targets=_clean(table.get("targets")),
        begun_with=_clean(table.get("student before") or table.get("begun with")) or _begun_with(results),
        num_steps=results.get("train_steps") or table.get("optimizer steps"),
        train_seconds=seconds if _is_number(seconds) else None,
        hardware=_clean(table.get("hardware")) or (device and f"`{device}`"),
        versions={str(name): str(version) for name, version in _dict(results.get("versions")).items()},
        scores=_scores(results),
        energy=_clean(table.get("energy") or results.get("energy")),
        metadata={**_begun_from(results), **metadata},
    )


def _run_results(folder):
    try:
        results = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _dict(results)


def _student(results):
    """What a distillation measured of its student; empty for other runs."""
    models = results.get("models")
    models = [model for model in models if _dict(model)] if isinstance(models, list) else []
    return next((model for model in models if model.get("name") == "distilled student"), {})


def _dict(value):
    """A `dict`, also where a file of somebody else has something of another kind in this place."""
    return value if isinstance(value, dict) else {}


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _card_of(folder):
    """Metadata and the table of a training from a card that a trainer left; empty where there is none."""
    try:
        card = ModelCard.load(folder / "README.md")
    except (OSError, ValueError, yaml.YAMLError):
        return {}, {}
    data = card.data.to_dict()
    known = {key: data[key] for key in ("license", "language", "datasets", "base_model", "tags") if data.get(key)}
    rows = re.findall(r"^\| *([^|\n]+?) *\| *([^|\n]+?) *\|$", card.text.partition("## Training")[2], re.MULTILINE)
    return known, {label: value for label, value in rows if value != NOT_RECORDED}


def _begun_from(results):
    name = results.get("model")
    is_hub_name = isinstance(name, str) and "/" in name and is_repository_name(name) and not Path(name).exists()
    return {"base_model": name} if is_hub_name and name.partition("/")[0] not in LOCAL_FOLDERS else {}


def is_repository_name(name: str) -> bool:
    """Whether a text can be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return True


def _objective(results):
    """Both trainers that write such files without a card's table have no other."""
    return "cross-entropy on the targets" if _dict(results.get("after")) or _dict(results.get("tasks")) else None


def _begun_with(results):
    name = results.get("model")
    return f"new weights of the preset `{name}`" if name in list_presets() else _clean(name)


def _counted_rows(results):
    counted = _dict(results.get("rows")).get("train")
    number = counted.get("rows") if isinstance(counted, dict) else counted
    number = results.get("train_rows") if number is None else number
    return f"{number:,} rows" if isinstance(number, int) else None


def _scores(results):
    """Numbers on held-out rows that the run measured when it ended."""
    after = _dict(results.get("after")) or _student(results)
    shown = {
        f"{task}: exactly right (%)": _dict(row).get("after") for task, row in _dict(results.get("tasks")).items()
    }
    labels = {
        "loss": "loss (nats per token)",
        "rougeL": "ROUGE-L (%)",
        "rougeL_other_rows": "ROUGE-L beside other rows (%)",
    }
    labels |= {"exact": "exactly right (%)", "teacher_agreement": "same next token as the teacher (%)"}
    shown |= {label: after.get(key) for key, label in labels.items()}
    return {label: f"{value:.6g}" for label, value in shown.items() if _is_number(value)}


def _clean(text):
    return without_local_paths(str(text)) if text else None


def check_facts(facts: dict[str, Any] | None) -> dict[str, Any]:
    """What a publisher states, after a look at whether a card has a place for it.

    Raises:
        ValueError: A fact is unknown, or is neither a text nor, where several make sense, a list of texts.
    """
    facts = dict(facts or {})
    unknown = sorted(set(facts) - {*TEXT_FACTS, *LIST_FACTS})
    if unknown:
        known = ", ".join(sorted((*TEXT_FACTS, *LIST_FACTS)))
        raise ValueError(f"`facts` has {', '.join(unknown)}, but a card has a place for {known}. Use these.")
    for key, value in facts.items():
        values = value if key in LIST_FACTS and isinstance(value, (list, tuple)) else [value]
        if not values or not all(isinstance(item, str) and item.strip() for item in values):
            kind = "a text or a list of texts" if key in LIST_FACTS else "a text"
            raise ValueError(f"`facts[{key!r}]` is {value!r}, but must be {kind}. Correct it, or leave it out.")
    return facts


@dataclass(frozen=True)
class ModelFacts:
    """What the weights themselves tell."""

    config: Any
    num_parameters: int
    num_bytes: int
    dtype: str


def published_card(
    repo_name: str,
    name: str,
    model: ModelFacts,
    run: RunFacts,
    results: list[EvaluationResult],
    facts: dict[str, Any],
    bundles: dict[str, dict[str, Any]],
    revision: str | None = None,
    has_weights_licence: bool = False,
) -> ModelCard:
    """The card of a repository; `.save(path)` writes it.

    Args:
        repo_name (`str`): What its snippets load: the name of the repository, or of the folder.
        name (`str`): Its heading.
        model ([`ModelFacts`]): Sizes.
        run ([`RunFacts`]): Of the training.
        results (`list` of [`~encdec_slm.hub_cards.eval_results.EvaluationResult`]): For the table.
        facts (`dict`): What the publisher states; goes before what files tell.
        bundles (`dict`): Manifests of the exports that lie in the folder, by its name.
        revision (`str`, *optional*): A branch that it is published to.
        has_weights_licence (`bool`, *optional*, defaults to `False`): Whether the weights' own lies there too.
    """
    sees = hasattr(model.config, "vision_config")
    task = "image-text-to-text" if sees else "text2text-generation"
    known = {**run.metadata, **{key: facts[key] for key in (*LIST_FACTS, "license") if key in facts}}
    tags = [model.config.model_type, "encoder-decoder", "custom_code", *_as_list(known.get("tags"))]
    licence = known.get("license") or "apache-2.0"
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=licence,
        language=_one_or_list(known.get("language") or "en"),
        base_model=_one_or_list(_repository_names(known.get("base_model"))),
        datasets=_repository_names(known.get("datasets")),
        tags=list(dict.fromkeys(tags)),
        metrics=list(dict.fromkeys(metric.name for result in results for metric in result.metrics)) or None,
        model_name=name if results else None,
        eval_results=card_results(results, task) or None,
    )
    stated = {key: facts.get(key) for key in TEXT_FACTS}
    return ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        repo=json.dumps(repo_name),
        name=name,
        model=model,
        text_config=model.config.get_text_config(),
        sees=sees,
        task=task,
        run=run,
        results=results,
        stated=stated,
        example=json.dumps(facts.get("example") or _example(results, sees), ensure_ascii=False),
        bundles=bundles,
        revision=json.dumps(revision or "main"),
        licence=licence,
        has_weights_licence=has_weights_licence,
        not_recorded=NOT_RECORDED,
    )


def _example(results, sees):
    if sees:
        return "What is in the picture?"
    if any("docstring" in result.task.lower() for result in results):
        return "def area(width, height):\n    return width * height"
    return "The encoder reads this text once; the decoder writes an answer to it, token by token."


def _as_list(value):
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _one_or_list(value):
    values = _as_list(value)
    return values[0] if len(values) == 1 else values or None


def _repository_names(value):
    """Of names, those that can be repositories; paths of data on a disk cannot."""
    return [name for name in _as_list(value) if is_repository_name(name)] or None
