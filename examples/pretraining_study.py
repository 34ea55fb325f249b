# SPDX-License-Identifier: Apache-2.0
"""Compare denoising objectives and optimizers: pre-train small models, then fine-tune each of them on tasks.

    python -m encdec_slm.trainers.tasks.synopses Packages Translation-en --output_dir outputs/synopses
    python examples/pretraining_study.py --tasks shell=outputs/shell_data synopses=outputs/synopses

Each run, {span, prefix, ul2} x {adamw, muon} x seeds, is `encdec-slm pretrain` on text of this machine, and then
`encdec-slm finetune` on each task, a folder with train.jsonl and test.jsonl. Runs
without pre-training, with the same tokenizer, are the baseline. Every model is measured on held-out documents by each
objective, and on held-out rows of each task. Writes one JSON file per run; the same command continues a study that was
stopped, and `--table_only` makes the table from the files. `nlc2cmd` is from -1 to 1, `rougeL` in percent, both of
greedy answers; losses are nats per token. Not measured: other learning rates, longer runs, other sizes.
"""

import argparse
import itertools
import json
import logging
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import Seq2SeqTrainingArguments, set_seed
from trl import ModelConfig

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.checkpoints import load_checkpoint, write_file
from encdec_slm.run_results import format_table
from encdec_slm.trainers.corpora import HELD_OUT, CorpusDataset, Source
from encdec_slm.trainers.denoising import OBJECTIVES, DataCollatorForDenoising
from encdec_slm.trainers.evaluation.shell_metrics import nlc2cmd_score, parse_command
from encdec_slm.trainers.finetune_job import FinetuneArguments, finetune
from encdec_slm.trainers.pretrain_job import OPTIMIZERS, PretrainArguments, pretrain


logger = logging.getLogger(__name__)

# Objective and optimizer of each arm; without an objective, the model is fine-tuned from random weights.
NO_PRETRAINING = (None, "adamw")
ARMS = (*itertools.product(OBJECTIVES, OPTIMIZERS), NO_PRETRAINING)
TRAINING = {
    **{"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.1, "adam_beta2": 0.98},
    **{"logging_steps": 100, "save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False},
    **{"per_device_eval_batch_size": 100, "disable_tqdm": True},
}
PRETRAINING = {"per_device_train_batch_size": 16, "learning_rate": 5e-3}
FINETUNING = {"per_device_train_batch_size": 16, "learning_rate": 3e-3}
MAX_LENGTH, VOCAB_SIZE, MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH = 128, 4096, 160, 48


def run(args: argparse.Namespace, objective: str | None, optimizer: str, seed: int) -> dict:
    """Pre-train one model, fine-tune it on each task, and return what was measured."""
    folder = args.output_dir / "models" / f"{objective}-{optimizer}-{seed}"
    started = time.monotonic()
    if objective is None:
        save_random_model(args, folder, seed)
    else:
        arguments = PretrainArguments(
            args.sources,
            preset=args.preset,
            vocab_size=VOCAB_SIZE,
            objective=objective,
            max_length=MAX_LENGTH,
            optimizer=optimizer,
            max_eval_samples=args.eval_rows,
        )
        pretrain(arguments, training_arguments(args, folder, seed, args.steps, PRETRAINING))
    seconds = {"pretraining": time.monotonic() - started}
    losses = {name: held_out_loss(args, folder, name) for name in OBJECTIVES}
    tasks = {}
    for task in args.tasks:
        started = time.monotonic()
        tasks[task] = finetune_on(args, task, folder, seed)
        seconds[task] = time.monotonic() - started
    arm = {"objective": objective, "optimizer": optimizer, "seed": seed}
    return {**arm, "settings": describe_settings(args), "losses": losses, "tasks": tasks, "seconds": seconds}


def training_arguments(args, folder, seed, steps, settings):
    return Seq2SeqTrainingArguments(
        str(folder), seed=seed, max_steps=steps, use_cpu=args.use_cpu, bf16=args.bf16, **TRAINING, **settings
    )


def save_random_model(args, folder, seed):
    """Save a model with random weights, with the tokenizer of the pre-trained models of the seed."""
    model, tokenizer = load_checkpoint(args.output_dir / "models" / f"span-adamw-{seed}")
    set_seed(seed)
    EncDecSLMForConditionalGeneration(model.config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def held_out_loss(args: argparse.Namespace, folder: Path, objective: str) -> float:
    """Return the loss on held-out documents, which are denoised in the same way for all models with a tokenizer."""
    model, tokenizer = load_checkpoint(folder)
    sources = [Source.parse(text) for text in args.sources]
    dataset = CorpusDataset(sources, MAX_LENGTH, HELD_OUT, shuffle_buffer=args.eval_rows)
    rows = list(itertools.islice(dataset, args.eval_rows))
    collate, total, num_tokens = DataCollatorForDenoising(tokenizer, OBJECTIVES[objective], MAX_LENGTH), 0.0, 0
    for start in range(0, len(rows), 100):
        batch = collate(rows[start : start + 100])
        count = int((batch["labels"] >= 0).sum())
        total += count * model(**batch).loss.item()
        num_tokens += count
    return total / num_tokens


def finetune_on(args: argparse.Namespace, task: str, model: Path, seed: int) -> dict:
    """Fine-tune a model on a task; return the loss and the score of each held-out row."""
    data, folder = Path(args.tasks[task]), args.output_dir / "models" / "finetuned"
    num_rows = args.finetuning_steps * FINETUNING["per_device_train_batch_size"]
    arguments = FinetuneArguments(
        train_file=draw_rows(data / "train.jsonl", num_rows, args.output_dir / "models" / f"{task}.jsonl"),
        validation_file=str(data / "test.jsonl"),
        test_file=str(data / "test.jsonl"),
        max_source_length=MAX_SOURCE_LENGTH,
        max_target_length=MAX_TARGET_LENGTH,
        max_eval_samples=args.eval_rows,
        packing=True,
    )
    settings = training_arguments(args, folder, seed, args.finetuning_steps, FINETUNING)
    metrics = finetune(arguments, settings, ModelConfig(model_name_or_path=str(model))).saved.metrics
    found = {"loss": metrics["loss"].value, "rougeL": metrics["rougeL"].value}
    if task == "shell":
        lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        scores = [nlc2cmd_score(parse_command(row["prediction"]), row["reference"]) for row in rows]
        found["nlc2cmd"] = statistics.mean(scores)
    return found


def draw_rows(file, num_rows, output):
    """Write the rows that are trained on, the same ones for all models; return the name of the file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    chosen = random.Random(0).sample(lines, min(num_rows, len(lines)))
    write_file(output, "\n".join(chosen) + "\n")
    return str(output)


def describe_settings(args: argparse.Namespace) -> dict:
    """What runs of one table must have in common."""
    names = ("sources", "preset", "steps", "finetuning_steps", "eval_rows", "bf16")
    return {name: getattr(args, name) for name in names} | {"tasks": sorted(args.tasks)}


# Table


def build_table(runs: Sequence[Mapping]) -> list[list[str]]:
    """Return a row for each arm, with mean and standard deviation over its seeds."""
    tasks = {
        task: [name for name in ("loss", "nlc2cmd", "rougeL") if name in found]
        for task, found in runs[0]["tasks"].items()
    }
    measures = [(objective, lambda run, name=objective: run["losses"][name]) for objective in OBJECTIVES]
    measures += [
        (f"{task} {name}", lambda run, task=task, name=name: run["tasks"][task][name])
        for task, names in tasks.items()
        for name in names
        if (task, name) != ("shell", "rougeL")
    ]
    table = [
        [
            "objective",
            "optimizer",
            "seeds",
            *(f"{name} loss" for name in OBJECTIVES),
            *(name for name, _ in measures[3:]),
        ]
    ]
    for objective, optimizer in ARMS:
        found = [run for run in runs if (run["objective"], run["optimizer"]) == (objective, optimizer)]
        cells = [format_mean([measure(run) for run in found]) for _, measure in measures]
        table.append([objective or "none", optimizer if objective else "", str(len(found)), *cells])
    return table


def format_mean(values: Sequence[float]) -> str:
    if not values:
        return "missing"
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the table; see the top of this file."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    runs, settings = [], describe_settings(args)
    for seed, (objective, optimizer) in itertools.product(args.seeds, ARMS):
        path = args.output_dir / f"{objective or 'none'}-{optimizer}-{seed}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if not args.table_only and (found is None or found["settings"] != settings):
            found = run(args, objective, optimizer, seed)
            write_file(path, json.dumps(found, indent=1) + "\n")
            logger.info(f"{path.stem}: {found['losses']}, {found['tasks']}.")
        if found is not None:
            runs.append(found)
    if not runs:
        raise SystemExit(f"{args.output_dir} has no runs. Leave out `--table_only` to run some.")
    if len({json.dumps(found["settings"]) for found in runs}) > 1:
        raise SystemExit(
            f"{args.output_dir} has runs with different settings. Leave out `--table_only` to run all with the same."
        )
    table = format_table(build_table(runs), markdown=True)
    write_file(args.output_dir / "study.md", table + "\n")
    print(f"\n{table}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=[], metavar="NAME=FOLDER", help="`shell` is scored by NLC2CMD")
    parser.add_argument("--sources", nargs="+", default=["python", "/usr/share/doc"], help="as for `pretrain`")
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--steps", type=int, default=500, help="of pre-training")
    parser.add_argument("--finetuning_steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval_rows", type=int, default=500, help="held-out rows of each kind")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU although there is an accelerator")
    parser.add_argument("--table_only", action="store_true", help="run nothing; missing runs are shown as missing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pretraining_study"))
    args = parser.parse_args(arguments)
    args.tasks = dict(task.split("=", 1) for task in args.tasks)
    return args


if __name__ == "__main__":
    main()
