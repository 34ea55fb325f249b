# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were written to their end, and weights that are fit to be saved."""

import pytest
import torch
from torch import nn
from transformers.trainer_callback import TrainerState

from encdec_slm.trainers.resuming import last_complete_checkpoint, refuse_non_finite_weights


def write_checkpoint(folder, step):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    TrainerState(global_step=step).save_to_json(str(checkpoint / "trainer_state.json"))
    return checkpoint


def test_the_checkpoint_of_the_highest_step_is_the_last(tmp_path):
    for step in (9, 100, 20):
        write_checkpoint(tmp_path, step)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-100")


def test_a_checkpoint_without_its_state_is_passed_over(tmp_path):
    kept = write_checkpoint(tmp_path, 2)
    (write_checkpoint(tmp_path, 4) / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-6").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(kept)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_checkpoint_with_half_of_its_state_is_passed_over(tmp_path, share):
    kept = write_checkpoint(tmp_path, 2)
    state = write_checkpoint(tmp_path, 4) / "trainer_state.json"
    written = state.read_bytes().rstrip()
    state.write_bytes(written[: int(share * len(written))])
    assert last_complete_checkpoint(tmp_path) == str(kept)


@pytest.mark.parametrize("content", [b"[]", b'{"unknown_field": 1}', b"\0" * 64, b"\xff\xfe\x80 no text"])
def test_a_checkpoint_with_a_state_of_something_else_is_passed_over(tmp_path, content):
    kept = write_checkpoint(tmp_path, 2)
    (write_checkpoint(tmp_path, 4) / "trainer_state.json").write_bytes(content)
    assert last_complete_checkpoint(tmp_path) == str(kept)


def test_there_is_no_last_checkpoint_where_there_is_none(tmp_path):
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "missing") is None
    (write_checkpoint(tmp_path, 4) / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) is None


def test_other_names_are_no_checkpoints(tmp_path):
    write_checkpoint(tmp_path, 3).rename(tmp_path / "checkpoint-best")
    (tmp_path / "checkpoint-7").write_text("a file", encoding="utf-8")
    write_checkpoint(tmp_path / "runs", 9)
    assert last_complete_checkpoint(tmp_path) is None


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_is_named_with_the_last_good_checkpoint(tmp_path, model, value):
    write_checkpoint(tmp_path, 2)
    (write_checkpoint(tmp_path, 4) / "trainer_state.json").unlink()
    model[1].weight.data[1, 2] = value
    with pytest.raises(FloatingPointError) as error:
        refuse_non_finite_weights(model, 6, tmp_path)
    message = str(error.value)
    assert message.startswith("After step 6, `1.weight` has values that are not finite, so it is not saved. ")
    assert f"The last good checkpoint is {tmp_path / 'checkpoint-2'}." in message


def test_without_a_checkpoint_the_message_says_that_nothing_has_been_saved(tmp_path, model):
    model[0].bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"After step 1, `0.bias` has .* Nothing has been saved\."):
        refuse_non_finite_weights(model, 1, tmp_path)


def test_finite_weights_are_not_refused(tmp_path, model):
    refuse_non_finite_weights(model, 1, tmp_path)


def test_a_frozen_weight_is_not_looked_at(tmp_path, model):
    model[0].requires_grad_(False).weight.data[0, 0] = torch.inf
    refuse_non_finite_weights(model, 1, tmp_path)


def test_looking_at_weights_changes_none(tmp_path, model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    refuse_non_finite_weights(model, 1, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
