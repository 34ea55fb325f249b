# SPDX-License-Identifier: Apache-2.0
"""Model cards, filled in from what a run has measured."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedConfig, TrainingArguments


TEMPLATE = Path(__file__).parent / "finetuned_card.md"
DISTILLATION_TEMPLATE = Path(__file__).parent / "distillation_card.md"
CONVERTED_TEMPLATE = Path(__file__).parent / "converted_card.md"
# Speed of a machine is no property of the model.
UNSHOWN_METRICS = ("_runtime", "_per_second", "_num_tokens", "_preparation_time")


def model_card(name: str, config: PreTrainedConfig, results: dict[str, Any]) -> ModelCard:
    """The card of a fine-tuned model; `.save(path)` writes it.

    Args:
        name (`str`): Heading of the card.
        config ([`EncDecSLMConfig`]): Of the model.
        results (`dict`): What [`~encdec_slm.trainers.finetune_job.finetune`] returned.
    """
    counts = results["rows"]["train"]
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag="text2text-generation", tags=[config.model_type]),
        template_path=str(TEMPLATE),
        **results,
        model_name=name,
        encoder_layers=config.encoder_num_hidden_layers,
        decoder_layers=config.decoder_num_hidden_layers,
        train_rows=f"{counts['rows']:,}",
        cut_sources=counts.get("source", 0),
        cut_targets=counts.get("target", 0),
    )


def distillation_card(
    name: str,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    args: TrainingArguments,
    dataset_name: str | None,
    num_rows: int | None,
    tags: list[str],
    train_steps: int,
    evaluation: dict[str, Any] | None,
) -> ModelCard:
    """The card of a distilled model; `.save(path)` writes it.

    Args:
        name (`str`): Heading of the card.
        student ([`~transformers.PreTrainedConfig`]): Of the student; its `_name_or_path` says where it comes from.
        teacher ([`~transformers.PreTrainedConfig`]): Of the teacher.
        args ([`~encdec_slm.trainers.Seq2SeqDistillationConfig`]): The run.
        dataset_name (`str`, *optional*): Of a data set on the Hub.
        num_rows (`int`, *optional*): Rows that were trained on, where their number is known.
        tags (`list[str]`): For the Hub.
        train_steps (`int`): Optimizer steps so far.
        evaluation (`dict`, *optional*): The last entry of the Trainer's log with evaluation metrics.
    """
    sees = hasattr(student, "vision_config")
    metrics = {
        key.removeprefix("eval_"): f"{value:.4f}"
        for key, value in (evaluation or {}).items()
        if key.startswith("eval_") and isinstance(value, float) and not key.endswith(UNSHOWN_METRICS)
    }
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="image-text-to-text" if sees else "text2text-generation",
            model_name=name,
            base_model=_hub_name(student),
            datasets=dataset_name,
            tags=sorted({student.model_type, *tags}),
        ),
        template_path=str(DISTILLATION_TEMPLATE),
        sees=sees,
        model_name=name,
        repository=args.hub_model_id or name,
        student=_link(student),
        teacher_link=_link(teacher),
        data=_data(dataset_name, num_rows),
        targets=_targets(args),
        loss=_loss(args),
        train_steps=train_steps,
        evaluation=evaluation,
        metrics=metrics,
        versions={package: version(package) for package in ("trl", "transformers", "torch")},
    )


def converted_card(
    name: str, config: PreTrainedConfig, num_parameters: int, prompt: str, has_tokenizer: bool
) -> ModelCard:
    """The card of a model with the predecessor's weights; `.save(path)` writes it.

    Args:
        name (`str`): Heading of the card.
        config ([`EncDecSLMConfig`] or [`EncDecVLMConfig`]): Of the model.
        num_parameters (`int`): Of the model; a tied weight counts once.
        prompt (`str`): The predecessor's, with `{question}` and `{context}` where these go.
        has_tokenizer (`bool`): Whether a tokenizer lies beside the weights.
    """
    text_config = config.get_text_config()
    is_vision = text_config is not config
    return ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="image-text-to-text" if is_vision else "text2text-generation",
            license="mit",
            tags=[config.model_type],
        ),
        template_path=str(CONVERTED_TEMPLATE),
        model_name=name,
        config=text_config,
        is_vision=is_vision,
        num_parameters=num_parameters,
        is_scaled=text_config.rope_parameters["rope_type"] == "dynamic",
        prompt=json.dumps(prompt),
        has_tokenizer=has_tokenizer,
    )


def _hub_name(config):
    """Where a model comes from, if that can be a repository on the Hub."""
    name = config._name_or_path
    return (
        name if name and not Path(name).exists() and name.count("/") < 2 and not name.startswith((".", "/")) else None
    )


def _link(config):
    if name := _hub_name(config):
        return f"[{name}](https://huggingface.co/{name})"
    folder = Path(config._name_or_path).name
    return f"`{config.model_type}` from the folder `{folder}`" if folder else f"a new `{config.model_type}` model"


def _data(dataset_name, num_rows):
    rows = "a stream of rows" if num_rows is None else f"{num_rows:,} rows"
    return f"{rows} of [{dataset_name}](https://huggingface.co/datasets/{dataset_name})" if dataset_name else rows


def _targets(args):
    others = "written by the teacher" if args.seq_kd else "those of the data"
    if args.lmbda == 0 or args.kd_ratio == 0:
        return others
    by_student = f"written by the student (temperature {args.temperature}, top-k {args.top_k or 'off'})"
    return by_student if args.lmbda == 1 else f"{by_student} in {args.lmbda:.0%} of the batches, else {others}"


def _loss(args):
    kind = {0.0: "forward KL", 1.0: "reverse KL"}.get(args.beta, f"generalised JSD (beta {args.beta})")
    parts = []
    if args.kd_ratio > 0:
        parts.append(f"{args.kd_ratio:g} x {kind} at temperature {args.kd_temperature:g}, times its square")
    if args.kd_ratio < 1:
        smoothing = f" with label smoothing {args.label_smoothing_factor:g}" if args.label_smoothing_factor else ""
        parts.append(f"{1 - args.kd_ratio:g} x cross-entropy on gold targets{smoothing}")
    return " + ".join(parts)
