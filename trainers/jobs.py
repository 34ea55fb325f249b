# SPDX-License-Identifier: Apache-2.0
"""Steps that the training jobs share: build a trainer, measure, train, save, and report.

All jobs have the same order: [`~encdec_slm.trainers.resuming.prepare_output_dir`], load rows, load or build the model,
[`set_generation_config`], measure held-out rows [`before_training`], [`train`], measure them again, [`save_run`].
"""

import contextlib
import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from matplotlib.figure import Figure
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)

from ..checkpoints import INCOMPLETE_PREFIX
from ..errors import format_list
from ..run_results import Metric, RunResults, comparison_table, format_table
from .evaluation.metrics import text_scores
from .evaluation.results import mean_with_interval
from .figures import draw_losses
from .packing import DataCollatorWithPacking, PackingSeq2SeqTrainer
from .resuming import RESULTS_NAME, contains_checkpoint, remove_checkpoints


logger = logging.getLogger(__name__)

CONFIDENCE = 0.95
BEFORE, AFTER = "before training", "after training"
# Files that an earlier run may have left in the folder, and that would change what is loaded from it.
OBSOLETE_FILES = (
    *("config.json", "model.safetensors", "model.safetensors.index.json"),
    *("adapter_config.json", "adapter_model.safetensors", "contact_sheet.png", "README.md"),
)


class LossProgress(ProgressCallback):
    """Show the last losses in the progress bar, instead of a printed `dict` per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            losses = {name: logs[name] for name in ("loss", "eval_loss") if name in logs}
            self._losses = {**getattr(self, "_losses", {}), **losses}
            self.training_bar.set_postfix(self._losses)


class LossLogger(TrainerCallback):
    """Log the losses of each step, instead of a printed `dict` per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        losses = [f"{name} {float(logs[name]):.3f}" for name in ("loss", "eval_loss") if name in logs]
        if losses and state.is_world_process_zero:
            logger.info(f"Step {state.global_step} of {state.max_steps}: {', '.join(losses)}.")


def show_losses(trainer: Trainer) -> None:
    """Show losses in the progress bar of a Trainer, or in the log if it has none."""
    is_quiet = trainer.args.disable_tqdm
    trainer.remove_callback(PrinterCallback if is_quiet else ProgressCallback)
    trainer.add_callback(LossLogger if is_quiet else LossProgress)


def set_generation_config(
    model: PreTrainedModel,
    max_target_length: int,
    settings: Mapping[str, Any] | None = None,
    inherited_from: str | None = None,
) -> GenerationConfig:
    """Make a model generate up to `max_target_length` tokens, by `settings` alone; its special tokens are kept.

    Settings that a checkpoint has for another task, such as `no_repeat_ngram_size`, are removed.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Is changed.
        max_target_length (`int`): In tokens, with the end-of-text token.
        settings (`Mapping`, *optional*): Fields of [`~transformers.GenerationConfig`]. `None` is greedy search.
        inherited_from (`str`, *optional*): Name of the checkpoint that the model was loaded from, to log the settings
            that are removed. `None` logs nothing.

    Returns:
        [`~transformers.GenerationConfig`]: A copy for [`save_run`], because evaluation adds defaults to the model's.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = model.generation_config.to_diff_dict()
    token_ids = {name: value for name, value in before.items() if name.endswith("_token_id")}
    length = {"max_new_tokens": None, "max_length": max_target_length + 1}  # with the decoder's start token
    model.generation_config = GenerationConfig(**{**token_ids, **(settings or {}), **length})
    neutral = GenerationConfig._get_default_generation_params()
    removed = [
        f"{name}={value!r}"
        for name, value in before.items()
        if name not in (*token_ids, "transformers_version", "_from_model_config")
        and value not in (getattr(model.generation_config, name, None), neutral.get(name), None, False, [])
    ]
    if inherited_from is not None and removed:
        logger.warning(
            f"Generation settings of {inherited_from} that this run does not use, and that are not saved: "
            f"{', '.join(removed)}."
        )
    return copy.deepcopy(model.generation_config)


def build_trainer(
    model: PreTrainedModel,
    training_args: Seq2SeqTrainingArguments,
    max_target_length: int,
    inherited_from: str | None = None,
    packing_collator: DataCollatorWithPacking | None = None,
    **kwargs: Any,
) -> Seq2SeqTrainer:
    """Build a [`~transformers.Seq2SeqTrainer`] that generates in evaluation, as the saved model will.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): Is trained.
        training_args ([`~transformers.Seq2SeqTrainingArguments`]): Its `generation_config` and `generation_num_beams`
            decide how the model generates. `remove_unused_columns` is ignored: no column is removed.
        max_target_length (`int`): In tokens, with the end-of-text token.
        inherited_from (`str`, *optional*): As in [`set_generation_config`].
        packing_collator ([`DataCollatorWithPacking`], *optional*): Packs the training rows.
        kwargs: Passed to the Trainer.
    """
    training_args = copy.copy(training_args)
    # The collators read columns that models do not know, and `group_by_length` reads `length`.
    training_args.remove_unused_columns = False
    settings = {}
    if training_args.generation_config is not None:
        settings = Seq2SeqTrainer.load_generation_config(training_args.generation_config).to_diff_dict()
    if training_args.generation_num_beams is not None:
        settings["num_beams"] = training_args.generation_num_beams
    training_args.generation_config = set_generation_config(model, max_target_length, settings, inherited_from)
    training_args.predict_with_generate, training_args.generation_max_length = True, max_target_length + 1
    if packing_collator is None:
        trainer = Seq2SeqTrainer(model, training_args, **kwargs)
    else:
        trainer = PackingSeq2SeqTrainer(model, training_args, packing_collator=packing_collator, **kwargs)
    show_losses(trainer)
    logger.info(f"{model.num_parameters():,} parameters, {count_trainable(model):,} of them are trained.")
    return trainer


def count_trainable(model: torch.nn.Module) -> int:
    """Count the trainable parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@contextlib.contextmanager
def before_training(trainer: Trainer) -> Iterator[None]:
    """Evaluate a model before it is trained, unwrapped.

    Otherwise the Trainer prepares it for evaluation: accelerate takes it for prepared in training, which then has no
    DDP, and FSDP2 refuses a model without its optimizer.
    """
    accelerator, device = trainer.accelerator, trainer.model.device
    accelerator._models.append(trainer.model)
    if device != accelerator.device:
        trainer.model.to(accelerator.device)
    try:
        with accelerator.autocast():
            yield
    finally:
        accelerator._models.remove(trainer.model)
        if device != accelerator.device:
            trainer.model.to(device)


def train(trainer: Trainer, checkpoint: str | None) -> float:
    """Train from a checkpoint, or from the start; return the seconds."""
    if checkpoint is not None:
        logger.info(f"Continuing from {checkpoint}.")
    if not contains_checkpoint(trainer.args.output_dir, checkpoint) and trainer.is_world_process_zero():
        remove_checkpoints(trainer.args.output_dir)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    return round(time.perf_counter() - started, 1)


def predict(trainer: Trainer, rows: Any) -> Any:
    """Return `trainer.predict(rows)` in the order of the rows, which `group_by_length` changes in evaluation, too."""
    strategy, trainer.args.train_sampling_strategy = trainer.args.train_sampling_strategy, "random"
    try:
        return trainer.predict(rows)
    finally:
        trainer.args.train_sampling_strategy = strategy


def decode(tokenizer: Any, predicted_ids: np.ndarray, num_rows: int) -> list[str]:
    """Decode completions of a Trainer, without special tokens and surrounding spaces.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model.
        predicted_ids (`np.ndarray` of shape `(num_predictions, length)`): -100 is padding.
        num_rows (`int`): Rows that were predicted. In a distributed run, `Seq2SeqTrainer` returns more, because the
            last batches are filled with rows from the start.
    """
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    predicted_ids = np.where(predicted_ids < 0, pad_token_id, predicted_ids)[:num_rows]
    return [text.strip() for text in tokenizer.batch_decode(predicted_ids, skip_special_tokens=True)]


def loss_metric(loss: float) -> Metric:
    """Return a loss in nats per token as a metric."""
    return Metric(round(float(loss), 4), unit="nats")


def text_metrics(completions: Sequence[str], references: Sequence[str]) -> dict[str, Metric]:
    """Score completions against their references, in percent.

    Args:
        completions (`Sequence[str]`): Generated texts, at least one.
        references (`Sequence[str]`): One for each of them.

    Returns:
        `dict[str, Metric]`: `rougeL`; `rougeL_shuffled`, against the references of other rows, which any text of the
        same form earns; and `exact`.
    """
    references = list(references)
    shuffled = references[1:] + references[:1]
    rows = []
    for completion, reference, other in zip(completions, references, shuffled, strict=True):
        scores = text_scores(completion, [reference])
        rouge_shuffled = text_scores(completion, [other])["rougeL"]
        rows.append({"rougeL": scores["rougeL"], "rougeL_shuffled": rouge_shuffled, "exact": scores["exact"]})
    return mean_with_interval(rows, confidence=CONFIDENCE)


def describe_training(
    trainer: Trainer, splits: Mapping[str, Dataset | IterableDataset], **settings: Any
) -> dict[str, Any]:
    """Return the fields of [`~encdec_slm.run_results.RunResults`] that describe a training.

    Args:
        trainer ([`~transformers.Trainer`]): After training.
        splits (`Mapping`): Rows by split.
        settings: Other settings of the run.
    """
    losses = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    settings |= {"num_trainable_parameters": count_trainable(trainer.model), "seed": trainer.args.seed}
    return {
        "num_rows": {split: len(rows) for split, rows in splits.items() if isinstance(rows, Dataset)},
        "train_steps": trainer.state.global_step,
        "validation_losses": [{"step": step, "loss": round(loss, 4)} for step, loss in losses],
        "confidence": CONFIDENCE,
        "settings": settings,
        "device": str(trainer.args.device),
    }


def save_run(
    trainer: Trainer,
    generation_config: GenerationConfig,
    results: RunResults,
    predictions: Sequence[Mapping[str, Any]] = (),
    **figures: Figure,
) -> None:
    """Save the model and what was measured to the output folder; on failure the folder is as it was.

    Args:
        trainer ([`~transformers.Trainer`]): Has the model.
        generation_config ([`~transformers.GenerationConfig`]): From [`set_generation_config`].
        results ([`~encdec_slm.run_results.RunResults`]): Saved as `results.json`.
        predictions (`Sequence[Mapping]`): Held-out rows with their completions, saved as `predictions.jsonl`.
        figures ([`~matplotlib.figure.Figure`]): Saved by their names beside `loss.png`.
    """
    folder = Path(trainer.args.output_dir)
    temporary = folder / f"{INCOMPLETE_PREFIX}run"
    if trainer.is_fsdp_enabled:  # checkpoints may be in shards, the model is not
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        trainer.save_model(str(temporary), _internal_call=True)  # else it would be pushed from there
        if trainer.is_world_process_zero():
            generation_config.save_pretrained(temporary)
            if lines := [json.dumps(row, ensure_ascii=False) + "\n" for row in predictions]:
                (temporary / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
            figures["loss"] = draw_losses(trainer.state.log_history)
            for name, figure in figures.items():
                figure.savefig(temporary / f"{name}.png")
            results.save(temporary / RESULTS_NAME)
            _move_into_place(temporary, folder)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()  # other processes may read what this one has saved
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _move_into_place(temporary, folder):
    names = [path.name for path in temporary.iterdir()]
    for name in sorted(names, key=lambda name: name == RESULTS_NAME):  # which marks a finished run
        os.replace(temporary / name, folder / name)
    for name in set(OBSOLETE_FILES) - set(names):
        (folder / name).unlink(missing_ok=True)


def describe_run(results: RunResults, folder: str | Path) -> str:
    """Describe the results of a run for a terminal: a table of all models, and some rows.

    Args:
        results ([`~encdec_slm.run_results.RunResults`]): Of the run.
        folder (`str` or `Path`): Where the run was saved.
    """
    lines = ["", format_table(comparison_table(results))]
    for sample in results.samples:
        lines += [""]
        for name, text in sample.items():
            shown = text.splitlines()[:6] + ["..."] * (text.count("\n") > 5)
            lines += [f"{name + ':':12}" + f"\n{'':12}".join(shown)]
    files = [name for name in (RESULTS_NAME, "predictions.jsonl", "loss.png") if Path(folder, name).is_file()]
    lines += ["", f"Saved to {folder}: the model, {format_list(files)}."]
    return "\n".join(lines)
