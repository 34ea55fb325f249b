# SPDX-License-Identifier: Apache-2.0
"""Distillation of a teacher that has another tokenizer than the student, at aligned byte spans."""

import json

import pytest
import torch
from ddp_worker import build, history_of
from distillation_worker import (
    OTHER_ORDER,
    capture_batches,
    make_args,
    make_teacher,
    make_trainer,
    metrics_of,
    weights_of,
)
from tokenizers import Tokenizer
from torch import nn
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from conftest import build_byte_tokenizer


WORDS = ("Ġreads", "Ġreturns", "Ġlines")
ROWS = [
    {"prompt": f"{kind} reads {things}", "completion": f"returns {things}{' lines' * number}"}
    for kind in ("reader", "a reader", "writer", "no writer")
    for number, things in enumerate(("lines", "bytes", "naïve 🙂", "abcd"))
]
SPANS = {"token_alignment": "byte_spans", "max_completion_length": 40}


def build_tokenizer(*words):
    return build_byte_tokenizer(ends_sources=False, words=words)


def permute(tokenizer, seed=0):
    """The tokenizer with its ids in another order, and the old id of each new one."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    old_ids = [
        0,
        1,
        2,
        3,
        *(4 + torch.randperm(len(tokenizer) - 4, generator=torch.Generator().manual_seed(seed))).tolist(),
    ]
    tokens = tokenizer.convert_ids_to_tokens(old_ids)
    spec["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokenizer.special_tokens_map), old_ids


class Pair:
    """A student and a teacher with other words in its vocabulary."""

    def __init__(self):
        # The student's "cd" begins inside the teacher's "abc", but is not one of its tokens "a" and "bc".
        self.tokenizer = build_tokenizer("Ġre", "Ġlines", "cd", "bc")
        self.teacher_tokenizer = build_tokenizer(*WORDS, "abc")
        self.teacher = make_teacher(vocab_size=len(self.teacher_tokenizer) + 3)

    def trainer(self, folder, student=None, rows=ROWS, **settings):
        arguments = {"processing_class": self.tokenizer, "teacher_processing_class": self.teacher_tokenizer}
        student = build(vocab_size=len(self.tokenizer) + 1) if student is None else student
        return make_trainer(folder, student, self.teacher, rows, arguments, **{**SPANS, **settings})


@pytest.fixture(scope="module")
def pair():
    return Pair()


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 0.0, "kd_ratio": 1.0, "beta": 0.0},
        {"lmbda": 0.0, "kd_ratio": 0.5, "beta": 0.5, "kd_temperature": 2.0, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_the_same_tokens_in_another_order_give_the_same_run(settings, tmp_path):
    tokenizer = build_tokenizer(*WORDS)
    permuted, old_ids = permute(tokenizer)
    teacher, permuted_teacher = (make_teacher(vocab_size=len(tokenizer)) for _ in range(2))
    for module in (permuted_teacher.get_input_embeddings(), permuted_teacher.get_output_embeddings()):
        module.weight = nn.Parameter(module.weight[old_ids].clone())
    trainers = []
    for each, teacher_tokenizer, spans in ((teacher, tokenizer, {}), (permuted_teacher, permuted, SPANS)):
        arguments = {"processing_class": tokenizer, "teacher_processing_class": teacher_tokenizer}
        student = build(vocab_size=len(tokenizer))
        options = {"per_device_train_batch_size": 4, **SPANS, "token_alignment": "same", **spans, **settings}
        trainers.append(make_trainer(tmp_path, student, each, ROWS, arguments, **options))
        trainers[-1].train()
    assert [trainer.alignment is None for trainer in trainers] == [True, False]
    for name in ("loss", "kd_loss", "entropy", "teacher_agreement"):
        torch.testing.assert_close(history_of(trainers[0], name), history_of(trainers[1], name), **OTHER_ORDER)
    assert history_of(trainers[1], "targets/aligned_ratio") == [1.0, 1.0]
    weights = [dict(trainer.model.named_parameters()) for trainer in trainers]
    torch.testing.assert_close(*weights, **OTHER_ORDER)
    torch.testing.assert_close(*(metrics_of(trainer, trainer.train_dataset) for trainer in trainers), **OTHER_ORDER)


def test_equal_tokenizers_are_compared_token_by_token(pair, tmp_path):
    arguments = {"processing_class": pair.tokenizer, "teacher_processing_class": pair.tokenizer}
    models = (
        build(vocab_size=len(pair.tokenizer)),
        make_teacher(vocab_size=len(pair.tokenizer), max_position_embeddings=80),
    )
    assert make_trainer(tmp_path, *models, ROWS, arguments, **SPANS).alignment is None


@pytest.mark.parametrize(
    "settings", [{"lmbda": 0.0, "beta": 0.0}, {"lmbda": 1.0}, {"lmbda": 0.0, "seq_kd": True, "beta": 0.5}], ids=str
)
def test_two_steps_change_every_student_parameter(pair, settings, tmp_path):
    student = build(vocab_size=len(pair.tokenizer) + 1)
    before, teacher_before = weights_of(student), weights_of(pair.teacher)
    optimizer = {"optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = pair.trainer(tmp_path, student, kd_ratio=0.5, **optimizer, **settings)
    batches = capture_batches(trainer)
    trainer.train()
    assert not [name for name, parameter in student.named_parameters() if torch.equal(parameter, before[name])]
    assert all(torch.equal(tensor, teacher_before[name]) for name, tensor in pair.teacher.state_dict().items())
    assert all(value > 0 for value in history_of(trainer, "kd_loss"))
    for _, batch in batches:
        num_compared = (batch["position_kinds"] >= 0).sum()
        assert 0 < num_compared == batch["num_target_tokens"]
        assert num_compared < batch["target_mask"].sum() or settings.get("seq_kd")


def test_training_makes_the_student_agree_with_the_teacher(pair, tmp_path):
    settings = {"lmbda": 0.0, "beta": 0.0, "max_steps": 30, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = pair.trainer(tmp_path, per_device_train_batch_size=16, **settings)
    before = metrics_of(trainer, trainer.train_dataset)
    trainer.train()
    after = metrics_of(trainer, trainer.train_dataset)
    assert after["kd_loss"] < 0.5 * before["kd_loss"] and after["teacher_agreement"] > before["teacher_agreement"]


def test_the_teacher_reads_the_text_of_the_students_completion(pair, tmp_path):
    trainer = pair.trainer(tmp_path, max_steps=1)
    text = " lines reads 🙂"
    completion = [*pair.tokenizer(text)["input_ids"], pair.tokenizer.eos_token_id]
    trainer.generate_as_student = lambda rows, config: [completion] * len(rows)
    batches = capture_batches(trainer)
    trainer.train()
    _, batch = batches[0]
    start = batch["teacher_source_lengths"][0]
    read = batch["teacher_ids"][0, start : batch["teacher_mask"][0].sum()].tolist()
    assert read == [*pair.teacher_tokenizer(text)["input_ids"], pair.teacher_tokenizer.eos_token_id]


def test_padding_changes_no_loss_and_no_weight(pair, tmp_path):
    runs = []
    for rows_per_step in (8, 4):
        settings = {"per_device_train_batch_size": rows_per_step, "gradient_accumulation_steps": 8 // rows_per_step}
        runs.append(pair.trainer(tmp_path, lmbda=0.0, kd_ratio=0.5, **settings))
        runs[-1].train()
    torch.testing.assert_close(*(history_of(run) for run in runs), **OTHER_ORDER)
    torch.testing.assert_close(*(dict(run.model.named_parameters()) for run in runs), **OTHER_ORDER)


def test_a_target_that_is_too_long_in_the_teachers_tokens_is_refused(pair, tmp_path):
    teacher = make_teacher(vocab_size=len(pair.teacher_tokenizer), max_position_embeddings=32)
    rows = [*ROWS, {"prompt": "reader", "completion": " lines" * 30}]  # 31 tokens for the student
    arguments = {"processing_class": build_tokenizer(*WORDS), "teacher_processing_class": build_tokenizer("Ġre")}
    with pytest.raises(ValueError, match="context is 32 tokens, but row 16"):
        make_trainer(tmp_path, build(vocab_size=280), teacher, rows, arguments, lmbda=0.0, **SPANS)


def test_settings_that_cannot_be_honored_are_refused(pair, tmp_path):
    with pytest.raises(ValueError, match="`token_alignment` must be 'same' or 'byte_spans', got 'spans'"):
        make_args(tmp_path, token_alignment="spans")
    with pytest.raises(ValueError, match=r"`token_alignment='byte_spans'`.*`teacher_cache`"):
        make_args(tmp_path, token_alignment="byte_spans", teacher_cache="folder", lmbda=0.0)
    with pytest.raises(ValueError, match="token_alignment='byte_spans'"):
        pair.trainer(tmp_path, token_alignment="same")
    pair = Pair()
    pair.teacher_tokenizer = ByT5Tokenizer()
    with pytest.raises(ValueError, match=r"teacher's tokenizer .ByT5Tokenizer., which is slow"):
        pair.trainer(tmp_path)


def test_without_a_divergence_the_models_are_compared_in_evaluation_alone(pair, tmp_path):
    trainer = pair.trainer(tmp_path, lmbda=0.0, kd_ratio=0.0, max_steps=1)
    batches = capture_batches(trainer)
    trainer.train()
    assert "position_kinds" not in batches[0][1]
    assert metrics_of(trainer, trainer.train_dataset)["kd_loss"] > 0
