# SPDX-License-Identifier: Apache-2.0
"""Compare ways to learn from a teacher with another tokenizer, on the docstrings of Python's standard library.

    python examples/other_tokenizer_study.py [--seeds 0 1 2] [--steps 500] [--methods cross-entropy "byte spans" ...]

A decoder-only teacher with 2,048 tokens is trained first. Students of the preset 700k with 512 tokens learn from the
targets of the data alone, from completions of the teacher (sequence-level distillation), and from its distributions at
byte spans. Seeds decide the weights and the order of rows. A study that was stopped continues with the next run.
Writes one JSON file per run and study.md: loss in nats per held-out target token, with the standard deviation over the
seeds, and ROUGE-L with a bootstrap interval over rows.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.checkpoints import write_file
from encdec_slm.trainers import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer
from encdec_slm.trainers.decoder_only_job import train_decoder_only
from encdec_slm.trainers.distillation_data import as_prompts
from encdec_slm.trainers.evaluation.metrics import summary_scores
from encdec_slm.trainers.evaluation.results import mean_with_interval
from encdec_slm.trainers.jobs import decode
from encdec_slm.trainers.new_models import first_texts, preset_config, train_tokenizer
from encdec_slm.trainers.row_encoding import encode_rows
from encdec_slm.trainers.tasks.docstrings import build_docstring_task


STUDENT_TOKENS, TEACHER_TOKENS = 512, 2048
MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH = 80, 48
METHODS = {
    "cross-entropy": {"kd_ratio": 0.0},
    "sequence-level": {"kd_ratio": 0.0},
    "byte spans": {"kd_ratio": 0.9, "token_alignment": "byte_spans"},
}
SETTINGS = {
    **{"beta": 0.0, "lmbda": 0.0, "max_source_length": MAX_SOURCE_LENGTH, "max_completion_length": MAX_TARGET_LENGTH},
    **{"per_device_train_batch_size": 16, "per_device_eval_batch_size": 50, "learning_rate": 3e-3, "bf16": False},
    **{"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.01, "adam_beta2": 0.98},
    **{"gradient_checkpointing": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True},
    # With greedy search, so small a student would repeat itself.
    **{"predict_with_generate": True, "generation_kwargs": {"no_repeat_ngram_size": 3}},
}


def main():
    arguments = parse_arguments()
    task = build_docstring_task()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    teacher_folder = load_teacher_folder(task, arguments)
    for seed in arguments.seeds:
        for method in arguments.methods:
            path = arguments.output_dir / f"{method.replace(' ', '_')}-{seed}.json"
            if not path.is_file():
                run = train(task, teacher_folder, method, seed, arguments)
                write_file(path, json.dumps({"method": method, "seed": seed, **run}))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.output_dir.glob("*-*.json"))]
    table = format_table(runs)
    write_file(arguments.output_dir / "study.md", table + "\n")
    print(f"{table}\n\nThe teacher has ROUGE-L {measure_teacher(task, teacher_folder, arguments):.2f}.")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="of a student, 16 rows each")
    parser.add_argument("--teacher-epochs", type=float, default=4)
    parser.add_argument("--eval-rows", type=int, default=400)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/other_tokenizer_study"))
    return parser.parse_args()


# Training


def load_teacher_folder(task, arguments):
    """Train the teacher, unless an earlier run has."""
    folder = arguments.output_dir / "teacher"
    if not (folder / "config.json").is_file():
        names = ("lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta2", "per_device_train_batch_size")
        names += ("learning_rate", "bf16", "use_cpu", "report_to", "save_strategy", "disable_tqdm")
        settings = {name: SETTINGS[name] for name in names} | {"num_train_epochs": arguments.teacher_epochs}
        training_args = TrainingArguments(str(folder), **settings)
        lengths = (MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH)
        train_decoder_only("1m", TEACHER_TOKENS, task["train"], training_args, *lengths)
    return folder


def build_trainer(task, teacher_folder, method, seed, arguments, rows=None):
    """Build the trainer of a new student."""
    tokenizer = train_tokenizer(first_texts(task["train"], ("source", "target")), STUDENT_TOKENS, MAX_SOURCE_LENGTH)
    set_seed(seed)
    student = EncDecSLMForConditionalGeneration(preset_config("700k", tokenizer))
    args = Seq2SeqDistillationConfig(
        str(arguments.output_dir / "student"), max_steps=arguments.steps, seed=seed, **SETTINGS, **METHODS[method]
    )
    return Seq2SeqDistillationTrainer(
        student,
        AutoModelForCausalLM.from_pretrained(teacher_folder),
        args,
        train_dataset=as_prompts(task["train"] if rows is None else rows, is_chat=True).remove_columns("name"),
        processing_class=tokenizer,
        teacher_processing_class=AutoTokenizer.from_pretrained(teacher_folder),
    )


def train(task, teacher_folder, method, seed, arguments):
    """Train a student; return its held-out loss, the ROUGE-L of each row, and the seconds."""
    rows = None
    if method == "sequence-level":
        completions = generate_targets(task, teacher_folder, arguments)
        rows = task["train"].remove_columns("target").add_column("target", completions)
    trainer = build_trainer(task, teacher_folder, method, seed, arguments, rows)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    test = as_prompts(held_out_rows(task, arguments), is_chat=True)
    output = trainer.predict(test)
    completions = decode(trainer.processing_class, output.predictions, len(test))
    print(f"{method}, seed {seed}: loss {output.metrics['test_ce_loss']:.3f} after {seconds:.0f} s", flush=True)
    return {"loss": output.metrics["test_ce_loss"], "rouge_l": score(completions, test), "seconds": seconds}


def held_out_rows(task, arguments):
    rows = task["test"].shuffle(seed=0)
    return rows.select(range(min(arguments.eval_rows, len(rows))))


def score(completions, test):
    pairs = zip(completions, test["completion"], strict=True)
    return [summary_scores(completion.strip(), [reference])["rougeL"] for completion, reference in pairs]


def generate_targets(task, teacher_folder, arguments):
    """Let the teacher generate targets for the training rows greedily, unless an earlier run has."""
    path = arguments.output_dir / "completions.txt"
    if not path.is_file():
        trainer = build_trainer(task, teacher_folder, "sequence-level", 0, arguments)
        write_file(path, json.dumps(generate_as_teacher(trainer, trainer.train_dataset)))
    return json.loads(path.read_text(encoding="utf-8"))


def measure_teacher(task, teacher_folder, arguments):
    """Return the mean ROUGE-L of the teacher on held-out rows, in percent."""
    trainer = build_trainer(task, teacher_folder, "sequence-level", 0, arguments)
    test = as_prompts(held_out_rows(task, arguments), is_chat=True)
    completions = generate_as_teacher(trainer, encode_rows(test, trainer.row_encoder, "rows of the teacher"))
    return 100 * statistics.mean(score(completions, test))


@torch.no_grad()
def generate_as_teacher(trainer, rows):
    size = SETTINGS["per_device_eval_batch_size"]
    batches = (rows.select(range(first, min(first + size, len(rows)))) for first in range(0, len(rows), size))
    ids = [target for batch in batches for target in trainer.generate_as_teacher(batch.to_list())]
    return trainer.processing_class.batch_decode(ids, skip_special_tokens=True)


def format_table(runs):
    """Format means over the seeds as a Markdown table, in the order of the methods."""
    lines = ["| method | seeds | held-out loss | ROUGE-L | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    for method in METHODS:
        if found := [run for run in runs if run["method"] == method]:
            losses = [run["loss"] for run in found]
            deviation = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
            rows = [
                {"rouge_l": statistics.mean(scores)} for scores in zip(*(run["rouge_l"] for run in found), strict=True)
            ]
            rouge = mean_with_interval(rows)["rouge_l"]
            seconds = statistics.mean(run["seconds"] for run in found)
            cells = (method, len(found), f"{statistics.mean(losses):.3f}{deviation}", rouge, f"{seconds:.0f}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
