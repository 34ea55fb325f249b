# SPDX-License-Identifier: Apache-2.0
"""Which ids are the same tokens in two tokenizers."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from encdec_slm.trainers.vocabulary import count_common_tokens


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c", "d", "e", "f"]


def tokenizer_with(words):
    """A tokenizer whose ids are the places of its words; `None` leaves an id without a token."""
    vocabulary = {word: token_id for token_id, word in enumerate(words) if word is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")))


def swap(words, *pairs):
    words = list(words)
    for one, other in pairs:
        words[one], words[other] = words[other], words[one]
    return words


@pytest.mark.parametrize("rows", [(10, 10), (16, 10), (10, 16), (12, 16)])
def test_rows_that_pad_either_table_are_not_common(rows):
    assert count_common_tokens(tokenizer_with(WORDS), tokenizer_with(WORDS), *rows) == 10


@pytest.mark.parametrize("words", [[*WORDS, "g", "<image>"], [*WORDS, None, "g"]], ids=["added", "gap"])
def test_added_tokens_and_ids_without_a_token_in_both_are_common(words):
    assert count_common_tokens(tokenizer_with(words), tokenizer_with(words), 16, 16) == 12


@pytest.mark.parametrize(
    ("student", "teacher", "num_different", "shown"),
    [
        (WORDS, swap(WORDS, (4, 5), (7, 9)), 4, "4 is 'a' and 'b'; 5 is 'b' and 'a'; 7 is 'd' and 'f'"),
        (WORDS, WORDS[::-1], 10, "0 is '<pad>' and 'f'"),
        ([*WORDS, "g"], WORDS, 1, "10 is 'g'"),
        (WORDS, [*WORDS, "g"], 1, "10 .*'g'"),
    ],
)
def test_different_tokens_are_refused_with_their_number_and_the_first_three(student, teacher, num_different, shown):
    with pytest.raises(ValueError, match=f"{num_different} of .*{shown}") as error:
        count_common_tokens(tokenizer_with(student), tokenizer_with(teacher), 16, 16)
    assert "9 is" not in str(error.value)


@pytest.mark.parametrize(("rows", "role"), [((9, 10), "student"), ((10, 9), "teacher")])
def test_a_table_with_fewer_rows_than_tokens_is_refused(rows, role):
    with pytest.raises(ValueError, match=rf"{role} .* 9 .*`{role}.resize_token_embeddings\(10\)`"):
        count_common_tokens(tokenizer_with(WORDS), tokenizer_with(WORDS), *rows)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([*WORDS, "<image>"], WORDS),
        (WORDS, [*WORDS, "<image>"]),
        ([*WORDS, "<image>"], [*WORDS, "<|image|>"]),
        ([*WORDS, "<image>"], [*WORDS, None, "<|image|>"]),
    ],
)
def test_image_tokens_behind_all_others_may_differ_and_are_not_common(student, teacher):
    tokenizers, rows = (tokenizer_with(student), tokenizer_with(teacher)), (len(student), len(teacher))
    assert count_common_tokens(*tokenizers, *rows, image_tokens=("<image>", "<|image|>")) == 10
    with pytest.raises(ValueError, match="10 is"):
        count_common_tokens(*tokenizers, *rows)


@pytest.mark.parametrize(
    ("student", "teacher", "shown"),
    [
        ([*WORDS, "g"], WORDS, "10 is 'g'"),
        ([*WORDS[:9], "<image>"], WORDS, "9 is '<image>' and 'f'"),
        ([*WORDS[:8], "<image>", "f"], [*WORDS[:8], None, "f"], "8 is '<image>'"),
    ],
)
def test_image_tokens_excuse_no_other_difference(student, teacher, shown):
    with pytest.raises(ValueError, match=f"1 of .*{shown}"):
        count_common_tokens(tokenizer_with(student), tokenizer_with(teacher), 16, 16, ("<image>",))
