# SPDX-License-Identifier: Apache-2.0
"""Distillation from a teacher cache equals distillation from the teacher that wrote it."""

import pytest
import torch
from datasets import Dataset
from ddp_worker import build, history_of, make_tokenizer
from distillation_worker import make_args, make_teacher, make_texts, make_trainer, weights_of

from conftest import build_byte_tokenizer
from encdec_slm.trainers import Seq2SeqDistillationTrainer
from encdec_slm.trainers.teacher_cache import DistributionSpec
from encdec_slm.trainers.teacher_engines import CompletionSettings, TransformersEngine
from encdec_slm.trainers.teacher_labels import LabelSettings, label_dataset
from encdec_slm.vocabulary import trim_tokenizer


ROWS = make_texts()
SETTINGS = {"lmbda": 0.0, "beta": 0.0, "max_steps": 4, "logging_steps": 1}


def write_cache(folder, teacher=None, tokenizer=None, rows=ROWS, spec="topk:200", **settings):
    engine = TransformersEngine(teacher or make_teacher(), tokenizer or make_tokenizer())
    spec = None if spec is None else DistributionSpec.parse(spec)
    label_dataset(Dataset.from_list(rows), engine, folder, LabelSettings(spec, **settings), teacher="tiny teacher")
    return str(folder)


def train(folder, cache, rows=ROWS, tokenizer=None, student=None, resume=None, **settings):
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    trainer = Seq2SeqDistillationTrainer(
        student or build(),
        args=make_args(folder, **{**SETTINGS, **settings}),
        train_dataset=dataset,
        eval_dataset=Dataset.from_list(ROWS[:4]),
        processing_class=tokenizer or make_tokenizer(),
        teacher_cache=cache,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """All of the teacher's distributions."""
    return write_cache(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_cache_of_the_whole_vocabulary_trains_as_the_live_teacher(tmp_path, cache, beta):
    live, cached = build(), build()
    trainer = make_trainer(
        tmp_path / "live", live, make_teacher(), ROWS, **{**SETTINGS, "beta": beta, "kd_ratio": 0.7}
    )
    trainer.train()
    found = train(tmp_path / "cached", cache, student=cached, beta=beta, kd_ratio=0.7)
    for name in ("loss", "kd_loss", "ce_loss", "grad_norm"):
        expected = torch.tensor(history_of(trainer, name))
        torch.testing.assert_close(torch.tensor(history_of(found, name)), expected, rtol=2e-3, atol=2e-3)
    for name, weight in weights_of(cached).items():
        torch.testing.assert_close(weight, weights_of(live)[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("spec", ["topk:8", "sampled:12"])
def test_few_tokens_per_position_lower_the_divergence(tmp_path, spec):
    cache = write_cache(tmp_path / "cache", spec=spec)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 40, "logging_steps": 10}
    trainer = train(tmp_path / "run", cache, kd_ratio=1.0, **settings)
    losses = history_of(trainer, "kd_loss")
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_ce_loss"])


def test_a_stream_trains_as_a_data_set_in_memory(tmp_path, cache):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    expected = train(tmp_path / "memory", cache, shuffle_dataset=False)
    found = train(tmp_path / "stream", cache, stream, shuffle_dataset=False)
    assert history_of(found, "kd_loss") == pytest.approx(history_of(expected, "kd_loss"), rel=1e-4)


def test_a_resumed_run_has_the_losses_of_an_uninterrupted_one(tmp_path, cache):
    expected = train(tmp_path / "whole", cache, save_strategy="steps", save_steps=2)
    found = train(tmp_path / "resumed", cache, resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert history_of(found, "loss")[-2:] == pytest.approx(history_of(expected, "loss")[-2:], rel=1e-4)


def test_a_student_with_a_trimmed_vocabulary_learns_the_restricted_distributions(tmp_path):
    words = ("Ġreads", "Ġreturns", "Ġlines", "Ġbytes", "Ġunused", "reader", "writer")
    rows = [
        {"prompt": f"{kind} reads {thing}", "completion": f"returns{' lines' * number}"}
        for kind in ("reader", "writer")
        for number, thing in enumerate(("lines", "bytes", "it", "a lot"))
    ]
    teacher_tokenizer = build_byte_tokenizer(ends_sources=False, words=words)
    tokenizer, old_ids = trim_tokenizer(teacher_tokenizer, [text for row in rows for text in row.values()])
    teacher = make_teacher(vocab_size=len(teacher_tokenizer) + 3)
    cache = write_cache(tmp_path / "cache", teacher, teacher_tokenizer, rows, "topk:300")
    live, cached = build(vocab_size=len(old_ids)), build(vocab_size=len(old_ids))
    arguments = {"processing_class": tokenizer, "teacher_processing_class": teacher_tokenizer}
    settings = {**SETTINGS, "kd_ratio": 1.0}
    trainer = make_trainer(tmp_path / "live", live, teacher, rows, arguments, **settings)
    trainer.train()
    found = train(tmp_path / "cached", cache, rows, tokenizer, cached, kd_ratio=1.0)
    for name in ("kd_loss", "teacher/kept_mass"):
        assert history_of(found, name) == pytest.approx(history_of(trainer, name), rel=5e-3, abs=2e-3)


def test_completions_alone_teach_a_student_with_any_tokenizer(tmp_path):
    settings = CompletionSettings(max_new_tokens=5)
    cache = write_cache(tmp_path / "cache", spec=None, completions=settings)
    trainer = train(tmp_path / "run", cache, [{"prompt": row["prompt"]} for row in ROWS], kd_ratio=0.0)
    assert len(history_of(trainer, "ce_loss")) == 4


def test_a_target_that_the_student_cannot_spell_with_the_teachers_tokens_is_encoded_from_its_text(tmp_path):
    words = ("Ġlines", "Ġbytes")
    rows = [{"prompt": "a", "completion": text} for text in ("two lines", "two bytes") * 4]
    teacher_tokenizer = build_byte_tokenizer(ends_sources=False, words=words)
    tokenizer, old_ids = trim_tokenizer(teacher_tokenizer, ["two lines"])
    teacher = make_teacher(vocab_size=len(teacher_tokenizer))
    cache = write_cache(tmp_path / "cache", teacher, teacher_tokenizer, rows)
    trainer = train(tmp_path / "run", cache, rows, tokenizer, build(vocab_size=len(old_ids)), kd_ratio=0.5)
    assert trainer.train_dataset["has_labels"][:] == [True, False] * 4
    assert all(torch.tensor(history_of(trainer, "loss")).isfinite())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"lmbda": 0.5}, "lmbda"),
        ({"seq_kd": True}, "seq_kd"),
        ({"kd_temperature": 2.0}, "kd_temperature"),
        ({"teacher_model_name_or_path": "somewhere"}, "teacher_model_name_or_path"),
    ],
)
def test_settings_that_need_a_teacher_are_refused_beside_a_cache(tmp_path, settings, named):
    with pytest.raises(ValueError, match=named):
        make_args(tmp_path, **{**SETTINGS, "teacher_cache": "cache", **settings})


def test_a_cache_that_does_not_fit_is_refused(tmp_path, cache):
    with pytest.raises(ValueError, match="Row 2"):
        train(tmp_path / "run", cache, [*ROWS[:2], ROWS[3]])
    with pytest.raises(ValueError, match="tokenizer"):
        train(tmp_path / "run", cache, tokenizer=build_byte_tokenizer(ends_sources=False))
    sampled = write_cache(tmp_path / "sampled", spec="sampled:4")
    with pytest.raises(ValueError, match="beta"):
        train(tmp_path / "run", sampled, beta=1.0)
    completions = write_cache(tmp_path / "completions", spec=None, completions=CompletionSettings(max_new_tokens=5))
    with pytest.raises(ValueError, match="kd_ratio"):
        train(tmp_path / "run", completions, kd_ratio=0.5)
    with pytest.raises(ValueError, match="teacher_model"):
        make_trainer(tmp_path / "run", build(), make_teacher(), ROWS, {"teacher_cache": cache}, **SETTINGS)
