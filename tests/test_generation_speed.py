# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from distillation_worker import make_teacher

from encdec_slm.benchmarks import generation_speed
from encdec_slm.benchmarks.generation_speed import compare_speed, decode_rate, token_seconds


def test_every_new_token_has_its_moment_whether_or_not_a_text_ends(tiny_model):
    tiny_model.generation_config.eos_token_id = list(range(96))  # all but one token would end the text
    for model in (tiny_model, make_teacher()):
        seconds = token_seconds(model, torch.tensor([[5, 6, 7]]), 4)
        assert len(seconds) == 4 and seconds == sorted(seconds) and seconds[0] > 0


def test_the_first_token_does_not_count_for_the_rate():
    assert decode_rate([10.0, 10.5, 11.0]) == pytest.approx(2.0)


def test_contenders_are_timed_in_turns_and_by_medians(tiny_model, monkeypatch):
    other, calls = make_teacher(), []
    scripted = {id(tiny_model): iter([9, 1, 5, 3]), id(other): iter([9, 2, 2, 2])}

    def timed(model, source_ids, num_new_tokens):
        calls.append((id(model), source_ids.tolist()))
        first = next(scripted[id(model)])
        return [first, first + 0.5]

    monkeypatch.setattr(generation_speed, "token_seconds", timed)
    sources = [[4], [5, 6], [7]]
    speeds = compare_speed([(tiny_model, sources), (other, sources)], 2)
    assert [speed["first_token_seconds"] for speed in speeds] == [3, 2]  # without the first run, which warms up
    assert speeds[0]["tokens_per_second"] == pytest.approx(2.0)
    assert [model for model, _ in calls] == [id(tiny_model), id(other)] * 4
    assert [source for _, source in calls[::2]] == [[[4]], [[4]], [[5, 6]], [[7]]]
