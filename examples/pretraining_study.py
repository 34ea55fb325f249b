# SPDX-License-Identifier: Apache-2.0
"""Compare denoising objectives and optimizers: pre-train small models, then fine-tune each of them on tasks.

    python -m encdec_slm.trainers.tasks.synopses Packages Translation-en --output_dir outputs/synopses
    python examples/pretraining_study.py --tasks shell=outputs/shell_data synopses=outputs/synopses --bf16
    python examples/pretraining_study.py --table_only

Each run, {span, prefix, ul2} x {adamw, muon} x seeds, is `encdec-slm pretrain` on text of this machine, and then
`encdec-slm finetune` on each task, a folder with train.jsonl and test.jsonl. All runs of a seed start from the same
weights and tokenizer; those without pre-training are the baseline. Every model is measured on held-out documents by
each objective, and on held-out rows of each task. Each run is a line of `pretraining_results.jsonl`; the same command
continues a study that was stopped. `--table_only` runs nothing, and writes the table into docs/train.md. `nlc2cmd` is
from -1 to 1, `rougeL` in percent, both of greedy answers; losses are nats per token. Not measured: other learning
rates, longer runs, other sizes.
"""

import argparse
import functools
import itertools
import json
import logging
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from shell_results import update_blocks
from transformers import Seq2SeqTrainingArguments, set_seed
from trl import ModelConfig

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.checkpoints import load_checkpoint, write_file
from encdec_slm.run_results import format_table
from encdec_slm.trainers.corpora import HELD_OUT, CorpusDataset, Source, mix_documents
from encdec_slm.trainers.denoising import OBJECTIVES, DataCollatorForDenoising, add_sentinel_tokens
from encdec_slm.trainers.evaluation.shell_metrics import nlc2cmd_score, parse_command
from encdec_slm.trainers.finetune_job import FinetuneArguments, finetune
from encdec_slm.trainers.new_models import TOKENIZER_ROWS, preset_config, train_tokenizer
from encdec_slm.trainers.pretrain_job import OPTIMIZERS, PretrainArguments, pretrain


logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "examples" / "pretraining_results.jsonl", ROOT / "docs" / "train.md"
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
MAX_LENGTH, VOCAB_SIZE, MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH = 128, 2048, 96, 48
# On a CPU the fastest with dropout, in bfloat16.
ATTENTION = "eager"


def run(args: argparse.Namespace, objective: str | None, optimizer: str, seed: int) -> dict:
    """Pre-train one model, fine-tune it on each task, and return what was measured; seconds are of the CPU."""
    folder = args.output_dir / "models" / f"{objective}-{optimizer}-{seed}"
    initial = save_initial_model(args.output_dir / "models", tuple(args.sources), args.preset, seed)
    started = time.process_time()
    if objective is None:
        folder = initial
    else:
        arguments = PretrainArguments(
            args.sources,
            model_name_or_path=str(initial),
            objective=objective,
            max_length=MAX_LENGTH,
            optimizer=optimizer,
            max_eval_samples=args.eval_rows,
            attn_implementation=ATTENTION,
        )
        pretrain(arguments, training_arguments(args, folder, seed, args.steps, PRETRAINING))
    seconds = {"pretraining": time.process_time() - started}
    losses = held_out_losses(args, folder)
    tasks = {}
    for task in args.tasks:
        started = time.process_time()
        tasks[task] = finetune_on(args, task, folder, seed)
        seconds[task] = time.process_time() - started
    arm = {"objective": objective, "optimizer": optimizer, "seed": seed}
    return {**arm, "settings": describe_settings(args), "losses": losses, "tasks": tasks, "seconds": seconds}


def training_arguments(args, folder, seed, steps, settings):
    return Seq2SeqTrainingArguments(
        str(folder), seed=seed, max_steps=steps, use_cpu=args.use_cpu, bf16=args.bf16, **TRAINING, **settings
    )


@functools.cache
def save_initial_model(folder, sources, preset, seed):
    """Save a model with random weights, and a tokenizer that is trained on the corpus; return its folder."""
    folder = folder / f"initial-{seed}"
    documents = mix_documents([Source.parse(text) for text in sources], seed)
    tokenizer = train_tokenizer(itertools.islice(documents, TOKENIZER_ROWS), VOCAB_SIZE, 2 * MAX_LENGTH)
    add_sentinel_tokens(tokenizer)
    set_seed(seed)
    EncDecSLMForConditionalGeneration(preset_config(preset, tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def held_out_losses(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return the loss by each objective on held-out documents, which are denoised alike for all models of a seed."""
    model, tokenizer = load_checkpoint(folder)
    sources = [Source.parse(text) for text in args.sources]
    dataset = CorpusDataset(sources, MAX_LENGTH, HELD_OUT, shuffle_buffer=args.eval_rows)
    rows = list(itertools.islice(dataset, args.eval_rows))
    losses = {}
    for name, denoisers in OBJECTIVES.items():
        collate, total, num_tokens = DataCollatorForDenoising(tokenizer, denoisers, MAX_LENGTH), 0.0, 0
        for start in range(0, len(rows), 100):
            batch = collate(rows[start : start + 100])
            count = int((batch["labels"] >= 0).sum())
            total += count * model(**batch).loss.item()
            num_tokens += count
        losses[name] = total / num_tokens
    return losses


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
    model_args = ModelConfig(model_name_or_path=str(model), attn_implementation=ATTENTION)
    metrics = finetune(arguments, settings, model_args).saved.metrics
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
    measures = {f"{name} loss": lambda run, name=name: run["losses"][name] for name in OBJECTIVES}
    for task, found in runs[0]["tasks"].items():
        for name in ("loss", "nlc2cmd" if "nlc2cmd" in found else "rougeL"):
            measures[f"{task} {name}"] = lambda run, task=task, name=name: run["tasks"][task][name]
    table = [["objective", "optimizer", "seeds", *measures]]
    for objective, optimizer in ARMS:
        found = [run for run in runs if (run["objective"], run["optimizer"]) == (objective, optimizer)]
        cells = [format_mean([measure(run) for run in found]) for measure in measures.values()]
        table.append([objective or "none", optimizer if objective else "", str(len(found)), *cells])
    return table


def format_mean(values: Sequence[float]) -> str:
    if not values:
        return "missing"
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


BLOCKS = {"pretraining study": lambda runs: format_table(build_table(runs), markdown=True)}


def load_runs() -> list[dict]:
    """Load the results file."""
    return list(map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())) if RESULTS.exists() else []


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, or write the table; see the top of this file."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.table_only:
        write_file(PAGE, update_blocks(PAGE.read_text(encoding="utf-8"), BLOCKS, load_runs()))
        return
    for seed, (objective, optimizer) in itertools.product(args.seeds, ARMS):
        arm = {"objective": objective, "optimizer": optimizer, "seed": seed, "settings": describe_settings(args)}
        # The file has the runs of one study: those with other settings are replaced.
        runs = [run for run in load_runs() if run["settings"] == arm["settings"]]
        if not any(arm.items() <= run.items() for run in runs):
            runs.append(run(args, objective, optimizer, seed))
            write_file(RESULTS, "".join(json.dumps(run) + "\n" for run in runs))
            logger.info(f"{objective} {optimizer} {seed}: {runs[-1]['losses']}, {runs[-1]['tasks']}.")
    print(format_table(build_table(load_runs())))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=[], metavar="NAME=FOLDER", help="`shell` is scored by NLC2CMD")
    parser.add_argument("--sources", nargs="+", default=["python", "/usr/share/doc"], help="as for `pretrain`")
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--steps", type=int, default=200, help="of pre-training")
    parser.add_argument("--finetuning_steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval_rows", type=int, default=150, help="held-out rows of each kind")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU although there is an accelerator")
    parser.add_argument("--table_only", action="store_true", help="write the table of the finished runs")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pretraining_study"))
    args = parser.parse_args(arguments)
    args.tasks = dict(task.split("=", 1) for task in args.tasks)
    return args


if __name__ == "__main__":
    main()
