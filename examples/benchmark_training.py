# SPDX-License-Identifier: Apache-2.0
"""Times distillation steps, and measures the memory of their loss: random weights, float32, random token ids.

    python examples/benchmark_training.py --preset 26m --teacher-preset 26m --batch-size 16 --new-tokens 64

On-policy: the student writes `--new-tokens` tokens for every row, then learns from them, from the teacher and from
gold targets (forward KL with weight 0.9, cross-entropy 0.1; AdamW). Our trainer writes for the whole batch, with a
cache. The predecessor's data path is written out below: a row at a time in train mode, the decoder run over the whole
prefix for each token; then all teacher logits and two whole student passes on sources padded to the fixed length of
its recipe, 1024. Its step is also timed without that padding. No text ends early. Off-policy: our loss and its
gradients, against what they cannot do without: both forwards and the student's backward.

Memory: what the loss and its gradients add to the peak of a fresh process, given hidden states and heads, against the
dense loss where that is expected to fit 6 GB. Repetitions of the contenders are interleaved; medians and quartiles are
reported. Writes `benchmark_training.json` (with every raw time) and `benchmark_training.png`. Data loading, logging,
gradient clipping and accumulation, several processes, half precision and adapters are not measured.
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
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from encdec_slm import EncDecSLMConfig
from encdec_slm.benchmarks.machine import describe_machine, matmul_rate, peak_bytes
from encdec_slm.benchmarks.measuring import spread
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import decoder_only_twin, list_presets, load_preset
from encdec_slm.configuration.sizes import build_model
from encdec_slm.trainers import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer
from encdec_slm.trainers.distillation_losses import LOGITS_BUDGET_BYTES, ObjectiveSettings, distillation_objective
from encdec_slm.trainers.output_heads import OutputHead


PAD_TOKEN_ID, START_TOKEN_ID, EOS_TOKEN_ID = 0, 1, 2
KD_RATIO, TEMPERATURE, TOP_K = 0.9, 0.9, 128
ON_POLICY = ("ours_on_policy", "predecessor_on_policy")
BARS = {"on_policy_speedup": "10 x", "writing_speedup": "10 x", "off_policy_share_of_needed_speed": "0.8 x"}
# A vocabulary that no logits of a batch fit beside (Qwen's), and widths that leave the heads' weights small.
LOSS_VOCAB_SIZE, STUDENT_WIDTH, TEACHER_WIDTH = 151_936, 64, 128
# Of N x V float32 values that the dense loss holds at its peak, a little more than was measured.
DENSE_COPIES, DENSE_LIMIT_BYTES = 5, 6 * 10**9


def build(arguments):
    """Models and rows that all contenders share, and our trainers of them."""
    vocabulary = {"vocab_size": arguments.vocab_size, "eos_token_id": EOS_TOKEN_ID}
    presets = (load_preset(name).to_dict() for name in (arguments.preset, arguments.teacher_preset))
    student_config, teacher_shape = (EncDecSLMConfig.from_dict(preset | vocabulary) for preset in presets)
    torch.manual_seed(0)
    student, teacher = (
        build_model(config, arguments.device, dtype=torch.float32)
        for config in (student_config, decoder_only_twin(teacher_shape))
    )
    student.train().generation_config.eos_token_id = student.generation_config.max_length = None
    teacher.eval()
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
    words = Tokenizer(
        models.WordLevel({str(id): id for id in range(arguments.vocab_size)}, unk_token=str(PAD_TOKEN_ID))
    )
    special = {"pad_token": str(PAD_TOKEN_ID), "bos_token": str(START_TOKEN_ID), "eos_token": str(EOS_TOKEN_ID)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
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


@torch.no_grad()
def predecessor_text(student, source_ids, num_tokens):
    """Ids that a student in train mode samples for one source; nothing but the encoder's output is kept."""
    encoder_outputs = student.get_encoder()(source_ids)
    decoder_ids = torch.full_like(source_ids[:, :1], START_TOKEN_ID)
    for _ in range(num_tokens):
        outputs = student(encoder_outputs=encoder_outputs, decoder_input_ids=decoder_ids, use_cache=False)
        logits = outputs.logits[:, -1] / TEMPERATURE
        least = logits.topk(TOP_K).values[:, -1:]
        probabilities = logits.masked_fill(logits < least, -torch.inf).softmax(-1)
        decoder_ids = torch.cat((decoder_ids, torch.multinomial(probabilities, 1)), 1)
    return decoder_ids[:, 1:]


def predecessor_loss(bench, padded_length, target_ids):
    """0.9 KL + 0.1 cross-entropy of padded rows: two student passes, and all logits of the teacher."""
    sources, gold_ids, missing = bench.source_ids, bench.gold_ids, padded_length - bench.source_ids.shape[1]
    ones, shifted = torch.ones_like(sources), bench.student.prepare_decoder_input_ids_from_labels
    inputs = {"input_ids": F.pad(sources, (0, missing)), "attention_mask": F.pad(ones, (0, missing))}
    teacher_ids = torch.cat((F.pad(sources, (missing, 0)), target_ids), 1)
    teacher_mask = torch.cat((F.pad(ones, (missing, 0)), torch.ones_like(target_ids)), 1)
    with torch.no_grad():
        teacher_logits = bench.teacher(teacher_ids, attention_mask=teacher_mask, use_cache=False).logits
    teacher_log = F.log_softmax(teacher_logits[:, padded_length - 1 : -1], dim=-1).flatten(0, 1)
    logits = bench.student(**inputs, decoder_input_ids=shifted(target_ids), use_cache=False).logits
    student_log = F.log_softmax(logits, dim=-1).flatten(0, 1)
    divergence = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    logits = bench.student(**inputs, decoder_input_ids=shifted(gold_ids), use_cache=False).logits
    return KD_RATIO * divergence + (1 - KD_RATIO) * F.cross_entropy(logits.flatten(0, 1), gold_ids.flatten())


def contenders(bench, padded_length):
    """Parts of a step by contender; each part is given what the one before it returned."""
    num_tokens, off_policy_batch = bench.gold_ids.shape[1], bench.off_policy.make_batch(bench.rows)

    def write(_):
        batch = bench.on_policy.make_batch(bench.rows)
        if batch["num_target_tokens"] != bench.gold_ids.numel():
            raise RuntimeError(f"The student wrote {batch['num_target_tokens']} tokens, not {bench.gold_ids.numel()}.")
        return batch

    def write_row_by_row(_):
        return torch.cat([predecessor_text(bench.student, source[None], num_tokens) for source in bench.source_ids])

    def learn(loss):
        loss.backward()
        bench.optimizer.step()

    @torch.no_grad()
    def teacher_logits(_):
        teacher_ids = torch.cat((bench.source_ids, bench.gold_ids), 1)[:, :-1]
        return bench.teacher(teacher_ids, logits_to_keep=num_tokens, use_cache=False).logits

    def student_sum(_):
        decoder_ids = bench.student.prepare_decoder_input_ids_from_labels(bench.gold_ids)
        return bench.student(bench.source_ids, decoder_input_ids=decoder_ids, use_cache=False).logits.sum()

    loss_of = partial(bench.on_policy.compute_loss, bench.student)
    theirs = partial(predecessor_loss, bench, bench.source_ids.shape[1])
    return {
        "predecessor_padded": {
            "loss": lambda _: predecessor_loss(bench, padded_length, bench.gold_ids),
            "backward": learn,
        },
        "predecessor_on_policy": {"writing": write_row_by_row, "loss": theirs, "backward": learn},
        "ours_on_policy": {"writing": write, "loss": loss_of, "backward": learn},
        "needed_off_policy": {"teacher": teacher_logits, "student": student_sum, "backward": torch.Tensor.backward},
        "ours_off_policy": {"loss": lambda _: loss_of(off_policy_batch), "backward": torch.Tensor.backward},
    }


def timed(bench, parts):
    """Seconds of each part of a step."""
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
    """Runs of every contender, in turns, and the machine's rate of matrix products beside them."""
    steps = contenders(bench, arguments.padded_source_length)
    predecessor_text(bench.student, bench.source_ids[:1], 2)
    for name in ("ours_on_policy", "needed_off_policy", "ours_off_policy"):  # the predecessor's is warm from theirs
        timed(bench, steps[name])
    runs, matmul_rates = {name: [] for name in steps}, []
    for repetition in range(arguments.repetitions):
        matmul_rates.append(matmul_rate(torch.ones(2048, 2048, device=arguments.device)))
        for name, parts in steps.items():
            runs[name].append(timed(bench, parts))
            seconds = ", ".join(f"{part} {value:.2f} s" for part, value in runs[name][-1].items())
            print(f"repetition {repetition + 1} of {arguments.repetitions}, {name}: {seconds}", flush=True)
    return runs, matmul_rates


def compare(runs, num_tokens):
    """Speeds of the contenders, and ours by the others', run by run: neighbours share the machine's mood."""
    seconds = {name: np.array([sum(run.values()) for run in runs[name]]) for name in runs}
    writing = {name: np.array([run["writing"] for run in runs[name]]) for name in ON_POLICY}
    learning = {name: seconds[name] - writing[name] for name in ON_POLICY}
    ours, predecessor = ON_POLICY
    seconds["predecessor_padded"] += writing[predecessor]  # texts are written from sources without padding
    return {
        "step_seconds": {name: spread(seconds[name]) for name in runs},
        "writing_seconds": {name: spread(writing[name]) for name in ON_POLICY},
        "learning_seconds": {name: spread(learning[name]) for name in ON_POLICY},
        "tokens_per_second": {name: spread(num_tokens / seconds[name]) for name in (*ON_POLICY, "predecessor_padded")},
        "on_policy_speedup": spread(seconds["predecessor_padded"] / seconds[ours]),
        "unpadded_speedup": spread(seconds[predecessor] / seconds[ours]),
        "writing_speedup": spread(writing[predecessor] / writing[ours]),
        "learning_speedup": spread(learning[predecessor] / learning[ours]),
        "off_policy_share_of_needed_speed": spread(seconds["needed_off_policy"] / seconds["ours_off_policy"]),
    }


def our_objective(hidden, head, teacher_hidden, teacher_head, labels):
    weights = {"kd_weight": KD_RATIO / len(labels), "ce_weight": (1 - KD_RATIO) / len(labels)}
    rest = {"beta": 0.0, "temperature": 1.0, "label_smoothing": 0.0, "num_common_tokens": LOSS_VOCAB_SIZE}
    models = hidden, OutputHead(head), teacher_hidden, OutputHead(teacher_head)
    return distillation_objective(*models, labels, ObjectiveSettings(**weights, **rest)).loss


def dense_objective(hidden, head, teacher_hidden, teacher_head, labels):
    """The same from whole logits, by autograd."""
    with torch.no_grad():
        teacher_log = F.log_softmax(teacher_hidden @ teacher_head.mT, dim=-1)
    student_log = F.log_softmax(hidden @ head.mT, dim=-1)
    divergence = F.kl_div(student_log, teacher_log, reduction="batchmean", log_target=True)
    return KD_RATIO * divergence + (1 - KD_RATIO) * F.nll_loss(student_log, labels)


OBJECTIVES = {"ours": our_objective, "dense": dense_objective}


def loss_memory(name, num_positions, arguments):
    """Bytes that an objective and its gradients add to the peak of this process; run it in a new one."""
    draw = partial(torch.randn, generator=torch.Generator(arguments.device).manual_seed(0), device=arguments.device)
    hidden, head = draw(num_positions, STUDENT_WIDTH), draw(LOSS_VOCAB_SIZE, STUDENT_WIDTH)
    teacher_hidden, teacher_head = draw(num_positions, TEACHER_WIDTH), draw(LOSS_VOCAB_SIZE, TEACHER_WIDTH)
    labels = torch.arange(num_positions, device=arguments.device) % LOSS_VOCAB_SIZE
    (head[:64].requires_grad_() @ head[:64].mT).sum().backward()  # threads and libraries are there before
    before = peak_bytes(arguments.device)
    OBJECTIVES[name](hidden.requires_grad_(), head.requires_grad_(), teacher_hidden, teacher_head, labels).backward()
    return peak_bytes(arguments.device) - before


def measure_memory(arguments):
    """Peak bytes by objective and number of positions, and what they are to be read with."""
    # Forked from a server that has done nothing but import: fresh, without the seconds of the imports. The C library
    # gives back what is freed, so that the peak is what is held; else its heap's gaps come on top, a third or so.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    context = get_context("forkserver")
    context.set_forkserver_preload(["encdec_slm.trainers"])
    peaks = {}
    with ProcessPoolExecutor(max_workers=1, mp_context=context, max_tasks_per_child=1) as pool:
        for name in OBJECTIVES:
            limit = DENSE_LIMIT_BYTES / (DENSE_COPIES * 4 * LOSS_VOCAB_SIZE) if name == "dense" else math.inf
            sizes = [size for size in arguments.positions if size <= limit]
            peaks[name] = {size: pool.submit(loss_memory, name, size, arguments).result() for size in sizes}
            print(f"loss memory, {name}: {[f'{peak / 1e6:.0f} MB' for peak in peaks[name].values()]}", flush=True)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    sizes = {"vocab_size": LOSS_VOCAB_SIZE, "student_width": STUDENT_WIDTH, "teacher_width": TEACHER_WIDTH}
    return {**sizes, "chunk_positions": LOGITS_BUDGET_BYTES // (4 * LOSS_VOCAB_SIZE), "peak_bytes": peaks}


def run(arguments):
    """The contents of `benchmark_training.json`."""
    here = {**describe_machine(arguments.device), trl.__name__: trl.__version__}
    memory, bench = measure_memory(arguments), build(arguments)
    runs, matmul_rates = measure_times(bench, arguments)
    return {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "machine": here,
        "num_parameters": {"student": bench.student.num_parameters(), "teacher": bench.teacher.num_parameters()},
        "matmul_flops_per_second": spread(matmul_rates),
        "num_tokens_per_step": bench.gold_ids.numel(),
        **compare(runs, bench.gold_ids.numel()),
        "loss_memory": memory,
        "runs": runs,
    }


def table(report):
    """All results beside the bars they are to reach, as Markdown."""
    lines = ["| | ours | against | ours by it | at least |", "| --- | ---: | ---: | ---: | ---: |"]
    for title, key, other, ratio in (
        ("on-policy step, predecessor's (tokens/s)", "tokens_per_second", "padded", "on_policy_speedup"),
        ("- its step without padding (tokens/s)", "tokens_per_second", "predecessor", "unpadded_speedup"),
        ("- its writing alone (s)", "writing_seconds", "predecessor", "writing_speedup"),
        ("- its learning alone (s)", "learning_seconds", "predecessor", "learning_speedup"),
        ("off-policy step, needed passes (s)", "step_seconds", "needed", "off_policy_share_of_needed_speed"),
    ):
        kind = "off_policy" if other == "needed" else "on_policy"
        names = (f"ours_{kind}", "predecessor_padded" if other == "padded" else f"{other}_{kind}")
        ours, against = (_text(report[key][name]) for name in names)
        lines.append(f"| {title} | {ours} | {against} | {_text(report[ratio])} x | {BARS.get(ratio, '')} |")
    ours, dense = (report["loss_memory"]["peak_bytes"][name] for name in OBJECTIVES)
    for size, peak in ours.items():
        against = f"{dense[size] / 1e6:,.0f} | {peak / dense[size]:.2f} x" if size in dense else "not run |"
        lines.append(f"| loss memory, dense loss's, {size} positions (MB) | {peak / 1e6:,.0f} | {against} | |")
    return "\n".join(lines)


def _text(summary):
    return "{median:.3g} ({lower_quartile:.3g} to {upper_quartile:.3g})".format(**summary)


def notes(report):
    memory, matmul = report["loss_memory"], report["matmul_flops_per_second"]["median"]
    return f"""{setting(report)}: median (quartiles) of {report["arguments"]["repetitions"]} repetitions. Loss memory:
vocabulary {memory["vocab_size"]:,}, chunks of {memory["chunk_positions"]} positions, dense up to 6 GB. 2048 x 2048
matrix product: {matmul / 1e9:.0f} GFLOP/s."""


def setting(report):
    arguments, here = report["arguments"], report["machine"]
    student, teacher = (f"{count / 1e6:.1f}M" for count in report["num_parameters"].values())
    rows = f"{arguments['batch_size']} rows of {arguments['source_length']} + {arguments['new_tokens']} tokens"
    where = here["gpu"] or f"{here['cpu']}, torch threads: {here['torch_threads']}"
    return f"Student {student}, teacher {teacher}, vocabulary {arguments['vocab_size']:,}, {rows}, float32, {where}"


def plot(report, path):
    """Writes seconds per step and the loss's memory over positions as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    _plot_speed(speed, report)
    _plot_memory(memory, report["loss_memory"]["peak_bytes"])
    figure.suptitle(setting(report), fontsize=9)
    figure.savefig(path, format="png", dpi=150)
    plt.close(figure)


def _plot_speed(axis, report):
    steps = report["step_seconds"]
    writers = {"predecessor_padded": "predecessor_on_policy"}
    spreads = report["writing_seconds"]
    writing = [spreads.get(writers.get(name, name), {"median": 0.0})["median"] for name in steps]
    middle, low, high = (
        np.array([step[key] for step in steps.values()]) for key in ("median", "lower_quartile", "upper_quartile")
    )
    axis.barh(range(len(steps)), writing, color="tab:orange", label="writing")
    axis.barh(range(len(steps)), middle - writing, left=writing, color="tab:blue", label="learning")
    spreads = {"xerr": (middle - low, high - middle), "color": "black", "capsize": 3}
    axis.errorbar(middle, range(len(steps)), linestyle="none", **spreads)
    for index, name in enumerate(steps):
        rate = report["tokens_per_second"].get(name)
        text = f"{middle[index]:.2f} s" + (f", {rate['median']:.0f} tokens/s" if rate else "")
        axis.annotate(text, (high[index], index), (6, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(steps)), [name.replace("_", ",\n", 1).replace("_", "-") for name in steps])
    axis.invert_yaxis()
    axis.margins(x=0.55)
    axis.set_xlim(left=0)
    axis.set(xlabel="seconds per step, median and quartiles")
    axis.legend(loc="lower right")


def _plot_memory(axis, peak_bytes_by_objective):
    for (name, peaks), marker in zip(peak_bytes_by_objective.items(), "os", strict=True):
        label = "dense (up to 6 GB)" if name == "dense" else name
        axis.plot(list(peaks), [peak / 1e6 for peak in peaks.values()], marker=marker, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(peak_bytes_by_objective["ours"]), list(peak_bytes_by_objective["ours"]))
    axis.set(xlabel=f"target positions (vocabulary {LOSS_VOCAB_SIZE:,})", ylabel="peak memory of the loss (MB)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="26m", choices=list_presets(), help="of the student")
    parser.add_argument("--teacher-preset", default="26m", choices=list_presets(), help="whose twin teaches")
    parser.add_argument("--vocab-size", type=int, default=8192, help="of both models; replaces the presets'")
    parser.add_argument("--batch-size", type=int, default=16, help="rows")
    parser.add_argument("--source-length", type=int, default=64, help="tokens")
    parser.add_argument("--padded-source-length", type=int, default=1024, help="tokens, of the predecessor")
    parser.add_argument("--new-tokens", type=int, default=64, help="per row, and in its gold target")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--positions", default="64,128,256,512,1024,2048", help="of the loss's memory")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_training"), help="folder of the files")
    parsed = parser.parse_args(arguments)
    parsed.positions = sorted({int(size) for size in parsed.positions.split(",")})
    sizes = (parsed.batch_size, parsed.source_length, parsed.new_tokens, parsed.repetitions, *parsed.positions)
    if min(sizes) < 1 or parsed.vocab_size < TOP_K or parsed.padded_source_length < parsed.source_length:
        parser.error("a run needs at least 1 of everything, 128 token ids, and no padded source shorter than a source")
    return parsed


def main():
    arguments = parse_arguments()
    report = run(arguments)
    print(f"\n{table(report)}\n\n{notes(report)}\n")
    arguments.output.mkdir(parents=True, exist_ok=True)
    text, stem = json.dumps({"command": " ".join(sys.argv), **report}, indent=2) + "\n", "benchmark_training"
    write_file(arguments.output / f"{stem}.json", lambda path: path.write_text(text, encoding="utf-8"))
    write_file(arguments.output / f"{stem}.png", lambda path: plot(report, path))


if __name__ == "__main__":
    main()
