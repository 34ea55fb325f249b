# SPDX-License-Identifier: Apache-2.0
"""Compare a student with a teacher that has another tokenizer.

Both models predict the bytes of one text, but at different positions. The student is compared at three kinds of them:

- START: a token of the teacher starts at the same byte. Both distributions are projected onto common events (X-Token,
  arXiv 2605.21699; Byte-Prefix Marginalization, arXiv 2607.22334).
- FIRST: likewise at the start of the text, where one tokenizer alone puts a space before the token.
- Inside a token of the teacher: given the bytes of it that the student has read, the teacher's distribution over the
  tokens that begin with them is one over the student's next token.

N positions, D width of the teacher, V vocabulary of one model, E events.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from .distillation_losses import LOWEST_LOG_PROBABILITY, divergence_of_log_probs, to_autocast_dtype
from .output_heads import OutputHead
from .token_bytes import TokenBytes
from .token_projection import build_prefix_table, build_projections
from .vocabulary import check_table


# Kinds of positions. All above FIRST are inside a token of the teacher, and count its prefixes.
NOT_COMPARED, START, FIRST = -1, 0, 1
# Stands for the end of a text. No UTF-8 text contains this byte.
END = b"\xff"


class AlignedTarget(NamedTuple):
    """A target in the teacher's tokens.

    Args:
        teacher_ids (`list[int]`): What the teacher reads.
        teacher_indices (`list[int]`): For each token of the student, the index in `teacher_ids` of the token that
            contains its first byte; 0 if it is not compared.
        kinds (`list[int]`): Kind of each position; -1 if it is not compared.
    """

    teacher_ids: list[int]
    teacher_indices: list[int]
    kinds: list[int]


class TokenAlignment:
    """Positions and events at which a student is compared with a teacher that has another tokenizer.

    Args:
        student_tokenizer ([`~transformers.PreTrainedTokenizerFast`]): See
            [`~encdec_slm.trainers.token_bytes.TokenBytes`] for the kinds.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerFast`]): Likewise.
        student_vocab_size (`int`): Rows of the student's embedding table.
        teacher_vocab_size (`int`): Rows of the teacher's embedding table.

    Raises:
        ValueError: A tokenizer is slow, of another kind, has no end-of-text token, or has more ids than table rows.
    """

    def __init__(
        self,
        student_tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_vocab_size: int,
        teacher_vocab_size: int,
    ):
        self.student = TokenBytes(student_tokenizer, "student")
        self.teacher = TokenBytes(teacher_tokenizer, "teacher")
        check_table("student", self.student.num_ids - 1, student_vocab_size)
        check_table("teacher", self.teacher.num_ids - 1, teacher_vocab_size)
        if teacher_tokenizer.eos_token_id is None:
            raise ValueError("The teacher's tokenizer has no end-of-text token. Set its `eos_token`.")
        self.projections = {START: build_projections(self.student, self.teacher)}
        self._num_spaces = [int(table.adds_space) for table in (self.student, self.teacher)]
        if self.student.adds_space == self.teacher.adds_space:
            self._num_spaces = [0, 0]
        else:
            spaces = (b" " * number for number in self._num_spaces)
            self.projections[FIRST] = build_projections(self.student, self.teacher, *spaces)
        self._prefix_numbers, self.prefix_table = build_prefix_table(self.student, self.teacher)

    def to(self, device: torch.device | str) -> "TokenAlignment":
        """Move all tensors to a device."""
        self.projections = {
            kind: tuple(projection.to(device) for projection in pair) for kind, pair in self.projections.items()
        }
        self.prefix_table = self.prefix_table.to(device)
        return self

    def encode_target(self, token_ids: Sequence[int], max_length: int | None = None) -> AlignedTarget:
        """Encode the text of a target for the teacher; the end-of-text tokens of both are aligned.

        Args:
            token_ids (`Sequence[int]`): Tokens of the student, from the data or generated.
            max_length (`int`, *optional*): Longest target of the teacher; nothing is compared behind it.
        """
        is_complete = bool(token_ids) and token_ids[-1] == self.student.tokenizer.eos_token_id
        text_ids = list(token_ids[:-1] if is_complete else token_ids)
        teacher_ids = self.teacher.encode(self.student.decode(text_ids))
        tokens = [
            [*_drop_spaces([table.texts.get(token_id, b"") for token_id in ids], number), *[END] * is_complete]
            for table, ids, number in zip(
                (self.student, self.teacher), (text_ids, teacher_ids), self._num_spaces, strict=True
            )
        ]
        teacher_ids = [*teacher_ids, *[self.teacher.tokenizer.eos_token_id] * is_complete]
        indices, kinds = [], []
        for position, (index, num_before) in enumerate(align_tokens(*tokens)):
            is_cut = max_length is not None and index >= max_length
            kinds.append(NOT_COMPARED if is_cut else self._find_kind(position, index, num_before, teacher_ids))
            indices.append(0 if is_cut else max(index, 0))
        return AlignedTarget(teacher_ids[:max_length], indices, kinds)

    def _find_kind(self, position, index, num_before, teacher_ids):
        if index == NOT_COMPARED:
            return NOT_COMPARED
        is_first = FIRST in self.projections and (position if self.student.adds_space else index) == 0
        if num_before == 0:
            return FIRST if is_first else START
        if FIRST in self.projections and index == 0:  # without the space, the student's tokens are others
            return NOT_COMPARED
        text = self.teacher.texts[teacher_ids[index]]
        ends = accumulate(len(self.student.texts[piece]) for piece in self.student.split(text))
        number = self._prefix_numbers.get(text[:num_before])
        return NOT_COMPARED if number is None or num_before not in ends else FIRST + 1 + number


def _drop_spaces(tokens, number):
    """Remove the space that one tokenizer alone puts before a text."""
    return [tokens[0].removeprefix(b" " * number), *tokens[1:]] if tokens else tokens


def align_tokens(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int]]:
    """Find, for each token of the student, the token of the teacher that contains its first byte.

    Where the two texts differ, because a tokenizer changed the text or does not have a character, nothing is found
    from the first to the last difference.

    Args:
        student (`list[bytes]`): Bytes of the student's tokens; empty for tokens that are no text.
        teacher (`list[bytes]`): Bytes of the teacher's tokens.

    Returns:
        `list[tuple[int, int]]`: The index in `teacher`, and how many bytes of that token come before; -1 and 0 for
        tokens that are empty or where the texts differ.
    """
    texts = [b"".join(tokens) for tokens in (student, teacher)]
    num_equal_before = _count_equal(*texts)
    num_equal_after = _count_equal(*(text[num_equal_before:][::-1] for text in texts))
    found, starts = [], _starts(teacher)
    for token, start in zip(student, _starts(student), strict=True):
        lowest = 0  # where the bytes of both begin to be equal
        if start >= num_equal_before:
            start, lowest = start + len(texts[1]) - len(texts[0]), len(texts[1]) - num_equal_after
        # Of several tokens that start at a byte, all but the last are empty.
        index = bisect_right(starts, start) - 1
        is_found = token and 0 <= lowest <= start and index >= 0 and lowest <= starts[index]
        found.append((index, start - starts[index]) if is_found else (NOT_COMPARED, 0))
    return found


def _starts(tokens):
    return [end - len(token) for end, token in zip(accumulate(map(len, tokens)), tokens, strict=True)]


def _count_equal(first, second):
    """Count the bytes that two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


def compute_aligned_ratio(targets: Sequence[AlignedTarget]) -> float:
    """Return the share of the student's tokens that are compared, from 0 to 1."""
    kinds = [kind for target in targets for kind in target.kinds]
    return sum(kind != NOT_COMPARED for kind in kinds) / max(len(kinds), 1)


@dataclass
class AlignedTeacher:
    """A teacher with another tokenizer at the positions of a student.

    Args:
        alignment ([`TokenAlignment`]): On the same device.
        hidden (`torch.Tensor` of shape `(N, D)`): Inputs of `head`; not used where nothing is compared.
        head ([`OutputHead`]): Of the teacher.
        kinds (`torch.LongTensor` of shape `(N,)`): See [`AlignedTarget`].
        temperature (`float`): Divides the logits of both models.
    """

    alignment: TokenAlignment
    hidden: torch.Tensor
    head: OutputHead
    kinds: torch.Tensor
    temperature: float

    def __post_init__(self):
        self.hidden, self.head = to_autocast_dtype(self.hidden, self.head)

    def __len__(self):
        return len(self.hidden)

    def __getitem__(self, index) -> "AlignedTeacher":
        return AlignedTeacher(self.alignment, self.hidden[index], self.head, self.kinds[index], self.temperature)

    @property
    def num_scores(self) -> int:
        """Size of the teacher's vocabulary."""
        return self.head.vocab_size(self.hidden)

    def compare(self, logits, log_student, student, beta):
        """Compare a chunk of the student's distributions with the teacher's.

        Returns:
            `tuple`: Divergence, agreement of the most probable events, and 1, of shape `(N,)`, and the gradient of the
            divergence for the student's logits divided by the temperature, of shape `(N, V)`. All are 0 where nothing
            is compared.
        """
        if self.temperature != 1.0:
            log_student = F.log_softmax(logits / self.temperature, dim=-1)
        parts, gradient = torch.zeros(3, len(logits), device=logits.device), torch.zeros_like(logits)
        masks = {kind: self.kinds == kind for kind in self.alignment.projections} | {None: self.kinds > FIRST}
        for kind, mask in masks.items():
            positions = mask.nonzero()[:, 0]
            if len(positions):
                log_teacher = self.head.logits(self.hidden[positions]) / self.temperature
                inputs = (log_student[positions], F.log_softmax(log_teacher, dim=-1), beta)
                if kind is None:
                    prefixes = self.kinds[positions] - FIRST - 1
                    result = compare_inside(*inputs, self.alignment.prefix_table.find_entries(prefixes))
                else:
                    result = compare_at_start(*inputs, *self.alignment.projections[kind])
                parts[0, positions], parts[1, positions], gradient[positions] = result
                parts[2, positions] = 1.0
        return *parts, gradient


def compare_at_start(log_student, log_teacher, beta, student_projection, teacher_projection):
    """Compare distributions over tokens that start at the same byte.

    Args:
        log_student (`torch.FloatTensor` of shape `(N, V)`): Log-probabilities of the student's tokens.
        log_teacher (`torch.FloatTensor` of shape `(N, V)`): Log-probabilities of the teacher's tokens.
        beta (`float`): Kind of divergence.
        student_projection ([`~encdec_slm.trainers.token_projection.Projection`]): Onto common events.
        teacher_projection ([`~encdec_slm.trainers.token_projection.Projection`]): Onto the same events.

    Returns:
        `tuple`: Divergence and agreement, of shape `(N,)`, and the gradient for the student's logits.
    """
    log_events, log_kept = student_projection.project(log_student)
    log_teacher = teacher_projection.project(log_teacher)[0].clamp_(min=LOWEST_LOG_PROBABILITY)
    divergence, gradient = divergence_of_log_probs(log_events, log_events.exp(), log_teacher, beta)
    agreement = (log_events.argmax(-1) == log_teacher.argmax(-1)).float()
    return divergence, agreement, student_projection.pull_back(gradient, log_student, log_events, log_kept)


def compare_inside(log_student, log_teacher, beta, entries):
    """Compare distributions inside a token of the teacher, whose first bytes the student has read.

    The events are the student's tokens that may follow in a token of the teacher, and all others as one event. If the
    teacher's tokens do not allow others, they are left out.

    Args: as in [`compare_at_start`]; `entries` of [`~encdec_slm.trainers.token_projection.PrefixTable`].
    """
    num_tokens = log_student.shape[1]
    rows, teacher_ids, next_ids = entries
    events = torch.where(next_ids < 0, num_tokens, next_ids)
    terms = log_teacher[rows, teacher_ids].clamp_(min=LOWEST_LOG_PROBABILITY)
    peaks = terms.new_full((len(log_teacher),), -torch.inf).scatter_reduce_(0, rows, terms, "amax")
    teacher = terms.new_zeros(len(log_teacher), num_tokens + 1)
    teacher.index_put_((rows, events), terms.sub_(peaks[rows]).exp_(), accumulate=True)
    log_teacher = teacher.div_(teacher.sum(-1, keepdim=True)).log_().clamp_(min=LOWEST_LOG_PROBABILITY)
    is_event = torch.zeros_like(log_teacher, dtype=torch.bool)
    is_event[rows, events] = True
    is_next, has_others = is_event[:, :-1], is_event[:, -1:]
    log_others = log_student.masked_fill(is_next, -torch.inf).logsumexp(-1, keepdim=True)
    log_events = F.log_softmax(torch.cat((log_student, log_others), 1).masked_fill(~is_event, -torch.inf), dim=-1)
    log_events.clamp_(min=LOWEST_LOG_PROBABILITY)
    divergence, gradient = divergence_of_log_probs(log_events, log_events.exp(), log_teacher, beta)
    agreement = (log_events.argmax(-1) == log_teacher.argmax(-1)).float()
    shares = (log_student - log_others).exp_().mul_(gradient[:, -1:].masked_fill(~has_others, 0.0))
    return divergence, agreement, torch.where(is_next, gradient[:, :-1], shares)


__all__ = ["AlignedTarget", "AlignedTeacher", "TokenAlignment", "align_tokens", "compute_aligned_ratio"]
