# SPDX-License-Identifier: Apache-2.0
"""Checkpoints to continue from, and weights that are not saved."""

import pytest
import torch
from torch import nn
from transformers.trainer_callback import TrainerState

from encdec_slm.trainers.resuming import find_checkpoint, last_complete_checkpoint, refuse_non_finite_weights


def write_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    TrainerState(global_step=step).save_to_json(str(checkpoint / "trainer_state.json"))
    return checkpoint


def test_the_last_checkpoint_has_the_highest_step(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-777").write_text("a file")
    write_checkpoint(tmp_path / "runs", 999)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")
    assert last_complete_checkpoint(tmp_path / "missing") is None


STATES = [None, b"", b'{"global_st', b"[]", b'{"unknown_field": 1}', b"\0" * 64, b"\xff\xfe\x80"]


@pytest.mark.parametrize("state", STATES)
def test_a_checkpoint_without_a_readable_state_is_incomplete(tmp_path, state):
    kept, incomplete = write_checkpoint(tmp_path, 2), write_checkpoint(tmp_path, 4)
    if state is None:
        (incomplete / "trainer_state.json").unlink()
    else:
        (incomplete / "trainer_state.json").write_bytes(state)
    assert last_complete_checkpoint(tmp_path) == find_checkpoint(tmp_path, "true") == str(kept)
    with pytest.raises(ValueError, match="checkpoint-4"):
        find_checkpoint(tmp_path, str(incomplete))


def test_resume_from_checkpoint_has_one_meaning(tmp_path):
    for value in ("true", True, str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
            find_checkpoint(tmp_path, value)
    assert find_checkpoint(tmp_path, "auto") is None
    path = str(write_checkpoint(tmp_path, 2))
    assert [find_checkpoint(tmp_path, value) for value in (True, "True", "auto", path)] == [path] * 4
    assert [find_checkpoint(tmp_path, value) for value in (None, False, "false")] == [None] * 3


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_weight_is_named_with_the_last_complete_checkpoint(tmp_path, model, value):
    write_checkpoint(tmp_path, 2)
    (write_checkpoint(tmp_path, 4) / "trainer_state.json").unlink()
    model[1].weight.data[1, 2] = value
    with pytest.raises(FloatingPointError, match=r"step 6, `1\.weight`") as error:
        refuse_non_finite_weights(model, 6, tmp_path)
    assert "checkpoint-2" in str(error.value)


def test_finite_and_frozen_weights_are_accepted(tmp_path, model):
    model[0].requires_grad_(False).weight.data[0, 0] = torch.inf
    refuse_non_finite_weights(model, 1, tmp_path)
