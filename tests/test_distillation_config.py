# SPDX-License-Identifier: Apache-2.0
"""Settings of a distillation run: TRL's are unchanged, ours are checked."""

import dataclasses

import pytest
from distillation_worker import make_args
from trl import DistillationConfig

from encdec_slm.trainers.distillation_config import Seq2SeqDistillationConfig


OUR_DEFAULTS = {
    "kd_ratio": 1.0,
    "kd_temperature": 1.0,
    "lmbda": 1.0,
    "seq_kd": False,
    "max_source_length": None,
    "teacher_cache": None,
    "token_alignment": "same",
    "predict_with_generate": False,
    "packing": False,
}


def test_no_default_of_trl_is_changed_and_the_objective_is_trls(tmp_path):
    def defaults(kind):
        return {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(kind)
        }

    ours, theirs = defaults(Seq2SeqDistillationConfig), defaults(DistillationConfig)
    assert ours == theirs | OUR_DEFAULTS
    assert all(field.metadata.get("help") for field in dataclasses.fields(Seq2SeqDistillationConfig))


@pytest.mark.parametrize(
    ("name", "valid", "invalid"),
    [
        ("kd_ratio", (0.0, 0.3, 1.0), (-0.1, 1.1, float("nan"))),
        ("lmbda", (0.0, 0.3, 1.0), (-0.1, 1.1, float("nan"))),
        ("beta", (0.0, 1.0), (-0.1, 1.1)),
        ("kd_temperature", (0.5,), (0.0, -1.0, float("nan"))),
        ("temperature", (0.5,), (0.0, -1.0, float("nan"))),
        ("max_source_length", (1, None), (0, -5)),
        ("max_completion_length", (1,), (0, None)),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, name, valid, invalid):
    for value in valid:
        assert getattr(make_args(tmp_path, **{name: value}), name) == value
    for value in invalid:
        with pytest.raises(ValueError, match=rf"{name}.*{value}"):
            make_args(tmp_path, **{name: value})


def test_the_temperature_of_the_loss_is_not_that_of_sampling(tmp_path):
    assert make_args(tmp_path, kd_temperature=2.0).temperature == 1.0
    assert make_args(tmp_path, temperature=0.7).kd_temperature == 1.0


@pytest.mark.parametrize(
    "settings",
    [
        {"use_vllm": True},
        {"seq_kd": True, "lmbda": 1.0},
        {"include_for_metrics": ["inputs"]},
        {"include_for_metrics": ["loss", "inputs"]},
        {"train_sampling_strategy": "group_by_length"},
        {"generation_kwargs": {"num_return_sequences": 2}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_without_an_effect_are_refused_by_name(tmp_path, settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}"):
        make_args(tmp_path, **settings)


def test_seq_kd_has_an_effect_where_the_student_does_not_generate(tmp_path):
    for settings in ({"lmbda": 0.5}, {"lmbda": 1.0, "kd_ratio": 0.0}):
        assert make_args(tmp_path, seq_kd=True, **settings).seq_kd


def test_half_precision_is_left_to_machines_with_a_gpu_for_it(tmp_path, monkeypatch):
    assert Seq2SeqDistillationConfig(str(tmp_path), use_cpu=True).bf16 is False
    monkeypatch.setattr("encdec_slm.trainers.distillation_config.is_torch_bf16_gpu_available", lambda: False)
    assert Seq2SeqDistillationConfig(str(tmp_path)).bf16 is False
