# SPDX-License-Identifier: Apache-2.0
"""Compare a student with the labels of a teacher cache instead of with a teacher.

N positions, K stored entries per position, V vocabulary of the student.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .distillation_losses import LOWEST_LOG_PROBABILITY, divergence_of_log_probs


@dataclass
class CachedLabels:
    """What a teacher predicts at some positions, by its most probable or by drawn tokens.

    Args:
        ids (`torch.LongTensor` of shape `(N, K)`): Token ids of the student; -1 fills rows up.
        probs (`torch.FloatTensor` of shape `(N, K)`): Probabilities (`topk`) or shares of the draws (`sampled`).
        tail (`torch.FloatTensor` of shape `(N,)`, *optional*): Probability of all other tokens. `None` for draws.
        kept_mass (`torch.FloatTensor` of shape `(N,)`): Share of the teacher's probability that the student's
            vocabulary does not exclude.
    """

    ids: torch.Tensor
    probs: torch.Tensor
    tail: torch.Tensor | None
    kept_mass: torch.Tensor

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index) -> "CachedLabels":
        tail = None if self.tail is None else self.tail[index]
        return CachedLabels(self.ids[index], self.probs[index], tail, self.kept_mass[index])

    def to(self, device: torch.device | str) -> "CachedLabels":
        """Move the labels to a device."""
        tail = None if self.tail is None else self.tail.to(device)
        return CachedLabels(self.ids.to(device), self.probs.to(device), tail, self.kept_mass.to(device))


def build_cached_labels(rows: Sequence[dict], lengths: Sequence[int], new_ids: np.ndarray | None) -> CachedLabels:
    """Build the labels of a batch from the columns of its rows; see [`~encdec_slm.trainers.teacher_cache`].

    Tokens that the student does not have are removed, and the others renormalized.

    Args:
        rows (`Sequence[dict]`): With `label_num_ids`, `label_ids` and `label_log_probs` and `label_tail`, or
            `label_counts`.
        lengths (`Sequence[int]`): How many positions of each row are compared.
        new_ids (`np.ndarray`, *optional*): The student's id of each token of the teacher, -1 for tokens that it does
            not have. `None` means equal ids.

    Returns:
        [`CachedLabels`]: Of all positions, row after row.
    """
    is_sampled = rows[0].get("label_log_probs") is None
    counts = [
        np.asarray(row["label_num_ids"][:length], dtype=np.int64) for row, length in zip(rows, lengths, strict=True)
    ]
    num_ids = np.concatenate(counts)
    ids = np.concatenate([row["label_ids"][: count.sum()] for row, count in zip(rows, counts, strict=True)])
    column = "label_counts" if is_sampled else "label_log_probs"
    values = np.concatenate([row[column][: count.sum()] for row, count in zip(rows, counts, strict=True)])
    values = values.astype(np.float32) if is_sampled else np.exp(values.astype(np.float32))
    ids = ids.astype(np.int64) if new_ids is None else new_ids[ids.astype(np.int64)]
    # Scatter the entries of all positions into a table of as many columns as the longest position has.
    width = max(1, int(num_ids.max(initial=0)))
    is_filled = np.arange(width) < num_ids[:, None]  # (N, K)
    table_ids, table = np.full(is_filled.shape, -1), np.zeros(is_filled.shape, np.float32)
    table_ids[is_filled], table[is_filled] = ids, values
    tail = None
    if not is_sampled:
        tail = np.concatenate([row["label_tail"][:length] for row, length in zip(rows, lengths, strict=True)])
        tail = torch.from_numpy(tail.astype(np.float32))
    return _normalize(torch.from_numpy(table_ids), torch.from_numpy(table), tail)


def _normalize(ids, probs, tail):
    """Remove what the student does not have; make the rest sum to 1."""
    rest = 0.0 if tail is None else tail
    total = probs.sum(-1) + rest
    probs = probs.masked_fill(ids < 0, 0.0)
    kept = probs.sum(-1) + rest
    scale = 1 / kept.clamp(min=torch.finfo(kept.dtype).tiny)
    kept_mass = torch.where(total > 0, kept / total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)
    return CachedLabels(ids, probs * scale[:, None], None if tail is None else tail * scale, kept_mass)


def compare_with_labels(
    logits: torch.Tensor, log_student: torch.Tensor, student: torch.Tensor, labels: CachedLabels, beta: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compare a chunk of the student's distributions with cached labels.

    For the most probable tokens, all others are one bucket for both models, whose probabilities are compared as those
    of one token: a lower bound of the divergence over the whole vocabulary. For draws it is the cross-entropy of the
    student on the drawn tokens, an unbiased estimate of the forward KL divergence plus the teacher's entropy.

    Args:
        logits (`torch.FloatTensor` of shape `(N, V)`): Of the student.
        log_student (`torch.FloatTensor` of shape `(N, V)`): Their log-softmax.
        student (`torch.FloatTensor` of shape `(N, V)`): Their softmax.
        labels ([`CachedLabels`]): Of these positions.
        beta (`float`): Kind of divergence; 0 for draws.

    Returns:
        `tuple`: Divergence and agreement of the most probable tokens, of shape `(N,)`, and the gradient of the
        divergence for the logits, of shape `(N, V)`. All are 0 at positions without labels.
    """
    ids, is_filled = labels.ids.clamp(min=0), labels.ids >= 0  # (N, K)
    has_labels = is_filled.any(-1)
    first = labels.probs.argmax(-1, keepdim=True)
    agreement = (logits.argmax(-1) == ids.gather(-1, first)[:, 0]).float() * has_labels
    log_kept = log_student.gather(-1, ids)  # (N, K)
    if labels.tail is None:
        divergence = -(labels.probs * log_kept).sum(-1)
        gradient = student * has_labels[:, None]
        gradient.scatter_add_(-1, ids, -labels.probs)
        return divergence, agreement, gradient
    return _compare_top_tokens(log_student, student, labels, beta, ids, is_filled, log_kept, agreement, has_labels)


def _compare_top_tokens(log_student, student, labels, beta, ids, is_filled, log_kept, agreement, has_labels):
    # What the student gives to all other tokens: exact even if that is very little.
    spare = torch.nn.functional.pad(log_student, (0, 1))  # a column for entries that are not filled
    others = spare.scatter_(-1, ids.masked_fill(~is_filled, student.shape[-1]), -torch.inf)[:, :-1]
    log_others = others.logsumexp(-1, keepdim=True).clamp(min=LOWEST_LOG_PROBABILITY)  # (N, 1)
    log_buckets = torch.cat((log_kept.masked_fill(~is_filled, LOWEST_LOG_PROBABILITY), log_others), -1)  # (N, K + 1)
    teacher = torch.cat((labels.probs, labels.tail[:, None]), -1)
    log_teacher = teacher.log().clamp(min=LOWEST_LOG_PROBABILITY)
    divergence, bucket_gradient = divergence_of_log_probs(log_buckets, log_buckets.exp(), log_teacher, beta)
    # The gradient of a bucket is shared by its tokens in proportion to their probabilities.
    gradient = (others - log_others).exp() * bucket_gradient[:, -1:]
    gradient.scatter_add_(-1, ids, bucket_gradient[:, :-1].masked_fill(~is_filled, 0.0))
    return divergence * has_labels, agreement, gradient * has_labels[:, None]
