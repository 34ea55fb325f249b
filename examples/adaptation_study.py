# SPDX-License-Identifier: Apache-2.0
"""Compare ways to start an encoder-decoder from a decoder-only checkpoint, by the loss after some distillation steps.

    python examples/adaptation_study.py SOURCE [--starts default even ...] [--seeds 0 1 2] [--steps 200]

SOURCE is a folder, or a preset such as `tiny`, whose decoder-only baseline is trained first. Students with 2/3 of its
layers in the encoder and 1/3 in the decoder learn from it to write docstrings for Python's standard library: forward
KL and cross-entropy, half each, a trimmed vocabulary, AdamW. Seeds order the rows. `--steps 0` measures the losses
before training alone. The teacher reads each row once, and a study that was stopped continues with the next start.
Writes one JSON file per run and study.md: losses in nats per held-out target token.

A source that follows instructions needs some: for Qwen2.5-Coder-0.5B-Instruct, `--prompt "Write the first sentence of
the docstring of this Python function.\n\n{source}"`.
"""

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, TrainingArguments, get_linear_schedule_with_warmup

from encdec_slm.adaptation import from_decoder_only, load_tokenizer, select_layers
from encdec_slm.benchmarks.machine import has_bfloat16_units
from encdec_slm.checkpoints import write_file
from encdec_slm.configuration import list_presets
from encdec_slm.trainers.decoder_only_job import train_decoder_only
from encdec_slm.trainers.row_encoding import RowEncoder
from encdec_slm.trainers.tasks.docstrings import build_docstring_task
from encdec_slm.vocabulary import old_token_ids, trim_tokenizer


@dataclass(frozen=True)
class Start:
    """How a student starts.

    Args:
        encoder (`str`): Layers of the encoder: `"first"`, `"last"`, `"even"`, `"contiguous"` (a block in the middle is
            left out), `"outer"` (the first, and every second one up to the last), or `"influence"` (those that change
            their input most, ShortGPT, arXiv 2403.03853).
        decoder (`str`): Layers of the decoder, likewise.
        cross_scale (`float`): Factor of the copied output projection of the cross-attention.
        source_norm (`bool`): Copy the source's final norm to the encoder, and keys and values of the cross-attention
            as they are, instead of multiplying the gain of the layer's input norm into them.
    """

    encoder: str = "first"
    decoder: str = "outer"
    cross_scale: float = 0.0
    source_norm: bool = False


# Targets on which the influence of layers is measured.
NUM_INFLUENCE_ROWS = 32
SOURCE_TRAINING = {
    **{"per_device_train_batch_size": 16, "learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05},
    **{"weight_decay": 0.01, "adam_beta2": 0.98, "save_strategy": "no", "dataloader_pin_memory": False},
}
STARTS = {
    "default": Start(),
    "source norm": Start(source_norm=True),
    "copied cross-attention": Start(cross_scale=1.0, source_norm=True),
    "cross-attention scaled by 0.1": Start(cross_scale=0.1, source_norm=True),
    "contiguous decoder": Start(decoder="contiguous", source_norm=True),
    "even decoder": Start(decoder="even", source_norm=True),
    "last decoder": Start(decoder="last", source_norm=True),
    "influence decoder": Start(decoder="influence", source_norm=True),
    "even encoder": Start(encoder="even", source_norm=True),
    "outer encoder": Start(encoder="outer", source_norm=True),
    "even": Start("even", "even", cross_scale=1.0, source_norm=True),
    "first-last": Start("first", "last", cross_scale=1.0, source_norm=True),
}


def main():
    arguments = parse_arguments()
    if arguments.source in list_presets():
        arguments.source = train_source(arguments)
    study = load_study(arguments)
    for seed in arguments.seeds:
        for name in arguments.starts:
            path = arguments.output_dir / f"{name.replace(' ', '_')}-{seed}.json"
            if not path.is_file():
                run = train(study, STARTS[name], seed, arguments, f"{name}, seed {seed}")
                write_file(path, json.dumps({"start": name, "seed": seed, **run}, indent=2))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.output_dir.glob("*.json"))]
    table = format_table(runs)
    write_file(arguments.output_dir / "study.md", table + "\n")
    print(f"\n{table}\n\nThe teacher has {study.teacher_loss:.3f}; kept mass {study.kept_mass:.3f}.")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of a decoder-only checkpoint, or a preset")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-source-length", type=int, default=64, help="tokens; longer rows are left out")
    parser.add_argument("--max-target-length", type=int, default=24, help="tokens; longer rows are left out")
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--prompt", default="{source}", help="what the teacher is asked")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/adaptation_study"))
    return parser.parse_args()


# Data and teacher


def train_source(arguments):
    """Train the decoder-only baseline of a preset for four epochs, unless an earlier run has done so."""
    folder = arguments.output_dir / "source"
    if not (folder / "config.json").is_file():
        settings = TrainingArguments(str(folder), num_train_epochs=4, report_to=[], **SOURCE_TRAINING)
        train_decoder_only(arguments.source, 512, build_docstring_task()["train"], settings, 80, 48)
    return str(folder)


@dataclass
class Study:
    source: str
    tokenizer: object
    encoder: RowEncoder
    train_rows: list
    eval_rows: list
    head: torch.Tensor
    teacher_loss: float
    kept_mass: float


def load_study(arguments):
    """Trim the vocabulary, select rows, and let the teacher read them, unless an earlier run has done so."""
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    original, task = load_tokenizer(arguments.source), build_docstring_task()
    folder = arguments.output_dir / "tokenizer"
    if not folder.is_dir():
        texts = (row[column] for row in task["train"] for column in ("source", "target"))
        trim_tokenizer(original, texts)[0].save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    encoder = RowEncoder(tokenizer)
    num_rows = max(arguments.steps * arguments.batch_size, NUM_INFLUENCE_ROWS)
    train_rows = select_rows(task["train"], encoder, arguments)[:num_rows]
    eval_rows = [row for name in ("validation", "test") for row in select_rows(task[name], encoder, arguments)]
    random.Random(0).shuffle(eval_rows)
    eval_rows = eval_rows[: arguments.eval_rows]
    path = arguments.output_dir / "teacher.pt"
    if not path.is_file():
        scores = read_rows(arguments, original, tokenizer, train_rows + eval_rows, len(eval_rows))
        write_file(path, lambda path: torch.save(scores, path))
    scores = torch.load(path)
    for row, hidden_states in zip(train_rows + eval_rows, scores.pop("hidden_states"), strict=True):
        row["hidden_states"] = hidden_states
    return Study(arguments.source, tokenizer, encoder, train_rows, eval_rows, **scores)


def select_rows(dataset, encoder, arguments):
    rows = []
    for row in dataset.shuffle(seed=0):
        source = encoder.encode_source(row["source"])
        target_ids, _ = encoder.encode_target(row["target"])
        if source.num_tokens <= arguments.max_source_length and len(target_ids) <= arguments.max_target_length:
            rows.append({**row, "input_ids": source.input_ids, "labels": target_ids})
    return rows


@torch.no_grad()
def read_rows(arguments, original, tokenizer, rows, num_eval_rows):
    """Return the teacher's final hidden states at the positions that predict target tokens, and its kept head rows."""
    teacher = AutoModelForCausalLM.from_pretrained(arguments.source, dtype=choose_dtype()).eval()
    old_ids = torch.tensor(old_token_ids(tokenizer, original))
    states, total, kept, num_tokens = [], 0.0, 0.0, 0
    for index, row in enumerate(rows):
        messages = [{"role": "user", "content": arguments.prompt.format(source=row["source"])}]
        prompt = original.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt_ids = original(prompt, add_special_tokens=False)["input_ids"]
        target_ids = old_ids[row["labels"]]
        ids = torch.cat((torch.tensor(prompt_ids), target_ids))[None]
        states.append(teacher.model(ids).last_hidden_state[0, len(prompt_ids) - 1 : -1].clone())
        if index >= len(rows) - num_eval_rows:
            log_probs = teacher.lm_head(states[-1]).float().log_softmax(-1)
            total -= log_probs.gather(1, target_ids[:, None]).sum().item()
            kept += log_probs[:, old_ids].exp().sum().item()
            num_tokens += len(target_ids)
        if index % 100 == 0:
            print(f"The teacher has read {index} of {len(rows)} rows.", flush=True)
    facts = {"teacher_loss": total / num_tokens, "kept_mass": kept / num_tokens}
    return {"hidden_states": states, "head": teacher.lm_head.weight[old_ids].clone(), **facts}


def choose_dtype():
    return torch.bfloat16 if torch.cuda.is_available() or has_bfloat16_units() else torch.float32


# Students


def build_student(study, start):
    """Build a student in float32: 2/3 and 1/3 of the source's layers."""
    teacher = AutoModelForCausalLM.from_pretrained(study.source, dtype=torch.float32)
    depth = teacher.config.num_hidden_layers
    num_encoder_layers, num_decoder_layers = round(2 / 3 * depth), depth - round(2 / 3 * depth)
    layers = []
    for name, count in ((start.encoder, num_encoder_layers), (start.decoder, num_decoder_layers)):
        is_influence = name == "influence"
        layers.append(
            most_influential_layers(study, teacher, count) if is_influence else choose_layers(name, depth, count)
        )
    student = from_decoder_only(teacher, strategy=tuple(layers), tokenizer=study.tokenizer)
    with torch.no_grad():
        for index, layer in zip(layers[1], student.model.decoder.layers, strict=True):
            original = teacher.model.layers[index]
            layer.cross_attn.o_proj.weight.copy_(start.cross_scale * original.self_attn.o_proj.weight)
            if start.source_norm:
                layer.cross_attn.k_proj.weight.copy_(original.self_attn.k_proj.weight)
                layer.cross_attn.v_proj.weight.copy_(original.self_attn.v_proj.weight)
        if start.source_norm:
            student.model.encoder.norm.weight.copy_(teacher.model.norm.weight)
    return student


def choose_layers(name, depth, count):
    if name == "outer":
        return select_layers("outer", depth, 1, count)[1]
    if name == "contiguous":
        num_first = max(1, (count - 1) // 2)
        return [*range(num_first), *range(depth - count + num_first, depth)]
    if name == "last":
        return list(range(depth - count, depth))
    return select_layers("even" if name == "even" else "outer", depth, count, 1)[0]


@torch.no_grad()
def most_influential_layers(study, teacher, count):
    """Return the layers whose output is least similar to their input where the teacher reads targets alone."""
    influence = torch.zeros(len(teacher.model.layers))

    def add_influence(index, layer_input, layer_output):
        influence[index] += (1 - torch.cosine_similarity(layer_input, layer_output, dim=-1)).sum()

    hooks = [
        layer.register_forward_hook(lambda _, args, output, index=index: add_influence(index, args[0], output))
        for index, layer in enumerate(teacher.model.layers)
    ]
    old_ids = torch.tensor(old_token_ids(study.tokenizer))
    for row in study.train_rows[:NUM_INFLUENCE_ROWS]:
        teacher.model(old_ids[row["labels"]][None])
    for hook in hooks:
        hook.remove()
    return sorted(influence.topk(count).indices.tolist())


def compute_losses(student, study, rows):
    """Return forward KL from the teacher, restricted to the kept tokens, and cross-entropy, both per target token."""
    batch = study.encoder.collate([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows])
    labels = batch["labels"]
    with torch.autocast("cpu", choose_dtype(), enabled=choose_dtype() == torch.bfloat16):
        decoder_input_ids = student.prepare_decoder_input_ids_from_labels(labels)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        outputs = student.model(**inputs, decoder_input_ids=decoder_input_ids, use_cache=False)
        log_probs = student.lm_head(outputs.last_hidden_state[labels >= 0]).float().log_softmax(-1)
    teacher_states = torch.cat([row["hidden_states"] for row in rows])
    teacher_log_probs = (teacher_states @ study.head.mT).float().log_softmax(-1)
    divergence = (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(-1).mean()
    return divergence, -log_probs.gather(1, labels[labels >= 0][:, None]).mean()


@torch.no_grad()
def evaluate(student, study, batch_size=20):
    student.eval()
    totals, num_tokens = torch.zeros(2), 0
    for first in range(0, len(study.eval_rows), batch_size):
        rows = study.eval_rows[first : first + batch_size]
        count = sum(len(row["labels"]) for row in rows)
        totals += count * torch.stack(compute_losses(student, study, rows))
        num_tokens += count
    student.train()
    return dict(zip(("divergence", "loss"), (totals / num_tokens).tolist(), strict=True))


def train(study, start, seed, arguments, name):
    """Return the held-out losses on the way, the first gradient norm, and the seconds."""
    student, started = build_student(study, start), time.perf_counter()
    curve = {0: evaluate(student, study)}
    options = {"lr": arguments.learning_rate, "betas": (0.9, 0.98), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(student.parameters(), **options)
    warmup, size = max(1, arguments.steps // 10), arguments.batch_size
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, arguments.steps)
    generator = torch.Generator().manual_seed(seed)
    order = []
    while len(order) < arguments.steps * size:
        order += torch.randperm(len(study.train_rows), generator=generator).tolist()
    norms = []
    for step in range(arguments.steps):
        rows = [study.train_rows[index] for index in order[step * size : (step + 1) * size]]
        (sum(compute_losses(student, study, rows)) / 2).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step + 1 in (arguments.steps // 2, arguments.steps):
            curve[step + 1] = evaluate(student, study)
            print(f"{name}, step {step + 1}: {curve[step + 1]}, {time.perf_counter() - started:.0f} s", flush=True)
    return {"losses": curve, "first_gradient_norm": next(iter(norms), None), "seconds": time.perf_counter() - started}


def format_table(runs):
    """Format mean and standard deviation over the seeds as a Markdown table, the best start first."""
    by_start = {run["start"]: [other for other in runs if other["start"] == run["start"]] for run in runs}
    steps = list(runs[0]["losses"])
    header = ("start", "seeds", *(f"loss at step {step}" for step in steps), "divergence")
    lines = [header, ("---", *["---:"] * (len(header) - 1))]
    for name in sorted(
        by_start, key=lambda name: statistics.mean(run["losses"][steps[-1]]["loss"] for run in by_start[name])
    ):
        cells = [format_mean(by_start[name], step, "loss") for step in steps]
        cells.append(format_mean(by_start[name], steps[-1], "divergence"))
        lines.append((name, str(len(by_start[name])), *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_mean(runs, step, measure):
    values = [run["losses"][step][measure] for run in runs]
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
