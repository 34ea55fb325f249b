# SPDX-License-Identifier: Apache-2.0
"""Rows of text or messages become what student and teacher read, and batches of it.

A word `w10` has the id 10; <pad>, <s>, </s> and <unk> are 0 to 3.
"""

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset
from ddp_worker import make_tokenizer
from tokenizers.processors import TemplateProcessing

from encdec_slm.trainers.distillation_data import (
    RowEncoder,
    collate,
    encode_rows,
    padded,
    refuse_long_rows,
    stacked,
    trimmed,
    unpadded,
)


EOS = 2
# <s> role-name content for each message; w90 is the user, w91 the assistant.
CHAT_TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}{{ 'w90' if message['role'] == 'user' else 'w91' }} "
    "{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}{{ opening|default('w91') }}{% endif %}"
)


def tokenizer_with(template=None, chat_template=None):
    """The words' tokenizer; `template` says which special tokens it puts around a text, such as `<s> $A </s>`."""
    tokenizer = make_tokenizer()
    if template is not None:
        specials = [("<s>", 1), ("</s>", 2)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    tokenizer.chat_template = chat_template
    return tokenizer


def make_encoder(template=None, teacher_template=None, max_source_length=None, max_target_length=8, **kwargs):
    student, teacher = tokenizer_with(template), tokenizer_with(teacher_template, CHAT_TEMPLATE)
    return RowEncoder(student, teacher, max_source_length, max_target_length, kwargs)


def encode_one(encoder, **row):
    """The only row of `encode_rows`, without the columns that a test does not ask for."""
    (encoded,) = encode_rows(Dataset.from_list([row]), encoder, "training data")
    return encoded


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


# Text


@pytest.mark.parametrize(("source", "target"), [("prompt", "completion"), ("source", "target")])
def test_a_row_of_text_becomes_ids_for_both_models(source, target):
    row = encode_one(make_encoder(), **{source: "w10 w11 w12", target: "w20 w21"})
    assert row == {
        "row": 0,
        "source_ids": [10, 11, 12],
        "teacher_source_ids": [10, 11, 12],
        "target_ids": [20, 21, EOS],
        "num_source_tokens": 3,
        "num_target_tokens": 3,
    }


def test_rows_are_numbered_and_other_columns_are_left_out():
    rows = Dataset.from_dict({"id": ["x", "y"], "prompt": ["w10", "w11"], "completion": ["w20", "w21"]})
    encoded = encode_rows(rows, make_encoder(), "training data")
    assert encoded["row"][:] == [0, 1] and "id" not in encoded.column_names
    assert encoded["source_ids"][:] == [[10], [11]]


def test_rows_without_a_target_have_no_column_of_it():
    assert encode_one(make_encoder(), prompt="w10").keys() == {
        "row",
        "source_ids",
        "teacher_source_ids",
        "num_source_tokens",
    }


def test_the_end_is_taught_once():
    encoder = make_encoder(template="<s> $A </s>")
    assert encode_one(encoder, prompt="w10", completion="w20")["target_ids"] == [20, EOS]
    assert encode_one(encoder, prompt="w10", completion="w20 </s>")["target_ids"] == [20, EOS]


def test_an_empty_target_teaches_to_end_at_once():
    row = encode_one(make_encoder(), prompt="w10", completion="")
    assert (row["target_ids"], row["num_target_tokens"]) == ([EOS], 1)


@pytest.mark.parametrize(
    ("max_target_length", "ids"),
    [(5, [20, 21, 22, EOS]), (4, [20, 21, 22, EOS]), (3, [20, 21, 22]), (2, [20, 21]), (1, [20])],
)
def test_a_target_that_is_cut_does_not_end(max_target_length, ids):
    row = encode_one(make_encoder(max_target_length=max_target_length), prompt="w10", completion="w20 w21 w22")
    assert row["target_ids"] == ids
    assert row["num_target_tokens"] == 4  # before the cut


def test_a_source_that_is_cut_is_cut_for_the_teacher_too():
    row = encode_one(make_encoder(max_source_length=2), prompt="w10 w11 w12", completion="w20")
    assert row["source_ids"] == row["teacher_source_ids"] == [10, 11]
    assert row["num_source_tokens"] == 3


def test_a_source_that_is_cut_keeps_the_special_tokens_of_each_tokenizer():
    encoder = make_encoder(template="$A </s>", teacher_template="<s> $A", max_source_length=3)
    row = encode_one(encoder, prompt="w10 w11 w12", completion="w20")
    assert row["source_ids"] == [10, 11, EOS]
    assert row["teacher_source_ids"] == [1, 10, 11]
    assert row["num_source_tokens"] == 4


def test_a_source_of_just_the_bound_is_not_cut():
    row = encode_one(make_encoder(max_source_length=3), prompt="w10 w11 w12", completion="w20")
    assert row["source_ids"] == row["teacher_source_ids"] == [10, 11, 12]


@pytest.mark.parametrize(
    ("teacher_template", "ids"),
    [(None, [10, 11]), ("$A </s>", [10, 11]), ("<s> $A", [1, 10, 11]), ("<s> $A </s>", [1, 10, 11])],
)
def test_the_teacher_reads_on_into_the_target(teacher_template, ids):
    """What ends a text is dropped from its source, what begins one is kept."""
    row = encode_one(make_encoder(teacher_template=teacher_template), prompt="w10 w11", completion="w20")
    assert row["teacher_source_ids"] == ids
    assert row["source_ids"] == [10, 11]


# Messages


def test_a_message_is_plain_text_for_the_student_and_rendered_for_the_teacher():
    row = encode_one(make_encoder(), prompt=[user("w10 w11")], completion=[assistant("w20")])
    assert row["source_ids"] == [10, 11]
    assert row["teacher_source_ids"] == [1, 90, 10, 11, 91]
    assert row["target_ids"] == [20, EOS]


def test_the_student_reads_who_says_what_where_there_are_several_messages():
    encoder = make_encoder()
    vocabulary = {"system:": 80, "user:": 81, "assistant:": 82}
    encoder.tokenizer.add_tokens(list(vocabulary))
    ids = encoder.tokenizer.convert_tokens_to_ids(list(vocabulary))
    messages = [{"role": "system", "content": "w9"}, user("w10"), assistant("w11"), user("w12")]
    row = encode_one(encoder, prompt=messages, completion="w20")
    system_id, user_id, assistant_id = ids
    assert row["source_ids"] == [system_id, 9, user_id, 10, assistant_id, 11, user_id, 12]
    assert row["teacher_source_ids"] == [1, 91, 9, 90, 10, 91, 11, 90, 12, 91]


def test_a_message_that_is_cut_is_cut_for_the_teacher_too():
    row = encode_one(make_encoder(max_source_length=2), prompt=[user("w10 w11 w12")], completion="w20")
    assert row["source_ids"] == [10, 11]
    assert row["teacher_source_ids"] == [1, 90, 10, 11, 91]
    assert row["num_source_tokens"] == 3


def test_settings_of_the_chat_template_reach_it():
    row = encode_one(make_encoder(opening="w77"), prompt=[user("w10")], completion="w20")
    assert row["teacher_source_ids"] == [1, 90, 10, 77]


def test_a_chat_template_of_the_student_is_not_used():
    encoder = make_encoder()
    encoder.tokenizer.chat_template = "w66"
    assert encode_one(encoder, prompt=[user("w10")], completion=[assistant("w20")])["source_ids"] == [10]


def test_messages_need_a_chat_template():
    encoder = make_encoder()
    encoder.teacher_tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"`prompt` of index=0 is a list of messages, but the teacher's tokenizer"):
        encode_one(encoder, prompt=[user("w10")], completion="w20")


def test_text_needs_no_chat_template():
    encoder = make_encoder()
    encoder.teacher_tokenizer.chat_template = None
    assert encode_one(encoder, prompt="w10", completion="w20")["teacher_source_ids"] == [10]


# What is logged


def test_lengths_and_cuts_are_logged(caplog):
    rows = Dataset.from_dict(
        {"prompt": ["w10", "w10 w11 w12", "w10 w11 w12 w13 w14"], "completion": ["w20", "w20 w21 w22 w23", "w20 w21"]}
    )
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        encode_rows(rows, make_encoder(max_source_length=2, max_target_length=3), "training data")
    assert [record.getMessage() for record in caplog.records] == [
        "Training data: 3 rows; sources of 3 tokens (longest 5), 2 of them cut to 2; targets of 3 tokens (longest 5), "
        "1 of them cut to 3."
    ]


def test_it_is_logged_that_nothing_was_cut(caplog):
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        encode_one(make_encoder(), prompt="w10 w11")
    assert [record.getMessage() for record in caplog.records] == [
        "Training data: 1 row; sources of 2 tokens (longest 2), none cut."
    ]


# Kinds of data sets


def test_rows_that_stream_are_encoded_as_they_come():
    rows = Dataset.from_dict({"id": [1, 2, 3], "source": ["w10", "w11", "w12 w13"], "target": ["w20", "", "w21"]})
    expected = encode_rows(rows, make_encoder(), "training data").to_list()
    streamed = encode_rows(rows.to_iterable_dataset(), make_encoder(), "training data")
    assert isinstance(streamed, IterableDataset)
    assert list(streamed) == expected
    assert list(streamed) == expected  # a second epoch


def test_only_rows_that_are_asked_for_are_read_from_a_stream():
    read = []

    def rows():
        for index in range(10_000):
            read.append(index)
            yield {"prompt": "w10", "completion": "w20"}

    streamed = encode_rows(IterableDataset.from_generator(rows), make_encoder(), "training data")
    assert next(iter(streamed))["source_ids"] == [10]
    assert len(read) < 3_000  # the look at the first row, and a batch of a thousand


def test_rows_that_are_encoded_already_come_back_as_they_are(caplog):
    encoded = encode_rows(Dataset.from_dict({"prompt": ["w10"]}), make_encoder(), "training data")
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        assert encode_rows(encoded, make_encoder(), "training data") is encoded
    assert not caplog.records


# What is refused


@pytest.mark.parametrize("rows", [Dataset.from_dict({"prompt": []}), IterableDataset.from_generator(lambda: iter(()))])
def test_no_rows_are_refused(rows):
    with pytest.raises(ValueError, match="The training data has no rows, but at least one is needed"):
        encode_rows(rows, make_encoder(), "training data")


def test_other_columns_are_refused_with_those_that_are_needed():
    rows = Dataset.from_dict({"question": ["w10"], "completion": ["w20"]})
    with pytest.raises(ValueError, match="The test data has the columns question, completion, but `prompt` and"):
        encode_rows(rows, make_encoder(), "test data")


@pytest.mark.parametrize("prompt", ["", []])
def test_an_empty_source_is_refused_with_its_row(prompt):
    rows = [{"prompt": "w10" if prompt == "" else [user("w10")]}, {"prompt": prompt}]
    kind, message = (ValueError, "has no tokens") if prompt == "" else (TypeError, r"is \[\], but it must be text")
    with pytest.raises(kind, match=f"The `prompt` of index=1 {message}"):
        encode_rows(Dataset.from_list(rows), make_encoder(), "training data")


def test_a_source_that_is_empty_for_the_teacher_is_refused():
    """There would be no position that predicts the first target token. The student's tokenizer ends every text."""
    with pytest.raises(ValueError, match="The `prompt` of index=0 has no tokens"):
        encode_one(make_encoder(template="$A </s>"), prompt="", completion="w20")


def test_a_source_that_the_cut_leaves_empty_for_the_teacher_is_refused():
    """Of a bound of one token, what begins every text of the student takes all."""
    with pytest.raises(ValueError, match="The `prompt` of index=0 has no tokens"):
        encode_one(make_encoder(template="<s> $A", max_source_length=1), prompt="w10 w11", completion="w20")


@pytest.mark.parametrize("value", [None, 5])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_what_is_neither_text_nor_messages_is_refused(column, value):
    row = {"prompt": "w10", "completion": "w20", column: value}
    with pytest.raises(TypeError, match=rf"The `{column}` of index=0 is {value}, but it must be text or a list of"):
        encode_one(make_encoder(), **row)


@pytest.mark.parametrize("content", [None, [{"type": "text", "text": "w10"}]])
def test_a_message_without_text_is_refused(content):
    with pytest.raises(TypeError, match=r"The `prompt` of index=0 is \[\{.*but it must be text or a list of messages"):
        encode_one(make_encoder(), prompt=[{"role": "user", "content": content}])


def test_a_row_that_is_wrong_in_a_stream_is_refused_when_it_comes():
    rows = Dataset.from_dict({"prompt": ["w10", None]}).to_iterable_dataset()
    streamed = encode_rows(rows, make_encoder(), "training data")
    with pytest.raises(TypeError, match="The `prompt` of index=1 is None, but it must be text"):
        list(streamed)


# The teacher's context


@pytest.fixture
def encoded():
    """Rows of 2 + 4, 5 + 3 and 6 + 1 tokens for the teacher."""
    return Dataset.from_list(
        [
            {"teacher_source_ids": [10] * num_source, "target_ids": [20] * num_target}
            for num_source, num_target in ((2, 4), (5, 3), (6, 1))
        ]
    )


def test_rows_that_fit_the_teacher_s_context_are_not_refused(encoded):
    refuse_long_rows(encoded, None, teacher_context=8)
    refuse_long_rows(encoded, 2, teacher_context=8)
    refuse_long_rows(encoded.remove_columns("target_ids"), None, teacher_context=1)


def test_a_row_that_is_too_long_for_the_teacher_is_refused_with_its_numbers(encoded):
    with pytest.raises(ValueError) as error:
        refuse_long_rows(encoded, None, teacher_context=7)
    assert str(error.value).startswith(
        "The teacher's context is 7 tokens, but row 1 has 5 source tokens for it and 3 target tokens, 8 together. "
        "Lower `max_source_length` or `max_completion_length`"
    )


@pytest.mark.parametrize("has_targets", [True, False])
def test_targets_that_will_be_written_count_with_their_bound(encoded, has_targets):
    rows = encoded if has_targets else encoded.remove_columns("target_ids")
    with pytest.raises(ValueError, match=r"is 8 tokens, but row 2 has 6 .* and up to 3 target tokens, 9 together"):
        refuse_long_rows(rows, 3, teacher_context=8)


# Batches


def encoded_row(row, source_ids, teacher_source_ids):
    return {"row": row, "source_ids": source_ids, "teacher_source_ids": teacher_source_ids}


def test_a_batch_holds_source_target_and_what_the_teacher_reads():
    rows = [encoded_row(7, [10, 11, 12], [1, 10]), encoded_row(3, [13], [1, 13, 14, 15])]
    batch = collate(rows, [[20, EOS], [21, 22, EOS]], pad_token_id=0, multiple=None)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "source_ids": [[10, 11, 12], [13, 0, 0]],
        "source_mask": [[1, 1, 1], [1, 0, 0]],
        "target_ids": [[20, EOS, 0], [21, 22, EOS]],
        "target_mask": [[1, 1, 0], [1, 1, 1]],
        "teacher_ids": [[1, 10, 20, EOS, 0, 0, 0], [1, 13, 14, 15, 21, 22, EOS]],
        "teacher_mask": [[1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
        "teacher_source_lengths": [2, 4],
        "row": [7, 3],
    }
    assert all(tensor.dtype == torch.long for tensor in batch.values())


@pytest.mark.parametrize("multiple", [None, 1, 4, 8])
def test_lengths_are_rounded_up_to_a_multiple(multiple):
    rows = [encoded_row(0, [10, 11, 12, 13, 14], [1, 10, 11])]
    batch = collate(rows, [[20, 21, 22, EOS]], pad_token_id=9, multiple=multiple)
    for name, ids in (("source", rows[0]["source_ids"]), ("target", [20, 21, 22, EOS])):
        length = len(ids) if multiple is None else -(-len(ids) // multiple) * multiple
        missing = length - len(ids)
        assert batch[f"{name}_ids"].tolist() == [[*ids, *[9] * missing]]
        assert batch[f"{name}_mask"].tolist() == [[*[1] * len(ids), *[0] * missing]]


def test_a_pad_token_that_a_text_uses_is_not_masked_in_it():
    batch = collate([encoded_row(0, [10, EOS], [10])], [[20, EOS]], pad_token_id=EOS, multiple=4)
    assert batch["target_ids"].tolist() == [[20, EOS, EOS, EOS]]
    assert batch["target_mask"].tolist() == [[1, 1, 0, 0]]


def test_prompts_are_padded_on_the_left_of_what_is_written():
    ids, mask = padded([[10], [11, 12, 13]], 9, 4, left=True)
    assert ids.tolist() == [[9, 9, 9, 10], [9, 11, 12, 13]]
    assert mask.tolist() == [[0, 0, 0, 1], [0, 1, 1, 1]]


def test_trimming_removes_the_columns_that_pad_every_row():
    ids, mask = padded([[10, 11], [12]], 0, 8)
    trimmed_ids, trimmed_mask = trimmed(ids, mask)
    assert trimmed_ids.tolist() == [[10, 11], [12, 0]]
    assert trimmed_mask.tolist() == [[1, 1], [1, 0]]


def test_trimming_leaves_a_column_of_rows_that_are_all_padding():
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    assert [tensor.shape for tensor in trimmed(ids, mask)] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("multiple", [None, 4])
def test_unpadding_undoes_padding(left, multiple):
    rows = [[10, 0, 11], [], [12]]
    assert list(unpadded(*padded(rows, 0, multiple, left=left))) == rows


def test_batches_of_other_widths_are_stacked_as_wide_as_the_widest():
    short, long = padded([[5, 6], [7]], 0, None), padded([[8, 9, 10]], 0, None)
    ids, mask = stacked(short, long)
    assert ids.tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]
    assert mask.tolist() == [[1, 1, 0], [1, 0, 0], [1, 1, 1]]
