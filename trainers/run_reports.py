# SPDX-License-Identifier: Apache-2.0
"""What the training jobs share: a new model to begin with, texts to score, and files that say what happened."""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase, ProgressCallback

from ..configuration import load_preset
from ..configuration_encdec_slm import EncDecSLMConfig


def preset_config(preset: str, tokenizer: PreTrainedTokenizerBase) -> EncDecSLMConfig:
    """The config of a new model of a preset's size that fits a tokenizer's vocabulary and special tokens."""
    bos_token_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"bos_token_id": bos_token_id, "decoder_start_token_id": bos_token_id}
    return EncDecSLMConfig(**{**load_preset(preset).to_diff_dict(), **ids, "vocab_size": len(tokenizer)})


class LossBesideProgress(ProgressCallback):
    """A progress bar with the losses beside it, instead of a printed dict per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None:
            shown = {name: logs[name] for name in ("loss", "eval_loss") if name in logs}
            self._shown = {**getattr(self, "_shown", {}), **shown}
            self.training_bar.set_postfix(self._shown)


def score_texts(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """How near texts are to their references, in percent.

    Args:
        predictions (`Sequence[str]`): What a model wrote.
        references (`Sequence[str]`): Equally many; at least one.

    Returns:
        `dict`: `rougeL` (F-measure over stemmed words, averaged over rows) and `exact` (equal texts).
    """
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = list(zip(predictions, references, strict=True))
    rouge = [scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
    exact = [prediction == reference for prediction, reference in pairs]
    return {"rougeL": round(100 * sum(rouge) / len(pairs), 2), "exact": round(100 * sum(exact) / len(pairs), 2)}


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name first, so that nobody ever finds half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide what a run gives."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def loss_figure(log_history: list[dict]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.legend(title="rows")
    axes.grid(alpha=0.3)
    return figure
