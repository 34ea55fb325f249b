# SPDX-License-Identifier: Apache-2.0
"""Rows for distillation: what the student reads, what the teacher reads, and the target that both predict."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, Image, IterableDataset, List
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# Names of source and target in a row; the first pair is TRL's.
COLUMNS = (("prompt", "completion"), ("source", "target"))
ENCODED_COLUMNS = (
    *("row", "source_ids", "teacher_source_ids", "target_ids"),
    *("num_source_tokens", "num_target_tokens"),
)


@dataclass
class RowEncoder:
    """Turns rows of text or messages into token ids, for `datasets.map(..., batched=True, with_indices=True)`.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the student, for its source and for the target.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`]): For the teacher's source; its chat template
            renders messages.
        max_source_length (`int`, *optional*): In tokens of the student.
        max_target_length (`int`): In tokens, with the end-of-text token. Of a target that is cut, this token is cut
            too: the student is not taught to stop where the text goes on.
        chat_template_kwargs (`dict`): For the teacher's chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    max_source_length: int | None
    max_target_length: int
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    kept_columns = ()

    def is_encoded(self, row: dict[str, Any]) -> bool:
        """Whether a row comes from this class."""
        return "source_ids" in row

    def finished(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of a batch with all that [`collate`] takes: they have it already."""
        return rows

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        """The columns `row`, `source_ids`, `teacher_source_ids`, `num_source_tokens` and, with targets, `target_ids`
        and `num_target_tokens`; lengths are those before anything was cut.

        Raises:
            TypeError: A source or target is neither text nor a list of messages.
            ValueError: A source is empty, or messages meet a tokenizer without a chat template.
        """
        source_column, target_column = next(names for names in COLUMNS if names[0] in batch)
        encoded = {name: [] for name in ENCODED_COLUMNS}
        targets = batch.get(target_column, [None] * len(indices))
        for index, source, target in zip(indices, batch[source_column], targets, strict=True):
            source_ids, teacher_source_ids, num_source_tokens = self._sources(source, f"`{source_column}` of {index=}")
            encoded["row"].append(index)
            encoded["source_ids"].append(source_ids)
            encoded["teacher_source_ids"].append(teacher_source_ids)
            encoded["num_source_tokens"].append(num_source_tokens)
            if target_column in batch:
                target_ids = self._target(target, f"`{target_column}` of {index=}")
                encoded["target_ids"].append(target_ids[: self.max_target_length])
                encoded["num_target_tokens"].append(len(target_ids))
        return {name: values for name, values in encoded.items() if values}

    def _sources(self, source, where):
        text = _plain_text(source, where)
        source_ids = self.tokenizer(text)["input_ids"]
        num_tokens = len(source_ids)
        if num_tokens == 0:
            raise ValueError(f"The {where} has no tokens, but the student's encoder needs one to read. Leave it out.")
        if self.max_source_length is not None and num_tokens > self.max_source_length:
            source_ids = self.tokenizer(text, truncation=True, max_length=self.max_source_length)["input_ids"]
            source = _shortened(source, self.tokenizer.decode(source_ids, skip_special_tokens=True))
        teacher_source_ids = self._teacher_source(source, where)
        if not teacher_source_ids:
            raise ValueError(
                f"The {where} has no tokens for the teacher, but the target's first token is predicted from one. "
                "Leave the row out."
            )
        return source_ids, teacher_source_ids, num_tokens

    def _teacher_source(self, source, where):
        if not isinstance(source, str):
            if self.teacher_tokenizer.chat_template is None:
                raise ValueError(
                    f"The {where} is a list of messages, but the teacher's tokenizer has no chat template to render "
                    "them with. Set its `chat_template`, or give plain text."
                )
            encoded = self.teacher_tokenizer.apply_chat_template(
                source, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
            )
            return encoded["input_ids"]
        ids = self.teacher_tokenizer(source)["input_ids"]
        # Some tokenizers end every text; the teacher is to read on into the target.
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.teacher_tokenizer.eos_token_id else ids

    def _target(self, target, where):
        ids = self.target_ids(_plain_text(target, where))
        return ids if ids[-1:] == [self.tokenizer.eos_token_id] else [*ids, self.tokenizer.eos_token_id]

    def target_ids(self, text: str) -> list[int]:
        """Ids of a text that the decoder is to write, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _plain_text(value, where):
    """What an encoder reads of text or messages: roles are named where there are several messages."""
    if isinstance(value, str):
        return value
    is_conversation = isinstance(value, Sequence) and value and all(isinstance(part, dict) for part in value)
    if not is_conversation or not all(isinstance(part.get("content"), str) for part in value):
        raise TypeError(
            f"The {where} is {value!r:.80}, but it must be text or a list of messages with `role` and text as "
            "`content`. Convert it or leave the row out."
        )
    if len(value) == 1:
        return value[0]["content"]
    return "\n".join(f"{part['role']}: {part['content']}" for part in value)


def _shortened(source, text):
    """A source that was cut, for the teacher: it is to know no more than the student. A dialogue stays whole."""
    if isinstance(source, str):
        return text
    return [{**source[0], "content": text}] if len(source) == 1 else source


def as_prompts(dataset: Dataset | IterableDataset, is_chat: bool) -> Dataset | IterableDataset:
    """Rows of `source` and `target` as `prompt` and `completion`; the prompt is text, or a message of the user."""

    def convert(row):
        prompt = [{"role": "user", "content": row["source"]}] if is_chat else row["source"]
        return {"prompt": prompt, "completion": row["target"]}

    options = {"remove_columns": ["source", "target"]}
    return dataset.map(convert, **options if isinstance(dataset, IterableDataset) else {**options, "desc": "Prompts"})


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """`dataset` whose images stay files until somebody reads them, who can say which of them is damaged."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(feature, List) and isinstance(feature.feature, Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def encode_rows(dataset: Dataset | IterableDataset, encoder: RowEncoder, name: str) -> Dataset | IterableDataset:
    """A data set of token ids; one that has them already comes back as it is.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): With `prompt` and, where known, `completion`;
            or `source` and `target`. Text, or lists of messages.
        encoder ([`RowEncoder`]): What to do with a row.
        name (`str`): How messages call the data set.

    Raises:
        ValueError: There are no rows, or no such columns.
    """
    dataset = undecoded(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} has no rows, but at least one is needed. Check what it holds.")
    if encoder.is_encoded(first):
        return dataset
    if not any(source in first for source, _ in COLUMNS):
        raise ValueError(
            f"The {name} has the columns {', '.join(first)}, but `prompt` and `completion`, or `source` and `target`, "
            "are needed (`prompt` alone where the student or the teacher writes the targets). Rename them."
        )
    dropped = [name for name in first if name not in encoder.kept_columns]
    options = {"batched": True, "with_indices": True, "remove_columns": dropped}
    if isinstance(dataset, IterableDataset):
        return dataset.map(encoder, **options)
    encoded = dataset.map(encoder, desc=f"Tokenizing the {name}", **options)
    logger.info(describe_lengths(encoded, encoder, name))
    return encoded


def describe_lengths(encoded: Dataset, encoder: RowEncoder, name: str) -> str:
    """Rows, lengths and how many texts were cut, in a sentence."""
    parts = [f"{name.capitalize()}: {len(encoded):,} row{'s' * (len(encoded) != 1)}"]
    bounds = {"source": encoder.max_source_length, "target": encoder.max_target_length}
    for kind, bound in bounds.items():
        if (column := f"num_{kind}_tokens") not in encoded.column_names:
            continue
        lengths = encoded[column][:]
        num_cut = 0 if bound is None else sum(length > bound for length in lengths)
        cut = f", {num_cut:,} of them cut to {bound}" if num_cut else ", none cut"
        parts.append(f"{kind}s of {sum(lengths) / len(lengths):.0f} tokens (longest {max(lengths)}){cut}")
    return "; ".join(parts) + "."


def refuse_long_rows(dataset: Dataset, max_target_length: int | None, teacher_context: int) -> None:
    """Raises a `ValueError` if the teacher's context is too short for a row.

    Args:
        dataset ([`~datasets.Dataset`]): From [`encode_rows`].
        max_target_length (`int`, *optional*): Of targets that will be written. `None` takes those of the rows.
        teacher_context (`int`): In tokens, for source and target together.
    """
    if "teacher_source_ids" not in dataset.column_names:
        return  # lengths of rows with images are known when a batch is made
    if max_target_length is None and "target_ids" not in dataset.column_names:
        return
    targets = [max_target_length] * len(dataset)
    if max_target_length is None:
        targets = [len(ids) for ids in dataset["target_ids"]]
    lengths = [(len(ids), target) for ids, target in zip(dataset["teacher_source_ids"], targets, strict=True)]
    row, (source_length, target_length) = max(enumerate(lengths), key=lambda item: sum(item[1]))
    if source_length + target_length > teacher_context:
        raise ValueError(
            f"The teacher's context is {teacher_context} tokens, but row {row} has {source_length} source tokens for "
            f"it and {'' if max_target_length is None else 'up to '}{target_length} target tokens, "
            f"{source_length + target_length} together. Lower `max_source_length` or `max_completion_length`, or use "
            "a teacher with a longer context."
        )


def padded(rows: Sequence[Sequence[int]], padding_value: int, multiple: int | None, left: bool = False):
    """Ids of shape (B, L) and their mask; L is a multiple of `multiple`."""
    tensors = [torch.tensor(ids, dtype=torch.long) for ids in rows]
    side = "left" if left else "right"
    ids = pad_sequence(tensors, batch_first=True, padding_value=padding_value, padding_side=side)
    ones = [torch.ones_like(tensor) for tensor in tensors]
    mask = pad_sequence(ones, batch_first=True, padding_side=side)
    if multiple and (missing := -ids.shape[1] % multiple):
        width = (missing, 0) if left else (0, missing)
        ids = F.pad(ids, width, value=padding_value)
        mask = F.pad(mask, width)
    return ids, mask


def collate(
    rows: Sequence[dict[str, Any]], targets: Sequence[Sequence[int]], pad_token_id: int, multiple: int | None
) -> dict[str, torch.Tensor]:
    """Tensors of a batch, padded on the right.

    Args:
        rows (`Sequence[dict]`): From [`encode_rows`].
        targets (`Sequence[Sequence[int]]`): Token ids that student and teacher are compared on, one list per row.
        pad_token_id (`int`): Fills what the masks hide.
        multiple (`int`, *optional*): Lengths are rounded up to multiples of this.

    Returns:
        `dict`: `source_ids`, `target_ids`, `teacher_ids` (source and target in one row) of shape `(batch_size,
        length)` and their masks; `teacher_source_lengths` and `row` of shape `(batch_size,)`.
    """
    teacher_rows = [[*row["teacher_source_ids"], *target] for row, target in zip(rows, targets, strict=True)]
    sequences = {"source": [row["source_ids"] for row in rows], "target": targets, "teacher": teacher_rows}
    batch = {}
    for name, ids in sequences.items():
        batch[f"{name}_ids"], batch[f"{name}_mask"] = padded(ids, pad_token_id, multiple)
    batch["teacher_source_lengths"] = torch.tensor([len(row["teacher_source_ids"]) for row in rows])
    batch["row"] = torch.tensor([row["row"] for row in rows])
    return batch


def trimmed(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the columns on the right that are padding in every row."""
    length = max(1, int(mask.sum(-1).max()))
    return ids[:, :length], mask[:, :length]


def stacked(*batches: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and masks of several batches, one below the other and as wide as the widest."""
    width = max(ids.shape[1] for ids, _ in batches)
    ids, mask = (
        torch.cat([F.pad(one, (0, width - one.shape[1])) for one in kind]) for kind in zip(*batches, strict=True)
    )
    return ids, mask


def unpadded(ids: torch.Tensor, mask: torch.Tensor) -> Iterator[list[int]]:
    """The ids of each row that its mask keeps."""
    for row_ids, row_mask in zip(ids, mask, strict=True):
        yield row_ids[row_mask.bool()].tolist()


__all__ = ["RowEncoder", "collate", "encode_rows"]
