# SPDX-License-Identifier: Apache-2.0
"""Compare the vocabularies of two tokenizers."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


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
            "the teacher's tokenizer for the student and train on its ids, or use the teacher for sequence-level "
            "distillation only (`seq_kd=True, lmbda=0, kd_ratio=0`)."
        )
    for role, tokens, num_rows in (("student", student, student_vocab_size), ("teacher", teacher, teacher_vocab_size)):
        if num_rows <= max(tokens):
            raise ValueError(
                f"The embedding table of the {role} has {num_rows:,} rows, but its tokenizer has ids up to "
                f"{max(tokens):,}. Call `{role}.resize_token_embeddings({max(tokens) + 1})`, or use the tokenizer of "
                f"the {role}."
            )
    return size


def _describe(ids, student, teacher):
    """Describe the first ids that differ."""

    def name(token):
        return "no token" if token is None else repr(token)

    shown = [f"{id_} is {name(student.get(id_))} and {name(teacher.get(id_))}" for id_ in ids[:NUM_SHOWN]]
    return "; ".join(shown) + ("; and others" if len(ids) > NUM_SHOWN else "")


__all__ = ["count_common_tokens"]
