# SPDX-License-Identifier: Apache-2.0
"""One small distillation run, the same however many processes share its batches, and its loss written out plainly.

python distillation_worker.py <output_dir> <runs as JSON> splits each named run over two processes; with a third
argument, `alone`, it stays in one.
"""

import copy
import functools
import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import debug_launcher
from datasets import Dataset
from ddp_worker import build, history_of, make_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from encdec_slm.configuration import decoder_only_twin
from encdec_slm.trainers import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer


# accelerate collects garbage after each run; two thirds of a run's time would go by looking through torch's modules.
gc.freeze()

BOS, EOS = 1, 2
# Sums over rows or processes are taken in another order.
OTHER_ORDER = {"atol": 1e-5, "rtol": 1e-5}
# transformers 5.23 deprecates the name that 5.17 has.
CHECKPOINTING = (
    "activation" if "activation_checkpointing" in Seq2SeqDistillationConfig.__dataclass_fields__ else "gradient"
)
OFF_POLICY = {"lmbda": 0.0, "kd_ratio": 0.5}


@functools.cache
def twin_config(**switches):
    return decoder_only_twin(build(**switches).config)


def make_teacher(seed=1, **switches):
    """A decoder-only model of the student's size, with every tensor drawn from `seed`."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(twin_config(**switches)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
    return model.eval()


def make_texts(num_rows=16, seed=3, names=("prompt", "completion")):
    """Rows of words whose numbers of source and of target tokens differ, some of them greatly."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        lengths = (2 + index * 7 % 5, 1 + index * 5 % 9)
        texts = (torch.randint(4, 97, (length,), generator=generator).tolist() for length in lengths)
        rows.append(dict(zip(names, (" ".join(f"w{id}" for id in ids) for ids in texts), strict=True)))
    return rows


# A number of rows that neither two processes nor batches of 4 share out evenly.
EVALUATED = Dataset.from_list(make_texts(7, seed=8))


def make_args(output_dir, **settings):
    """Settings with which updates are proportional to the gradient, so that a wrong scale shows."""
    defaults = {
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,  # logs the norm and never clips
        "max_completion_length": 10,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        f"{CHECKPOINTING}_checkpointing": False,
    }
    return Seq2SeqDistillationConfig(str(output_dir), **{**defaults, **settings})


def make_trainer(output_dir, model=None, teacher=None, rows=None, arguments=None, **settings):
    """A trainer of the tiny pair; `arguments` go to it and `settings` to its config."""
    defaults = {
        "train_dataset": Dataset.from_list(make_texts() if rows is None else rows),
        "processing_class": make_tokenizer(),
    }
    return Seq2SeqDistillationTrainer(
        build() if model is None else model,
        make_teacher() if teacher is None else teacher,
        make_args(output_dir, **settings),
        **{**defaults, **(arguments or {})},
    )


def ids_of(text):
    return [int(word[1:]) for word in text.split()]


def gold_pairs(rows):
    """Source ids and target ids, end-of-text token included."""
    return [(ids_of(row["prompt"]), [*ids_of(row["completion"]), EOS]) for row in rows]


def plain_divergence(student_logits, teacher_logits, beta, temperature):
    """Nats per position by the definition, from probabilities."""
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0.0 else kl(q, p)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def logits_beside(student, teacher, source, target):
    """The logits that student and teacher predict each target token from, of shape (T, V): one row, no padding."""
    decoder_input = torch.tensor([[BOS, *target[:-1]]])
    student_logits = student(input_ids=torch.tensor([source]), decoder_input_ids=decoder_input).logits[0]
    with torch.no_grad():
        teacher_logits = teacher(input_ids=torch.tensor([source + target])).logits[0]
    begin = len(source) - 1
    return student_logits, teacher_logits[begin : begin + len(target)]


def plain_numbers(
    student, teacher, pairs, gold=None, beta=1.0, kd_temperature=1.0, kd_ratio=1.0, smoothing=0.0, common=None
):
    """The loss, its parts and what evaluation measures, row by row: means over tokens, not over rows.

    `pairs` are what both models are compared on, on the first `common` ids (`None`: all of them), and `gold` what the
    cross-entropy is taken of (`None`: the same).
    """
    divergence, entropy, agreement, cross_entropy = [], [], [], []
    for source, target in pairs:
        mine, theirs = logits_beside(student, teacher, source, target)
        entropy.append(torch.distributions.Categorical(logits=mine).entropy())
        mine, theirs = mine[:, :common], theirs[:, :common]
        divergence.append(plain_divergence(mine, theirs, beta, kd_temperature))
        agreement.append((mine.argmax(-1) == theirs.argmax(-1)).float())
    for source, target in pairs if gold is None else gold:
        mine, _ = logits_beside(student, teacher, source, target)
        cross_entropy.append(F.cross_entropy(mine, torch.tensor(target), reduction="none", label_smoothing=smoothing))
    parts = {"kd_loss": divergence, "entropy": entropy, "teacher_agreement": agreement, "ce_loss": cross_entropy}
    numbers = {name: torch.cat(part).mean() for name, part in parts.items()}
    numbers["loss"] = kd_ratio * kd_temperature**2 * numbers["kd_loss"] + (1 - kd_ratio) * numbers["ce_loss"]
    return numbers


def result_of(trainer):
    return {
        "num_processes": trainer.accelerator.num_processes,
        "losses": history_of(trainer),
        "gradient_norms": history_of(trainer, "grad_norm"),
        "weights": dict(trainer.accelerator.unwrap_model(trainer.model).state_dict()),
    }


def metrics_of(trainer, dataset=None):
    """What evaluation measures of the models, without its speed."""
    metrics = trainer.evaluate() if dataset is None else trainer.evaluate(dataset)
    names = ("loss", "kd_loss", "ce_loss", "teacher_agreement", "entropy")
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def floats(numbers):
    return {name: value.item() for name, value in numbers.items()}


def capture(owner, name, calls):
    """Lets `owner.name` be called as before and appends to `calls` what it was given and what it returned."""
    original = getattr(owner, name)

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, kwargs, result))
        return result

    setattr(owner, name, spy)


def greedy_text(model, source, begin):
    """What `model` writes after one source without padding, up to and with the end-of-text token."""
    with torch.no_grad():
        written = model.generate(
            torch.tensor([source]),
            attention_mask=torch.ones(1, len(source), dtype=torch.long),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    return written[0, begin:].tolist()


def frozen_texts(source_ids):
    """Texts that depend on the source alone, of different lengths."""
    return [[*reversed(ids), *ids[: len(ids) % 3], EOS] for ids in source_ids]


# What is trained, and what is not


def same_function_pair():
    """A student and a teacher whose next token depends on the last one alone: table, norm and head, each the same."""
    student, teacher = build(), make_teacher()
    for model in (student, teacher):
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        teacher.get_input_embeddings().weight.copy_(student.get_input_embeddings().weight)
        teacher.get_output_embeddings().weight.copy_(student.get_output_embeddings().weight)
        teacher.model.norm.weight.copy_(student.model.decoder.norm.weight)
    return student, teacher


def main(output_dir, runs):
    results = {}
    for name, settings in json.loads(runs).items():
        trainer = make_trainer(output_dir, **settings)
        trainer.train()
        results[name] = {**result_of(trainer), "metrics": metrics_of(trainer, EVALUATED)}
    if trainer.is_world_process_zero():
        torch.save(results, Path(output_dir) / "result.pt")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    if len(sys.argv) > 3:
        main(*sys.argv[1:3])
    else:
        debug_launcher(main, sys.argv[1:], num_processes=2)
