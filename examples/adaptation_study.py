# SPDX-License-Identifier: Apache-2.0
"""Does a student cut from a decoder-only checkpoint learn faster than a new one, and which layers should it keep?

    python examples/adaptation_study.py [--preset 26m] [--output_dir outputs/adaptation_study]

Trains a decoder-only model on the standard-library docstring task first. Then students of one shape are fine-tuned on
the same rows for the same number of steps: cut from it by each strategy, or with random weights; each with three
seeds, which decide the order of the rows and the random weights. Prints a table (mean and standard deviation over the
seeds) and writes it, `study.json` and `study.png`. `--preset` scales it up: the decoder-only model is the twin of that
preset. A study that was stopped goes on where it was. Not supported: another task or checkpoint (fine-tune what
`encdec-slm adapt` writes), and one learning rate per way to begin.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer, Seq2SeqTrainingArguments, TrainingArguments, set_seed
from trl import ModelConfig

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.adaptation import STRATEGIES, from_decoder_only
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import list_presets
from encdec_slm.run_results import RunResults, package_versions
from encdec_slm.trainers.decoder_only_job import train_decoder_only
from encdec_slm.trainers.finetune_job import FinetuneArguments, finetune
from encdec_slm.trainers.seq2seq_data import load_splits


RANDOM = "random"
BEGINNINGS = (*STRATEGIES, RANDOM)
SEEDS = (0, 1, 2)
VOCAB_SIZE, MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH = 512, 80, 48
SOURCE_RUN = {"num_train_epochs": 4}
STUDENT_RUN = {
    "num_train_epochs": 3,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "per_device_eval_batch_size": 50,
    "disable_tqdm": True,
}
EVERY_RUN = {
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "logging_steps": 50,
    "save_strategy": "no",
    "dataloader_pin_memory": False,
    "report_to": [],
}
SCORES = {
    "loss": "loss (nats per token)",
    "rougeL": "ROUGE-L",
    "rougeL_shuffled": "ROUGE-L, shuffled references",
    "before": "loss before training",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", choices=list_presets(), help="size that is studied")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/adaptation_study"))
    arguments = parser.parse_args()
    folder = arguments.output_dir / arguments.preset
    train_source(arguments.preset, folder / "source")
    runs = train_students(folder)
    table = study_table(runs)
    source = RunResults.load(folder / "source" / "results.json")
    results = {"preset": arguments.preset, "source_train_seconds": source.saved.train_seconds}
    results |= {"students": runs, "versions": package_versions()}
    write_file(folder / "study.json", lambda path: path.write_text(json.dumps(results, indent=2), encoding="utf-8"))
    write_file(folder / "study.md", lambda path: path.write_text(table + "\n", encoding="utf-8"))
    write_file(folder / "study.png", lambda path: study_figure(runs).savefig(path, format="png", dpi=120))
    print(f"\n{table}\n\n{verdict(runs)}\nWritten to {folder}: study.md, study.json, study.png, and every model.")


def train_source(preset, folder):
    """The decoder-only model that students are cut from, unless an earlier run has trained it."""
    if (folder / "results.json").is_file():
        return
    args = TrainingArguments(str(folder), seed=0, **EVERY_RUN, **SOURCE_RUN)
    rows = load_splits(FinetuneArguments())["train"]
    train_decoder_only(preset, VOCAB_SIZE, rows, args, MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH)


def train_students(folder):
    """One run for each way to begin and each seed; on a CPU two at a time, as small models gain little from cores."""
    jobs = [(beginning, seed) for seed in SEEDS for beginning in BEGINNINGS]
    num_workers = 1 if torch.cuda.is_available() else min(2, os.cpu_count())
    num_threads = max(1, os.cpu_count() // num_workers)
    # New processes, since torch's threads do not survive a fork.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), torch.set_num_threads, (num_threads,)) as pool:
        runs = []
        for run in pool.map(partial(train_student, folder), *zip(*jobs, strict=True)):
            runs.append(run)
            print(
                f"{run['beginning']}, seed {run['seed']}: {run['loss']:.3f} nats per token on held-out rows, after "
                f"{run['train_steps']} steps in {run['train_seconds']:.0f} s",
                flush=True,
            )
    return runs


def train_student(study, beginning, seed):
    """The numbers of one student, trained unless an earlier run has done so."""
    folder = study / f"{beginning}-{seed}"
    if not (folder / "results.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "log.txt").open("w", encoding="utf-8")
        with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            begin = folder.with_name(f"{folder.name}-begin")
            write_student(study / "source", beginning, seed, begin)
            args = FinetuneArguments(max_source_length=MAX_SOURCE_LENGTH, max_target_length=MAX_TARGET_LENGTH)
            training_args = Seq2SeqTrainingArguments(str(folder), seed=seed, **EVERY_RUN, **STUDENT_RUN)
            finetune(args, training_args, ModelConfig(str(begin)))
        shutil.rmtree(begin)
    results = RunResults.load(folder / "results.json")
    scores = {name: results.saved.metrics[name].value for name in ("loss", "rougeL", "rougeL_shuffled")}
    scores["before"] = results["before training"].metrics["loss"].value
    sizes = {name: getattr(results.saved, name) for name in ("num_parameters", "train_seconds")}
    kept = {name: getattr(results, name) for name in ("validation_losses", "train_steps", "device")}
    return {"beginning": beginning, "seed": seed, **scores, **sizes, **kept}


def write_student(source, beginning, seed, folder):
    """A student of one shape: copied layers, or random ones."""
    student = from_decoder_only(source, strategy=STRATEGIES[0] if beginning == RANDOM else beginning)
    if beginning == RANDOM:
        set_seed(seed)
        student = EncDecSLMForConditionalGeneration(student.config)
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


# What came out


def study_table(runs):
    """Mean and standard deviation over the seeds, as a Markdown table."""
    lines = [("begins as", *SCORES.values()), ("---", *["---:"] * len(SCORES))]
    for beginning in BEGINNINGS:
        cells = []
        for score in SCORES:
            values = [run[score] for run in runs if run["beginning"] == beginning]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append((beginning, *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_losses(runs):
    """Held-out loss by way to begin, the best first."""
    losses = {name: [run["loss"] for run in runs if run["beginning"] == name] for name in BEGINNINGS}
    return dict(sorted(((name, statistics.mean(values)) for name, values in losses.items()), key=lambda item: item[1]))


def verdict(runs):
    """What the numbers say, in a sentence, and what they were measured with."""
    losses = mean_losses(runs)
    best = next(iter(losses))
    steps, seeds = {run["train_steps"] for run in runs}, {run["seed"] for run in runs}
    said = f"{best!r} begins best" if best != RANDOM else "No strategy beats random weights"
    others = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    size = f"{runs[0]['num_parameters']:,} parameters, {' or '.join(map(str, sorted(steps)))} steps"
    return f"{said}: {others} nats per token (students of {size}, {len(seeds)} seeds, on {runs[0]['device']})."


def study_figure(runs):
    """Validation loss over steps: the mean over the seeds, and the range between the lowest and the highest."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for beginning in BEGINNINGS:
        curves = [run["validation_losses"] for run in runs if run["beginning"] == beginning]
        points = [(step[0]["step"], [entry["loss"] for entry in step]) for step in zip(*curves, strict=True)]
        steps = [step for step, _ in points]
        (line,) = axes.plot(steps, [statistics.mean(losses) for _, losses in points], label=beginning)
        lowest, highest = [min(losses) for _, losses in points], [max(losses) for _, losses in points]
        axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.25)
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats per token)")
    axes.legend(title="student begins as")
    axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
