# SPDX-License-Identifier: Apache-2.0
"""`finetune`, `distill` and `pretrain`: runs by a recipe, whose keys can also be given on the command line."""

from collections.abc import Sequence
from typing import Annotated, Literal

import typer

from .console import UsageError, print_status


DEFAULT_RECIPES = {
    **{"text": "finetune_docstrings", "vision": "vqa_synthetic", "distill": "distill_docstrings"},
    "pretrain": "pretrain_26m",
}

Recipe = Annotated[
    str | None,
    typer.Option("--config", metavar="RECIPE", help="Name of a recipe, or path of a YAML file of --list-keys."),
]
ListKeys = Annotated[bool, typer.Option("--list-keys", help="Show every key with its default, and exit.")]


def finetune(
    ctx: typer.Context,
    config: Recipe = None,
    task: Annotated[
        Literal["text", "vision"] | None,
        typer.Option(help="Train a text or a vision-text model.  [default: the recipe's `task`, else text]"),
    ] = None,
    list_keys: ListKeys = False,
):
    """Fine-tune an encoder-decoder on rows of source and target text, or on questions about images.

    Held-out rows are scored before and after. The model, its card, results.json, predictions.jsonl and loss.png are
    saved to output_dir. The default recipe, finetune_docstrings, trains a new model of a million parameters to write
    docstrings, on Python's standard library, in a few minutes on two CPU cores.

    Keys of the recipe follow as --key VALUE and override it. The most used ones:

    \b
      model_name_or_path   checkpoint to start from; without it, a new model of --preset
      train_file           JSON, CSV or Parquet rows; columns source_column and target_column
      dataset_name         data set on the Hub, instead of train_file
      output_dir           folder of the run
      num_train_epochs, max_steps, learning_rate, per_device_train_batch_size, seed
      optimizer            adamw or muon; muon often needs fewer steps to train a new model
      max_source_length, max_target_length   in tokens
      use_peft, lora_r     LoRA
      use_cpu, bf16        where and in which precision
      resume_from_checkpoint   true, auto (if there is a checkpoint), or the path of a checkpoint

    \b
    Examples:
      encdec-slm finetune
      encdec-slm finetune --train_file rows.jsonl --output_dir outputs/mine
      encdec-slm finetune --config finetune_lora --model_name_or_path outputs/mine
      encdec-slm finetune --task vision --dataset_name HuggingFaceM4/ChartQA --question_column query
      encdec-slm finetune --list-keys
    """
    task = task or _recipe_task(config)
    arguments = None if list_keys else _with_recipe(config, task, ctx.args)
    (run_vision if task == "vision" else run_finetune)(arguments)


def distill(ctx: typer.Context, config: Recipe = None, list_keys: ListKeys = False):
    """Distill a decoder-only teacher into an encoder-decoder student, and compare both on held-out rows.

    The student, its card, results.json, predictions.jsonl and loss.png are saved to output_dir. The default recipe,
    distill_docstrings, first trains a teacher on Python's standard library, and for comparison a student without a
    teacher: 12 minutes on one CPU core.

    Keys of the recipe follow as --key VALUE and override it. The most used ones:

    \b
      teacher_model_name_or_path   decoder-only teacher; without it, a new one of --teacher_preset
      model_name_or_path   student to start from; without it, a new model of --preset
      trim_vocabulary      true keeps only the teacher's tokens that the rows use
      teacher_prompt_template   file with instructions and examples around {{ source }}, for the teacher
      train_file           JSON, CSV or Parquet rows; columns source_column and target_column
      dataset_name         data set on the Hub, instead of train_file
      output_dir           folder of the run
      kd_ratio             weight of the divergence from the teacher, beside cross-entropy
      kd_temperature, beta, lmbda, seq_kd   the objective
      max_source_length, max_completion_length   in tokens
      num_train_epochs, max_steps, learning_rate, per_device_train_batch_size, seed
      resume_from_checkpoint   true, auto (if there is a checkpoint), or the path of a checkpoint

    \b
    Examples:
      encdec-slm distill
      encdec-slm distill --teacher_model_name_or_path NAME --train_file rows.jsonl
      encdec-slm distill --preset 26m --teacher_model_name_or_path NAME --trim_vocabulary true --train_file rows.jsonl
      encdec-slm distill --config distill_predecessor --train_file rows.jsonl
      encdec-slm distill --config distill_docstrings --kd_ratio 0.5 --resume_from_checkpoint true
      encdec-slm distill --list-keys
    """
    run_distill(None if list_keys else _with_recipe(config, "distill", ctx.args))


def pretrain(ctx: typer.Context, config: Recipe = None, list_keys: ListKeys = False):
    """Pre-train an encoder-decoder on plain text, by span corruption, prefix language modeling or UL2's mixture.

    The model, its card, results.json and loss.png are saved to output_dir. About 1 % of the documents are held out to
    measure the loss. The default recipe, pretrain_26m, trains 26M parameters on Python's standard library.

    Keys of the recipe follow as --key VALUE and override it. The most used ones:

    \b
      sources              text or Parquet files, folders, or data sets on the Hub, each NAME or NAME=WEIGHT
      preset, vocab_size   size of a new model and of its tokenizer
      objective            span, prefix or ul2
      optimizer            adamw or muon
      output_dir           folder of the run
      max_steps, learning_rate, lr_scheduler_type, per_device_train_batch_size, max_length, seed
      use_cpu, bf16, torch_compile         where and how
      resume_from_checkpoint   true, auto (if there is a checkpoint), or the path of a checkpoint

    \b
    Examples:
      encdec-slm pretrain --preset 1m --max_steps 300
      encdec-slm pretrain --sources corpus.txt articles/=2 --output_dir outputs/mine
      encdec-slm pretrain --optimizer muon --objective ul2 --lr_scheduler_type warmup_stable_decay
      encdec-slm pretrain --list-keys
    """
    run_pretrain(None if list_keys else _with_recipe(config, "pretrain", ctx.args))


def _recipe_task(config):
    if config is None:
        return "text"
    from encdec_slm.configuration import load_recipe

    try:
        task = load_recipe(config).get("task", "text")
    except ValueError as error:
        raise UsageError(str(error)) from error
    if task not in ("text", "vision"):
        raise UsageError(f"`task` in {config} is {task!r}, but must be text or vision.")
    return task


def _with_recipe(config, job, keys):
    if config is None:
        config = DEFAULT_RECIPES[job]
        print_status(f"No --config: using the recipe {config}.")
    return ["--config", config, *keys]


def run_finetune(arguments: Sequence[str] | None) -> None:
    """Fine-tune a text model by `--config RECIPE --key VALUE ...`, and print a report; list the keys for `None`."""
    from transformers import Seq2SeqTrainingArguments
    from trl import ModelConfig

    from encdec_slm.trainers.finetune_job import FinetuneArguments, finetune

    kinds = (FinetuneArguments, Seq2SeqTrainingArguments, ModelConfig)
    args, training_args, model_args = _parse(kinds, arguments)
    _report(finetune(args, training_args, model_args), training_args)


def run_vision(arguments: Sequence[str] | None) -> None:
    """Train a vision-text model, as [`run_finetune`]."""
    from transformers import Seq2SeqTrainingArguments

    from encdec_slm.trainers.vision_job import VisionArguments, finetune_vision

    args, training_args = _parse((VisionArguments, Seq2SeqTrainingArguments), arguments)
    _report(finetune_vision(args, training_args), training_args)


def run_distill(arguments: Sequence[str] | None) -> None:
    """Distill a teacher, as [`run_finetune`]."""
    from encdec_slm.trainers import Seq2SeqDistillationConfig
    from encdec_slm.trainers.distill_job import DistillArguments, distill

    args, training_args = _parse((DistillArguments, Seq2SeqDistillationConfig), arguments)
    _report(distill(args, training_args), training_args)


def run_pretrain(arguments: Sequence[str] | None) -> None:
    """Pre-train a text model, as [`run_finetune`]."""
    from transformers import Seq2SeqTrainingArguments

    from encdec_slm.trainers.pretrain_job import PretrainArguments, pretrain

    args, training_args = _parse((PretrainArguments, Seq2SeqTrainingArguments), arguments)
    _report(pretrain(args, training_args), training_args)


def _report(results, training_args):
    from encdec_slm.hub_cards.model_cards import write_card
    from encdec_slm.trainers.jobs import describe_run

    if training_args.process_index == 0:
        write_card(training_args.output_dir, results)
        print(describe_run(results, training_args.output_dir))


def _parse(dataclass_types, arguments):
    from encdec_slm.configuration.recipe_files import describe_keys, parse_recipe

    if arguments is None:
        print(describe_keys(dataclass_types))
        raise typer.Exit
    try:
        return parse_recipe(dataclass_types, arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


__all__ = ["distill", "finetune", "pretrain", "run_distill", "run_finetune", "run_pretrain"]
