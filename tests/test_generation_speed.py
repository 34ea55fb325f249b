# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from distillation_worker import make_teacher

from encdec_slm.generation_speed import compare_speed, decode_rate, token_seconds


def test_each_new_token_is_timed_although_texts_end_before(tiny_model):
    tiny_model.generation_config.eos_token_id = list(range(96))  # all tokens but one
    for model in (tiny_model, make_teacher()):
        seconds = token_seconds(model, torch.tensor([[5, 6, 7]]), 4)
        assert len(seconds) == 4 and seconds == sorted(seconds) and seconds[0] > 0


def test_the_first_token_does_not_count_for_the_rate():
    assert decode_rate([10.0, 10.5, 11.0]) == pytest.approx(2.0)


def test_models_are_compared_on_sources_of_their_own(tiny_model):
    models = [(tiny_model, [[5, 6], [7]]), (make_teacher(), [[5, 6, 1], [7, 1]])]
    speeds = compare_speed(models, 3)
    assert len(speeds) == 2
    assert all(speed["first_token_seconds"] > 0 and speed["tokens_per_second"] > 0 for speed in speeds)
