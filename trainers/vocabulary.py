# SPDX-License-Identifier: Apache-2.0
"""Whether two tokenizers mean the same by the same ids, which comparing next-token distributions takes for granted."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


NUM_SHOWN = 3


def num_common_tokens(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_vocab_size: int,
    teacher_vocab_size: int,
    image_tokens: Sequence[str] = (),
) -> int:
    """How many ids, from 0, are tokens of both models; the rows behind them pad the models' tables.

    Args:
        student_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the student.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the teacher.
        student_vocab_size (`int`): Rows of the student's table; its tokenizer may have fewer tokens.
        teacher_vocab_size (`int`): Rows of the teacher's table.
        image_tokens (`Sequence[str]`, *optional*): Tokens that stand for images and are in no text: behind all common
            tokens, one tokenizer may have them and the other not.

    Raises:
        ValueError: An id means different tokens, or a token in one tokenizer and nothing in the other; or a table
            has fewer rows than its tokenizer has ids.
    """
    student = {id: token for token, id in student_tokenizer.get_vocab().items()}
    teacher = {id: token for token, id in teacher_tokenizer.get_vocab().items()}
    size = max((id for id, token in student.items() if teacher.get(id) == token), default=-1) + 1
    of_images = {None, *image_tokens}
    different = sorted(
        id
        for id in student.keys() | teacher.keys()
        if student.get(id) != teacher.get(id)
        and not (id >= size and student.get(id) in of_images and teacher.get(id) in of_images)
    )
    if different:
        raise ValueError(
            f"Student and teacher disagree about {len(different):,} of {len(student.keys() | teacher.keys()):,} token "
            f"ids: {_shown(different, student, teacher)}. Their next-token distributions can only be compared if each "
            "id means one token. Give the student the teacher's tokenizer (and train it on ids of that), or let the "
            "teacher write texts and train on these alone (`seq_kd=True, lmbda=0, kd_ratio=0`)."
        )
    for role, tokens, rows in (("student", student, student_vocab_size), ("teacher", teacher, teacher_vocab_size)):
        needed = max(tokens) + 1
        if rows < needed:
            raise ValueError(
                f"The {role}'s table has {rows:,} rows, but the tokenizer has ids up to {needed - 1:,}. Resize it "
                f"with `{role}.resize_token_embeddings({needed})`, or use the tokenizer that the {role} was made with."
            )
    return size


def _shown(ids, student, teacher):
    def name(token):
        return "nothing" if token is None else repr(token)

    shown = [f"{id} is {name(student.get(id))} and {name(teacher.get(id))}" for id in ids[:NUM_SHOWN]]
    return "; ".join(shown) + ("; and others" if len(ids) > NUM_SHOWN else "")


__all__ = ["num_common_tokens"]
