# SPDX-License-Identifier: Apache-2.0
"""Compare three ways to train a student of 5M parameters on the docstring task with the labels of a real teacher.

    python examples/teacher_cache_proof.py TEACHER [--label_minutes 60] [--steps 300] [--seeds 0 1 2]

1. The teacher labels as many rows as the minutes allow, once: its completions, and the 32 most probable tokens at each
   token of the gold targets.
2. For each seed, students with the teacher's trimmed vocabulary are trained on these rows: on the gold targets, on the
   teacher's completions, and on its distributions (0.9 forward KL, 0.1 cross-entropy on the gold targets). All have
   equally many rows, steps and settings.
3. The table compares the loss on held-out gold targets, and ROUGE-L of greedy completions.

The same command resumes: rows that are labeled and runs that are finished are kept in `--output_dir`, one JSON file
per run. The prompt has the turns of Qwen's chat template. Not supported: another task.
"""

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.checkpoints import write_file
from encdec_slm.run_results import format_table
from encdec_slm.trainers import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer
from encdec_slm.trainers.evaluation.metrics import text_scores
from encdec_slm.trainers.evaluation.results import mean_with_interval
from encdec_slm.trainers.jobs import decode, show_losses
from encdec_slm.trainers.new_models import preset_config
from encdec_slm.trainers.prompt_templates import load_prompt_template
from encdec_slm.trainers.row_encoding import iterate_texts
from encdec_slm.trainers.tasks.docstrings import build_docstring_task
from encdec_slm.trainers.teacher_cache import DistributionSpec, TeacherCache
from encdec_slm.trainers.teacher_engines import CompletionSettings
from encdec_slm.trainers.teacher_labels import LabelSettings, build_engine, label_dataset
from encdec_slm.vocabulary import trim_tokenizer


logger = logging.getLogger(__name__)

# Two examples in Qwen's chat format, without its system message. Jinja removes a line break at the end of a template,
# so an empty text follows it.
PROMPT = """\
<|im_start|>user
Docstring:
def area(self):
    return self.width * self.height<|im_end|>
<|im_start|>assistant
Return the area of the rectangle.<|im_end|>
<|im_start|>user
Docstring:
def sync(path):
    with open(path) as f:
        os.fsync(f)<|im_end|>
<|im_start|>assistant
Write buffered data of a file to disk.<|im_end|>
<|im_start|>user
Docstring:
{{ source[:400] }}<|im_end|>
<|im_start|>assistant
{{ "" }}"""
ROWS_PER_SHARD, MAX_NEW_TOKENS, NUM_IDS = 64, 32, 32
LABELS = {
    "completions": LabelSettings(
        completions=CompletionSettings(MAX_NEW_TOKENS, stop="\n"), rows_per_shard=ROWS_PER_SHARD
    ),
    "distributions": LabelSettings(DistributionSpec("topk", NUM_IDS), rows_per_shard=ROWS_PER_SHARD),
}
# Name of the arm -> its labels and the weight of the divergence.
ARMS = {
    "gold targets": (None, 0.0),
    "teacher's completions": ("completions", 0.0),
    "teacher's distributions": ("distributions", 0.9),
}
VOCABULARY_SIZE, MAX_SOURCE_LENGTH, MAX_TARGET_LENGTH = 8000, 80, 40
TRAINING = {
    **{"per_device_train_batch_size": 16, "per_device_eval_batch_size": 50, "learning_rate": 2e-3},
    **{"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.01, "adam_beta2": 0.98},
    **{"max_source_length": MAX_SOURCE_LENGTH, "max_completion_length": MAX_TARGET_LENGTH},
    **{"lmbda": 0.0, "beta": 0.0, "generation_kwargs": {"no_repeat_ngram_size": 3}, "predict_with_generate": True},
    **{"bf16": False, "save_strategy": "no", "logging_steps": 50, "report_to": []},
    **{"dataloader_pin_memory": False, "disable_tqdm": True},
}


# Labels


def label(args: argparse.Namespace, rows: Dataset) -> None:
    """Label rows in their order, a shard of each cache in turn, until the minutes are over."""
    render = load_prompt_template(PROMPT)
    rows = Dataset.from_list(
        [{"source": row["source"], "prompt": render(row), "completion": row["target"]} for row in rows]
    )
    engine = build_engine(args.engine, args.teacher, dtype=args.dtype)
    started = time.monotonic()
    for start in range(0, len(rows), ROWS_PER_SHARD):
        if time.monotonic() - started > 60 * args.label_minutes:
            break
        span = (start, min(start + ROWS_PER_SHARD, len(rows)))
        for name, settings in LABELS.items():
            folder = args.output_dir / name
            options = {"teacher": Path(args.teacher).name, "rows": span, "prompt_template": f"False {PROMPT}"}
            label_dataset(rows, engine, folder, settings, **options)
        logger.info(f"{span[1]:,} rows are labeled.")


# Students


def train(args: argparse.Namespace, arm: str, seed: int, rows: dict[str, Dataset], tokenizer) -> dict:
    """Train a student in one arm, and measure it on held-out rows."""
    cache, kd_ratio = ARMS[arm]
    set_seed(seed)
    folder = args.output_dir / "runs" / "trainer"
    settings = Seq2SeqDistillationConfig(
        str(folder), max_steps=args.steps, seed=seed, kd_ratio=kd_ratio, use_cpu=args.use_cpu, **TRAINING
    )
    trainer = Seq2SeqDistillationTrainer(
        EncDecSLMForConditionalGeneration(preset_config(args.preset, tokenizer)),
        args=settings,
        train_dataset=rows["train"],
        processing_class=tokenizer,
        teacher_cache=None if cache is None else TeacherCache(args.output_dir / cache),
    )
    show_losses(trainer)
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    output = trainer.predict(rows["test"])
    completions = decode(tokenizer, output.predictions, len(rows["test"]))
    scores = [
        text_scores(completion, [target])["rougeL"]
        for completion, target in zip(completions, rows["test"]["target"], strict=True)
    ]
    return {
        **{"arm": arm, "seed": seed, "settings": describe_settings(args, rows)},
        **{"num_parameters": trainer.model.num_parameters(), "train_seconds": round(seconds, 1)},
        "loss": output.metrics["test_ce_loss"],
        **{"rougeL": scores, "completions": completions},
    }


def describe_settings(args: argparse.Namespace, rows: dict[str, Dataset]) -> dict:
    """What runs of one table must have in common."""
    sizes = {"num_train_rows": len(rows["train"]), "num_test_rows": len(rows["test"])}
    return {"preset": args.preset, "steps": args.steps, **sizes}


def load_run(path: Path, settings: dict) -> dict | None:
    """Load a finished run with these settings; `None` if there is none."""
    run = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return run if run is not None and run["settings"] == settings else None


def build_tokenizer(args: argparse.Namespace, rows: Dataset) -> PreTrainedTokenizerBase:
    """Trim the teacher's tokenizer to the training rows; it is the same for all students."""
    tokenizer = TeacherCache(args.output_dir / "distributions").load_tokenizer()
    return trim_tokenizer(tokenizer, iterate_texts(rows), max_size=VOCABULARY_SIZE)[0]


# Table


def build_table(runs: dict[tuple[str, int], dict | None], seeds: Sequence[int]) -> list[list[str]]:
    """Return a row for each arm: mean loss and its lowest and highest seed, mean ROUGE-L and its interval."""
    table = [["trained on", "loss (nats per token)", "lowest to highest seed", "ROUGE-L [95 % interval]", "seeds"]]
    for arm in ARMS:
        found = [run for seed in seeds if (run := runs.get((arm, seed))) is not None]
        if not found:
            table.append([arm, "missing", "", "", "0"])
            continue
        losses = [run["loss"] for run in found]
        # The mean over seeds of each row, so that the interval is over held-out rows.
        scores = np.mean([run["rougeL"] for run in found], axis=0)
        rouge = mean_with_interval([{"rougeL": score} for score in scores])["rougeL"]
        spread = f"{min(losses):.3f} to {max(losses):.3f}"
        table.append([arm, f"{np.mean(losses):.3f}", spread, str(rouge), str(len(found))])
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Label, train what is missing, and print the table; see the top of this file."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    task = build_docstring_task()
    train_rows = task["train"].shuffle(seed=0).remove_columns("name")
    if args.label_minutes > 0:
        label(args, train_rows)
    num_rows = min(TeacherCache(args.output_dir / name).num_rows for name in LABELS)
    tokenizer = build_tokenizer(args, train_rows)
    rows = {"train": train_rows.select(range(num_rows)), "test": task["test"].shuffle(seed=0).take(args.eval_rows)}
    settings, runs = describe_settings(args, rows), {}
    for seed in args.seeds:
        for arm in ARMS:
            path = args.output_dir / "runs" / f"{arm.replace(' ', '-')}-{seed}.json"
            run = load_run(path, settings)
            if run is None and not args.table_only:
                run = train(args, arm, seed, rows, tokenizer)
                write_file(path, json.dumps(run, indent=1) + "\n")
                logger.info(f"{arm}, seed {seed}: loss {run['loss']:.3f}, {run['train_seconds']:.0f} s.")
            runs[arm, seed] = run
    table = format_table(build_table(runs, args.seeds), markdown=True)
    write_file(args.output_dir / "table.md", table + "\n")
    print(f"\n{num_rows:,} training rows, {len(rows['test']):,} held-out rows, {args.steps} steps.\n\n{table}")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="folder or Hub name of a decoder-only model with Qwen's chat format")
    parser.add_argument("--engine", default="transformers", choices=("transformers", "ctranslate2", "vllm"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the teacher")
    parser.add_argument("--label_minutes", type=float, default=60, help="0 uses the labels that are there")
    parser.add_argument("--preset", default="5m", help="size of the students")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--eval_rows", type=int, default=300, help="held-out rows")
    parser.add_argument("--table_only", action="store_true", help="train nothing; missing runs are shown as missing")
    parser.add_argument("--use_cpu", action="store_true", help="train on the CPU although there is an accelerator")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/teacher_cache_proof"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
