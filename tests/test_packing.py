# SPDX-License-Identifier: Apache-2.0
"""Training on packed batches is training on padded ones."""

import pytest
import torch
from datasets import Dataset
from ddp_worker import build, history_of, make_rows, make_tokenizer, make_trainer
from test_cached_distillation import train as distill
from test_cached_distillation import write_cache
from transformers import T5Config, T5ForConditionalGeneration

from conftest import build_vision_model
from encdec_slm.trainers.packing import DataCollatorWithPacking, assign_rows, check_packing, locate_rows, pack_ids


SOURCES, TARGETS = [7, 2, 4, 1, 3], [1, 2, 3, 6, 1]


@pytest.mark.parametrize("limits", [(None, None), (8, 8), (100, 7)])
def test_each_row_is_in_one_pack_within_both_budgets(limits):
    packs = assign_rows(SOURCES, TARGETS, *limits)
    assert sorted(row for pack in packs for row in pack) == [0, 1, 2, 3, 4]
    for lengths, limit in zip((SOURCES, TARGETS), limits, strict=True):
        assert all(sum(lengths[row] for row in pack) <= (limit or max(lengths)) for pack in packs)
    assert packs == assign_rows(SOURCES, TARGETS, *limits) and len(packs) < 5


def test_packs_hold_their_rows_and_number_the_padding():
    rows = [[5], [6, 7], [8, 9, 10]]
    ids, segments = pack_ids(rows, [[2], [1, 0]], 0, min_length=4)
    assert ids.tolist() == [[8, 9, 10, 0], [6, 7, 5, 0]]
    assert segments.tolist() == [[0, 0, 0, 1], [0, 0, 1, 2]]
    pack_numbers, starts = locate_rows([[2], [1, 0]], [1, 2, 3])
    assert (pack_numbers.tolist(), starts.tolist()) == ([1, 1, 0], [2, 0, 0])


def train(tmp_path, collator=None, rows=None, **settings):
    trainer = make_trainer(build(), str(tmp_path), rows, **settings)
    trainer.data_collator = collator or trainer.data_collator
    trainer.train()
    return trainer


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [(None, None), (40, 30)])
def test_a_packed_run_takes_the_steps_of_a_padded_run(tmp_path, lengths, label_smoothing):
    settings = {"label_smoothing_factor": label_smoothing, "per_device_train_batch_size": 4}
    settings["gradient_accumulation_steps"] = 2
    expected = train(tmp_path, **settings)
    collator = DataCollatorWithPacking(make_tokenizer(), 1 if label_smoothing else None, *lengths)
    found = train(tmp_path, collator, **settings)
    torch.testing.assert_close(history_of(found), history_of(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(history_of(found, "grad_norm"), history_of(expected, "grad_norm"), rtol=1e-4, atol=1e-5)
    for name, weight in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_packed_run_continues_where_it_was_interrupted(tmp_path, is_streamed):
    rows = Dataset.from_list(make_rows())
    rows = rows.to_iterable_dataset() if is_streamed else rows
    collator, settings = DataCollatorWithPacking(make_tokenizer()), {"save_strategy": "steps", "save_steps": 2}
    settings["per_device_train_batch_size"] = 4
    expected = train(tmp_path / "whole", collator, rows, max_steps=4, **settings)
    found = make_trainer(build(1), str(tmp_path / "whole"), rows, max_steps=4, **settings)
    found.data_collator = collator
    found.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert history_of(found)[2:] == history_of(expected)[2:]
    torch.testing.assert_close(found.model.state_dict(), expected.model.state_dict())


@pytest.mark.parametrize("settings", [{}, {"kd_ratio": 0.5, "per_device_train_batch_size": 2}])
def test_packed_distillation_from_a_cache_equals_padded_distillation(tmp_path, settings):
    cache = write_cache(tmp_path / "cache")
    expected = distill(tmp_path / "padded", cache, **settings)
    found = distill(tmp_path / "packed", cache, packing=True, **settings)
    for name in ("loss", "kd_loss", "grad_norm"):
        torch.testing.assert_close(history_of(found, name), history_of(expected, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((3, None), "packed_source_length"), ((None, 2), "packed_target_length"), ((0, None), "packed_source_length")],
)
def test_rows_that_are_longer_than_a_pack_are_refused(sizes, name):
    with pytest.raises(ValueError, match=name):
        DataCollatorWithPacking(make_tokenizer(), None, *sizes)([{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 2]}])


def test_rows_without_labels_are_refused():
    with pytest.raises(ValueError, match="labels"):
        DataCollatorWithPacking(make_tokenizer())([{"input_ids": [5, 6]}])


def test_models_that_cannot_keep_rows_apart_are_refused():
    sizes = {"vocab_size": 97, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    for model in (T5ForConditionalGeneration(T5Config(**sizes)), build_vision_model()):
        with pytest.raises(ValueError, match="decoder_segment_ids"):
            check_packing(model)
    check_packing(build())
