# SPDX-License-Identifier: Apache-2.0
"""Compare the vocabularies of two tokenizers, and trim one to rows."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import format_list
from ..vocabulary import old_token_ids, read_vocabulary_map, trim_tokenizer
from .row_encoding import iterate_texts


NUM_SHOWN = 3


def count_common_tokens(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_vocab_size: int,
    teacher_vocab_size: int,
    image_tokens: Sequence[str] = (),
) -> int:
    """Count the ids, from 0, that are the same tokens for both models; ids behind them pad the embedding tables.

    Args:
        student_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the student.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the teacher.
        student_vocab_size (`int`): Rows of the student's embedding table.
        teacher_vocab_size (`int`): Rows of the teacher's embedding table.
        image_tokens (`Sequence[str]`, *optional*): Tokens that stand for images. Behind all common tokens, one
            tokenizer may have them and the other not.

    Raises:
        ValueError: An id is not the same token in both tokenizers, or a tokenizer has more ids than its table rows.
    """
    student = {token_id: token for token, token_id in student_tokenizer.get_vocab().items()}
    teacher = {token_id: token for token, token_id in teacher_tokenizer.get_vocab().items()}
    size = max((token_id for token_id, token in student.items() if teacher.get(token_id) == token), default=-1) + 1
    ignored = {None, *image_tokens}
    ids = student.keys() | teacher.keys()
    different = sorted(
        token_id
        for token_id in ids
        if student.get(token_id) != teacher.get(token_id)
        and not (token_id >= size and student.get(token_id) in ignored and teacher.get(token_id) in ignored)
    )
    if different:
        raise ValueError(
            f"The vocabularies of student and teacher differ in {len(different):,} of {len(ids):,} ids: "
            f"{_describe(different, student, teacher)}. Distributions can only be compared over the same tokens. Use "
            "the teacher's tokenizer for the student, set `token_alignment='byte_spans'`, or use the teacher for "
            "sequence-level distillation only (`seq_kd=True, lmbda=0, kd_ratio=0`)."
        )
    check_table("student", max(student), student_vocab_size)
    check_table("teacher", max(teacher), teacher_vocab_size)
    return size


def find_teacher_token_ids(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_vocab_size: int,
    teacher_vocab_size: int,
    image_tokens: Sequence[str] = (),
) -> list[int] | None:
    """Return the teacher's id of each token of the student; `None` if the student's tokenizer is not trimmed from it.

    Args: as in [`count_common_tokens`].

    Raises:
        ValueError: The tokenizer was trimmed from another one than the teacher's, or has tokens that were added since,
            or a tokenizer has more ids than its table rows.
    """
    vocabulary = student_tokenizer.get_vocab()
    if read_vocabulary_map(student_tokenizer) is None or vocabulary == teacher_tokenizer.get_vocab():
        return None
    teacher_token_ids = old_token_ids(student_tokenizer, teacher_tokenizer)
    added = [
        token
        for token, token_id in vocabulary.items()
        if token_id >= len(teacher_token_ids) and token not in image_tokens
    ]
    if added:
        raise ValueError(
            f"Tokens were added to the student's trimmed tokenizer ({format_list(added, NUM_SHOWN)}), but "
            "the teacher does not have them. Add them to the teacher's tokenizer and trim that."
        )
    check_table("student", max(vocabulary.values()), student_vocab_size)
    check_table("teacher", teacher_token_ids[-1], teacher_vocab_size)
    return teacher_token_ids


def check_table(role: str, last_id: int, num_rows: int) -> None:
    """Check that an embedding table has a row for each token id.

    Raises:
        ValueError: It has fewer.
    """
    if num_rows <= last_id:
        raise ValueError(
            f"The embedding table of the {role} has {num_rows:,} rows, but its tokenizer has ids up to {last_id:,}. "
            f"Call `{role}.resize_token_embeddings({last_id + 1})`, or use the tokenizer of the {role}."
        )


def _describe(ids, student, teacher):
    """Describe the first ids that differ."""

    def name(token):
        return "no token" if token is None else repr(token)

    shown = [f"{id_} is {name(student.get(id_))} and {name(teacher.get(id_))}" for id_ in ids[:NUM_SHOWN]]
    return "; ".join(shown) + ("; and others" if len(ids) > NUM_SHOWN else "")


def trim_to_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    max_size: int | None,
    names: tuple[str, str],
) -> PreTrainedTokenizerBase:
    """Trim a tokenizer to the tokens of rows; see [`~encdec_slm.vocabulary.trim_tokenizer`].

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): It is not changed.
        rows (`Iterable[Mapping]`): With sources, and optionally targets.
        max_size (`int`, *optional*): Keep only the most frequent tokens.
        names (`tuple[str, str]`): What errors call `rows` and `max_size`.

    Raises:
        ValueError: As [`~encdec_slm.vocabulary.trim_tokenizer`].
    """
    try:
        return trim_tokenizer(tokenizer, iterate_texts(rows), max_size=max_size)[0]
    except ValueError as error:
        message = str(error)
        for name, shown in zip(("`texts`", "`max_size`"), names, strict=True):
            message = message.replace(name, shown)
        raise ValueError(message[0].upper() + message[1:]) from error


__all__ = ["check_table", "count_common_tokens", "find_teacher_token_ids", "trim_to_rows"]
