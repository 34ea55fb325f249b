# SPDX-License-Identifier: Apache-2.0
"""Distillation of a teacher into a student whose tokenizer was trimmed from the teacher's.

The reference is a teacher with only the embeddings and the head of the kept tokens: its distribution is that of the
whole teacher, restricted and renormalized.
"""

import copy
import importlib
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ddp_worker import build, history_of
from distillation_worker import OTHER_ORDER, capture_completions, make_teacher, make_trainer, metrics_of, save_folder
from torch import nn
from transformers import AutoTokenizer

from conftest import build_byte_tokenizer
from encdec_slm.vocabulary import trim_tokenizer


ROOT = Path(__file__).parent.parent
WORDS = ("Ġreads", "Ġreturns", "Ġlines", "Ġbytes", "Ġunused", "reader", "writer")
ROWS = [
    {"prompt": f"{kind} reads {things}", "completion": f"returns{' lines' * number}"}
    for kind in ("reader", "a reader", "writer", "no writer")
    for number, things in enumerate(("lines", "bytes", "bytes, lines", "it"))
]


class Pair:
    """A student with a trimmed vocabulary, its teacher, and the reference teacher."""

    def __init__(self):
        self.teacher_tokenizer = build_byte_tokenizer(ends_sources=False, words=WORDS)
        texts = [text for row in ROWS for text in row.values()]
        self.tokenizer, self.old_ids = trim_tokenizer(self.teacher_tokenizer, texts)
        # Ids of the last tokens differ, and rows pad both tables.
        assert self.old_ids[-1] > len(self.old_ids) + 5
        self.teacher = make_teacher(vocab_size=len(self.teacher_tokenizer) + 3)
        self.small_teacher = copy.deepcopy(self.teacher)
        for module in (self.small_teacher.get_input_embeddings(), self.small_teacher.get_output_embeddings()):
            module.weight = nn.Parameter(module.weight[self.old_ids].clone())
        self.small_teacher.config.vocab_size = len(self.old_ids)

    def student(self):
        return build(vocab_size=len(self.old_ids))

    def trainer(self, folder, is_trimmed, **settings):
        teacher = self.teacher if is_trimmed else self.small_teacher
        arguments = {
            "processing_class": self.tokenizer,
            "teacher_processing_class": self.teacher_tokenizer if is_trimmed else self.tokenizer,
        }
        return make_trainer(folder, self.student(), teacher, ROWS, arguments, **settings)


@pytest.fixture(scope="module")
def pair():
    return Pair()


@pytest.mark.parametrize(
    "settings",
    [
        {"lmbda": 0.0, "kd_ratio": 1.0, "beta": 0.0},
        {"lmbda": 0.0, "kd_ratio": 0.5, "beta": 0.5, "kd_temperature": 2.0},
        {"lmbda": 1.0, "kd_ratio": 0.9, "beta": 1.0},
    ],
    ids=str,
)
def test_a_run_equals_that_of_a_teacher_with_only_the_kept_tokens(pair, settings, tmp_path):
    trainers = []
    for is_trimmed in (True, False):
        trainers.append(pair.trainer(tmp_path, is_trimmed, **settings))  # seeds the sampling
        trainers[-1].train()
    for name in ("loss", "kd_loss", "entropy", "teacher_agreement"):
        torch.testing.assert_close(history_of(trainers[0], name), history_of(trainers[1], name), **OTHER_ORDER)
    weights = [dict(trainer.model.named_parameters()) for trainer in trainers]
    torch.testing.assert_close(*weights, **OTHER_ORDER)


def test_the_kept_mass_is_logged_with_a_trimmed_vocabulary(pair, tmp_path):
    settings = {"lmbda": 0.0, "max_steps": 1, "per_device_train_batch_size": len(ROWS)}
    trimmed, plain = (pair.trainer(tmp_path, is_trimmed, **settings) for is_trimmed in (True, False))
    masses = []
    for row in ROWS:
        source, target = (pair.teacher_tokenizer(text)["input_ids"] for text in row.values())
        target = [*target, pair.teacher_tokenizer.eos_token_id]
        with torch.no_grad():
            logits = pair.teacher(input_ids=torch.tensor([source + target])).logits[0, len(source) - 1 : -1]
        masses.append(logits.softmax(-1)[:, pair.old_ids].sum(-1))
    expected = torch.cat(masses).mean().item()
    trimmed.train()
    assert history_of(trimmed, "teacher/kept_mass") == [pytest.approx(expected)]
    assert trimmed.evaluate(trimmed.train_dataset)["eval_teacher/kept_mass"] == pytest.approx(expected)
    plain.train()
    assert "teacher/kept_mass" not in {name for entry in plain.state.log_history for name in entry}


def test_completions_of_the_teacher_become_ids_of_the_student(pair, tmp_path):
    trainer = pair.trainer(tmp_path, True, lmbda=0.0, seq_kd=True, kd_ratio=0.0, max_completion_length=30)
    kept, other = " lines reader", " lines unused"
    completions = [
        [*pair.teacher_tokenizer(text)["input_ids"], pair.teacher_tokenizer.eos_token_id] for text in (kept, other)
    ]
    trainer._generate_ids = lambda *args: completions
    expected = [[*pair.tokenizer(text)["input_ids"], pair.tokenizer.eos_token_id] for text in (kept, other)]
    rows = [{"source_ids": [5], "teacher_source_ids": [5]}] * 2
    assert trainer.generate_as_teacher(rows) == expected


def test_a_teacher_that_generates_the_targets_trains_the_student(pair, tmp_path):
    trainer = pair.trainer(tmp_path, True, lmbda=0.0, seq_kd=True, kd_ratio=0.5, max_steps=1)
    pairs = capture_completions(trainer, "teacher")
    trainer.train()
    assert len(pairs) == 8
    assert all(0 <= token_id < len(pair.old_ids) for _, ids in pairs for token_id in ids)
    assert torch.tensor(history_of(trainer)).isfinite().all()


def test_a_saved_student_and_teacher_are_recognized(pair, tmp_path):
    student = save_folder(tmp_path / "student", pair.student(), pair.tokenizer)
    teacher = save_folder(tmp_path / "teacher", pair.teacher, pair.teacher_tokenizer)
    trainer = make_trainer(tmp_path, student, teacher, ROWS, {"processing_class": None}, lmbda=0.0, max_steps=1)
    assert trainer.teacher_token_ids == pair.old_ids
    trainer.train()
    assert metrics_of(trainer, trainer.train_dataset)["kd_loss"] > 0


def test_a_map_of_another_teacher_is_refused(pair, tmp_path):
    other = build_byte_tokenizer(ends_sources=False, words=WORDS[1:])
    arguments = {"processing_class": pair.tokenizer, "teacher_processing_class": other}
    with pytest.raises(ValueError, match="trim"):
        make_trainer(tmp_path, pair.student(), make_teacher(vocab_size=320), ROWS, arguments)
    added = copy.deepcopy(pair.tokenizer)
    added.add_tokens(["<new>"])
    arguments = {"processing_class": added, "teacher_processing_class": pair.teacher_tokenizer}
    with pytest.raises(ValueError, match="<new>"):
        make_trainer(tmp_path, build(vocab_size=len(added)), pair.teacher, ROWS, arguments)
    arguments = {"processing_class": pair.tokenizer, "teacher_processing_class": pair.teacher_tokenizer}
    with pytest.raises(ValueError, match="student has 200 rows"):
        make_trainer(tmp_path, build(vocab_size=200), pair.teacher, ROWS, arguments)


def test_the_study_of_vocabulary_sizes_prints_a_row_for_each(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    study = importlib.import_module("trim_vocabulary")
    tokenizer = copy.deepcopy(pair.teacher_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    teacher = save_folder(tmp_path / "teacher", pair.teacher, tokenizer)
    rows = Dataset.from_list(ROWS).rename_columns({"prompt": "source", "completion": "target"})
    monkeypatch.setattr(study, "build_docstring_task", lambda: {"train": rows, "test": rows})
    study.main([teacher, "--sizes", "270", "--rows", "2", "--output_dir", str(tmp_path / "trimmed")])
    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in table] == [str(len(pair.old_ids)), "270"]
    assert table[0][1:4] == ["0.0%", "0.0%", "100.0%"]
    masses = [float(row[4].rstrip("%")) for row in table]
    assert 0 < masses[1] < masses[0] < 100
    assert len(AutoTokenizer.from_pretrained(tmp_path / "trimmed")) == 270
