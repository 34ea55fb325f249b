# SPDX-License-Identifier: Apache-2.0
"""The recipe of microsoft/encoder-decoder-slm: its objective, its sampling, its optimizer and its learning rates."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from ddp_worker import build, make_tokenizer
from distillation_worker import make_teacher

from encdec_slm.configuration.recipe_files import parse_recipe
from encdec_slm.trainers import Seq2SeqDistillationConfig, Seq2SeqDistillationTrainer
from encdec_slm.trainers.distill_job import DistillArguments


GOLDEN_SCHEDULE = json.loads((Path(__file__).parent / "golden" / "lr_schedule.json").read_text("utf-8"))
ROWS = Dataset.from_dict({"source": ["w4 w5 w6"] * 8, "target": ["w7 w8"] * 8})


@pytest.fixture
def trainer(tmp_path):
    """The recipe at the smallest scale: batches, lengths and number of steps alone are changed."""
    command = [
        "--config",
        "distill_predecessor",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    command += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--eval_strategy", "no"]
    command += ["--load_best_model_at_end", "false", "--save_strategy", "no", "--disable_tqdm", "true"]
    command += ["--max_completion_length", "4", "--max_steps", str(GOLDEN_SCHEDULE["total_steps"])]
    _, args = parse_recipe((DistillArguments, Seq2SeqDistillationConfig), command)
    student = build(lm_head_bias=True, mlp_bias=True, attention_bias=True)
    return Seq2SeqDistillationTrainer(student, make_teacher(), args, ROWS, processing_class=make_tokenizer())


def test_objective_and_sampling_are_the_original_ones(trainer):
    args = trainer.args
    assert (args.lmbda, args.beta, args.kd_ratio, args.kd_temperature) == (1.0, 0.0, 0.9, 1.0)
    assert (args.temperature, args.top_k, args.max_grad_norm) == (0.9, 128, 1.0)
    config = trainer.generation_config
    assert (config.do_sample, config.temperature, config.top_k) == (True, 0.9, 128)


def test_learning_rates_and_weight_decay_are_the_original_ones(trainer):
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    expected = [1e-4 * factor for factor in GOLDEN_SCHEDULE["factor"]]
    assert len(rates) == GOLDEN_SCHEDULE["total_steps"]
    assert rates == pytest.approx(expected[: len(rates)], rel=1e-6, abs=1e-12)
    for group in trainer.optimizer.param_groups:
        assert group["betas"] == (0.9, 0.98)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.01 if parameter.dim() >= 2 else 0.0)


def test_its_steps_take_as_many_rows_as_the_original_ones():
    _, args = parse_recipe(
        (DistillArguments, Seq2SeqDistillationConfig), ["--config", "distill_predecessor", "--use_cpu", "true"]
    )
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 126
    assert (args.max_source_length, args.max_completion_length, args.num_train_epochs) == (1024, 256, 128)
