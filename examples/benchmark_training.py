# SPDX-License-Identifier: Apache-2.0
"""Time distillation steps, and measure the memory of their loss: random weights, float32, random token ids.

    python examples/benchmark_training.py --preset 26m --teacher-preset 26m --batch-size 16 --new-tokens 64

On-policy: the student generates `--new-tokens` tokens for every row, then learns from them, from the teacher and from
gold targets (forward KL with weight 0.9, cross-entropy 0.1; AdamW). Our trainer generates for the whole batch, with a
cache. "original" is the data path of microsoft/encoder-decoder-slm: one row at a time in training mode, the decoder
run over the whole prefix for each token; then all teacher logits and two student passes on sources padded to the fixed
length of its recipe, 1024. Its step is also timed without that padding. No text ends early. Off-policy: our loss and
its gradients, beside the least that is needed: both forward passes and the student's backward pass.

Memory: what the loss and its gradients add to the peak of a fresh process, given hidden states and heads, beside the
dense loss where it is expected to fit 6 GB. Contenders take turns; medians and quartiles are reported. Writes
`benchmark_training.json` (with every raw time) and `benchmark_training.png`. Data loading, logging, gradient clipping
and accumulation, several processes, half precision and adapters are not measured.

    python examples/benchmark_training.py --teacher TEACHER --repetitions 5

With `--teacher`, the labels of a real teacher are measured instead, on rows of the docstring task that fit the source
length: how many tokens per second each engine labels, and whole steps of a student with the teacher's trimmed
vocabulary that learns from the teacher in the step, from its labels, or by cross-entropy alone, with the peak memory
of a process for each of them. With one thread (OMP_NUM_THREADS=1), seconds are CPU time. Writes
`benchmark_teacher_cache.json`.
"""

import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.benchmarks.machine import describe_machine, peak_bytes
from encdec_slm.benchmarks.measuring import spread
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import decoder_only_twin, list_presets, load_preset
from encdec_slm.configuration.sizes import build_model
from encdec_slm.trainers import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer
from encdec_slm.trainers.distillation_losses import LOGITS_BUDGET_BYTES, ObjectiveSettings, distillation_objective
from encdec_slm.trainers.new_models import preset_config
from encdec_slm.trainers.output_heads import OutputHead
from encdec_slm.trainers.row_encoding import iterate_texts
from encdec_slm.trainers.tasks.docstrings import build_docstring_task
from encdec_slm.trainers.teacher_cache import DistributionSpec
from encdec_slm.trainers.teacher_engines import CompletionSettings
from encdec_slm.trainers.teacher_labels import LabelSettings, build_engine, label_dataset
from encdec_slm.vocabulary import trim_tokenizer


PAD_TOKEN_ID, START_TOKEN_ID, EOS_TOKEN_ID = 0, 1, 2
KD_RATIO, TEMPERATURE, TOP_K = 0.9, 0.9, 128
# Ratio -> the speeds that it compares: ours and the other's. The last one is how much it must be at least.
RATIOS = {
    "on-policy step, original": ("ours_on_policy", "original_padded", 10),
    "on-policy step, original without padding": ("ours_on_policy", "original_on_policy", None),
    "off-policy step, least that is needed": ("ours_off_policy", "needed_off_policy", 0.8),
}
# Qwen's vocabulary, whose logits exceed the memory of a batch, and widths that keep the heads small.
LOSS_VOCAB_SIZE, STUDENT_WIDTH, TEACHER_WIDTH = 151_936, 64, 128
# How often the dense loss holds N x V float32 values at its peak, a little more than was measured.
DENSE_COPIES, DENSE_LIMIT_BYTES = 5, 6 * 10**9
# Engines that label, and the dtype of their weights.
ENGINES = {"transformers bfloat16": "bfloat16", "transformers float32": "float32", "ctranslate2 int8": "auto"}
LABELS = {"topk": DistributionSpec("topk", 32), "sampled": DistributionSpec("sampled", 12)}
# Ratio -> the steps that it compares, and how much it must be at least.
LABEL_RATIOS = {
    f"step with {name} labels, {title}": (name, other, bar)
    for name in LABELS
    for title, other, bar in (("teacher in the step", "teacher", 10), ("cross-entropy alone", "cross_entropy", 0.85))
}


# Models and trainers


def build(arguments):
    """Build the models and rows that all contenders share, and our trainers."""
    vocabulary = {"vocab_size": arguments.vocab_size, "eos_token_id": EOS_TOKEN_ID}
    presets = (load_preset(name).to_dict() for name in (arguments.preset, arguments.teacher_preset))
    student_config, teacher_shape = (EncDecSLMConfig.from_dict(preset | vocabulary) for preset in presets)
    torch.manual_seed(0)
    student = build_model(student_config, arguments.device, dtype=torch.float32).train()
    teacher = build_model(decoder_only_twin(teacher_shape), arguments.device, dtype=torch.float32).eval()
    student.generation_config.eos_token_id = student.generation_config.max_length = None
    draw = partial(torch.randint, EOS_TOKEN_ID + 1, arguments.vocab_size, generator=torch.Generator().manual_seed(0))
    shapes = (arguments.batch_size, arguments.source_length), (arguments.batch_size, arguments.new_tokens)
    source_ids, gold_ids = (draw(shape).to(arguments.device) for shape in shapes)
    rows = [
        {"row": index, "source_ids": source, "teacher_source_ids": source, "target_ids": gold}
        for index, (source, gold) in enumerate(zip(source_ids.tolist(), gold_ids.tolist(), strict=True))
    ]
    return SimpleNamespace(
        **{"student": student, "teacher": teacher, "source_ids": source_ids, "gold_ids": gold_ids, "rows": rows},
        optimizer=torch.optim.AdamW(student.parameters(), lr=1e-5),
        on_policy=build_trainer(student, teacher, rows, arguments, lmbda=1.0),
        off_policy=build_trainer(student, teacher, rows, arguments, lmbda=0.0),
    )


def build_trainer(student, teacher, rows, arguments, lmbda):
    words = {str(token_id): token_id for token_id in range(arguments.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token=str(PAD_TOKEN_ID)))
    special = {"pad_token": str(PAD_TOKEN_ID), "bos_token": str(START_TOKEN_ID), "eos_token": str(EOS_TOKEN_ID)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    settings = Seq2SeqDistillationConfig(
        str(arguments.output),
        per_device_train_batch_size=arguments.batch_size,
        max_completion_length=arguments.new_tokens,
        generation_kwargs={"min_new_tokens": arguments.new_tokens},
        **{"lmbda": lmbda, "beta": 0.0, "kd_ratio": KD_RATIO, "temperature": TEMPERATURE, "top_k": TOP_K},
        **{"bf16": False, "activation_checkpointing": False, "use_cpu": arguments.device == "cpu", "report_to": []},
    )
    tokenizers = {"processing_class": tokenizer, "teacher_processing_class": tokenizer}
    return Seq2SeqDistillationTrainer(student, teacher, settings, Dataset.from_list(rows), **tokenizers)


# Contenders


@torch.no_grad()
def generate_as_original(student, source_ids, num_tokens):
    """Sample ids for one source in training mode; only the encoder's output is cached."""
    encoder_outputs = student.get_encoder()(source_ids)
    decoder_ids = torch.full_like(source_ids[:, :1], START_TOKEN_ID)
    for _ in range(num_tokens):
        outputs = student(encoder_outputs=encoder_outputs, decoder_input_ids=decoder_ids, use_cache=False)
        logits = outputs.logits[:, -1] / TEMPERATURE
        lowest = logits.topk(TOP_K).values[:, -1:]
        probabilities = logits.masked_fill(logits < lowest, -torch.inf).softmax(-1)
        decoder_ids = torch.cat((decoder_ids, torch.multinomial(probabilities, 1)), 1)
    return decoder_ids[:, 1:]


def original_loss(bench, padded_length, target_ids):
    """Compute 0.9 KL + 0.1 cross-entropy of padded rows: two student passes, and all logits of the teacher."""
    sources, gold_ids, missing = bench.source_ids, bench.gold_ids, padded_length - bench.source_ids.shape[1]
    ones, shift = torch.ones_like(sources), bench.student.prepare_decoder_input_ids_from_labels
    inputs = {"input_ids": F.pad(sources, (0, missing)), "attention_mask": F.pad(ones, (0, missing))}
    teacher_ids = torch.cat((F.pad(sources, (missing, 0)), target_ids), 1)
    teacher_mask = torch.cat((F.pad(ones, (missing, 0)), torch.ones_like(target_ids)), 1)
    with torch.no_grad():
        teacher_logits = bench.teacher(teacher_ids, attention_mask=teacher_mask, use_cache=False).logits
    teacher_log_probs = F.log_softmax(teacher_logits[:, padded_length - 1 : -1], dim=-1).flatten(0, 1)
    logits = bench.student(**inputs, decoder_input_ids=shift(target_ids), use_cache=False).logits
    student_log_probs = F.log_softmax(logits, dim=-1).flatten(0, 1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    logits = bench.student(**inputs, decoder_input_ids=shift(gold_ids), use_cache=False).logits
    return KD_RATIO * divergence + (1 - KD_RATIO) * F.cross_entropy(logits.flatten(0, 1), gold_ids.flatten())


def list_contenders(bench, padded_length):
    """Return the parts of a step by contender; each part is given what the one before it returned."""
    num_tokens, off_policy_batch = bench.gold_ids.shape[1], bench.off_policy.make_batch(bench.rows)

    def generate(_):
        batch = bench.on_policy.make_batch(bench.rows)
        if batch["num_target_tokens"] != bench.gold_ids.numel():
            raise RuntimeError(f"{batch['num_target_tokens']} tokens were generated, not {bench.gold_ids.numel()}.")
        return batch

    def generate_row_by_row(_):
        rows = [generate_as_original(bench.student, source[None], num_tokens) for source in bench.source_ids]
        return torch.cat(rows)

    def learn(loss):
        loss.backward()
        bench.optimizer.step()

    @torch.no_grad()
    def run_teacher(_):
        teacher_ids = torch.cat((bench.source_ids, bench.gold_ids), 1)[:, :-1]
        return bench.teacher(teacher_ids, logits_to_keep=num_tokens, use_cache=False).logits

    def run_student(_):
        decoder_ids = bench.student.prepare_decoder_input_ids_from_labels(bench.gold_ids)
        return bench.student(bench.source_ids, decoder_input_ids=decoder_ids, use_cache=False).logits.sum()

    loss = partial(bench.on_policy.compute_loss, bench.student)
    unpadded_loss = partial(original_loss, bench, bench.source_ids.shape[1])
    padded_loss = partial(original_loss, bench, padded_length)
    backward = torch.Tensor.backward
    return {
        "original_padded": {"loss": lambda _: padded_loss(bench.gold_ids), "backward": learn},
        "original_on_policy": {"generation": generate_row_by_row, "loss": unpadded_loss, "backward": learn},
        "ours_on_policy": {"generation": generate, "loss": loss, "backward": learn},
        "needed_off_policy": {"teacher": run_teacher, "student": run_student, "backward": backward},
        "ours_off_policy": {"loss": lambda _: loss(off_policy_batch), "backward": backward},
    }


def time_step(bench, parts):
    """Return the seconds of each part of a step."""
    bench.optimizer.zero_grad()
    value, seconds = None, {}
    for name, part in parts.items():
        start = time.perf_counter()
        value = part(value)
        if bench.student.device.type == "cuda":
            torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
    return seconds


def measure_times(bench, arguments):
    """Return all times of every contender; they take turns."""
    contenders = list_contenders(bench, arguments.padded_source_length)
    generate_as_original(bench.student, bench.source_ids[:1], 2)
    for name in (
        "ours_on_policy",
        "needed_off_policy",
        "ours_off_policy",
    ):  # warms up the original, too
        time_step(bench, contenders[name])
    runs = {name: [] for name in contenders}
    for repetition in range(arguments.repetitions):
        for name, parts in contenders.items():
            runs[name].append(time_step(bench, parts))
            seconds = ", ".join(f"{part} {value:.2f} s" for part, value in runs[name][-1].items())
            print(f"repetition {repetition + 1} of {arguments.repetitions}, {name}: {seconds}", flush=True)
    return runs


def compare(runs, num_tokens):
    """Return speeds in tokens per second, and ratios of neighboring runs."""
    seconds = {name: np.array([sum(run.values()) for run in runs[name]]) for name in runs}
    # The original generates from sources without padding.
    seconds["original_padded"] += np.array([run["generation"] for run in runs["original_on_policy"]])
    ratios = {title: spread(seconds[other] / seconds[ours]) for title, (ours, other, _) in RATIOS.items()}
    speeds = {name: spread(num_tokens / values) for name, values in seconds.items()}
    return {"tokens_per_second": speeds, "ratios": ratios}


# Memory of the loss


def our_objective(hidden, head, teacher_hidden, teacher_head, labels):
    weights = {"kd_weight": KD_RATIO / len(labels), "ce_weight": (1 - KD_RATIO) / len(labels)}
    rest = {"beta": 0.0, "temperature": 1.0, "label_smoothing": 0.0, "num_common_tokens": LOSS_VOCAB_SIZE}
    heads = hidden, OutputHead(head), teacher_hidden, OutputHead(teacher_head)
    return distillation_objective(*heads, labels, ObjectiveSettings(**weights, **rest)).loss


def dense_objective(hidden, head, teacher_hidden, teacher_head, labels):
    """Compute the same from all logits, by autograd."""
    with torch.no_grad():
        teacher_log_probs = F.log_softmax(teacher_hidden @ teacher_head.mT, dim=-1)
    student_log_probs = F.log_softmax(hidden @ head.mT, dim=-1)
    divergence = F.kl_div(student_log_probs, teacher_log_probs, reduction="batchmean", log_target=True)
    return KD_RATIO * divergence + (1 - KD_RATIO) * F.nll_loss(student_log_probs, labels)


OBJECTIVES = {"ours": our_objective, "dense": dense_objective}


def loss_memory(name, num_positions, device):
    """Return the bytes that an objective and its gradients add to the peak of this process."""
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
    hidden, head = draw(num_positions, STUDENT_WIDTH), draw(LOSS_VOCAB_SIZE, STUDENT_WIDTH)
    teacher_hidden, teacher_head = draw(num_positions, TEACHER_WIDTH), draw(LOSS_VOCAB_SIZE, TEACHER_WIDTH)
    labels = torch.arange(num_positions, device=device) % LOSS_VOCAB_SIZE
    (head[:64].requires_grad_() @ head[:64].mT).sum().backward()  # starts threads and loads libraries
    before = peak_bytes(device)
    OBJECTIVES[name](hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels).backward()
    return peak_bytes(device) - before


def measure_memory(arguments):
    """Return the peak bytes by objective and number of positions."""
    # Processes are forked from a server that has only imported. With this setting the C library returns what is freed;
    # otherwise gaps in its heap would add about a third.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    context = get_context("forkserver")
    context.set_forkserver_preload(["encdec_slm.trainers"])
    peaks = {}
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in OBJECTIVES:
            limit = DENSE_LIMIT_BYTES / (DENSE_COPIES * 4 * LOSS_VOCAB_SIZE) if name == "dense" else math.inf
            sizes = [size for size in arguments.positions if size <= limit]
            peaks[name] = {size: pool.submit(loss_memory, name, size, arguments.device).result() for size in sizes}
            print(f"loss memory, {name}: {[f'{peak / 1e6:.0f} MB' for peak in peaks[name].values()]}", flush=True)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    chunk_positions = LOGITS_BUDGET_BYTES // (4 * LOSS_VOCAB_SIZE)
    return {"vocab_size": LOSS_VOCAB_SIZE, "chunk_positions": chunk_positions, "peak_bytes": peaks}


# Labels of a real teacher


def prepare_labels(arguments):
    """Choose rows, trim the tokenizer, and label the rows by each engine; return the tokens per second."""
    task = build_docstring_task()["train"].shuffle(seed=0)
    original = AutoTokenizer.from_pretrained(arguments.teacher)
    tokenizer, _ = trim_tokenizer(original, iterate_texts(task), max_size=arguments.vocab_size)
    task = task.filter(lambda row: len(tokenizer(row["source"])["input_ids"]) <= arguments.source_length)
    rows = Dataset.from_list(
        [{"prompt": row["source"], "completion": row["target"]} for row in task.take(arguments.batch_size)]
    )
    rows.to_json(arguments.output / "rows.jsonl")
    tokenizer.save_pretrained(arguments.output / "tokenizer")
    prompts = [original(row["prompt"])["input_ids"] for row in rows]
    targets = [[*original(row["completion"])["input_ids"], original.eos_token_id] for row in rows]
    speeds = {}
    for number, (name, dtype) in enumerate(ENGINES.items()):
        engine = build_engine(name.split()[0], arguments.teacher, dtype=dtype)
        parts = {
            "distributions": partial(engine.predict, prompts, targets, LABELS["topk"], [0] * len(rows)),
            "completions": partial(engine.generate, prompts, CompletionSettings(16)),
        }
        num_read = sum(map(len, prompts))
        num_tokens = {"distributions": num_read + sum(map(len, targets)), "completions": num_read + 16 * len(rows)}
        speeds[name] = {part: num_tokens[part] / time_call(call) for part, call in parts.items()}
        print(
            f"labels, {name}: { ({part: round(speed) for part, speed in speeds[name].items()}) } tokens/s", flush=True
        )
        for kind, spec in LABELS.items() if number == 0 else ():
            settings = LabelSettings(spec)
            label_dataset(rows, engine, arguments.output / kind, settings, teacher=str(arguments.teacher))
    return speeds


def time_call(function):
    """Return the seconds of a call: of one thread its CPU time, which other processes do not change."""
    is_alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if is_alone else time.perf_counter
    start = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def build_step(name, arguments):
    """Return a function that does a whole step in one way, and its number of target tokens."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.output / "tokenizer")
    torch.manual_seed(0)
    student = EncDecSLMForConditionalGeneration(preset_config(arguments.preset, tokenizer))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    settings = Seq2SeqDistillationConfig(
        str(arguments.output / "trainer"),
        per_device_train_batch_size=arguments.batch_size,
        max_completion_length=arguments.new_tokens,
        **{"lmbda": 0.0, "beta": 0.0, "kd_ratio": 0.0 if name == "cross_entropy" else KD_RATIO},
        **{"bf16": False, "use_cpu": arguments.device == "cpu", "report_to": []},
    )
    trainer = Seq2SeqDistillationTrainer(
        student,
        str(arguments.teacher) if name == "teacher" else None,
        settings,
        Dataset.from_json(str(arguments.output / "rows.jsonl")),
        processing_class=tokenizer,
        teacher_cache=str(arguments.output / name) if name in LABELS else None,
    )

    def step():
        optimizer.zero_grad()
        batch = trainer.make_batch(trainer.train_dataset.to_list())
        trainer.compute_loss(student, batch).backward()
        optimizer.step()

    student.train()
    return step, sum(trainer.train_dataset["num_target_tokens"])


def time_label_steps(name, arguments):
    """Return the seconds of steps of one kind, the number of their target tokens, and the peak of the process."""
    step, num_tokens = build_step(name, arguments)
    step()
    return [time_call(step) for _ in range(arguments.repetitions)], num_tokens, peak_bytes(arguments.device)


def run_with_labels(arguments):
    """Return the contents of `benchmark_teacher_cache.json`."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    speeds = prepare_labels(arguments)
    context = get_context("spawn")
    report = {"labels_per_second": speeds, "tokens_per_second": {}, "seconds": {}, "peak_bytes": {}}
    for name in ("cross_entropy", *LABELS, "teacher"):
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            seconds, num_tokens, peak = pool.submit(time_label_steps, name, arguments).result()
        report["seconds"][name], report["peak_bytes"][name] = seconds, peak
        report["tokens_per_second"][name] = spread(num_tokens / np.array(seconds))
        print(f"step, {name}: {np.median(seconds):.2f} s, peak {peak / 1e6:,.0f} MB", flush=True)
    medians = {name: values["median"] for name, values in report["tokens_per_second"].items()}
    report["ratios"] = {title: medians[ours] / medians[other] for title, (ours, other, _) in LABEL_RATIOS.items()}
    return {"arguments": describe_arguments(arguments), "machine": describe_machine(arguments.device), **report}


def format_label_table(report):
    lines = ["| | tokens/s | peak memory (MB) |", "| --- | ---: | ---: |"]
    for name, speed in report["tokens_per_second"].items():
        lines.append(f"| step, {name} | {_format_spread(speed)} | {report['peak_bytes'][name] / 1e6:,.0f} |")
    for name, speeds in report["labels_per_second"].items():
        lines += [f"| {part}, {name} | {speed:,.0f} | |" for part, speed in speeds.items()]
    lines += ["", "| ratio of speeds | | at least |", "| --- | ---: | ---: |"]
    for title, (*_, bar) in LABEL_RATIOS.items():
        lines.append(f"| {title} | {report['ratios'][title]:.2f} x | {bar} x |")
    return "\n".join(lines)


# Report


def describe_arguments(arguments):
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}


def run(arguments):
    """Return the contents of `benchmark_training.json`."""
    machine = {**describe_machine(arguments.device), trl.__name__: trl.__version__}
    memory, bench = measure_memory(arguments), build(arguments)
    runs = measure_times(bench, arguments)
    return {
        "arguments": describe_arguments(arguments),
        "machine": machine,
        "num_parameters": {"student": bench.student.num_parameters(), "teacher": bench.teacher.num_parameters()},
        "num_tokens_per_step": bench.gold_ids.numel(),
        **compare(runs, bench.gold_ids.numel()),
        "loss_memory": memory,
        "runs": runs,
    }


def format_table(report):
    lines = ["| | ours | other | ratio | at least |", "| --- | ---: | ---: | ---: | ---: |"]
    for title, (ours, other, bar) in RATIOS.items():
        speeds = [_format_spread(report["tokens_per_second"][name]) for name in (ours, other)]
        ratio, bar = f"{_format_spread(report['ratios'][title])} x", f"{bar} x" if bar else ""
        lines.append(f"| {title} (tokens/s) | {' | '.join(speeds)} | {ratio} | {bar} |")
    ours, dense = (report["loss_memory"]["peak_bytes"][name] for name in OBJECTIVES)
    for size, peak in ours.items():
        other = f"{dense[size] / 1e6:,.0f} | {peak / dense[size]:.2f} x" if size in dense else "not run |"
        lines.append(f"| loss memory, dense loss, {size} positions (MB) | {peak / 1e6:,.0f} | {other} | |")
    return "\n".join(lines)


def _format_spread(values):
    return "{median:.3g} ({lower_quartile:.3g} to {upper_quartile:.3g})".format(**values)


def describe_setting(report):
    arguments, machine, memory = report["arguments"], report["machine"], report["loss_memory"]
    student, teacher = (f"{count / 1e6:.1f}M" for count in report["num_parameters"].values())
    rows = f"{arguments['batch_size']} rows of {arguments['source_length']} + {arguments['new_tokens']} tokens"
    where = machine["gpu"] or f"{machine['cpu']}, torch threads: {machine['torch_threads']}"
    return (
        f"Student {student}, teacher {teacher}, vocabulary {arguments['vocab_size']:,}, {rows}, float32, {where}.\n"
        f"Loss memory: vocabulary {memory['vocab_size']:,}, chunks of {memory['chunk_positions']} positions."
    )


def draw_report(report):
    """Draw tokens per second of each contender, and the loss's memory over positions."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    speeds = report["tokens_per_second"]
    speed.barh([name.replace("_", " ") for name in speeds], [values["median"] for values in speeds.values()])
    speed.bar_label(speed.containers[0], fmt="%.0f", padding=3)
    speed.set(xlabel="target tokens per second, median")
    for (name, peaks), marker in zip(report["loss_memory"]["peak_bytes"].items(), "os", strict=True):
        label = "dense (up to 6 GB)" if name == "dense" else name
        memory.plot(list(peaks), [peak / 1e6 for peak in peaks.values()], marker=marker, label=label)
    memory.set_xscale("log", base=2)
    memory.set(xlabel=f"target positions (vocabulary {LOSS_VOCAB_SIZE:,})", ylabel="peak memory of the loss (MB)")
    memory.set_ylim(bottom=0)
    memory.grid(alpha=0.3)
    memory.legend()
    figure.suptitle(describe_setting(report), fontsize=9)
    return figure


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="26m", choices=list_presets(), help="of the student")
    parser.add_argument("--teacher-preset", default="26m", choices=list_presets(), help="the teacher is its baseline")
    parser.add_argument("--teacher", help="folder or Hub name of a decoder-only model, to measure its labels instead")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of both models; replaces the presets'")
    parser.add_argument("--batch-size", type=int, default=16, help="rows")
    parser.add_argument("--source-length", type=int, default=64, help="tokens")
    parser.add_argument("--padded-source-length", type=int, default=1024, help="tokens, with padding, of the original")
    parser.add_argument("--new-tokens", type=int, default=64, help="per row, and in its gold target")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--positions", default="64,128,256,512,1024,2048", help="of the loss's memory")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_training"), help="folder of the files")
    parsed = parser.parse_args(arguments)
    parsed.positions = sorted({int(size) for size in parsed.positions.split(",")})
    sizes = (parsed.batch_size, parsed.source_length, parsed.new_tokens, parsed.repetitions, *parsed.positions)
    if min(sizes) < 1 or parsed.vocab_size < TOP_K or parsed.padded_source_length < parsed.source_length:
        parser.error("numbers must be at least 1, the vocabulary 128, and a padded source no shorter than a source")
    return parsed


def main():
    arguments = parse_arguments()
    if arguments.teacher is not None:
        report = run_with_labels(arguments)
        print(f"\n{format_label_table(report)}\n")
        text = json.dumps({"command": " ".join(sys.argv), **report}, indent=2) + "\n"
        write_file(arguments.output / "benchmark_teacher_cache.json", text)
        return
    report = run(arguments)
    print(f"\n{format_table(report)}\n\n{describe_setting(report)}\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    text, figure = json.dumps({"command": " ".join(sys.argv), **report}, indent=2) + "\n", draw_report(report)
    write_file(arguments.output / "benchmark_training.json", text)
    write_file(arguments.output / "benchmark_training.png", lambda path: figure.savefig(path, format="png", dpi=150))


if __name__ == "__main__":
    main()
