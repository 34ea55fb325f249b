# SPDX-License-Identifier: Apache-2.0
"""The labels of a teacher cache in the place of a teacher.

N positions, K stored entries per position, V vocabulary of the student.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ..vocabulary import read_vocabulary_map, tokenizer_fingerprint
from .distillation_losses import LOWEST_LOG_PROBABILITY, divergence_of_log_probs
from .row_encoding import RowEncoder, find_columns
from .teacher_cache import TeacherCache


# The columns of a row that a batch needs beside its token ids.
LABEL_COLUMNS = ("has_labels", "label_ids", "label_num_ids", "label_log_probs", "label_counts", "label_tail")


class CachedTeacher:
    """A teacher cache in the token ids of a student.

    Args:
        cache ([`TeacherCache`]): Labels of the training data.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the student: the teacher's, or one trimmed from it.
            With completions only, any tokenizer.
        vocab_size (`int`): Number of tokens that the student scores.

    Raises:
        ValueError: The tokenizer is another one.
    """

    def __init__(self, cache: TeacherCache, tokenizer: PreTrainedTokenizerBase, vocab_size: int):
        self.cache = cache
        self.new_ids = None
        if cache.distributions is not None:
            self.new_ids = self._find_new_ids(tokenizer, vocab_size)

    def _find_new_ids(self, tokenizer, vocab_size):
        """Return the student's id of each id of the teacher, -1 for tokens that it does not have."""
        header, vocabulary_map = self.cache.header, read_vocabulary_map(tokenizer)
        old_ids = None
        if vocabulary_map is not None and vocabulary_map.fingerprint == header.tokenizer_fingerprint:
            old_ids = np.array(vocabulary_map.old_ids)
        elif tokenizer_fingerprint(tokenizer) == header.tokenizer_fingerprint:
            old_ids = np.arange(min(header.vocab_size, vocab_size))
        if old_ids is None:
            raise ValueError(
                f"The teacher cache {str(self.cache.folder)!r} was written with the tokenizer of {header.teacher}, "
                "but the student has another one. Use the teacher's, or one that `trim_tokenizer` made from it."
            )
        new_ids = np.full(max(header.vocab_size, int(old_ids.max()) + 1), -1)
        new_ids[old_ids] = np.arange(len(old_ids))
        return new_ids

    def attach(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Add the labels to the training data, unless it has them; see [`TeacherCache.attach`]."""
        row = next(iter(dataset))
        return dataset if "label_target_ids" in row else self.cache.attach(dataset, *find_columns(row))

    def encode_targets(
        self, batch: Mapping[str, list], indices: Sequence[int], encoder: RowEncoder
    ) -> dict[str, list]:
        """Encode the targets of rows with labels.

        A target with tokens that the student does not have is encoded from its text, and its labels are not used.

        Returns:
            `dict`: The columns `target_ids`, `num_target_tokens` and `has_labels`.
        """
        encoded = encoder.encode_targets(batch, indices, as_continuation=True)
        columns = {"target_ids": encoded["labels"], "num_target_tokens": encoded["num_target_tokens"]}
        columns["has_labels"] = [False] * len(indices)
        for row, old_ids in enumerate(batch["label_target_ids"] if self.new_ids is not None else ()):
            ids = self.new_ids[np.array(old_ids, dtype=np.int64)]
            if (ids >= 0).all() and len(ids):
                columns["target_ids"][row] = ids[: encoder.max_target_length].tolist()
                columns["num_target_tokens"][row] = len(ids)
                columns["has_labels"][row] = True
        return columns

    def build_labels(self, rows: Sequence[Mapping[str, Any]], lengths: Sequence[int]) -> "CachedLabels":
        """Build the labels of a batch; see [`build_cached_labels`]. Rows without usable labels have none."""
        kind = self.cache.distributions.kind
        values = "label_log_probs" if kind == "topk" else "label_counts"
        rows = [
            row
            if row["has_labels"]
            else {"label_num_ids": [0] * length, "label_ids": [], values: [], "label_tail": [1.0] * length}
            for row, length in zip(rows, lengths, strict=True)
        ]
        return build_cached_labels(rows, lengths, self.new_ids, values)


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

    @property
    def num_scores(self) -> int:
        """Number of entries of a position."""
        return self.ids.shape[1]

    def compare(self, logits, log_student, student, beta):
        """Compare a student with these labels; see [`compare_with_labels`]. The third result is `kept_mass`."""
        divergence, agreement, gradient = compare_with_labels(logits, log_student, student, self, beta)
        return divergence, agreement, self.kept_mass, gradient

    def to(self, device: torch.device | str) -> "CachedLabels":
        """Move the labels to a device."""
        tail = None if self.tail is None else self.tail.to(device)
        return CachedLabels(self.ids.to(device), self.probs.to(device), tail, self.kept_mass.to(device))


def build_cached_labels(
    rows: Sequence[Mapping[str, Any]], lengths: Sequence[int], new_ids: np.ndarray | None, column: str
) -> CachedLabels:
    """Build the labels of a batch from the columns of its rows; see [`~encdec_slm.trainers.teacher_cache`].

    Tokens that the student does not have are removed, and the others renormalized.

    Args:
        rows (`Sequence[dict]`): With `label_num_ids`, `label_ids` and `label_log_probs` and `label_tail`, or
            `label_counts`.
        lengths (`Sequence[int]`): How many positions of each row are compared.
        new_ids (`np.ndarray`, *optional*): The student's id of each token of the teacher, -1 for tokens that it does
            not have. `None` means equal ids.
        column (`str`): `"label_log_probs"` or `"label_counts"`.

    Returns:
        [`CachedLabels`]: Of all positions, row after row.
    """
    is_sampled = column == "label_counts"
    counts = [
        np.asarray(row["label_num_ids"][:length], dtype=np.int64) for row, length in zip(rows, lengths, strict=True)
    ]
    num_ids = np.concatenate(counts)
    ids = np.concatenate([row["label_ids"][: count.sum()] for row, count in zip(rows, counts, strict=True)])
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
