# SPDX-License-Identifier: Apache-2.0
"""Rows and batches for distillation: what the student reads, what the teacher reads, and the target of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .cached_labels import LABEL_COLUMNS, CachedTeacher
from .distillation_config import Seq2SeqDistillationConfig
from .row_encoding import RowEncoder, build_row_encoder, find_columns, pad_ids
from .token_alignment import NOT_COMPARED, AlignedTarget, TokenAlignment


ENCODED_COLUMNS = ("row", "source_ids", "teacher_source_ids", "target_ids", "num_source_tokens", "num_target_tokens")


@dataclass
class DistillationRowEncoder:
    """Encode rows of text or messages for both models, for [`~encdec_slm.trainers.row_encoding.encode_rows`].

    The teacher reads the row's `teacher_prompt` if it has one, else the source as the student reads it: truncated
    alike, but with messages rendered by the teacher's chat template.

    Args:
        student ([`RowEncoder`]): For sources and targets.
        teacher ([`RowEncoder`]): For the teacher's prompts.
        chat_template_kwargs (`dict`, *optional*): Variables of the teacher's chat template.
        cached_teacher ([`CachedTeacher`], *optional*): Takes the place of the teacher, whose prompts are empty then.
    """

    student: RowEncoder
    teacher: RowEncoder
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cached_teacher: CachedTeacher | None = None

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """Columns of a dataset that a batch needs as they are."""
        return () if self.cached_teacher is None else LABEL_COLUMNS

    @property
    def max_source_length(self) -> int | None:
        """Longest source, in tokens of the student."""
        return self.student.max_source_length

    @property
    def max_target_length(self) -> int | None:
        """Longest target, in tokens of the student."""
        return self.student.max_target_length

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Prepare a dataset for [`~DistillationRowEncoder.encode_batch`]."""
        return self.student.prepare_dataset(dataset)

    def is_encoded(self, row: Mapping[str, Any]) -> bool:
        """Whether a row comes from [`~DistillationRowEncoder.encode_batch`]."""
        return "teacher_source_ids" in row

    def encode_batch(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Encode rows; the columns are those of `ENCODED_COLUMNS`, without the target's if the rows have none.

        Raises:
            TypeError: A source or target is neither text nor a list of messages.
            ValueError: A source is empty, or messages have no chat template.
        """
        column, _ = find_columns(batch)
        names = [f"`{column}` of row {index}" for index in indices]
        sources = self.student.encode_sources(batch[column], names)
        teacher_prompts = batch["teacher_prompt"] if "teacher_prompt" in batch else [None] * len(sources)
        prompts = []
        for index, name, source, prompt in zip(indices, names, sources, teacher_prompts, strict=True):
            if self.cached_teacher is not None:
                check_not_empty(source.num_tokens, 1, name)
                prompts.append([])
                continue
            if prompt is None:
                prompt = source.source
            else:
                name = f"`teacher_prompt` of row {index}"
            prompt = self.teacher.encode_prompt(prompt, where=name, chat_template_kwargs=self.chat_template_kwargs)
            check_not_empty(source.num_tokens, prompt.num_tokens, name)
            prompts.append(prompt.input_ids)
        return {
            "row": list(indices),
            "source_ids": [source.input_ids for source in sources],
            "teacher_source_ids": prompts,
            "num_source_tokens": [source.num_tokens for source in sources],
            **self.encode_targets(batch, indices),
        }

    def encode_targets(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Encode the targets of rows as the columns `target_ids` and `num_target_tokens`."""
        if self.cached_teacher is not None and "label_target_ids" in batch:
            return self.cached_teacher.encode_targets(batch, indices, self.student)
        encoded = self.student.encode_targets(batch, indices, as_continuation=True)
        return {("target_ids" if name == "labels" else name): values for name, values in encoded.items()}

    def read_images(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Return rows with all that [`collate`] needs; rows of text have it already."""
        return list(rows)


def build_encoder(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: Seq2SeqDistillationConfig,
    cached_teacher: CachedTeacher | None = None,
) -> DistillationRowEncoder:
    """Build the encoder for the rows of a run; for images if the student has a processor.

    Raises:
        ValueError: A student that reads images has a teacher cache.
    """
    lengths = {"max_source_length": args.max_source_length, "max_target_length": args.max_completion_length}
    if isinstance(processing_class, ProcessorMixin):
        if cached_teacher is not None:
            raise ValueError("`teacher_cache` supports students that read text, but the student reads images.")
        from .distillation_images import build_image_encoder

        return build_image_encoder(processing_class, teacher_processing_class, args.chat_template_kwargs, **lengths)
    student = build_row_encoder(processing_class, **lengths)
    teacher = RowEncoder(teacher_processing_class)
    return DistillationRowEncoder(student, teacher, args.chat_template_kwargs or {}, cached_teacher)


def check_not_empty(num_source_tokens: int, num_teacher_tokens: int, where: str) -> None:
    """Check that both models have something to read.

    Raises:
        ValueError: One has not.
    """
    for reader, num_tokens in (("student", num_source_tokens), ("teacher", num_teacher_tokens)):
        if num_tokens == 0:
            raise ValueError(f"The {where} has no tokens for the {reader}, but at least one is required. Remove it.")


def as_prompts(dataset: Dataset | IterableDataset, is_chat: bool) -> Dataset | IterableDataset:
    """Convert `source` and `target` to `prompt` and `completion`; prompts are text, or a message of the user."""

    def as_prompt(text):
        return [{"role": "user", "content": text}] if is_chat else text

    def convert(row):
        teacher_prompt = {"teacher_prompt": as_prompt(row["teacher_prompt"])} if "teacher_prompt" in row else {}
        return {"prompt": as_prompt(row["source"]), "completion": row["target"], **teacher_prompt}

    options = {"remove_columns": ["source", "target"]}
    return dataset.map(convert, **options if isinstance(dataset, IterableDataset) else {**options, "desc": "Prompts"})


def check_teacher_context(
    dataset: Dataset, max_target_length: int | None, teacher_context: int, alignment: TokenAlignment | None = None
) -> None:
    """Check that each row fits the teacher's context.

    Args:
        dataset ([`~datasets.Dataset`]): Encoded. Rows with images are not checked, because their lengths are known
            when a batch is made.
        max_target_length (`int`, *optional*): Length of targets that are generated. `None` uses the rows' targets.
        teacher_context (`int`): In tokens, for source and target together.
        alignment ([`~encdec_slm.trainers.token_alignment.TokenAlignment`], *optional*): For another tokenizer.

    Raises:
        ValueError: A row is too long.
    """
    names = set(dataset.column_names)
    if "teacher_source_ids" not in names or (max_target_length is None and "target_ids" not in names):
        return
    targets = [max_target_length] * len(dataset)
    if max_target_length is None:
        targets = dataset["target_ids"]
        targets = [len(ids if alignment is None else alignment.encode_target(ids).teacher_ids) for ids in targets]
    lengths = [(len(ids), target) for ids, target in zip(dataset["teacher_source_ids"], targets, strict=True)]
    row, (source_length, target_length) = max(enumerate(lengths), key=lambda item: sum(item[1]))
    check_row_length(row, source_length, target_length, teacher_context)


def check_row_length(row: int, source_length: int, target_length: int, teacher_context: int) -> None:
    """Check that a row fits the teacher's context.

    Raises:
        ValueError: It is too long.
    """
    if source_length + target_length > teacher_context:
        raise ValueError(
            f"The teacher's context is {teacher_context} tokens, but row {row} needs {source_length + target_length}: "
            f"{source_length} of the source and up to {target_length} of the target. Lower `max_source_length` or "
            "`max_completion_length`, or use a teacher with a longer context."
        )


def collate(
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[Sequence[int]],
    gold: Sequence[Sequence[int]] | None,
    pad_token_id: int,
    pad_to_multiple_of: int | None = None,
    teacher_token_ids: Sequence[int] | None = None,
    aligned_targets: Sequence[AlignedTarget] | None = None,
) -> dict[str, torch.Tensor]:
    """Make a batch of encoded rows, padded on the right.

    Args:
        rows (`Sequence[Mapping]`): From a [`DistillationRowEncoder`].
        targets (`Sequence[Sequence[int]]`): Token ids on which student and teacher are compared, for each row.
        gold (`Sequence[Sequence[int]]`, *optional*): Token ids of the cross-entropy, for each row; may be `targets`.
        pad_token_id (`int`): Fills the padding.
        pad_to_multiple_of (`int`, *optional*): Lengths are rounded up to multiples of this.
        teacher_token_ids (`Sequence[int]`, *optional*): The teacher's id of each token of a trimmed vocabulary. `None`
            if the teacher reads the ids of the student.
        aligned_targets (`Sequence[AlignedTarget]`, *optional*): The targets in the tokens of a teacher with another
            tokenizer. `None` if both models have the same tokens.

    Returns:
        `dict`: `source_ids`, `target_ids`, `teacher_ids` (source and target in one row) and, if `gold` is not
        `targets`, `gold_ids` of shape `(batch_size, length)`, and their masks; `teacher_source_lengths` and `row` of
        shape `(batch_size,)`; `num_target_tokens`, which are compared, and `num_gold_tokens` of shape `()`. With
        `aligned_targets` also `teacher_indices` and `position_kinds`, of the shape of `target_ids`.
    """
    teacher_targets = targets
    if teacher_token_ids is not None:
        teacher_targets = [[teacher_token_ids[token_id] for token_id in target] for target in targets]
    elif aligned_targets is not None:
        teacher_targets = [target.teacher_ids for target in aligned_targets]
    teacher_rows = [[*row["teacher_source_ids"], *ids] for row, ids in zip(rows, teacher_targets, strict=True)]
    sequences = {"source": [row["source_ids"] for row in rows], "target": targets, "teacher": teacher_rows}
    if gold is not None and gold is not targets:
        sequences["gold"] = gold
    batch = {}
    for name, ids in sequences.items():
        batch[f"{name}_ids"], batch[f"{name}_mask"] = pad_ids(ids, pad_token_id, pad_to_multiple_of)
    batch["teacher_source_lengths"] = torch.tensor([len(row["teacher_source_ids"]) for row in rows])
    batch["row"] = torch.tensor([row["row"] for row in rows])
    batch["num_target_tokens"] = torch.tensor(sum(map(len, targets)))
    if aligned_targets is not None:
        columns = zip(*((target.teacher_indices, target.kinds) for target in aligned_targets), strict=True)
        for name, values in zip(("teacher_indices", "position_kinds"), columns, strict=True):
            batch[name], _ = pad_ids(values, NOT_COMPARED, pad_to_multiple_of)
        batch["num_target_tokens"] = (batch["position_kinds"] != NOT_COMPARED).sum()
    batch["num_gold_tokens"] = torch.tensor(sum(map(len, gold or ())))
    return batch


def trim_padding(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove the columns on the right that are padding in every row."""
    length = max(1, int(mask.sum(-1).max()))
    return ids[:, :length], mask[:, :length]


def to_lists(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Return the ids of each row without padding."""
    return [row_ids[row_mask.bool()].tolist() for row_ids, row_mask in zip(ids, mask, strict=True)]


__all__ = ["DistillationRowEncoder", "build_encoder", "collate"]
