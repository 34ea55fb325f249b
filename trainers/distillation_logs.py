# SPDX-License-Identifier: Apache-2.0
"""Logs of a distillation run: lengths of rows and completions, tables of completions, and the model card."""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
import torch
from huggingface_hub import ModelCard
from transformers.utils import is_rich_available
from trl.trainer.utils import print_prompt_completions_sample


if TYPE_CHECKING:
    from .distillation_config import Seq2SeqDistillationConfig
    from .distillation_trainer import Seq2SeqDistillationTrainer

CARD_SETTINGS = ("kd_ratio", "beta", "kd_temperature", "lmbda", "seq_kd", "temperature", "learning_rate", "max_steps")
CARD_METRICS = ("loss", "kd_loss", "ce_loss", "entropy", "teacher_agreement")
QUICK_START = """\
## Quick start

```python
from transformers import pipeline

generator = pipeline("{task}", model="{repository}", trust_remote_code=True)
```

"""


def describe_lengths(lengths: torch.Tensor, is_complete: torch.Tensor) -> dict[str, float]:
    """Describe the lengths of generated completions under TRL's names.

    Args:
        lengths (`torch.Tensor` of shape `(num_rows,)`): In tokens.
        is_complete (`torch.Tensor` of shape `(num_rows,)`): Whether a completion ends in an end-of-text token.
    """
    metrics = {"completions/clipped_ratio": 1 - is_complete.float().mean().item()}
    complete_lengths = lengths[is_complete] if is_complete.any() else torch.zeros(1)
    for name, values in (("", lengths), ("terminated_", complete_lengths)):
        for reduction in ("mean", "min", "max"):
            metrics[f"completions/{reduction}_{name}length"] = getattr(values.float(), reduction)().item()
    return metrics


def describe_rows(rows: Sequence[Mapping[str, Any]], kind: str, limit: int | None) -> dict[str, float]:
    """Describe the lengths of the sources or targets of encoded rows before truncation; empty if they are unknown.

    Args:
        rows (`Sequence[Mapping]`): Encoded rows.
        kind (`str`): `"source"` or `"target"`.
        limit (`int`, *optional*): Length that they are truncated to.
    """
    lengths = [row[f"num_{kind}_tokens"] for row in rows if f"num_{kind}_tokens" in row]
    if not lengths:
        return {}
    num_cut = sum(limit is not None and length > limit for length in lengths)
    return {
        f"{kind}s/mean_length": sum(lengths) / len(lengths),
        f"{kind}s/max_length": max(lengths),
        f"{kind}s/cut_ratio": num_cut / len(lengths),
    }


def log_completion_table(texts: dict[str, list[str]], step: int, args: "Seq2SeqDistillationConfig") -> None:
    """Print completions side by side and save them like TRL: as a Parquet file, and to Trackio or W&B.

    Args:
        texts (`dict[str, list[str]]`): The columns `prompt`, `completion`, `teacher` and `gold`.
        step (`int`): Optimizer steps so far.
        args ([`Seq2SeqDistillationConfig`]): Settings of the run.
    """
    if is_rich_available():
        others = {"Teacher": texts["teacher"], "Gold": texts["gold"]}
        print_prompt_completions_sample(texts["prompt"], texts["completion"], {}, None, step, None, extra=others)
    table = pandas.DataFrame({"step": [step] * len(texts["prompt"]), **texts})
    folder = Path(args.output_dir) / "completions"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"completions_{step:05d}.parquet")
    if args.log_unique_prompts:
        table = table.drop_duplicates(subset=["prompt"])
    for name in {"trackio", "wandb"} & set(args.report_to):
        backend = importlib.import_module(name)
        if name == "trackio" or backend.run is not None:
            backend.log({"completions": backend.Table(dataframe=table)})


def complete_card(trainer: "Seq2SeqDistillationTrainer") -> None:
    """Adapt TRL's card in the output folder: its code example is for decoder-only models and it has no settings."""
    path = Path(trainer.args.output_dir) / "README.md"
    card = ModelCard.load(path)
    task = "image-text-to-text" if hasattr(trainer.model.config, "vision_config") else "text2text-generation"
    card.data.pipeline_tag = task
    card.data.tags = sorted({*card.data.tags, trainer.model.config.model_type})
    quick_start = QUICK_START.format(task=task, repository=trainer.args.hub_model_id or path.parent.name)
    card.text = re.sub(
        r"## Quick start\n.*?(?=^## )", lambda _: quick_start, card.text, flags=re.DOTALL | re.MULTILINE
    )
    card.text = card.text.replace("### Framework versions", f"{_describe_run(trainer)}\n### Framework versions", 1)
    card.save(path)


def _describe_run(trainer):
    if trainer.cached_teacher is not None:
        rows = {"teacher": f"{trainer.cached_teacher.cache.header.teacher} (cached labels)"}
    elif trainer.teacher_model is None:
        rows = {}
    else:
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model).config
        rows = {"teacher": teacher._name_or_path or teacher.model_type}
    rows |= {name: getattr(trainer.args, name) for name in CARD_SETTINGS}
    rows["optimizer steps"] = trainer.state.global_step
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    for name in CARD_METRICS:
        if evaluations and f"eval_{name}" in evaluations[-1]:
            rows[f"eval_{name}"] = f"{evaluations[-1][f'eval_{name}']:.4f}"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""])
