# SPDX-License-Identifier: Apache-2.0
"""Rows of text for student and teacher, and batches of them; rows alone are tested in test_row_encoding.py.

A word `w10` has the id 10; <pad>, <s>, </s> and <unk> are 0 to 3.
"""

import logging

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from conftest import build_tokenizer
from encdec_slm.trainers.distillation_data import (
    DistillationRowEncoder,
    as_prompts,
    check_teacher_context,
    collate,
    to_lists,
    trim_padding,
)
from encdec_slm.trainers.row_encoding import RowEncoder, encode_rows, pad_ids


EOS = 2
# <s> role content for each message; w90 is the user, w91 the assistant.
CHAT_TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}{{ 'w90' if message['role'] == 'user' else 'w91' }} "
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}{{ opening|default('w91') }}{% endif %}"
)


def words(template=None, chat_template=None):
    """A tokenizer of words; `template` adds special tokens, as in `<s> $A </s>`."""
    tokenizer = build_tokenizer(ends_sources=False)
    if template is not None:
        specials = [("<s>", 1), ("</s>", EOS)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    tokenizer.chat_template = chat_template
    return tokenizer


def build_encoder(template=None, teacher_template=None, lengths=(None, 8), **kwargs):
    teacher = RowEncoder(words(teacher_template, CHAT_TEMPLATE))
    return DistillationRowEncoder(RowEncoder(words(template), *lengths), teacher, kwargs)


def encode_one(encoder, **row):
    (encoded,) = encode_rows(Dataset.from_list([row]), encoder, "training data")
    return encoded


def test_a_row_becomes_ids_for_both_models():
    row = encode_one(build_encoder(), prompt="w10 w11 w12", completion="w20 w21", id=7)
    assert row == {
        **{"row": 0, "source_ids": [10, 11, 12], "teacher_source_ids": [10, 11, 12], "num_source_tokens": 3},
        **{"target_ids": [20, 21, EOS], "num_target_tokens": 3},
    }
    row = encode_one(build_encoder(), prompt="w10")
    assert row.keys() == {"row", "source_ids", "teacher_source_ids", "num_source_tokens"}


@pytest.mark.parametrize(("template", "start"), [(None, []), ("$A </s>", []), ("<s> $A", [1]), ("<s> $A </s>", [1])])
def test_the_teacher_reads_on_into_the_target(template, start):
    row = encode_one(build_encoder(teacher_template=template), prompt="w10 w11", completion="w20")
    assert row["teacher_source_ids"] == [*start, 10, 11] and row["source_ids"] == [10, 11]


@pytest.mark.parametrize("as_message", [False, True])
def test_a_truncated_source_is_truncated_for_the_teacher_too(as_message):
    encoder = build_encoder("$A </s>", "<s> $A </s>", lengths=(3, 8))
    prompt = [{"role": "user", "content": "w10 w11 w12"}] if as_message else "w10 w11 w12"
    row = encode_one(encoder, prompt=prompt, completion="w20")
    assert (row["source_ids"], row["num_source_tokens"]) == ([10, 11, EOS], 4)
    assert row["teacher_source_ids"] == ([1, 90, 10, 11, 91] if as_message else [1, 10, 11])


def test_messages_are_rendered_for_the_teacher_alone_with_the_settings_of_its_template():
    encoder = build_encoder(opening="w77")
    encoder.student.tokenizer.chat_template = "w66"
    row = encode_one(encoder, prompt=[{"role": "user", "content": "w10"}], completion="w20")
    assert row["source_ids"] == [10] and row["teacher_source_ids"] == [1, 90, 10, 77]
    encoder.teacher.tokenizer.chat_template = None
    assert encode_one(encoder, prompt="w10")["teacher_source_ids"] == [10]
    with pytest.raises(ValueError, match=r"`prompt` of row 0 .*chat template"):
        encode_one(encoder, prompt=[{"role": "user", "content": "w10"}])


def test_the_teacher_reads_a_teacher_prompt_if_there_is_one():
    rows = Dataset.from_list(
        [{"prompt": "w10", "teacher_prompt": "w30 w10"}, {"prompt": "w11", "teacher_prompt": None}]
    )
    encoded = encode_rows(rows, build_encoder(), "training data")
    assert encoded["source_ids"][:] == [[10], [11]] and encoded["teacher_source_ids"][:] == [[30, 10], [11]]


@pytest.mark.parametrize(
    ("encoder", "row", "match"),
    [
        ({}, {"prompt": ""}, "`prompt` of row 0 .*student"),
        ({"template": "$A </s>"}, {"prompt": ""}, "`prompt` of row 0 .*teacher"),
        # The token that begins every text takes the whole length.
        ({"template": "<s> $A", "lengths": (1, 8)}, {"prompt": "w10 w11"}, "`prompt` of row 0 .*teacher"),
        ({}, {"prompt": "w10", "teacher_prompt": ""}, "`teacher_prompt` of row 0 .*teacher"),
    ],
)
def test_a_source_that_is_empty_for_a_model_is_refused(encoder, row, match):
    with pytest.raises(ValueError, match=match):
        encode_one(build_encoder(**encoder), **row)


def test_lengths_are_logged(caplog):
    sources, targets = ["w10", "w10 w11 w12", "w10 w11 w12 w13 w14"], ["w20", "w20 w21 w22 w23", "w20 w21"]
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        rows = Dataset.from_dict({"prompt": sources, "completion": targets})
        encode_rows(rows, build_encoder(lengths=(2, 3)), "training data")
    (message,) = caplog.messages
    for part in ("3 rows", "2 truncated to 2", "1 truncated to 3", "longest 5"):
        assert part in message


@pytest.mark.parametrize("is_streamed", [False, True])
def test_encoded_rows_are_not_encoded_again(is_streamed):
    rows = Dataset.from_dict({"prompt": ["w10"], "completion": ["w20"]})
    rows = rows.to_iterable_dataset() if is_streamed else rows
    encoded = encode_rows(rows, build_encoder(), "training data")
    assert list(encoded) == list(encoded)
    assert encode_rows(encoded, build_encoder(), "training data") is encoded


def test_rows_that_are_too_long_for_the_teacher_are_refused_with_their_numbers():
    lengths = ((2, 4), (5, 3), (6, 1))
    rows = [{"teacher_source_ids": [10] * source, "target_ids": [20] * target} for source, target in lengths]
    encoded = Dataset.from_list(rows)
    for dataset, max_target_length, context in (
        (encoded, None, 8),
        (encoded, 2, 8),
        (encoded.remove_columns("target_ids"), None, 1),
    ):
        check_teacher_context(dataset, max_target_length, context)
    with pytest.raises(ValueError, match=r"7 tokens.* row 1 .*8.* 5 .* 3 "):
        check_teacher_context(encoded, None, 7)
    for dataset in (encoded, encoded.remove_columns("target_ids")):
        with pytest.raises(ValueError, match=r"8 tokens.* row 2 .*9.* 6 .* 3 "):
            check_teacher_context(dataset, 3, 8)


def test_a_batch_holds_source_target_and_what_the_teacher_reads():
    rows = [
        {"row": 7, "source_ids": [10, 11, EOS], "teacher_source_ids": [1, 10]},
        {"row": 3, "source_ids": [13], "teacher_source_ids": [1, 13, 14, 15]},
    ]
    batch = collate(rows, [[20, EOS], [21, 22, EOS]], [[30], [31, EOS]], pad_token_id=EOS)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "source_ids": [[10, 11, EOS], [13, EOS, EOS]],
        "source_mask": [[1, 1, 1], [1, 0, 0]],
        "target_ids": [[20, EOS, EOS], [21, 22, EOS]],
        "target_mask": [[1, 1, 0], [1, 1, 1]],
        "teacher_ids": [[1, 10, 20, EOS, EOS, EOS, EOS], [1, 13, 14, 15, 21, 22, EOS]],
        "teacher_mask": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
        "gold_ids": [[30, EOS], [31, EOS]],
        "gold_mask": [[1, 0], [1, 1]],
        "teacher_source_lengths": [2, 4],
        "row": [7, 3],
        "num_target_tokens": 5,
        "num_gold_tokens": 3,
    }
    targets = [[20], [21, EOS]]
    for gold, num_gold_tokens in ((targets, 3), (None, 0)):
        batch = collate(rows, targets, gold, 0, 4)
        assert (batch["num_target_tokens"], batch["num_gold_tokens"]) == (3, num_gold_tokens)
        lengths = {name: ids.shape[1] for name, ids in batch.items() if name.endswith("_ids")}
        assert lengths == {"source_ids": 4, "target_ids": 4, "teacher_ids": 8}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("multiple", [None, 4])
def test_padding_is_removed(side, multiple):
    rows = [[10, 0, 11], [], [12]]
    ids, mask = pad_ids(rows, 0, multiple, side)
    assert to_lists(ids, mask) == rows
    if side == "right":
        assert [tensor.tolist() for tensor in trim_padding(ids, mask)] == [
            [[10, 0, 11], [0, 0, 0], [12, 0, 0]],
            [[1, 1, 1], [0, 0, 0], [1, 0, 0]],
        ]
    nothing = torch.zeros(2, 3, dtype=torch.long)
    assert [tensor.shape for tensor in trim_padding(nothing, nothing)] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("is_chat", [False, True])
def test_prompts_of_both_models_are_text_or_messages(is_chat):
    rows = Dataset.from_list([{"source": "w5", "target": "w6", "teacher_prompt": "w7 w5"}])
    source, prompt = ([{"role": "user", "content": text}] if is_chat else text for text in ("w5", "w7 w5"))
    assert as_prompts(rows, is_chat)[0] == {"prompt": source, "completion": "w6", "teacher_prompt": prompt}
