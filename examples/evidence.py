# SPDX-License-Identifier: Apache-2.0
"""Compare encoder-decoders with decoder-only models of the same size, with seeds, intervals and equal budgets.

    python examples/evidence.py --data shell=FOLDER synopses=FOLDER [--only "shell * cross-entropy *"] [--seeds 0 1 2]
    python examples/evidence.py --report

Each folder has train.jsonl, validation.jsonl and the test file of its task (see TASKS); docstrings are built from
Python's standard library. Runs are named TASK MODEL TRAINING BUDGET RATE SEED. The learning rate of each model is
chosen on validation rows with seed 0, and the other seeds use it. Each finished run becomes one line of
evidence_results.jsonl, and the same command continues with what is missing. `--rerun` repeats runs that are finished.
`--report` trains nothing: it writes the tables of docs/evidence.md and README.md, and docs/evidence.png, from the
results file.
"""

import argparse
import copy
import functools
import itertools
import json
import logging
import random
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import evidence_vision
import torch
import torch.nn.functional as F
from datasets import Dataset
from evidence_measures import count_training_flops, sum_losses
from evidence_statistics import (
    FAILS,
    HOLDS,
    MISSING,
    UNKNOWN,
    compare,
    format_interval,
    format_mean,
    format_number,
    mean,
)
from shell_results import update_blocks
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, Trainer, set_seed
from trl import ModelConfig

from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.adaptation import SPLITS, from_decoder_only
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.configuration.sizes import build_model, fit_num_parameters, num_parameters
from encdec_slm.run_results import format_table, package_versions
from encdec_slm.trainers.decoder_only_job import CHAT_TEMPLATE, encode_joined_rows, train_causal_model
from encdec_slm.trainers.distillation_config import Seq2SeqDistillationConfig
from encdec_slm.trainers.distillation_data import as_prompts
from encdec_slm.trainers.distillation_losses import token_divergence
from encdec_slm.trainers.distillation_trainer import Seq2SeqDistillationTrainer
from encdec_slm.trainers.evaluation import evaluate_checkpoint
from encdec_slm.trainers.evaluation.generation import load_model
from encdec_slm.trainers.evaluation.tasks import find_task
from encdec_slm.trainers.finetune_job import FinetuneArguments, finetune
from encdec_slm.trainers.new_models import first_texts, preset_config, train_tokenizer
from encdec_slm.trainers.row_encoding import RowEncoder, encode_rows
from encdec_slm.trainers.tasks.docstrings import build_docstring_task
from encdec_slm.trainers.teacher_cache import DistributionSpec
from encdec_slm.trainers.teacher_engines import TransformersEngine
from encdec_slm.trainers.teacher_labels import LabelSettings, label_dataset


logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "examples" / "evidence_results.jsonl"
PAGE, PLOT = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence.png"

# What is compared


@dataclass(frozen=True)
class Task:
    """Rows, metric and budget of a task. Rows that are too long are left out, in training and in tests."""

    evaluation: str  # task of `encdec-slm evaluate`
    metric: str
    num_rows: int  # of training, with repetitions
    max_source_length: int
    max_target_length: int
    origin: str | None = None  # of training rows
    test_file: str = "test.jsonl"
    max_validation_rows: int = 250
    max_test_rows: int = 500
    batch_size: int = 8
    vocab_size: int = 2048


@dataclass(frozen=True)
class Arm:
    """One model, trained in one way on one task.

    The budget is `"equal-rows"`, or `"equal-flops"`: so many rows that training takes as many FLOPs as that of the
    decoder-only model with `equal-rows`. The report expects `num_seeds` seeds.
    """

    task: str
    model: str
    budget: str = "equal-rows"
    training: str = "cross-entropy"
    num_seeds: int = 3

    @property
    def grid_arm(self) -> "Arm":
        """The arm that chooses the learning rate: of the same model with `equal-rows` and cross-entropy."""
        model = DECODER_ONLY if self.model == TEACHER else self.model
        return Arm(
            self.task, model, training=self.training if self.training in (ADAPTED, NOT_ADAPTED) else CROSS_ENTROPY
        )

    @property
    def has_grid(self) -> bool:
        """Whether the arm chooses its own learning rate."""
        names = (self.task, self.model, self.budget, self.training)
        grid = self.grid_arm
        return names == (grid.task, grid.model, grid.budget, grid.training)


@dataclass(frozen=True)
class Run:
    """An arm with a learning rate and a seed, which draws the weights and the order of the rows."""

    arm: Arm
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        arm = self.arm
        return f"{arm.task} {arm.model} {arm.training} {arm.budget} {self.learning_rate:g} {self.seed}"

    def settings(self) -> dict[str, Any]:
        """What identifies the run in the results file."""
        names = ("task", "model", "training", "budget")
        arm = {name: getattr(self.arm, name) for name in names}
        return {**arm, "learning_rate": self.learning_rate, "seed": self.seed, **asdict(TASKS[self.arm.task])}


OURS, DECODER_ONLY, SOURCE_SUPERVISED = "2/3-1/3", "decoder-only", "decoder-only-source-supervised"
MODELS = (OURS, DECODER_ONLY, "1/2-1/2", "1/3-2/3", SOURCE_SUPERVISED)
# A larger decoder-only model, trained on three times the rows. Runs that learn from it need its folder.
TEACHER, TEACHER_WIDTH, TEACHER_ROWS = "teacher", {"hidden_size": 256, "num_attention_heads": 8}, 3
TEACHER_WIDTH |= {"num_key_value_heads": 8, "intermediate_size": 512}
CROSS_ENTROPY, FORWARD_KL, ADAPTED, NOT_ADAPTED = "cross-entropy", "forward-kl", "adapted", "not-adapted"
# Settings of the distillation by training. `distributions` are stored by the teacher first.
DISTILLATION = {
    FORWARD_KL: {"beta": 0.0},
    "reverse-kl": {"beta": 1.0},
    "jsd": {"beta": 0.5},
    "forward-kl-topk": {"beta": 0.0, "distributions": "topk:16"},
    "forward-kl-sampled": {"beta": 0.0, "distributions": "sampled:16"},
    "forward-kl-on-policy": {"beta": 0.0, "lmbda": 0.5},
}
KD_RATIO = 0.9
TASKS = {
    "shell": Task("shell", "nlc2cmd", 4_800, 64, 64, origin="nl2bash", test_file="test_random.jsonl"),
    "synopses": Task("text", "rougeL", 2_400, 96, 32),
    "docstrings": Task("docstrings", "rougeL", 2_400, 96, 32),
    "visual": Task("vision", "exact", 9_000, 128, 24, max_validation_rows=300, batch_size=16, vocab_size=320),
}
VISUAL = "visual"
# In the order in which they run: the headline first.
COMPARISONS = (
    *((model, "equal-rows") for model in (OURS, DECODER_ONLY)),
    (OURS, "equal-flops"),
    *((model, "equal-rows") for model in ("1/2-1/2", "1/3-2/3", SOURCE_SUPERVISED)),
)
ARMS = [
    Arm(task, model, budget, num_seeds=5 if task == "shell" and model in (OURS, DECODER_ONLY) else 3)
    for comparisons in (COMPARISONS[:2], *([one] for one in COMPARISONS[2:]))
    for task in TASKS
    for model, budget in comparisons
    if task != VISUAL or model in (OURS, DECODER_ONLY)
]
ARMS += [
    Arm("shell", TEACHER, num_seeds=1),
    *(Arm("shell", model, training=FORWARD_KL, num_seeds=5) for model in (OURS, DECODER_ONLY)),
    *(Arm("shell", OURS, training=training) for training in list(DISTILLATION)[1:]),
    *(Arm("shell", OURS, training=training) for training in (ADAPTED, NOT_ADAPTED)),
]
# The grid of learning rates starts with these, and is extended by factors of 2 while the best is at an edge.
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
LEARNING_RATE_LIMITS = (7.5e-4, 1.2e-2)
# Sizes of the models: six layers of the width of the preset. Without dropout, because Llama has less of it.
PRESET = "1m"
LAYERS = {"encoder_num_hidden_layers": 4, "decoder_num_hidden_layers": 2}
SHAPE = {**LAYERS, "attention_dropout": 0.0, "mlp_dropout": 0.0}
TRAINING = {
    **{"num_train_epochs": 1, "train_sampling_strategy": "sequential", "lr_scheduler_type": "cosine"},
    **{"warmup_steps": 0.05, "weight_decay": 0.01, "adam_beta2": 0.98, "logging_steps": 50, "save_strategy": "no"},
    **{"report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": True},
}
COMMON_NAMES = {CROSS_ENTROPY, "equal-rows"}
METRIC_NAMES = {"nlc2cmd": "NLC2CMD", "rougeL": "ROUGE-L", "exact": "exact answers"}
METRIC_LABELS = {metric: f"{name}, percent" for metric, name in METRIC_NAMES.items()}
EVALUATION_BATCH_SIZE = 50
# Claims of arXiv 2501.16273, and then of this repository: the first arm is better than the second. An arm is a model,
# its training and its budget.
NUM_PAPER_CLAIMS = 6
SHORT_VERDICTS = {HOLDS: "holds", FAILS: "does not hold", UNKNOWN: "unclear"}
CLAIMS = (
    ("better than decoder-only: equal size and rows", (OURS,), (DECODER_ONLY,)),
    ("the same, decoder-only also learns the source", (OURS,), (SOURCE_SUPERVISED,)),
    ("better than decoder-only: equal size and training FLOPs", (OURS, CROSS_ENTROPY, "equal-flops"), (DECODER_ONLY,)),
    ("better than decoder-only: both distilled", (OURS, FORWARD_KL), (DECODER_ONLY, FORWARD_KL)),
    ("2/3-1/3 is better than 1/2-1/2", (OURS,), ("1/2-1/2",)),
    ("1/2-1/2 is better than 1/3-2/3", ("1/2-1/2",), ("1/3-2/3",)),
    ("2/3-1/3: distillation is better than cross-entropy", (OURS, FORWARD_KL), (OURS,)),
    ("decoder-only: distillation is better than cross-entropy", (DECODER_ONLY, FORWARD_KL), (DECODER_ONLY,)),
    *((f"forward KL is better than {name}", (OURS, FORWARD_KL), (OURS, name)) for name in ("reverse-kl", "jsd")),
    ("half of the targets by the student is better than none", (OURS, "forward-kl-on-policy"), (OURS, FORWARD_KL)),
    *(
        (f"a live teacher is better than {name} labels", (OURS, FORWARD_KL), (OURS, f"forward-kl-{name}"))
        for name in ("topk", "sampled")
    ),
    ("the teacher's layers are a better start than random weights", (OURS, ADAPTED), (OURS, NOT_ADAPTED)),
)


# Models and rows


def build_config(model: str, tokenizer: Any) -> Any:
    """Return the config of a model; all of a task but the teacher have equal numbers of parameters within 1 %."""
    if isinstance(tokenizer, evidence_vision.Images):
        return evidence_vision.build_config(tokenizer, model == OURS)
    fields = preset_config(PRESET, tokenizer).to_diff_dict() | SHAPE
    base = EncDecSLMConfig(**fields | (TEACHER_WIDTH if model == TEACHER else {}))
    if model not in SPLITS:
        return decoder_only_twin(base)
    num_layers = base.encoder_num_hidden_layers + base.decoder_num_hidden_layers
    num_encoder_layers = round(num_layers * SPLITS[model])
    layers = (num_encoder_layers, num_layers - num_encoder_layers)
    fields |= dict(zip(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), layers, strict=True))
    return fit_num_parameters(EncDecSLMConfig, fields, num_parameters(base), tolerance=0.01)


@functools.cache
def load_task(name: str, folder: Path | None) -> tuple[dict[str, list[dict]], Any, dict[str, int]]:
    """Return the rows of a task by split, the tokenizer of its training rows, and how many rows are too long.

    In place of a tokenizer, the visual task has what reads its images.
    """
    if name == VISUAL:
        splits, images = evidence_vision.load_rows(TASKS[name], LAYERS)
        return splits, images, dict.fromkeys(splits, 0)
    task, files = TASKS[name], {"train": "train.jsonl", "validation": "validation.jsonl"}
    files["test"] = task.test_file
    if name == "docstrings":
        splits = {split: rows.to_list() for split, rows in build_docstring_task().items()}
    elif folder is None:
        raise SystemExit(f"The rows of {name} are required. Give `--data {name}=FOLDER`.")
    else:
        splits = {split: read_lines(folder / file) for split, file in files.items()}
    if task.origin is not None:
        splits["train"] = [row for row in splits["train"] if row["origin"] == task.origin]
    random.Random(0).shuffle(splits["train"])
    texts = first_texts(splits["train"], ("source", "target"))
    tokenizer, num_left_out = train_tokenizer(texts, task.vocab_size, task.max_source_length), {}
    for split, rows in splits.items():
        lengths = zip(*(count_tokens(tokenizer, rows, column) for column in ("source", "target")), strict=True)
        limits = (task.max_source_length, task.max_target_length)
        kept = [
            {"source": row["source"], "target": row["target"], "lengths": length}
            for row, length in zip(rows, lengths, strict=True)
            if length[0] <= limits[0] and length[1] <= limits[1]
        ]
        num_left_out[split] = len(rows) - len(kept)
        most = {"train": len(kept), "validation": task.max_validation_rows, "test": task.max_test_rows}[split]
        splits[split] = kept if len(kept) <= most else random.Random(0).sample(kept, most)
    return splits, tokenizer, num_left_out


def read_lines(path):
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def count_tokens(tokenizer, rows, column):
    return [len(ids) for ids in tokenizer([row[column] for row in rows], verbose=False)["input_ids"]]


def draw_rows(rows: Sequence[dict], num_rows: int, batch_size: int, seed: int) -> list[dict]:
    """Return training rows in the order of the seed, again and again shuffled if there are too few.

    Batches have rows of similar length, which needs less padding. They are sorted within 50 batches and then shuffled.
    """
    generator, drawn, ordered = random.Random(seed), [], []
    while len(drawn) < num_rows:
        drawn += generator.sample(rows, len(rows))
    for start in range(0, num_rows, 50 * batch_size):
        chunk = sorted(drawn[start : min(start + 50 * batch_size, num_rows)], key=lambda row: sum(row["lengths"]))
        batches = [chunk[first : first + batch_size] for first in range(0, len(chunk), batch_size)]
        ordered += generator.sample(batches, len(batches))
    return list(itertools.chain.from_iterable(ordered))


def count_rows(run: Run, rows: Sequence[dict], tokenizer: Any) -> int:
    """Return the number of training rows of a run: that of its task, or that of equal FLOPs in whole batches."""
    task = TASKS[run.arm.task]
    if run.arm.budget == "equal-rows":
        return task.num_rows * (TEACHER_ROWS if run.arm.model == TEACHER else 1)
    lengths = [row["lengths"] for row in rows]
    flops = [count_training_flops(build_config(model, tokenizer), lengths) for model in (DECODER_ONLY, run.arm.model)]
    return task.batch_size * round(task.num_rows * flops[0] / flops[1] / task.batch_size)


# Run


def execute(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one model; return its line of the results file."""
    started, cpu_started = time.perf_counter(), time.process_time()
    task = TASKS[run.arm.task]
    splits, tokenizer, num_left_out = load_task(run.arm.task, args.data.get(run.arm.task))
    rows = draw_rows(splits["train"], count_rows(run, splits["train"], tokenizer), task.batch_size, run.seed)
    folder = args.output_dir / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    set_seed(run.seed)
    start = initialize_model(run.arm, tokenizer, args)
    config = start.config
    is_visual = run.arm.task == VISUAL
    (train_visual_model if is_visual else train_model)(run, start, tokenizer, {**splits, "train": rows}, folder, args)
    cpu_seconds = time.process_time() - cpu_started
    if run.arm.model == TEACHER:
        shutil.copytree(folder / "model", find_teacher(run.arm.task, args), dirs_exist_ok=True)
    measured = (measure_visual_model if is_visual else measure_model)(run, tokenizer, splits, folder, args)
    (validation_loss, num_tokens), (losses, num_test_tokens), scores = measured
    return {
        "settings": run.settings(),
        "num_parameters": num_parameters(config),
        "num_train_rows": len(rows),
        "num_rows_left_out": num_left_out,
        "num_source_tokens": sum(row["lengths"][0] for row in rows),
        "num_target_tokens": sum(row["lengths"][1] for row in rows),
        "training_flops": count_training_flops(config, [row["lengths"] for row in rows]),
        "validation_loss": round(sum(validation_loss) / sum(num_tokens), 4),
        "rows": {
            "num_tokens": num_test_tokens,
            "loss": [round(loss, 3) for loss in losses],
            task.metric: [round(100 * score, 1) for score in scores],
        },
        "device": args.device,
        "num_threads": torch.get_num_threads(),
        "training_cpu_seconds": round(cpu_seconds),
        "seconds": round(time.perf_counter() - started),
        "versions": package_versions(),
    }


def find_teacher(task: str, args: argparse.Namespace) -> Path:
    return args.output_dir / f"teacher-{task}"


def load_teacher(task, args):
    folder = find_teacher(task, args)
    if not folder.exists():
        raise SystemExit(f"The teacher is required. Run with `--only '{task} {TEACHER} *' --rerun` first.")
    return AutoModelForCausalLM.from_pretrained(folder)


def initialize_model(arm: Arm, tokenizer: Any, args: argparse.Namespace) -> Any:
    """Return a model with random weights, or with those of the teacher."""
    if arm.training in (ADAPTED, NOT_ADAPTED):
        adapted = from_decoder_only(load_teacher(arm.task, args), split=arm.model, tokenizer=tokenizer)
        return adapted if arm.training == ADAPTED else EncDecSLMForConditionalGeneration(adapted.config)
    return build_model(build_config(arm.model, tokenizer))


def build_settings(run, folder, args):
    """Return the training arguments of a run; its model is saved to `model` in the folder."""
    settings = {"seed": run.seed, "learning_rate": run.learning_rate, "use_cpu": args.device == "cpu", **TRAINING}
    batch_size = TASKS[run.arm.task].batch_size
    return settings | {"output_dir": str(folder / "model"), "per_device_train_batch_size": batch_size}


def train_visual_model(run, model, images, splits, folder, args):
    evidence_vision.train_model(model, images, splits["train"], build_settings(run, folder, args))


def measure_visual_model(run, images, splits, folder, args):
    """Return the same as `measure_model`."""
    model = evidence_vision.load_model(folder / "model", run.arm.model == OURS, args.device)
    losses = [evidence_vision.row_losses(model, images, splits[split]) for split in ("validation", "test")]
    limit = TASKS[run.arm.task].max_target_length
    return *losses, evidence_vision.score_answers(model, images, splits["test"], limit)


def train_model(run, model, tokenizer, splits, folder, args):
    """Train a model on the rows in their order."""
    task, arm, rows = TASKS[run.arm.task], run.arm, splits["train"]
    for split, found in splits.items():
        lines = (json.dumps({name: row[name] for name in ("source", "target")}) + "\n" for row in found)
        write_file(folder / f"{split}.jsonl", "".join(lines))
    settings = build_settings(run, folder, args)
    lengths = {"max_source_length": task.max_source_length, "max_target_length": task.max_target_length}
    dataset = Dataset.from_list([{name: row[name] for name in ("source", "target")} for row in rows])
    chat_tokenizer = copy.deepcopy(tokenizer)
    chat_tokenizer.chat_template = CHAT_TEMPLATE
    if arm.training in DISTILLATION:
        tokenizers = {"processing_class": tokenizer, "teacher_processing_class": chat_tokenizer}
        distill = distill_encoder_decoder if model.config.is_encoder_decoder else distill_decoder_only
        distill(model, load_teacher(arm.task, args), dataset, tokenizers, task, DISTILLATION[arm.training], settings)
    elif model.config.is_encoder_decoder:
        model.save_pretrained(folder / "start")
        tokenizer.save_pretrained(folder / "start")
        files = {f"{split}_file": str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
        # The job's own evaluation is not used: it ranks no rows, and cannot measure the decoder-only models.
        arguments = FinetuneArguments(**files, **lengths, max_eval_samples=1)
        finetune(arguments, Seq2SeqTrainingArguments(**settings), ModelConfig(str(folder / "start")))
    else:
        options = {**lengths, "supervise_source": arm.model == SOURCE_SUPERVISED, "base_model": arm.model}
        train_causal_model(model, chat_tokenizer, dataset, Seq2SeqTrainingArguments(**settings), **options)


def distill_encoder_decoder(student, teacher, dataset, tokenizers, task, distillation, settings):
    """Distill by the library's trainer: with the teacher, or with its stored distributions."""
    distillation = {"lmbda": 0.0, **distillation}
    spec = distillation.pop("distributions", None)
    prompts = as_prompts(dataset, is_chat=True)
    if spec is not None:
        labels = Path(settings["output_dir"]).parent / "labels"
        engine = TransformersEngine(teacher, tokenizers["teacher_processing_class"])
        label_settings = LabelSettings(DistributionSpec.parse(spec), seed=settings["seed"])
        labeled = prompts.add_column("source", dataset["source"][:])  # identifies a row instead of its chat messages
        label_dataset(labeled, engine, labels, label_settings, teacher=TEACHER)
        distillation, teacher, prompts = (
            {**distillation, "teacher_cache": str(labels)},
            None,
            as_prompts(dataset, False),
        )
        tokenizers = {"processing_class": tokenizers["processing_class"]}
    training_args = Seq2SeqDistillationConfig(
        **settings,
        **distillation,
        kd_ratio=KD_RATIO,
        max_source_length=task.max_source_length,
        max_completion_length=task.max_target_length,
        gradient_checkpointing=False,
    )
    trainer = Seq2SeqDistillationTrainer(student, teacher, training_args, prompts, **tokenizers)
    trainer.train()
    trainer.save_model()


def distill_decoder_only(student, teacher, dataset, tokenizers, task, distillation, settings):
    """Distill with the same objective; the library's trainer has encoder-decoder students only."""
    tokenizer = tokenizers["teacher_processing_class"]
    lengths = (task.max_source_length, task.max_target_length)
    training_args = Seq2SeqTrainingArguments(**settings)
    trainer = CausalDistillationTrainer(
        student,
        training_args,
        DataCollatorForSeq2Seq(tokenizer),
        encode_joined_rows(dataset, tokenizer, *lengths, supervise_source=False),
        processing_class=tokenizer,
    )
    trainer.teacher, trainer.beta = teacher.to(trainer.args.device).eval(), distillation["beta"]
    trainer.train()
    trainer.save_model()


class CausalDistillationTrainer(Trainer):
    """Distill a decoder-only teacher into a decoder-only student on the targets of the data."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the objective of [`~encdec_slm.trainers.Seq2SeqDistillationConfig`], per target token."""
        labels = inputs["labels"][:, 1:]
        chosen = labels >= 0
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = outputs.logits[:, :-1][chosen]
        with torch.no_grad():
            teacher_logits = self.teacher(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1][chosen]
        divergence = token_divergence(logits, teacher_logits, self.beta).mean()
        loss = KD_RATIO * divergence + (1 - KD_RATIO) * F.cross_entropy(logits, labels[chosen])
        return (loss, outputs) if return_outputs else loss


def measure_model(run, tokenizer, splits, folder, args):
    """Return losses and numbers of tokens of the validation rows, the same of the test rows, and their metric."""
    task, model = TASKS[run.arm.task], folder / "model"
    losses = [row_losses(model, splits[split], task, args.device) for split in ("validation", "test")]
    return *losses, score_answers(model, folder / "test.jsonl", task, args)


def row_losses(folder: Path, rows: Sequence[Mapping], task: Task, device: str | None) -> tuple[list[float], list[int]]:
    """Load a model, and return what [`sum_losses`] does."""
    model, tokenizer = load_model(folder, device=device)
    dataset = Dataset.from_list([{name: row[name] for name in ("source", "target")} for row in rows])
    lengths = (task.max_source_length, task.max_target_length)
    if model.config.is_encoder_decoder:
        encoder = RowEncoder(tokenizer, *lengths, model.config.decoder_start_token_id)
        dataset, collate = encode_rows(dataset, encoder, "rows"), encoder.collate
    else:
        dataset = encode_joined_rows(dataset, tokenizer, *lengths, supervise_source=False)
        collate = DataCollatorForSeq2Seq(tokenizer)
    return sum_losses(model, DataLoader(dataset, EVALUATION_BATCH_SIZE, collate_fn=collate))


def score_answers(model, file, task, args):
    """Return the metric of the greedy answer to each row, from 0 or -1 to 1."""
    folder = model.parent / "evaluation"
    options = {"batch_size": EVALUATION_BATCH_SIZE, "num_bootstrap": 1, "num_beams": 1, "show_progress": False}
    options |= {"dataset_name": file, "max_new_tokens": task.max_target_length, "device": args.device}
    evaluate_checkpoint(model, task.evaluation, output_dir=folder, **options)
    score = find_task(task.evaluation).score
    rows = read_lines(folder / "predictions.jsonl")
    return [score(row["prediction"], row["references"])[task.metric] for row in rows]


def list_runs(arm: Arm, results: Mapping[str, Mapping], seeds: Sequence[int] | None = None) -> Iterator[Run]:
    """Yield the runs of an arm: the learning rates of its own grid with seed 0, and then the chosen one by seed."""
    if arm.has_grid:
        yield from (Run(arm, rate, 0) for rate in list_learning_rates(arm, results))
    rate = choose_learning_rate(arm, results)
    if rate is not None:
        yield from (Run(arm, rate, seed) for seed in (range(arm.num_seeds) if seeds is None else seeds))


def list_learning_rates(arm: Arm, results: Mapping[str, Mapping]) -> list[float]:
    """Return the grid of an arm: the first rates, and those next to the best one while that is at an edge."""
    rates = list(LEARNING_RATES)
    while None not in (losses := validation_losses(arm, rates, results)):
        best = rates[losses.index(min(losses))]
        rate = {rates[0]: best / 2, rates[-1]: 2 * best}.get(best)
        if rate is None or not LEARNING_RATE_LIMITS[0] <= rate <= LEARNING_RATE_LIMITS[1]:
            break
        rates = sorted([*rates, rate])
    return rates


def validation_losses(arm: Arm, rates: Sequence[float], results: Mapping[str, Mapping]) -> list[float | None]:
    """Return the validation loss with seed 0 of each learning rate; `None` if it is not measured."""
    found = [find_result(results, Run(arm, rate, 0)) for rate in rates]
    return [None if result is None else result["validation_loss"] for result in found]


def choose_learning_rate(arm: Arm, results: Mapping[str, Mapping]) -> float | None:
    """Return the rate with the lowest validation loss; `None` until all rates of the grid are measured."""
    arm = arm.grid_arm
    rates = list_learning_rates(arm, results)
    losses = validation_losses(arm, rates, results)
    return None if None in losses else rates[losses.index(min(losses))]


# Results


def _key(settings):
    return json.dumps(settings, sort_keys=True)


def load_results() -> dict[str, dict]:
    """Load the results file, by settings."""
    results = read_lines(RESULTS) if RESULTS.exists() else []
    return {_key(result["settings"]): result for result in results}


def save_result(result: Mapping[str, Any]) -> None:
    """Add a result to the file, or replace the earlier one with the same settings."""
    results = load_results() | {_key(result["settings"]): result}
    write_file(RESULTS, "".join(json.dumps(one) + "\n" for one in results.values()))


def find_result(results: Mapping[str, Mapping], run: Run) -> Mapping | None:
    """Return the result of a run; `None` if it is not finished."""
    return results.get(_key(run.settings()))


def collect(arm: Arm, results: Mapping[str, Mapping]) -> dict[int, Mapping]:
    """Return the results of an arm with the chosen learning rate by seed."""
    rate = choose_learning_rate(arm, results)
    runs = {} if rate is None else {seed: Run(arm, rate, seed) for seed in range(arm.num_seeds)}
    found = {seed: find_result(results, run) for seed, run in runs.items()}
    return {seed: result for seed, result in found.items() if result is not None}


# Report


def sort_arms():
    """Return the arms in the order of the tables: by task."""
    return sorted(ARMS, key=lambda arm: list(TASKS).index(arm.task))


def quality_table(results):
    rows = [["task", "model", "training", "budget", "parameters", "learning rate", "seeds", "loss", "task metric"]]
    for arm in sort_arms():
        found, metric = collect(arm, results), TASKS[arm.task].metric
        cells = [MISSING] * 5
        if found:
            one = next(iter(found.values()))
            rate = one["settings"]["learning_rate"]
            rates = list_learning_rates(arm.grid_arm, results)
            edge = " (edge)" if rate in (rates[0], rates[-1]) else ""
            seeds = f"{len(found)} of {arm.num_seeds}"
            values = [format_mean([mean(run, name) for run in found.values()], name) for name in ("loss", metric)]
            cells = [f"{one['num_parameters']:,}", f"{rate:g}{edge}", seeds, *values]
        rows.append([arm.task, arm.model, arm.training, arm.budget, *cells])
    return format_table(rows, markdown=True)


def budget_table(results):
    header = ["task", "model", "training", "budget", "rows", "steps", "source tokens", "target tokens", "TFLOPs"]
    rows = [[*header, "CPU seconds", "validation loss by learning rate"]]
    for arm in sort_arms():
        rates = list_learning_rates(arm, results) if arm.has_grid else [choose_learning_rate(arm, results)]
        found = [None if rate is None else find_result(results, Run(arm, rate, 0)) for rate in rates]
        if not any(found):
            continue
        one = next(filter(None, found))
        steps = -(-one["num_train_rows"] // one["settings"]["batch_size"])
        numbers = [one["num_train_rows"], steps, one["num_source_tokens"], one["num_target_tokens"]]
        flops = f"{one['training_flops'] / 1e12:,.1f}"
        seconds = statistics.median(run["training_cpu_seconds"] for run in found if run)
        cells = [*(f"{number:,}" for number in numbers), flops, f"{seconds:.0f}"]
        losses = (f"{run['validation_loss']:.3f}" if run else MISSING for run in found)
        cells.append(", ".join(f"{rate:g}: {loss}" for rate, loss in zip(rates, losses, strict=True)))
        rows.append([arm.task, arm.model, arm.training, arm.budget, *cells])
    return format_table(rows, markdown=True)


def find_arm(task: str, model: str, training: str = CROSS_ENTROPY, budget: str = "equal-rows") -> Arm | None:
    names = (task, model, training, budget)
    return next((arm for arm in ARMS if (arm.task, arm.model, arm.training, arm.budget) == names), None)


def judge_claims(results: Mapping[str, Mapping]) -> Iterator[tuple[str, str, dict[str, Any] | None]]:
    """Yield each claim with a task, and what [`compare`] says by measure; `None` if there are too few runs."""
    for text, *pair in CLAIMS:
        for name, task in TASKS.items():
            arms = [find_arm(name, *one) for one in pair]
            if None in arms:
                continue
            found = [collect(arm, results) for arm in arms]
            compared = {measure: compare(*found, measure) for measure in ("loss", task.metric)}
            yield text, name, None if None in compared.values() else compared


def claim_table(results):
    rows = [["claim", "task", "measure", "seeds", "difference", "95 % over rows", "95 % over seeds", "verdict"]]
    for text, name, compared in judge_claims(results):
        if compared is None:
            rows.append([text, name, "both", "-", "-", "-", "-", MISSING])
            continue
        for measure, result in compared.items():
            numbers = [format_number(result["difference"], measure)]
            numbers += [format_interval(result[kind], measure) for kind in ("rows", "seeds")]
            label = METRIC_LABELS.get(measure, measure)
            rows.append([text, name, label, str(result["num_seeds"]), *numbers, result["verdict"]])
    return format_table(rows, markdown=True).replace("---:", "---")


def plot_link(results):
    if not any(collect(arm, results) for arm in ARMS):
        return "The plot is missing: no model has finished its learning rates."
    return f"![Loss and task metric of each seed]({PLOT.name})"


def verdict_table(results):
    """Return the verdicts on the claims of the paper, by loss and by task metric, for README.md."""
    verdicts = {}
    for text, name, compared in judge_claims(results):
        both = [MISSING] if compared is None else [SHORT_VERDICTS[one["verdict"]] for one in compared.values()]
        verdicts.setdefault(text, {})[name] = ", ".join(both)
    rows = [["claim of the paper", *TASKS]]
    for text, *_ in CLAIMS[:NUM_PAPER_CLAIMS]:
        rows.append([text, *(verdicts.get(text, {}).get(name, "") for name in TASKS)])
    return format_table(rows, markdown=True).replace("---:", "---")


BLOCKS = {"claims": claim_table, "quality": quality_table, "plot": plot_link, "budgets": budget_table}
PAGES = {PAGE: BLOCKS, ROOT / "README.md": {"evidence": verdict_table}}


def draw_plot(results: Mapping[str, Mapping]) -> Any:
    """Draw loss and metric of each seed, and the mean of each arm, for each task; `None` if nothing is measured."""
    from matplotlib.figure import Figure

    measured = {arm: found for arm in ARMS if (found := collect(arm, results))}
    tasks = [name for name in TASKS if any(arm.task == name for arm in measured)]
    if not tasks:
        return None
    heights = [1 + sum(arm.task == name for arm in measured) for name in tasks]
    figure = Figure(figsize=(10, 0.35 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False, height_ratios=heights)
    for line, name in zip(panels, tasks, strict=True):
        arms = [arm for arm in ARMS if arm.task == name and arm in measured][::-1]
        for axes, measure in zip(line, ("loss", TASKS[name].metric), strict=True):
            for place, arm in enumerate(arms):
                values = [mean(run, measure) for run in measured[arm].values()]
                axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
                axes.plot(statistics.mean(values), place, "|", color="black", markersize=18)
            labels = [", ".join([arm.model, *({arm.training, arm.budget} - COMMON_NAMES)]) for arm in arms]
            axes.set_yticks(range(len(arms)), labels)
            axes.set_ylim(-0.6, len(arms) - 0.4)
            axes.set_title(f"{name}: {'loss, nats per target token' if measure == 'loss' else METRIC_LABELS[measure]}")
            axes.grid(axis="x", alpha=0.3)
    return figure


def write_report(results: Mapping[str, Mapping]) -> None:
    """Write the tables of docs/evidence.md and README.md, and the plot."""
    for page, blocks in PAGES.items():
        write_file(page, update_blocks(page.read_text(encoding="utf-8"), blocks, results))
    if (figure := draw_plot(results)) is not None:
        write_file(PLOT, lambda path: figure.savefig(path, format="png", dpi=120))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, or write the report; see the top of this file."""
    args = parse_arguments(arguments)
    if args.report:
        write_report(load_results())
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    done = set()
    for arm in ARMS:
        # The grid decides on the runs that follow it.
        while run := find_next(arm, load_results(), args, done):
            logger.info(f"{run.name}: started.")
            result = execute(run, args)
            save_result(result)
            done.add(run)
            logger.info(f"{run.name}: validation loss {result['validation_loss']}, {result['seconds']} seconds.")


def find_next(arm: Arm, results: Mapping[str, Mapping], args: argparse.Namespace, done: set[Run]) -> Run | None:
    """Return the next run of an arm that the command line asks for; `None` if there is none."""
    for run in list_runs(arm, results, args.seeds):
        is_wanted = fnmatch(run.name, args.only) and run not in done and run.seed in (args.seeds or [run.seed])
        if is_wanted and (args.rerun or find_result(results, run) is None):
            return run
    return None


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=[], metavar="TASK=FOLDER", help="rows of a task")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="runs by name, as in a shell")
    parser.add_argument("--seeds", type=int, nargs="+", help="defaults to all that the report expects")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--rerun", action="store_true", help="repeat finished runs")
    parser.add_argument("--report", action="store_true", help="write tables and plot, and run nothing")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/evidence"), help="of the current run's model")
    args = parser.parse_args(arguments)
    args.data = {task: Path(folder) for task, folder in (item.split("=", 1) for item in args.data)}
    if unknown := set(args.data) - set(TASKS):
        parser.error(f"--data names {', '.join(sorted(unknown))}, but the tasks are {', '.join(TASKS)}.")
    return args


if __name__ == "__main__":
    main()
