# SPDX-License-Identifier: Apache-2.0
"""Small distillation runs that are the same for any number of processes, and their loss written out plainly.

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
from ddp_worker import SGD, build, history_of, make_tokenizer, result_of
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from conftest import randomize
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.trainers import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer


# accelerate collects garbage after each run, which takes most of a run's time because of torch's many objects.
gc.freeze()

BOS, EOS = 1, 2
# Sums over rows or processes are taken in another order.
OTHER_ORDER = {"atol": 1e-5, "rtol": 1e-5}
# transformers 5.23 deprecates the name that 5.18 has.
CHECKPOINTING = (
    "activation" if "activation_checkpointing" in Seq2SeqDistillationConfig.__dataclass_fields__ else "gradient"
)
OFF_POLICY = {"lmbda": 0.0, "kd_ratio": 0.5}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@functools.cache
def teacher_config(**fields):
    return decoder_only_twin(build(**fields).config)


def make_teacher(seed=1, **fields):
    """A decoder-only model of the student's size, in eval mode."""
    return randomize(AutoModelForCausalLM.from_config(copy.deepcopy(teacher_config(**fields))), seed).eval()


def make_texts(num_rows=16, seed=3, names=("prompt", "completion")):
    """Rows of words whose numbers of source and of target tokens differ, some of them greatly."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        lengths = (2 + index * 7 % 5, 1 + index * 5 % 9)
        texts = (torch.randint(4, 97, (length,), generator=generator).tolist() for length in lengths)
        rows.append(dict(zip(names, (" ".join(f"w{id}" for id in ids) for ids in texts), strict=True)))
    return rows


# A number of rows that neither two processes nor batches of 4 divide evenly.
EVALUATED = Dataset.from_list(make_texts(7, seed=8))


def make_args(output_dir, **settings):
    defaults = {
        **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "max_steps": 2},
        **{"max_completion_length": 10, "bf16": False, f"{CHECKPOINTING}_checkpointing": False},
    }
    return Seq2SeqDistillationConfig(str(output_dir), **{**SGD, **defaults, **settings})


def make_trainer(output_dir, model=None, teacher=None, rows=None, arguments=None, **settings):
    """A trainer of the tiny pair, or of the student with labels; `arguments` go to it, `settings` to its config."""
    defaults = {
        "train_dataset": Dataset.from_list(make_texts() if rows is None else rows),
        "processing_class": make_tokenizer(),
    }
    needs_teacher = teacher is None and "teacher_cache" not in settings
    return Seq2SeqDistillationTrainer(
        build() if model is None else model,
        make_teacher() if needs_teacher else teacher,
        make_args(output_dir, **settings),
        **{**defaults, **(arguments or {})},
    )


def save_folder(folder, *parts):
    """Save models and tokenizers in a folder; return its name."""
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


def to_ids(text):
    return [int(word[1:]) for word in text.split()]


def gold_pairs(rows):
    """Source ids and target ids, with the end-of-text token."""
    return [(to_ids(row["prompt"]), [*to_ids(row["completion"]), EOS]) for row in rows]


def plain_divergence(student_logits, teacher_logits, beta, temperature):
    """Nats per position by the definition, from probabilities."""
    p, q = (teacher_logits / temperature).softmax(-1), (student_logits / temperature).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    if beta in (0.0, 1.0):
        return kl(p, q) if beta == 0.0 else kl(q, p)
    mixture = beta * p + (1 - beta) * q
    return beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)


def logits_of_pair(student, teacher, source, target):
    """Logits from which both models predict each target token, of shape (T, V): one row, no padding."""
    decoder_input = torch.tensor([[BOS, *target[:-1]]])
    student_logits = student(input_ids=torch.tensor([source]), decoder_input_ids=decoder_input).logits[0]
    with torch.no_grad():
        teacher_logits = teacher(input_ids=torch.tensor([source + target])).logits[0]
    start = len(source) - 1
    return student_logits, teacher_logits[start : start + len(target)]


def plain_numbers(
    student, teacher, pairs, gold=None, beta=1.0, kd_temperature=1.0, kd_ratio=1.0, smoothing=0.0, common=None
):
    """The loss and what evaluation measures, row by row: means over tokens.

    Args:
        pairs (`list`): Sources and targets on which both models are compared, on the first `common` ids.
        gold (`list`, *optional*): Sources and targets of the cross-entropy; defaults to `pairs`.
    """
    divergence, entropy, agreement, cross_entropy = [], [], [], []
    for source, target in pairs:
        student_logits, teacher_logits = logits_of_pair(student, teacher, source, target)
        entropy.append(torch.distributions.Categorical(logits=student_logits).entropy())
        student_logits, teacher_logits = student_logits[:, :common], teacher_logits[:, :common]
        divergence.append(plain_divergence(student_logits, teacher_logits, beta, kd_temperature))
        agreement.append((student_logits.argmax(-1) == teacher_logits.argmax(-1)).float())
    for source, target in pairs if gold is None else gold:
        logits, _ = logits_of_pair(student, teacher, source, target)
        cross_entropy.append(
            F.cross_entropy(logits, torch.tensor(target), reduction="none", label_smoothing=smoothing)
        )
    parts = {"kd_loss": divergence, "entropy": entropy, "teacher_agreement": agreement, "ce_loss": cross_entropy}
    numbers = {name: torch.cat(part).mean() for name, part in parts.items()}
    numbers["loss"] = kd_ratio * kd_temperature**2 * numbers["kd_loss"] + (1 - kd_ratio) * numbers["ce_loss"]
    return numbers


def assert_step(trainer, student, loss, reference):
    """Assert that the only step of a run had this loss, and took the gradient of it for `reference`."""
    torch.testing.assert_close(history_of(trainer)[0], loss.item(), **OTHER_ORDER)
    loss.backward()
    stepped = {name: (p if p.grad is None else p - 0.05 * p.grad).detach() for name, p in reference.named_parameters()}
    torch.testing.assert_close(dict(student.named_parameters()), stepped, **OTHER_ORDER)


def metrics_of(trainer, dataset=None):
    """What evaluation measures of the models, without its speed."""
    metrics = trainer.evaluate() if dataset is None else trainer.evaluate(dataset)
    names = ("loss", "kd_loss", "ce_loss", "teacher_agreement", "entropy")
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def floats(numbers):
    return {name: value.item() for name, value in numbers.items()}


def capture(owner, name):
    """Return a list to which each call of `owner.name` appends its arguments and its result."""
    original, calls = getattr(owner, name), []

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    setattr(owner, name, spy)
    return calls


def capture_completions(trainer, role="student"):
    """Return a list to which each generation appends pairs of source ids and completion."""
    pairs, original = [], getattr(trainer, f"generate_as_{role}")

    def spy(rows, config=None):
        completions = original(rows, config)
        pairs.extend(zip([row["source_ids"] for row in rows], completions, strict=True))
        return completions

    setattr(trainer, f"generate_as_{role}", spy)
    return pairs


def capture_batches(trainer):
    """Return a list to which each batch of the trainer is appended with its rows."""
    return capture(trainer, "make_batch")


def greedy_completion(model, source, start):
    """What `model` generates for one source without padding, up to and with the end-of-text token."""
    options = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": EOS, "pad_token_id": 0}
    with torch.no_grad():
        output = model.generate(torch.tensor([source]), attention_mask=torch.ones(1, len(source)).long(), **options)
    return output[0, start:].tolist()


def generate_from_source(rows, config):
    """Completions of different lengths that depend on the source alone."""
    return [[*reversed(row["source_ids"]), *row["source_ids"][: len(row["source_ids"]) % 3], EOS] for row in rows]


def same_function_pair():
    """A student and a teacher that are the same function of the last token: table, norm and head are equal."""
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
