# SPDX-License-Identifier: Apache-2.0
"""Rows and numbers that distillation refuses, and runs that were stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from ddp_worker import build, history_of
from distillation_worker import (
    EOS,
    OFF_POLICY,
    OTHER_ORDER,
    gold_pairs,
    make_teacher,
    make_texts,
    make_trainer,
    plain_numbers,
    to_ids,
)
from safetensors.torch import load_file

from encdec_slm import EncDecSLMForConditionalGeneration


SAVING = {"save_strategy": "steps", "save_steps": 1}


# Rows


def test_a_row_longer_than_the_teachers_context_is_refused_with_the_numbers(tmp_path):
    rows = make_texts(8)
    rows[5] = {"prompt": " ".join(["w9"] * 12), "completion": "w8 w7 w6"}
    short, long = make_teacher(max_position_embeddings=15), make_teacher(max_position_embeddings=16)
    arguments, numbers = {"eval_dataset": Dataset.from_list(rows)}, r"15 tokens.* row 5 .*16.* 12 .* 4 "
    for settings in (
        {"rows": rows, **OFF_POLICY},
        {"rows": rows, "max_completion_length": 4},
        {"rows": make_texts(3), "arguments": arguments, **OFF_POLICY},
    ):
        with pytest.raises(ValueError, match=numbers):
            make_trainer(tmp_path, teacher=short, **settings)
    for settings in (OFF_POLICY, {"max_completion_length": 4}):
        make_trainer(tmp_path, teacher=long, rows=rows, max_steps=1, **settings).train()
    stream = Dataset.from_list([rows[5]] * 8).to_iterable_dataset()
    trainer = make_trainer(tmp_path, teacher=short, arguments={"train_dataset": stream}, **OFF_POLICY)
    with pytest.raises(ValueError, match=r"15 tokens.* row \d .*16.* 12 .* 4 "):
        trainer.train()


def test_an_empty_completion_is_an_end_of_text_token(tmp_path):
    rows = [{**row, "completion": ""} for row in make_texts(4)] + make_texts(4, seed=5)
    trainer = make_trainer(tmp_path, rows=rows, **OFF_POLICY, max_steps=1)
    trainer.train()
    assert gold_pairs(rows)[0][1] == [EOS]
    expected = plain_numbers(build(), make_teacher(), gold_pairs(rows), kd_ratio=0.5)
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)


def test_a_batch_in_which_everything_is_truncated_trains_on_what_is_left(tmp_path):
    rows = [{"prompt": row["prompt"] + " w5 w6", "completion": row["completion"] + " w7"} for row in make_texts(8)]
    lengths = {"max_source_length": 1, "max_completion_length": 1}
    trainer = make_trainer(tmp_path, rows=rows, **OFF_POLICY, **lengths, max_steps=1)
    trainer.train()
    assert history_of(trainer, "sources/cut_ratio") == history_of(trainer, "targets/cut_ratio") == [1.0]
    pairs = [(to_ids(row["prompt"])[:1], to_ids(row["completion"])[:1]) for row in rows]
    expected = plain_numbers(build(), make_teacher(), pairs, kd_ratio=0.5)
    torch.testing.assert_close(history_of(trainer)[0], expected["loss"].item(), **OTHER_ORDER)


def test_fewer_rows_than_an_optimizer_step_needs_are_refused(tmp_path):
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, rows=make_texts(7), **sizes)
    with pytest.raises(ValueError, match=r"8 rows .* 7\. .*`gradient_accumulation_steps`"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"lmbda": 0.5}, r"`lmbda=0.5` .*`completion`"),
        ({"lmbda": 1.0, "kd_ratio": 0.5}, r"`kd_ratio=0.5` .*`completion`"),
        ({"lmbda": 1.0, "kd_ratio": 0.0}, r"`lmbda=0.0` .*`completion`"),
    ],
)
def test_rows_without_a_required_target_are_refused(settings, names, tmp_path):
    rows = [{"prompt": row["prompt"]} for row in make_texts()]
    with pytest.raises(ValueError, match=names):
        make_trainer(tmp_path, rows=rows, **settings)
    make_trainer(tmp_path, rows=rows, lmbda=1.0, kd_ratio=1.0)


# Numbers that are not finite


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_nan_loss_names_its_row_and_leaves_the_last_checkpoint_alone(accumulation, role, tmp_path):
    rows = [{name: text.replace("w96", "w95") for name, text in row.items()} for row in make_texts(12)]
    rows[6]["prompt"] = "w5 w96"
    models = {"student": build(), "teacher": make_teacher()}
    models[role].get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.masked_fill((args[0] == 96)[..., None], float("nan"))
    )
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    settings = {**OFF_POLICY, **SAVING, **sizes, "max_steps": 3, "shuffle_dataset": False}
    trainer = make_trainer(tmp_path, models["student"], models["teacher"], rows=rows, **settings)
    with pytest.raises(FloatingPointError, match=r"after step 1 .* 6 of") as error:
        trainer.train()
    assert str(tmp_path / "checkpoint-1") in str(error.value)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    kept = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert all(torch.equal(tensor, models["student"].state_dict()[name]) for name, tensor in kept.items())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer = make_trainer(tmp_path, **OFF_POLICY, **SAVING, max_steps=1)
    trainer.train()
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.model.encoder.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(FloatingPointError, match=r"`model.encoder.layers.1.mlp.up_proj.weight`") as error:
        trainer.save_model()
    assert str(tmp_path / "checkpoint-1") in str(error.value)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_run_that_explodes_saves_nothing(tmp_path):
    student = build()
    student.get_parameter("model.decoder.norm.weight").register_hook(lambda gradient: gradient * float("inf"))
    trainer = make_trainer(tmp_path, student, **OFF_POLICY, **SAVING, max_steps=1)
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.train()
    assert not list(tmp_path.rglob("*.safetensors"))


# Runs that were stopped

RUN = {
    **{"lmbda": 0.5, "kd_ratio": 0.5, "max_steps": 8, "per_device_train_batch_size": 4},
    **{"optim": "adamw_torch", "learning_rate": 1e-3, **SAVING},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folder and losses of a run of 8 steps with a checkpoint after each one."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = make_trainer(folder, **RUN)
    trainer.train()
    return folder, history_of(trainer)


@pytest.mark.parametrize("damage", ["no state", "half a state", "an empty state", "no folder"])
def test_an_incomplete_checkpoint_is_ignored(damage, uninterrupted, tmp_path):
    folder, losses = uninterrupted
    for step in (3, 5):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    state = tmp_path / "checkpoint-5" / "trainer_state.json"
    if damage == "no state":
        state.unlink()
    elif damage == "no folder":
        shutil.rmtree(tmp_path / "checkpoint-5")
        (tmp_path / "checkpoint-best").mkdir()
    else:
        state.write_text(state.read_text()[:200] if damage == "half a state" else "")
    trainer, steps = make_trainer(tmp_path, build(seed=9), **RUN), []
    loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: steps.append(trainer.state.global_step) or loss(*args, **kwargs)
    trainer.train(resume_from_checkpoint=True)
    assert steps == [3, 4, 5, 6, 7]
    torch.testing.assert_close(history_of(trainer), losses)


def test_resuming_without_a_complete_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["checkpoint-2", "checkpoint-4/trainer_state.json"], ids=["saving", "training"])
def test_a_killed_run_continues_to_the_losses_of_an_uninterrupted_one(moment, uninterrupted, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("distillation_worker.py")
    command = [sys.executable, script, tmp_path, json.dumps({"run": RUN}), "alone"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not (tmp_path / moment).exists():
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.0005)
        finally:
            process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "checkpoint-8").exists()
    trainer = make_trainer(tmp_path, build(seed=9), **RUN)
    trainer.train(resume_from_checkpoint=True)
    torch.testing.assert_close(history_of(trainer), uninterrupted[1])
    models = [
        EncDecSLMForConditionalGeneration.from_pretrained(folder / "checkpoint-8")
        for folder in (tmp_path, uninterrupted[0])
    ]
    torch.testing.assert_close(*(dict(model.state_dict()) for model in models))
