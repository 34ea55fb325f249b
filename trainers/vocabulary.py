# SPDX-License-Identifier: Apache-2.0
"""Whether two tokenizers mean the same by the same ids, which comparing next-token distributions takes for granted."""

from transformers import PreTrainedTokenizerBase


NUM_SHOWN = 3


def num_common_tokens(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_vocab_size: int,
    teacher_vocab_size: int,
) -> int:
    """How many ids, from 0, are tokens of both models; the rows behind them pad the models' tables.

    Args:
        student_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the student.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the teacher.
        student_vocab_size (`int`): Rows of the student's table; its tokenizer may have fewer tokens.
        teacher_vocab_size (`int`): Rows of the teacher's table.

    Raises:
        ValueError: An id means different tokens, or a token in one tokenizer and nothing in the other; or a table
            has fewer rows than its tokenizer has ids.
    """
    student = {id: token for token, id in student_tokenizer.get_vocab().items()}
    teacher = {id: token for token, id in teacher_tokenizer.get_vocab().items()}
    different = sorted(id for id in student.keys() | teacher.keys() if student.get(id) != teacher.get(id))
    if different:
        raise ValueError(
            f"Student and teacher disagree about {len(different):,} of {len(student.keys() | teacher.keys()):,} token "
            f"ids: {_shown(different, student, teacher)}. Their next-token distributions can only be compared if each "
            "id means one token. Give the student the teacher's tokenizer (and train it on ids of that), or let the "
            "teacher write texts and train on these alone (`seq_kd=True, lmbda=0, kd_ratio=0`)."
        )
    size = max(student) + 1
    for role, rows in (("student", student_vocab_size), ("teacher", teacher_vocab_size)):
        if rows < size:
            raise ValueError(
                f"The {role}'s table has {rows:,} rows, but the tokenizer has ids up to {size - 1:,}. Resize it with "
                f"`{role}.resize_token_embeddings({size})`, or use the tokenizer that the {role} was made with."
            )
    return size


def _shown(ids, student, teacher):
    def name(token):
        return "nothing" if token is None else repr(token)

    shown = [f"{id} is {name(student.get(id))} and {name(teacher.get(id))}" for id in ids[:NUM_SHOWN]]
    return "; ".join(shown) + ("; and others" if len(ids) > NUM_SHOWN else "")


__all__ = ["num_common_tokens"]
