# SPDX-License-Identifier: Apache-2.0
"""Events that are common to two tokenizers, by fixed rules about the bytes of tokens (arXiv 2605.21699, 2607.22334).

N positions, V vocabulary of one model, E events, K tokens that have an event.
"""

from collections import defaultdict
from itertools import accumulate
from typing import NamedTuple

import torch

from .distillation_losses import LOWEST_LOG_PROBABILITY
from .token_bytes import TokenBytes


# Tokens that no rule maps to a token of the teacher.
OTHER_EVENT = -1


class Projection(NamedTuple):
    """A sparse matrix of zeros and ones that projects distributions over tokens onto events.

    Tokens without an event are left out, and the others renormalized.

    Args:
        token_ids (`torch.LongTensor` of shape `(K,)`): Tokens that have an event.
        events (`torch.LongTensor` of shape `(K,)`): The event of each.
        num_events (`int`): Each event has at least one token.
    """

    token_ids: torch.Tensor
    events: torch.Tensor
    num_events: int

    def to(self, device: torch.device | str) -> "Projection":
        """Move the projection to a device."""
        return Projection(self.token_ids.to(device), self.events.to(device), self.num_events)

    def project(self, log_probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project distributions, without gradient.

        Args:
            log_probs (`torch.FloatTensor` of shape `(N, V)`): Log-probabilities of tokens.

        Returns:
            `tuple`: Log-probabilities of events, of shape `(N, E)`, and the logarithm of the probability of all tokens
            that have an event, of shape `(N,)`.
        """
        terms = self._terms(log_probs)
        events = self.events.expand_as(terms)
        peaks = terms.new_full((len(terms), self.num_events), -torch.inf)
        peaks.scatter_reduce_(1, events, terms, "amax")
        sums = torch.zeros_like(peaks).scatter_add_(1, events, terms.sub_(peaks.gather(1, events)).exp_())
        log_events = sums.log_().add_(peaks)  # (N, E)
        log_kept = log_events.logsumexp(-1)
        return log_events.sub_(log_kept[:, None]), log_kept

    def pull_back(self, gradient, log_probs, log_events, log_kept) -> torch.Tensor:
        """Compute the gradient for the logits of tokens, of shape (N, V), from that for the logits of events."""
        terms = self._terms(log_probs)
        events = self.events.expand_as(terms)
        # Tokens share the gradient of their event in proportion to their probabilities.
        shares = terms.sub_(log_events.gather(1, events)).sub_(log_kept[:, None]).exp_()
        token_gradient = torch.zeros_like(log_probs)
        token_gradient[:, self.token_ids] = shares.mul_(gradient.gather(1, events))
        return token_gradient

    def _terms(self, log_probs):
        return log_probs[:, self.token_ids].clamp_(min=LOWEST_LOG_PROBABILITY)  # (N, K)


def build_projections(
    student: TokenBytes, teacher: TokenBytes, student_space: bytes = b"", teacher_space: bytes = b""
) -> tuple[Projection, Projection]:
    """Build the projections of both models onto events, which are the tokens of the teacher that the student reaches.

    1. A token of the student with the bytes of a token of the teacher is that token; so are special tokens of the same
       name, and the end-of-text tokens of both.
    2. Another token of the student is the first of the tokens into which the teacher's tokenizer splits it. The others
       have no weight, because the teacher predicts them at later positions.
    3. A token of the teacher that no token of the student reaches is split by the student's tokenizer, and is the
       event of the first token.
    4. All other tokens, such as special tokens of one model, are one event. If only one model has such tokens, they
       are left out.

    Args:
        student ([`TokenBytes`]): Of the student.
        teacher ([`TokenBytes`]): Of the teacher.
        student_space (`bytes`, *optional*): What the student's tokenizer adds before a text, for its first token.
        teacher_space (`bytes`, *optional*): Likewise.
    """
    student_rules = _match_special_tokens(student, teacher)
    for token_id, text in student.texts.items():
        rank = student.find(text).index(token_id)  # a character and its byte are two tokens with the same bytes
        text = text.removeprefix(student_space)
        if found := teacher.find(teacher_space + text)[rank : rank + 1] or _first(teacher, teacher_space, text):
            student_rules[token_id] = found[0]
    teacher_rules = {token_id: token_id for token_id in student_rules.values()}
    for token_id, text in teacher.texts.items():
        first = _first(student, student_space, text.removeprefix(teacher_space))
        if token_id not in teacher_rules and first and first[0] in student_rules:
            teacher_rules[token_id] = student_rules[first[0]]
    others = [
        [token_id for token_id in (*table.texts, *table.special_tokens) if token_id not in rules]
        for table, rules in ((student, student_rules), (teacher, teacher_rules))
    ]
    if all(others):
        for token_ids, rules in zip(others, (student_rules, teacher_rules), strict=True):
            rules.update(dict.fromkeys(token_ids, OTHER_EVENT))
    events = {name: index for index, name in enumerate(sorted({*student_rules.values()}))}
    return tuple(
        Projection(
            torch.tensor(token_ids), torch.tensor([events[rules[token_id]] for token_id in token_ids]), len(events)
        )
        for rules in (student_rules, teacher_rules)
        for token_ids in [sorted(rules)]
    )


def _match_special_tokens(student, teacher):
    """Return the teacher's id of special tokens that both have."""
    ends = (student.tokenizer.eos_token_id, teacher.tokenizer.eos_token_id)
    names = {name: token_id for token_id, name in teacher.special_tokens.items() if token_id != ends[1]}
    found = {token_id: names[name] for token_id, name in student.special_tokens.items() if name in names}
    return {**found, ends[0]: ends[1]}


def _first(table, space, text):
    """Return the first token of a text, as a list; empty if there is none."""
    return table.split(space + text)[:1] if text else []


class PrefixTable(NamedTuple):
    """What may follow in the student's tokens, given the first bytes of a token of the teacher.

    Args:
        starts (`torch.LongTensor` of shape `(num_prefixes + 1,)`): First entry of each prefix, and the number of all.
        teacher_ids (`torch.LongTensor` of shape `(num_entries,)`): Tokens of the teacher that begin with the prefix,
            where the student's tokenizer splits them behind it.
        next_ids (`torch.LongTensor` of shape `(num_entries,)`): The student's next token in each of them; -1 if it is
            over, and any token may follow.
    """

    starts: torch.Tensor
    teacher_ids: torch.Tensor
    next_ids: torch.Tensor

    def to(self, device: torch.device | str) -> "PrefixTable":
        """Move the table to a device."""
        return PrefixTable(*(tensor.to(device) for tensor in self))

    def find_entries(self, prefixes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the entries of `prefixes` of shape (N,): their index in it, `teacher_ids` and `next_ids`."""
        counts = self.starts[prefixes + 1] - self.starts[prefixes]
        rows = torch.arange(len(prefixes), device=prefixes.device).repeat_interleave(counts)
        shifts = self.starts[prefixes] - (counts.cumsum(0) - counts)
        entries = torch.arange(len(rows), device=prefixes.device) + shifts[rows]
        return rows, self.teacher_ids[entries], self.next_ids[entries]


def build_prefix_table(student: TokenBytes, teacher: TokenBytes) -> tuple[dict[bytes, int], PrefixTable]:
    """Split each token of the teacher into tokens of the student.

    Returns:
        `tuple`: The number of each prefix, and the table.
    """
    entries = defaultdict(list)
    for token_id, text in teacher.texts.items():
        pieces = student.split(text)
        ends = list(accumulate(len(student.texts[piece]) for piece in pieces))
        for end, piece in zip(ends, pieces[1:], strict=False):
            entries[text[:end]].append((token_id, piece))
    for prefix, found in entries.items():
        found.extend((token_id, OTHER_EVENT) for token_id in teacher.find(prefix))
    starts = [0, *accumulate(map(len, entries.values()))]
    columns = torch.tensor([entry for found in entries.values() for entry in found], dtype=torch.long).view(-1, 2)
    numbers = {prefix: number for number, prefix in enumerate(entries)}
    return numbers, PrefixTable(torch.tensor(starts), *columns.T.contiguous())


__all__ = ["PrefixTable", "Projection", "build_prefix_table", "build_projections"]
