# SPDX-License-Identifier: Apache-2.0
"""What the training jobs share: a new model to begin with, texts to score, and files that say what happened."""

import json
import logging
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerBase, ProgressCallback, Trainer

from ..checkpoint_folders import write_file


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


def held_out_texts(
    tokenizer: PreTrainedTokenizerBase, predicted_ids: np.ndarray, sources: Sequence[str], references: Sequence[str]
) -> tuple[dict[str, float], list[dict[str, str]]]:
    """Scores of what a model wrote, and rows of `source`, `reference` and `prediction`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model.
        predicted_ids (`np.ndarray` of shape `(num_rows, length)`): From `Trainer.predict`; -100 is padding.
        sources (`Sequence[str]`): What it read.
        references (`Sequence[str]`): What it was to write.
    """
    predicted_ids = np.where(predicted_ids < 0, tokenizer.pad_token_id, predicted_ids)
    predictions = [text.strip() for text in tokenizer.batch_decode(predicted_ids, skip_special_tokens=True)]
    rows = [
        {"source": source, "reference": reference, "prediction": prediction}
        for source, reference, prediction in zip(sources, references, predictions, strict=True)
    ]
    return score_beside_other_rows(predictions, references), rows


def score_beside_other_rows(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """[`score_texts`], and `rougeL_other_rows`: what the same texts earn beside other rows' references."""
    references = list(references)
    of_other_rows = score_texts(predictions, references[1:] + references[:1])["rougeL"]
    return {**score_texts(predictions, references), "rougeL_other_rows": of_other_rows}


def show_losses(trainer: Trainer) -> None:
    """Puts [`LossBesideProgress`] in the place of the Trainer's progress bar, if it has one."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossBesideProgress)


def write_run_files(folder: Path, log_history: list[dict], results: dict, predictions: list[dict]) -> None:
    """Writes `results.json`, `predictions.jsonl` and the plot of the losses, `loss.png`."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    figure = _loss_figure(log_history)
    write_file(folder / "predictions.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
    write_file(folder / "loss.png", lambda path: figure.savefig(path, format="png", dpi=120))
    write_file(folder / "results.json", lambda path: path.write_text(json.dumps(results, indent=2), encoding="utf-8"))


def versions() -> dict[str, str]:
    """Of Python and the libraries that decide what a run gives."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def _loss_figure(log_history: list[dict]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    if axes.lines:
        axes.legend(title="rows")
    axes.grid(alpha=0.3)
    return figure


def first_lines(text: str, num_lines: int = 6) -> str:
    """A text for a report, cut with dots if it has more lines."""
    lines = text.splitlines()
    return "\n".join([*lines[:num_lines], "    ..."] if len(lines) > num_lines else lines)


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` with our log on the screen; what is wrong with its input ends it with a sentence."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("encdec_slm").setLevel(logging.INFO)
    try:
        main()
    except (TypeError, ValueError, FloatingPointError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        # What our own code raises says what to change; anything else is a bug and keeps its stack trace.
        if not frame.f_globals.get("__name__", "").startswith("encdec_slm."):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
