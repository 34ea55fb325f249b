# SPDX-License-Identifier: Apache-2.0
"""Ids that mean the same to two tokenizers, and plain refusals where they do not."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from encdec_slm.trainers.vocabulary import num_common_tokens


SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = (*SPECIAL, "a", "b", "c", "d", "e", "f")


def tokenizer_of(tokens):
    """Ids of `tokens` are their positions; `None` leaves an id without a token."""
    vocabulary = {token: id for id, token in enumerate(tokens) if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")))


def swapped(tokens, *pairs):
    tokens = list(tokens)
    for first, second in pairs:
        tokens[first], tokens[second] = tokens[second], tokens[first]
    return tokens


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(10, 10), (16, 10), (10, 16), (12, 16)])
def test_rows_that_pad_either_table_are_not_common(student_rows, teacher_rows):
    assert num_common_tokens(tokenizer_of(WORDS), tokenizer_of(WORDS), student_rows, teacher_rows) == 10


def test_tokens_that_were_added_to_both_are_common():
    tokenizers = tokenizer_of(WORDS), tokenizer_of(WORDS)
    for tokenizer in tokenizers:
        tokenizer.add_tokens(["g", "<image>"])
    assert num_common_tokens(*tokenizers, 16, 16) == 12


def test_an_id_without_a_token_in_both_is_no_difference():
    holed = [*WORDS, None, "g"]
    assert num_common_tokens(tokenizer_of(holed), tokenizer_of(holed), 16, 16) == 12


def test_tokenizers_of_one_size_with_other_tokens_are_refused_with_the_first_three_ids():
    teacher = tokenizer_of(swapped(WORDS, (4, 5), (7, 9)))
    with pytest.raises(ValueError) as error:
        num_common_tokens(tokenizer_of(WORDS), teacher, 10, 10)
    message = str(error.value)
    assert message.startswith(
        "Student and teacher disagree about 4 of 10 token ids: 4 is 'a' and 'b'; 5 is 'b' and 'a'; "
        "7 is 'd' and 'f'; and others"
    )
    assert "'e'" not in message and "9 is" not in message
    assert "Give the student the teacher's tokenizer" in message and "`seq_kd=True" in message


def test_three_differences_are_all_there_are_without_an_ellipsis():
    teacher = tokenizer_of([*WORDS[:4], "b", "c", "a", *WORDS[7:]])
    with pytest.raises(ValueError, match=r"3 of 10 token ids: 4 is 'a' and 'b'; 5 .*; 6 is 'c' and 'a'\. Their"):
        num_common_tokens(tokenizer_of(WORDS), teacher, 10, 10)


@pytest.mark.parametrize(
    ("student_words", "teacher_words", "shown"),
    [([*WORDS, "g"], WORDS, "10 is 'g' and nothing"), (WORDS, [*WORDS, "g"], "10 is nothing and 'g'")],
)
def test_a_token_of_one_tokenizer_alone_is_refused(student_words, teacher_words, shown):
    with pytest.raises(ValueError, match=rf"disagree about 1 of 11 token ids: {shown}\. "):
        num_common_tokens(tokenizer_of(student_words), tokenizer_of(teacher_words), 16, 16)


def test_a_token_that_was_added_to_the_student_alone_is_refused():
    student = tokenizer_of(WORDS)
    student.add_special_tokens({"pad_token": "<mine>"})
    with pytest.raises(ValueError, match=r"1 of 11 token ids: 10 is '<mine>' and nothing\. "):
        num_common_tokens(student, tokenizer_of(WORDS), 16, 16)


def test_equal_numbers_of_rows_do_not_hide_different_tokens():
    with pytest.raises(ValueError, match="disagree about 10 of 10 token ids: 0 is '<pad>' and 'f'"):
        num_common_tokens(tokenizer_of(WORDS), tokenizer_of(WORDS[::-1]), 10, 10)


@pytest.mark.parametrize(("student_rows", "teacher_rows", "role"), [(9, 10, "student"), (10, 9, "teacher")])
def test_a_table_with_fewer_rows_than_tokens_is_refused_with_both_numbers(student_rows, teacher_rows, role):
    with pytest.raises(ValueError) as error:
        num_common_tokens(tokenizer_of(WORDS), tokenizer_of(WORDS), student_rows, teacher_rows)
    message = str(error.value)
    assert message.startswith(f"The {role}'s table has 9 rows, but the tokenizer has ids up to 9. ")
    assert f"`{role}.resize_token_embeddings(10)`" in message


@pytest.mark.parametrize(
    ("student_words", "teacher_words"),
    [
        ([*WORDS, "<image>"], WORDS),
        (WORDS, [*WORDS, "<image>"]),
        ([*WORDS, "<image>"], [*WORDS, "<|image|>"]),
        ([*WORDS, "<image>"], [*WORDS, None, "<|image|>"]),
    ],
)
def test_image_tokens_behind_all_others_are_no_difference_and_not_common(student_words, teacher_words):
    tokenizers = tokenizer_of(student_words), tokenizer_of(teacher_words)
    rows = len(student_words), len(teacher_words)
    assert num_common_tokens(*tokenizers, *rows, image_tokens=("<image>", "<|image|>")) == 10
    with pytest.raises(ValueError, match="disagree about"):
        num_common_tokens(*tokenizers, *rows)


@pytest.mark.parametrize(
    ("student_words", "shown"),
    [
        ([*WORDS, "g"], "10 is 'g' and nothing"),
        ([*WORDS[:9], "<image>"], "9 is '<image>' and 'f'"),
        ([*WORDS[:8], "<image>", "f"], "8 is '<image>' and nothing"),
    ],
)
def test_image_tokens_excuse_no_other_difference(student_words, shown):
    teacher_words = [*WORDS[:8], None, "f"] if student_words[-2:] == ["<image>", "f"] else WORDS
    with pytest.raises(ValueError, match=f"disagree about 1 of .* token ids: {shown}"):
        num_common_tokens(tokenizer_of(student_words), tokenizer_of(teacher_words), 16, 16, ("<image>",))


def test_each_table_has_rows_for_its_own_image_token():
    with pytest.raises(ValueError, match="The student's table has 10 rows, but the tokenizer has ids up to 10"):
        num_common_tokens(tokenizer_of([*WORDS, "<image>"]), tokenizer_of(WORDS), 10, 10, ("<image>",))
