# SPDX-License-Identifier: Apache-2.0
"""Settings of a distillation run: TRL's stay as they are, ours are checked."""

import dataclasses

import pytest
from trl import DistillationConfig

from encdec_slm.configuration.recipe_files import parse_recipe
from encdec_slm.trainers.distillation_config import Seq2SeqDistillationConfig


OURS = ("kd_ratio", "kd_temperature", "lmbda", "seq_kd", "max_source_length", "predict_with_generate")


# transformers 5.23 warns of TRL's `gradient_checkpointing` unless its new name is given, which 5.18 does not have.
FIELDS = Seq2SeqDistillationConfig.__dataclass_fields__
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"


def build(tmp_path, **settings):
    defaults = {"use_cpu": True, "bf16": False, "report_to": [], CHECKPOINTING: False}
    return Seq2SeqDistillationConfig(str(tmp_path), **{**defaults, **settings})


@pytest.fixture
def recipe(tmp_path):
    """The command line that names a recipe of these lines."""

    def write(*lines):
        path = tmp_path / "mine.yaml"
        basics = (f"output_dir: {tmp_path}", "use_cpu: true", "bf16: false", f"{CHECKPOINTING}: false")
        path.write_text("\n".join([*basics, *lines]), encoding="utf-8")
        return ["--config", str(path)]

    return write


def test_without_settings_the_objective_is_trl_s(tmp_path):
    args = build(tmp_path)
    assert (args.beta, args.lmbda, args.kd_ratio, args.kd_temperature, args.temperature) == (1.0, 1.0, 1.0, 1.0, 1.0)
    assert (args.seq_kd, args.max_source_length, args.predict_with_generate) == (False, None, False)


def test_no_default_of_trl_is_changed():
    def defaults(kind):
        return {
            field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(kind)
        }

    ours, theirs = defaults(Seq2SeqDistillationConfig), defaults(DistillationConfig)
    assert ours.keys() - theirs.keys() == set(OURS)
    assert {name: ours[name] for name in theirs} == theirs


def test_each_setting_of_ours_has_a_help_text():
    helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(Seq2SeqDistillationConfig)}
    assert all(helps[name] for name in OURS)


@pytest.mark.parametrize("name", ["kd_ratio", "lmbda"])
def test_shares_are_from_0_to_1(tmp_path, name):
    for value in (0.0, 0.3, 1.0):
        assert getattr(build(tmp_path, **{name: value}), name) == value
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"`{name}` is {value}, but it is a share. Set it from 0 to 1"):
            build(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["kd_temperature", "temperature"])
def test_temperatures_are_above_0(tmp_path, name):
    assert getattr(build(tmp_path, **{name: 0.5}), name) == 0.5
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"`{name}` is {value}, but logits are divided by it. Set it above 0"):
            build(tmp_path, **{name: value})


def test_the_temperature_of_the_loss_is_apart_from_that_of_sampling(tmp_path):
    args = build(tmp_path, kd_temperature=2.0)
    assert args.temperature == 1.0
    assert build(tmp_path, temperature=0.7).kd_temperature == 1.0


@pytest.mark.parametrize("name", ["max_source_length", "max_completion_length"])
def test_lengths_are_at_least_1(tmp_path, name):
    assert getattr(build(tmp_path, **{name: 1}), name) == 1
    for value in (0, -5):
        with pytest.raises(ValueError, match=rf"`{name}` is {value}, but a text has at least one token"):
            build(tmp_path, **{name: value})


def test_texts_that_are_written_need_a_bound(tmp_path):
    with pytest.raises(ValueError, match="`max_completion_length` is `None`, but texts that are written need a bound"):
        build(tmp_path, max_completion_length=None)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_is_bounded_by_trl(tmp_path, beta):
    with pytest.raises(ValueError, match=rf"beta must be in \[0.0, 1.0\], got {beta}"):
        build(tmp_path, beta=beta)


def test_vllm_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`use_vllm` is true, but vLLM runs no encoder-decoder student"):
        build(tmp_path, use_vllm=True)


def test_a_recipe_sets_what_the_command_line_does_not(recipe):
    ours = ("kd_ratio: 0.9", "kd_temperature: 2", "lmbda: 0.25", "seq_kd: true", "max_source_length: 96")
    command_line = recipe(*ours, "predict_with_generate: true", "beta: 0.0")
    command_line += ["--lmbda", "0.5", "--max_completion_length", "32"]
    (args,) = parse_recipe((Seq2SeqDistillationConfig,), command_line)
    assert (args.kd_ratio, args.kd_temperature, args.beta, args.lmbda) == (0.9, 2.0, 0.0, 0.5)
    assert (args.seq_kd, args.predict_with_generate) == (True, True)
    assert (args.max_source_length, args.max_completion_length) == (96, 32)


@pytest.mark.parametrize(("value", "parsed"), [("null", None), ("128", 128)])
def test_a_bound_of_sources_may_be_none_in_a_recipe(recipe, value, parsed):
    (args,) = parse_recipe((Seq2SeqDistillationConfig,), recipe(f"max_source_length: {value}"))
    assert args.max_source_length == parsed


def test_a_value_of_a_recipe_that_is_out_of_its_range_is_refused(recipe):
    with pytest.raises(ValueError, match=r"`kd_ratio` is 2(\.0)?, but it is a share"):
        parse_recipe((Seq2SeqDistillationConfig,), recipe("kd_ratio: 2"))


def test_a_key_of_a_recipe_that_is_nearly_right_is_answered_with_the_right_one(recipe):
    with pytest.raises(ValueError, match=r"Unknown key `kd_ration` .* The nearest valid key is `kd_ratio`"):
        parse_recipe((Seq2SeqDistillationConfig,), recipe("kd_ration: 0.5"))


def test_settings_survive_being_written_and_read(tmp_path):
    args = build(tmp_path, kd_ratio=0.4, kd_temperature=3.0, seq_kd=True, max_source_length=7)
    written = args.to_dict()
    assert {name: written[name] for name in OURS} == {name: getattr(args, name) for name in OURS}


def test_half_precision_is_left_to_machines_with_a_gpu_for_it(tmp_path, monkeypatch):
    assert Seq2SeqDistillationConfig(str(tmp_path), use_cpu=True).bf16 is False
    monkeypatch.setattr("encdec_slm.trainers.distillation_config.is_torch_bf16_gpu_available", lambda: False)
    assert Seq2SeqDistillationConfig(str(tmp_path)).bf16 is False
