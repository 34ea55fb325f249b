# SPDX-License-Identifier: Apache-2.0
"""Compare encoder-decoders with decoder-only models of the same size, with seeds, intervals and equal budgets.

    python examples/evidence.py --data shell=FOLDER synopses=FOLDER [--only "shell * cross-entropy *"] [--seeds 0 1 2]
    python examples/evidence.py --report

Each folder has train.jsonl, validation.jsonl and the test file of its task (see TASKS); docstrings are built from
Python's standard library. Runs are named TASK MODEL TRAINING BUDGET RATE SEED. The learning rate of each model is
chosen on validation rows with seed 0, and the other seeds use it. Each finished run becomes one line of
evidence_results.jsonl, and the same command continues with what is missing. `--rerun` repeats runs that are finished.
`--report` trains nothing: it writes the tables of docs/evidence.md and docs/evidence.png from the results file.
"""

import argparse
import copy
import functools
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

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from shell_results import update_blocks
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Seq2SeqTrainingArguments, set_seed
from trl import ModelConfig

from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.adaptation import SPLITS
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.configuration.sizes import build_model, fit_num_parameters, num_parameters
from encdec_slm.run_results import format_table, package_versions
from encdec_slm.trainers.decoder_only_job import CHAT_TEMPLATE, encode_joined_rows, train_causal_model
from encdec_slm.trainers.evaluation import evaluate_checkpoint
from encdec_slm.trainers.evaluation.generation import load_model
from encdec_slm.trainers.evaluation.tasks import find_task
from encdec_slm.trainers.finetune_job import FinetuneArguments, finetune
from encdec_slm.trainers.new_models import first_texts, preset_config, train_tokenizer
from encdec_slm.trainers.row_encoding import RowEncoder, encode_rows
from encdec_slm.trainers.tasks.docstrings import build_docstring_task


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
    max_test_rows: int = 500  # and of validation
    batch_size: int = 32
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
TASKS = {
    "shell": Task("shell", "nlc2cmd", 6_400, 64, 64, origin="nl2bash", test_file="test_random.jsonl"),
    "synopses": Task("text", "rougeL", 6_400, 160, 32),
    "docstrings": Task("docstrings", "rougeL", 6_400, 160, 48),
}
ARMS = [
    Arm(task, model, budget, num_seeds=5 if task == "shell" and model in (OURS, DECODER_ONLY) else 3)
    for task in TASKS
    for model, budget in (*((model, "equal-rows") for model in MODELS), (OURS, "equal-flops"))
]
LEARNING_RATES = (1.5e-3, 3e-3, 6e-3)
# Sizes of the models: six layers of the width of the preset. Without dropout, because Llama has less of it.
PRESET = "1m"
SHAPE = {
    **{"encoder_num_hidden_layers": 4, "decoder_num_hidden_layers": 2},
    **{"attention_dropout": 0.0, "mlp_dropout": 0.0},
}
TRAINING = {
    **{"num_train_epochs": 1, "train_sampling_strategy": "sequential", "lr_scheduler_type": "cosine"},
    **{"warmup_steps": 0.05, "weight_decay": 0.01, "adam_beta2": 0.98, "logging_steps": 50, "save_strategy": "no"},
    **{"report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": True},
}
METRIC_LABELS = {"nlc2cmd": "NLC2CMD, percent", "rougeL": "ROUGE-L, percent"}
EVALUATION_BATCH_SIZE = 50
# Claims of arXiv 2501.16273: the first arm is better than the second.
CLAIMS = (
    ("better than decoder-only: equal size and rows", (OURS, "equal-rows"), (DECODER_ONLY, "equal-rows")),
    ("the same, decoder-only also learns the source", (OURS, "equal-rows"), (SOURCE_SUPERVISED, "equal-rows")),
    ("better than decoder-only: equal size and training FLOPs", (OURS, "equal-flops"), (DECODER_ONLY, "equal-rows")),
    ("2/3-1/3 is better than 1/2-1/2", (OURS, "equal-rows"), ("1/2-1/2", "equal-rows")),
    ("1/2-1/2 is better than 1/3-2/3", ("1/2-1/2", "equal-rows"), ("1/3-2/3", "equal-rows")),
)
HOLDS, FAILS, UNKNOWN, MISSING = "holds here", "does not hold here", "cannot be told at this size", "missing"
MIN_SEEDS, NUM_BOOTSTRAP = 3, 10_000
# Student's t for 95 % intervals by the number of seeds; that of five is used for more, which widens the interval.
T_QUANTILES = {3: 4.303, 4: 3.182, 5: 2.776}


# Models and rows


def build_config(model: str, tokenizer: Any) -> Any:
    """Return the config of a model of the comparison; all have the same number of parameters within 1 %."""
    fields = preset_config(PRESET, tokenizer).to_diff_dict() | SHAPE
    base = EncDecSLMConfig(**fields)
    if model not in SPLITS:
        return decoder_only_twin(base)
    num_layers = base.encoder_num_hidden_layers + base.decoder_num_hidden_layers
    num_encoder_layers = round(num_layers * SPLITS[model])
    layers = (num_encoder_layers, num_layers - num_encoder_layers)
    fields |= dict(zip(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), layers, strict=True))
    return fit_num_parameters(EncDecSLMConfig, fields, num_parameters(base), tolerance=0.01)


def count_training_flops(config: Any, lengths: Sequence[tuple[int, int]]) -> int:
    """Count the floating-point operations of one training step on rows without padding.

    Counted are matrix products, a multiplication and an addition as two, as in `torch.utils.flop_counter`. Attention
    counts in full although half of a causal one is masked, and a backward pass as two forward passes.

    Args:
        config ([`~transformers.PreTrainedConfig`]): Of an encoder-decoder or a decoder-only model.
        lengths (`Sequence[tuple[int, int]]`): Tokens of source and target of each row. A decoder-only model reads as
            many, in one row: the end of the source is the token that separates them.
    """
    sources, targets = np.array(lengths, dtype=np.int64).reshape(-1, 2).T
    num_tokens = {"source": int(sources.sum()), "target": int(targets.sum()), "both": int((sources + targets).sum())}
    total = 0
    for name, module in build_model(config, "meta").named_modules():
        if isinstance(module, torch.nn.Linear):
            total += 2 * module.weight.numel() * num_tokens[_find_input(name, config)]
    width = 4 * config.num_attention_heads * config.head_dim
    if config.is_encoder_decoder:
        total += width * config.encoder_num_hidden_layers * int((sources**2).sum())
        total += width * config.decoder_num_hidden_layers * int((targets**2 + sources * targets).sum())
    else:
        total += width * config.num_hidden_layers * int(((sources + targets) ** 2).sum())
    return 3 * total


def _find_input(name, config):
    if not config.is_encoder_decoder:
        return "both"
    is_source = "encoder." in name or name.endswith(("cross_attn.k_proj", "cross_attn.v_proj"))
    return "source" if is_source else "target"


@functools.cache
def load_task(name: str, folder: Path | None) -> tuple[dict[str, list[dict]], Any, dict[str, int]]:
    """Return the rows of a task by split, the tokenizer of its training rows, and how many rows are too long."""
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
        splits[split] = kept if split == "train" else random.Random(0).sample(kept, min(len(kept), task.max_test_rows))
    return splits, tokenizer, num_left_out


def read_lines(path):
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))


def count_tokens(tokenizer, rows, column):
    return [len(ids) for ids in tokenizer([row[column] for row in rows], verbose=False)["input_ids"]]


def draw_rows(rows: Sequence[dict], num_rows: int, seed: int) -> list[dict]:
    """Return training rows in the order of the seed, again and again shuffled if there are too few."""
    generator, drawn = random.Random(seed), []
    while len(drawn) < num_rows:
        drawn += generator.sample(rows, len(rows))
    return drawn[:num_rows]


def count_rows(run: Run, rows: Sequence[dict], tokenizer: Any) -> int:
    """Return the number of training rows of a run: that of its task, or that of equal FLOPs in whole batches."""
    task = TASKS[run.arm.task]
    if run.arm.budget == "equal-rows":
        return task.num_rows
    lengths = [row["lengths"] for row in rows]
    flops = [count_training_flops(build_config(model, tokenizer), lengths) for model in (DECODER_ONLY, run.arm.model)]
    return task.batch_size * round(task.num_rows * flops[0] / flops[1] / task.batch_size)


# Run


def execute(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one model; return its line of the results file."""
    started, cpu_started = time.perf_counter(), time.process_time()
    task = TASKS[run.arm.task]
    splits, tokenizer, num_left_out = load_task(run.arm.task, args.data.get(run.arm.task))
    rows = draw_rows(splits["train"], count_rows(run, splits["train"], tokenizer), run.seed)
    folder = args.output_dir / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = build_config(run.arm.model, tokenizer)
    for split, found in {"train": rows, "validation": splits["validation"], "test": splits["test"]}.items():
        lines = (json.dumps({name: row[name] for name in ("source", "target")}) + "\n" for row in found)
        write_file(folder / f"{split}.jsonl", "".join(lines))
    train_model(run, config, tokenizer, rows, folder, args.device)
    cpu_seconds = time.process_time() - cpu_started
    model = folder / "model"
    validation_loss, num_tokens = row_losses(model, splits["validation"], task, args.device)
    losses, num_test_tokens = row_losses(model, splits["test"], task, args.device)
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
            task.metric: [round(100 * score, 1) for score in score_answers(model, folder / "test.jsonl", task, args)],
        },
        "device": args.device,
        "num_threads": torch.get_num_threads(),
        "training_cpu_seconds": round(cpu_seconds),
        "seconds": round(time.perf_counter() - started),
        "versions": package_versions(),
    }


def train_model(run, config, tokenizer, rows, folder, device):
    """Train a model from random weights, on the rows in their order, and save it to the folder `model`."""
    task, arm, model_folder = TASKS[run.arm.task], run.arm, folder / "model"
    training_args = Seq2SeqTrainingArguments(
        str(model_folder),
        seed=run.seed,
        learning_rate=run.learning_rate,
        per_device_train_batch_size=task.batch_size,
        use_cpu=device == "cpu",
        **TRAINING,
    )
    lengths = {"max_source_length": task.max_source_length, "max_target_length": task.max_target_length}
    set_seed(run.seed)
    if not config.is_encoder_decoder:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = CHAT_TEMPLATE
        dataset = Dataset.from_list([{name: row[name] for name in ("source", "target")} for row in rows])
        model, supervise_source = AutoModelForCausalLM.from_config(config), arm.model == SOURCE_SUPERVISED
        options = {**lengths, "supervise_source": supervise_source, "base_model": arm.model}
        train_causal_model(model, tokenizer, dataset, training_args, **options)
        return
    EncDecSLMForConditionalGeneration(config).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    files = {f"{split}_file": str(folder / f"{split}.jsonl") for split in ("train", "validation", "test")}
    # The job's own evaluation is not used: it ranks no rows, and cannot measure the decoder-only models.
    arguments = FinetuneArguments(**files, **lengths, max_eval_samples=1)
    finetune(arguments, training_args, ModelConfig(model_name_or_path=str(folder / "start")))


@torch.no_grad()
def row_losses(folder: Path, rows: Sequence[Mapping], task: Task, device: str | None) -> tuple[list[float], list[int]]:
    """Return the loss of each row, in nats, summed over the tokens of its target, and the number of these tokens."""
    model, tokenizer = load_model(folder, device=device)
    dataset = Dataset.from_list([{name: row[name] for name in ("source", "target")} for row in rows])
    lengths = (task.max_source_length, task.max_target_length)
    if model.config.is_encoder_decoder:
        encoder = RowEncoder(tokenizer, *lengths, model.config.decoder_start_token_id)
        dataset, collate, shift = encode_rows(dataset, encoder, "rows"), encoder.collate, 0
    else:
        dataset = encode_joined_rows(dataset, tokenizer, *lengths, supervise_source=False)
        collate, shift = DataCollatorForSeq2Seq(tokenizer), 1
    losses, num_tokens = [], []
    for batch in DataLoader(dataset, EVALUATION_BATCH_SIZE, collate_fn=collate):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        labels = batch["labels"][:, shift:]
        logits = model(**batch).logits[:, : labels.shape[1]]
        loss = F.cross_entropy(logits.transpose(1, 2).float(), labels, reduction="none")
        losses += loss.sum(1).tolist()
        num_tokens += (labels >= 0).sum(1).tolist()
    return losses, num_tokens


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
    """Yield the runs of an arm: all learning rates with seed 0, and then the chosen one with the other seeds."""
    yield from (Run(arm, rate, 0) for rate in LEARNING_RATES)
    rate = choose_learning_rate(arm, results)
    if rate is not None:
        yield from (Run(arm, rate, seed) for seed in (range(arm.num_seeds) if seeds is None else seeds) if seed)


def choose_learning_rate(arm: Arm, results: Mapping[str, Mapping]) -> float | None:
    """Return the rate with the lowest validation loss with seed 0; `None` until all rates are measured."""
    found = {rate: find_result(results, Run(arm, rate, 0)) for rate in LEARNING_RATES}
    if None in found.values():
        return None
    return min(found, key=lambda rate: found[rate]["validation_loss"])


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


def measure_rows(result: Mapping, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a measure of each test row, and its weight: a loss is a mean over tokens, a metric over rows."""
    values = np.array(result["rows"][measure])
    weights = np.array(result["rows"]["num_tokens"]) if measure == "loss" else np.ones(len(values))
    return values, weights


def mean(result: Mapping, measure: str) -> float:
    values, weights = measure_rows(result, measure)
    return float(values.sum() / weights.sum())


def compare(first: Mapping[int, Mapping], second: Mapping[int, Mapping], measure: str) -> dict[str, Any] | None:
    """Compare two arms on their common seeds: `None` if there are too few.

    Returns:
        `dict`: `difference` of the means, first minus second; `rows`, its 95 % interval by a paired bootstrap over
        test rows, whose values are means over seeds; `seeds`, its 95 % interval by Student's t over seeds; `verdict`.
    """
    seeds = sorted(set(first) & set(second))
    if len(seeds) < MIN_SEEDS:
        return None
    runs = [arm[seed] for arm in (first, second) for seed in seeds]
    if len({str(run["rows"]["num_tokens"]) for run in runs}) > 1:
        raise ValueError("The results are of different test rows, but rows are compared in pairs. Repeat the runs.")
    weights = measure_rows(runs[0], measure)[1]
    pairs = [[measure_rows(arm[seed], measure)[0] for seed in seeds] for arm in (first, second)]
    row_differences = np.mean(pairs[0], axis=0) - np.mean(pairs[1], axis=0)
    drawn = np.random.default_rng(0).multinomial(len(weights), [1 / len(weights)] * len(weights), NUM_BOOTSTRAP)
    on_rows = np.percentile((drawn @ row_differences) / (drawn @ weights), [2.5, 97.5]).tolist()
    differences = [mean(first[seed], measure) - mean(second[seed], measure) for seed in seeds]
    difference, deviation = statistics.mean(differences), statistics.stdev(differences)
    margin = T_QUANTILES[min(len(seeds), max(T_QUANTILES))] * deviation / len(seeds) ** 0.5
    intervals = {"rows": on_rows, "seeds": [difference - margin, difference + margin]}
    return {"difference": difference, "num_seeds": len(seeds), **intervals, "verdict": judge(intervals, measure)}


def judge(intervals: Mapping[str, Sequence[float]], measure: str) -> str:
    """Return whether the claim that the first arm is better holds: both intervals must be on the same side of 0."""
    sign = -1 if measure == "loss" else 1
    lows, highs = zip(*(sorted(sign * edge for edge in interval) for interval in intervals.values()), strict=True)
    return HOLDS if min(lows) > 0 else FAILS if max(highs) < 0 else UNKNOWN


# Report


def quality_table(results):
    rows = [["task", "model", "budget", "parameters", "learning rate", "seeds", "loss", "task metric"]]
    for arm in ARMS:
        found, metric = collect(arm, results), TASKS[arm.task].metric
        cells = [MISSING] * 5
        if found:
            one = next(iter(found.values()))
            rate = one["settings"]["learning_rate"]
            edge = " (edge)" if rate in (min(LEARNING_RATES), max(LEARNING_RATES)) else ""
            seeds = f"{len(found)} of {arm.num_seeds}"
            values = [format_mean([mean(run, name) for run in found.values()], name) for name in ("loss", metric)]
            cells = [f"{one['num_parameters']:,}", f"{rate:g}{edge}", seeds, *values]
        rows.append([arm.task, arm.model, arm.budget, *cells])
    return format_table(rows, markdown=True)


def budget_table(results):
    rates = [f"{rate:g}" for rate in LEARNING_RATES]
    header = ["task", "model", "budget", "rows", "steps", "source tokens", "target tokens", "TFLOPs", "CPU seconds"]
    rows = [[*header, *(f"validation loss at {rate}" for rate in rates)]]
    for arm in ARMS:
        found = [find_result(results, Run(arm, rate, 0)) for rate in LEARNING_RATES]
        if not any(found):
            continue
        one = next(filter(None, found))
        steps = -(-one["num_train_rows"] // one["settings"]["batch_size"])
        numbers = [one["num_train_rows"], steps, one["num_source_tokens"], one["num_target_tokens"]]
        flops = f"{one['training_flops'] / 1e12:,.1f}"
        seconds = statistics.median(run["training_cpu_seconds"] for run in found if run)
        cells = [*(f"{number:,}" for number in numbers), flops, f"{seconds:.0f}"]
        losses = [f"{run['validation_loss']:.3f}" if run else MISSING for run in found]
        rows.append([arm.task, arm.model, arm.budget, *cells, *losses])
    return format_table(rows, markdown=True)


def claim_table(results):
    rows = [["claim", "task", "measure", "seeds", "difference", "95 % over rows", "95 % over seeds", "verdict"]]
    for text, *pair in CLAIMS:
        for name, task in TASKS.items():
            arms = [next(arm for arm in ARMS if (arm.task, arm.model, arm.budget) == (name, *one)) for one in pair]
            found = [collect(arm, results) for arm in arms]
            compared = {measure: compare(*found, measure) for measure in ("loss", task.metric)}
            if None in compared.values():
                rows.append([text, name, "both", "-", "-", "-", "-", MISSING])
                continue
            for measure, result in compared.items():
                numbers = [format_number(result["difference"], measure)]
                numbers += [format_interval(result[kind], measure) for kind in ("rows", "seeds")]
                label = METRIC_LABELS.get(measure, measure)
                rows.append([text, name, label, str(result["num_seeds"]), *numbers, result["verdict"]])
    return format_table(rows, markdown=True).replace("---:", "---")


def format_number(value, measure):
    return f"{value:+.3f}" if measure == "loss" else f"{value:+.1f}"


def format_interval(interval, measure):
    return " to ".join(format_number(edge, measure) for edge in interval)


def format_mean(values, measure):
    """Format the mean over seeds and its standard error."""
    digits = 3 if measure == "loss" else 1
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def plot_link(results):
    if not any(collect(arm, results) for arm in ARMS):
        return "The plot is missing: no model has finished its learning rates."
    return f"![Loss and task metric of each seed]({PLOT.name})"


BLOCKS = {"claims": claim_table, "quality": quality_table, "plot": plot_link, "budgets": budget_table}


def draw_plot(results: Mapping[str, Mapping]) -> Any:
    """Draw loss and metric of each seed, and the mean of each arm, for each task; `None` if nothing is measured."""
    from matplotlib.figure import Figure

    measured = {arm: found for arm in ARMS if (found := collect(arm, results))}
    tasks = [name for name in TASKS if any(arm.task == name for arm in measured)]
    if not tasks:
        return None
    figure = Figure(figsize=(10, 0.8 + 2.4 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False)
    for line, name in zip(panels, tasks, strict=True):
        arms = [arm for arm in ARMS if arm.task == name and arm in measured][::-1]
        for axes, measure in zip(line, ("loss", TASKS[name].metric), strict=True):
            for place, arm in enumerate(arms):
                values = [mean(run, measure) for run in measured[arm].values()]
                axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.5)
                axes.plot(statistics.mean(values), place, "|", color="black", markersize=18)
            labels = [arm.model + (", equal FLOPs" if arm.budget == "equal-flops" else "") for arm in arms]
            axes.set_yticks(range(len(arms)), labels)
            axes.set_ylim(-0.6, len(arms) - 0.4)
            axes.set_title(f"{name}: {'loss, nats per target token' if measure == 'loss' else METRIC_LABELS[measure]}")
            axes.grid(axis="x", alpha=0.3)
    return figure


def write_report(results: Mapping[str, Mapping]) -> None:
    """Write the tables of docs/evidence.md, and the plot."""
    write_file(PAGE, update_blocks(PAGE.read_text(encoding="utf-8"), BLOCKS, results))
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
