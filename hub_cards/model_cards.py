# SPDX-License-Identifier: Apache-2.0
"""Model cards: one template, filled from the checkpoint folder, the results of its training, and stated facts."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig

from ..checkpoints import ADAPTER_FILE, MODEL_TYPES, read_config
from ..configuration import list_presets
from ..export_manifest import ENGINE_FORMATS
from ..run_results import RunResults, comparison_table, format_table
from .eval_results import card_results
from .repository_checks import remove_local_paths


TEMPLATE = Path(__file__).parent / "model_card.md"
NOT_RECORDED = "not recorded"
# In the folder of a model, a plot that its card shows.
RESULTS_PLOT = "results.png"
# What the author of a card can state.
TEXT_FACTS = (
    *("description", "training_data", "starting_point", "teacher", "objective", "optimizer_steps", "training_time"),
    *("hardware", "energy", "limits", "example", "license", "name"),
)
LIST_FACTS = ("language", "datasets", "base_model", "tags")
METADATA = ("license", *LIST_FACTS)
# In the metadata of converted checkpoints, so that publishing them keeps their notes.
CONVERTED_TAG = "microsoft-encoder-decoder-slm"
# First parts of relative paths that look like names on the Hub.
LOCAL_FOLDERS = ("outputs", "output", "checkpoints", "runs", "models", "tmp", "data", "results", "work")


def write_card(folder: str | Path, results: RunResults | None = None, *, converted: bool = False) -> None:
    """Write the model card, `README.md`, of a checkpoint folder.

    An adapter keeps the card of PEFT, and a model of another family, such as T5, gets none.

    Args:
        folder (`str` or `Path`): Checkpoint that `save_pretrained` wrote, with a tokenizer or processor.
        results ([`~encdec_slm.run_results.RunResults`], *optional*): Of the run that trained it.
        converted (`bool`, *optional*, defaults to `False`): Whether
            [`~encdec_slm.conversion.convert_reference_checkpoint`] wrote it.
    """
    folder = Path(folder)
    if (folder / ADAPTER_FILE).is_file() or read_config(folder).get("model_type") not in MODEL_TYPES:
        return
    name = folder.resolve().name
    facts = {"license": "mit", "tags": [CONVERTED_TAG]} if converted else {}
    save_card(build_card(CardContent(folder, name, training=results, facts=facts)), folder)


@dataclass(frozen=True)
class CardContent:
    """Everything that a card is made from.

    Args:
        folder (`Path`): Checkpoint with config and weights.
        repo_name (`str`): Name of the repository or folder that the snippets load.
        training ([`RunResults`], *optional*): Of the training.
        evaluations (`Sequence[RunResults]`, *optional*): Of `encdec-slm evaluate`.
        metadata (`dict`, *optional*): Of an earlier card.
        facts (`dict`, *optional*): What the author states. Takes precedence over all other sources.
        bundles (`dict`, *optional*): Manifests of the exports in the repository, by folder name.
        revision (`str`, *optional*): Branch that the snippets load, defaults to `"main"`.
        is_published (`bool`, *optional*, defaults to `False`): Whether the folder has license files.
        has_weights_license (`bool`, *optional*, defaults to `False`): Whether the weights have a license file of
            their own.
    """

    folder: Path
    repo_name: str
    training: RunResults | None = None
    evaluations: Sequence[RunResults] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    bundles: dict[str, dict[str, Any]] = field(default_factory=dict)
    revision: str | None = None
    is_published: bool = False
    has_weights_license: bool = False


def build_card(content: CardContent) -> ModelCard:
    """Fill the template; what nobody recorded is marked as such."""
    model = read_model_facts(content.folder)
    config = model.config.get_text_config()
    has_vision = config is not model.config
    task = "image-text-to-text" if has_vision else "text2text-generation"
    facts, training = content.facts, content.training
    metadata = _merge_metadata(content)
    name = facts.get("name") or content.repo_name.rpartition("/")[2]
    is_converted = CONVERTED_TAG in _as_list(metadata.get("tags"))
    results = [training, *content.evaluations] if training else content.evaluations
    example = facts.get("example") or _example(content, has_vision, is_converted)
    return ModelCard.from_template(
        _card_data(content, metadata, model.config, name, task),
        template_path=str(TEMPLATE),
        repo=json.dumps(content.repo_name),
        revision=json.dumps(content.revision or "main"),
        example=json.dumps(example, ensure_ascii=False),
        name=name,
        task=task,
        model=model,
        config=config,
        has_vision=has_vision,
        has_tokenizer=any(content.folder.glob("tokenizer*")),
        is_converted=is_converted,
        is_scaled=is_converted and config.rope_parameters["rope_type"] == "dynamic",
        is_distilled=training is not None and training.kind == "distillation",
        facts=facts,
        bundles=content.bundles,
        loadable_bundles={
            name: each for name, each in content.bundles.items() if each["format"] not in ENGINE_FORMATS
        },
        training_table=None if is_converted and training is None else _training_table(training, facts),
        results=[_describe_results(result) for result in results],
        plot=RESULTS_PLOT if (content.folder / RESULTS_PLOT).is_file() else None,
        license=metadata.get("license"),
        is_published=content.is_published,
        has_weights_license=content.has_weights_license,
    )


def save_card(card: ModelCard, folder: Path) -> None:
    """Save a card as `README.md`, with exactly one line break at its end."""
    (folder / "README.md").write_text(str(card).rstrip("\n") + "\n", encoding="utf-8")


@dataclass(frozen=True)
class ModelFacts:
    """Config and size of a checkpoint."""

    config: PreTrainedConfig
    num_parameters: int
    num_bytes: int
    dtype: str


def read_model_facts(folder: Path) -> ModelFacts:
    """Read config and size of a checkpoint; weights are counted as they are stored, tied ones once."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    num_parameters = 0
    paths = list(folder.glob("*.safetensors"))
    for path in paths:
        with safe_open(path, framework="pt") as weights:
            names = weights.keys()
            num_parameters += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    num_bytes = sum(path.stat().st_size for path in paths)
    return ModelFacts(config, num_parameters, num_bytes, str(config.dtype or "float32").removeprefix("torch."))


def read_card_metadata(folder: Path) -> dict[str, Any]:
    """Read license, language, data sets, base model and tags from the card in a folder; empty if there is none."""
    try:
        data = ModelCard.load(folder / "README.md").data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: data[key] for key in METADATA if data.get(key)}


def check_facts(facts: dict[str, Any] | None) -> dict[str, Any]:
    """Check the facts that an author states.

    Raises:
        ValueError: A fact is unknown, or is not a text or, where several make sense, a list of texts.
    """
    facts = dict(facts or {})
    known = (*TEXT_FACTS, *LIST_FACTS)
    if unknown := sorted(set(facts) - set(known)):
        raise ValueError(f"`facts` has {', '.join(unknown)}, but must only have {', '.join(sorted(known))}.")
    for key, value in facts.items():
        values = value if key in LIST_FACTS and isinstance(value, (list, tuple)) else [value]
        if not values or not all(isinstance(item, str) and item.strip() for item in values):
            kind = "a text or a list of texts" if key in LIST_FACTS else "a text"
            raise ValueError(f"`facts[{key!r}]` is {value!r}, but must be {kind} that is not empty.")
    return facts


def is_repository_name(name: Any) -> bool:
    """Return whether something can be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except (HFValidationError, TypeError):
        return False
    return True


def _merge_metadata(content):
    base_model = content.training.base_model if content.training else None
    found = {"base_model": base_model} if _is_hub_name(base_model) else {}
    stated = {key: content.facts[key] for key in METADATA if key in content.facts}
    merged = {**found, **content.metadata, **stated}
    if content.is_published:
        merged.setdefault("license", "apache-2.0")
    return merged


def _is_hub_name(name):
    return (
        name is not None
        and name.count("/") == 1
        and is_repository_name(name)
        and not Path(name).exists()
        and name.partition("/")[0] not in LOCAL_FOLDERS
    )


def _card_data(content, metadata, config, name, task):
    tags = [config.model_type, "encoder-decoder", "custom_code", *_as_list(metadata.get("tags"))]
    language = _as_list(metadata.get("language") or "en")
    base_model = _repository_names(metadata.get("base_model"))
    metrics = [name for result in content.evaluations for name in result.saved.metrics]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        license=metadata.get("license"),
        language=language[0] if len(language) == 1 else language,
        base_model=base_model[0] if len(base_model) == 1 else base_model or None,
        datasets=_repository_names(metadata.get("datasets")) or None,
        tags=list(dict.fromkeys(tags)),
        metrics=list(dict.fromkeys(metrics)) or None,
        model_name=name if content.evaluations else None,
        eval_results=card_results(content.evaluations, task) or None,
    )


def _as_list(value):
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _repository_names(value):
    """Return the names that can be repositories, without the paths of local files."""
    return [name for name in _as_list(value) if is_repository_name(name)]


def _example(content, has_vision, is_converted):
    tasks = [result.task for result in (content.training, *content.evaluations) if result is not None]
    if has_vision:
        return "What is in the picture?"
    if is_converted:
        from ..conversion import question_answering_prompt

        return question_answering_prompt("What is the capital?", "The capital is Denver.")
    if "docstrings" in tasks:
        return "def area(width, height):\n    return width * height"
    return "The encoder reads this text once; the decoder generates the answer token by token."


def _training_table(training, facts):
    recorded = _recorded_facts(training) if training is not None else {}
    rows = {
        "training data": facts.get("training_data") or recorded.get("data"),
        "shortened rows": recorded.get("cut"),
        "starting point": facts.get("starting_point") or recorded.get("base_model"),
        "teacher": facts.get("teacher") or recorded.get("teacher"),
        "targets": recorded.get("targets"),
        "objective": facts.get("objective") or recorded.get("objective"),
        "optimizer steps": facts.get("optimizer_steps") or recorded.get("steps"),
        "training time": facts.get("training_time") or recorded.get("time"),
        "hardware": facts.get("hardware") or recorded.get("hardware"),
        "energy": facts.get("energy"),
        "versions": recorded.get("versions"),
    }
    optional = ("shortened rows", "targets", "versions")
    table = [(label, value or NOT_RECORDED) for label, value in rows.items() if value or label not in optional]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {label} | {value} |" for label, value in table)])


def _recorded_facts(training):
    rows, source, seconds = training.num_rows.get("train"), training.dataset, training.saved.train_seconds
    base_model = training.base_model
    facts = {
        "data": " of ".join(filter(None, [f"{rows:,} rows" if rows else None, str(source.name) if source else None])),
        "cut": ", ".join(f"{count:,} {name}" for name, count in training.num_cut_rows.items() if count),
        "base_model": f"new weights, preset `{base_model}`" if base_model in list_presets() else base_model,
        "teacher": training.teacher,
        "targets": training.targets,
        "objective": training.objective,
        "steps": None if training.train_steps is None else f"{training.train_steps:,}",
        "time": None if seconds is None else f"{seconds:,.0f} seconds",
        "hardware": training.device,
        "versions": ", ".join(f"{package} {version}" for package, version in training.versions.items()),
    }
    return {name: remove_local_paths(value) for name, value in facts.items() if value}


def _describe_results(result):
    table = comparison_table(result)
    table[0] = [remove_local_paths(cell) for cell in table[0]]
    about = [f"data: {result.dataset}" if result.dataset else None, result.device, result.date]
    about = remove_local_paths("; ".join(filter(None, about)))
    heading = f"{result.kind.capitalize()} on `{result.task}`" + (f" ({about})" if about else "")
    if result.confidence:
        heading += f", with {result.confidence:.0%} confidence intervals in brackets"
    return {
        "heading": f"{heading}:",
        "table": format_table(table, markdown=True),
        "command": result.command and remove_local_paths(" ".join(result.command.split())),
    }
