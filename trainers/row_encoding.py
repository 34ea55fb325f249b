# SPDX-License-Identifier: Apache-2.0
"""Encode rows of text or chat messages as token ids, and pad them into batches.

Rows with images are encoded by [`~encdec_slm.trainers.image_rows.ImageRowEncoder`]; [`build_row_encoder`] chooses.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..errors import format_list


logger = logging.getLogger(__name__)

# Columns of the source and the target of a row.
COLUMNS = (("prompt", "completion"), ("source", "target"), ("question", "answer"))
LABELS_PADDING = -100

Messages = list[dict[str, Any]]


class EncodedSource(NamedTuple):
    """A source as the encoder reads it.

    Args:
        input_ids (`list[int]`): At most `max_source_length` tokens.
        num_tokens (`int`): Length before truncation.
        source (`str` or `list[dict]`): Text or messages, shortened like `input_ids`.
        image_inputs (`dict[str, torch.Tensor]`): Other inputs of the model, such as `pixel_values`; empty for text.
    """

    input_ids: list[int]
    num_tokens: int
    source: str | Messages
    image_inputs: dict[str, torch.Tensor] = {}

    @property
    def is_cut(self) -> bool:
        """Whether the source was truncated."""
        return self.num_tokens > len(self.input_ids)


@dataclass
class RowEncoder:
    """Encode sources and targets as token ids, for text models.

    A source is text or a list of messages; an encoder reads messages as plain text, with roles if there are several.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Fast or slow.
        max_source_length (`int`, *optional*): Longest source, in tokens; `None` truncates nothing.
        max_target_length (`int`, *optional*): Longest target, in tokens with the end-of-text token.
        decoder_start_token_id (`int`, *optional*): Of the model. Removed from targets, if the tokenizer puts it there,
            because the decoder is given it and does not generate it.

    Raises:
        ValueError: A length is not positive.
    """

    tokenizer: PreTrainedTokenizerBase
    max_source_length: int | None = None
    max_target_length: int | None = None
    decoder_start_token_id: int | None = None

    kept_columns = ()

    def __post_init__(self):
        for name in ("max_source_length", "max_target_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    # Sources

    def encode_source(
        self, source: str | Messages, *, before: str = "", after: str = "", where: str = "source"
    ) -> EncodedSource:
        """Encode one source.

        Args:
            source (`str` or `list[dict]`): The part that is truncated if the whole is too long.
            before (`str`, *optional*, defaults to `""`): Text before `source` that is never truncated.
            after (`str`, *optional*, defaults to `""`): Text after it, likewise.
            where (`str`, *optional*): Name of the source in error messages.

        Raises:
            TypeError: `source` is neither text nor a list of messages.
            ValueError: `before` and `after` alone are too long.
        """
        if not before and not after:
            return self.encode_sources([source], [where])[0]
        text = as_plain_text(source, where)
        ids = self._tokenize(before + text + after)
        num_tokens = len(ids)
        if self._is_too_long(ids):
            text = self._shorten(text, lambda text: len(self._tokenize(before + text + after)), where)
            ids = self._tokenize(before + text + after)
        return EncodedSource(ids or [self._eos_token_id], num_tokens, before + text + after)

    def encode_sources(self, sources: Sequence[str | Messages], where: Sequence[str]) -> list[EncodedSource]:
        """Encode several sources in one call of the tokenizer; a source without tokens becomes an end-of-text token.

        Args and Raises: as in [`~RowEncoder.encode_source`], with a name in `where` for each source.
        """
        texts = [as_plain_text(source, name) for source, name in zip(sources, where, strict=True)]
        return [
            self._truncate(source, text, ids)
            for source, text, ids in zip(sources, texts, self._tokenize(texts) if texts else (), strict=True)
        ]

    def _truncate(self, source, text, ids):
        num_tokens = len(ids)
        if self._is_too_long(ids):
            ids = self._tokenize(text, truncation=True, max_length=self.max_source_length)
            source = _replace_text(source, self.tokenizer.decode(ids, skip_special_tokens=True))
        return EncodedSource(ids or [self._eos_token_id], num_tokens, source)

    def encode_prompt(
        self, prompt: str | Messages, *, where: str = "prompt", chat_template_kwargs: Mapping[str, Any] | None = None
    ) -> EncodedSource:
        """Encode a prompt that a decoder-only model continues: messages by the chat template, without a final end.

        Args:
            prompt (`str` or `list[dict]`): Text or messages.
            where (`str`, *optional*): Name of the prompt in error messages.
            chat_template_kwargs (`dict`, *optional*): Variables of the chat template.

        Raises:
            TypeError: `prompt` is neither text nor a list of messages.
            ValueError: The tokenizer has no chat template for messages.
        """
        if isinstance(prompt, str):
            return self._open_end(self._tokenize(prompt), prompt)
        as_plain_text(prompt, where)
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"The {where} is a list of messages, but the tokenizer has no chat template. Set its `chat_template`, "
                "or give plain text."
            )
        options = {**(chat_template_kwargs or {}), "add_generation_prompt": True, "tokenize": True}
        ids = self.tokenizer.apply_chat_template(prompt, return_dict=True, **options)["input_ids"]
        return EncodedSource(ids, len(ids), prompt)

    def _open_end(self, ids, prompt, image_inputs=None):
        """Remove the end that some tokenizers append to each text, because the target follows."""
        ids = ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        return EncodedSource(ids, len(ids), prompt, image_inputs or {})

    # Targets

    def encode_target(self, target: str | Messages, *, as_continuation: bool = False, where: str = "target"):
        """Encode what the decoder generates.

        Args:
            target (`str` or `list[dict]`): Text or messages.
            as_continuation (`bool`, *optional*, defaults to `False`): Encode it as a decoder-only model continues a
                prompt: without other special tokens, and without an end-of-text token if it is truncated.
            where (`str`, *optional*): Name of the target in error messages.

        Returns:
            `tuple[list[int], int]`: At most `max_target_length` ids, which end in the end-of-text token, and their
            number before truncation.

        Raises:
            TypeError: `target` is neither text nor a list of messages.
            ValueError: The tokenizer has no end-of-text token.
        """
        ids = self._tokenize(as_plain_text(target, where), add_special_tokens=not as_continuation)
        if not as_continuation and ids[:1] == [self.decoder_start_token_id]:
            ids = ids[1:]
        while ids[-1:] == [self._eos_token_id]:  # in the text, from the tokenizer, or both
            ids = ids[:-1]
        ids = [*ids, self._eos_token_id]
        num_tokens, limit = len(ids), self.max_target_length
        if limit is not None and num_tokens > limit:
            ids = ids[:limit] if as_continuation else [*ids[: limit - 1], self._eos_token_id]
        return ids, num_tokens

    # Rows and batches

    def prepare_dataset(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Prepare a dataset for [`~RowEncoder.encode_batch`]."""
        return dataset

    def is_encoded(self, row: Mapping[str, Any]) -> bool:
        """Whether a row comes from [`~RowEncoder.encode_batch`]."""
        return "input_ids" in row

    def encode_batch(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        """Encode rows, for `datasets.map(..., batched=True, with_indices=True)`.

        Returns:
            `dict`: The columns `input_ids`, `num_source_tokens`, `length` (of the longer side) and, if the rows have
            targets, `labels` and `num_target_tokens`. Numbers of tokens are those before truncation.

        Raises:
            TypeError: A source or target is neither text nor a list of messages.
        """
        column, _ = find_columns(batch)
        sources = self.encode_sources(batch[column], [f"`{column}` of row {index}" for index in indices])
        encoded = {
            "input_ids": [source.input_ids for source in sources],
            "num_source_tokens": [source.num_tokens for source in sources],
        }
        encoded |= self.encode_targets(batch, indices)
        # `train_sampling_strategy: group_by_length` reads `length`. A row with a short source may have a long target.
        sides = (encoded[name] for name in ("input_ids", "labels") if name in encoded)
        return encoded | {"length": [max(map(len, row)) for row in zip(*sides, strict=True)]}

    def encode_targets(
        self, batch: Mapping[str, list], indices: Sequence[int], as_continuation: bool = False
    ) -> dict[str, list]:
        """Encode the targets of rows, if they have any, as the columns `labels` and `num_target_tokens`."""
        _, column = find_columns(batch)
        if column not in batch:
            return {}
        targets = [
            self.encode_target(target, as_continuation=as_continuation, where=f"`{column}` of row {index}")
            for index, target in zip(indices, batch[column], strict=True)
        ]
        return {"labels": [ids for ids, _ in targets], "num_target_tokens": [length for _, length in targets]}

    def collate_sources(self, sources: Sequence[EncodedSource]) -> dict[str, torch.Tensor]:
        """Pad sources on the right; return `input_ids` and `attention_mask` of shape `(batch_size, source_length)`."""
        input_ids, attention_mask = pad_ids([source.input_ids for source in sources], self._pad_token_id)
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of rows, as the `data_collator` of a [`~transformers.Seq2SeqTrainer`].

        Args:
            rows (`Sequence[Mapping]`): From [`~RowEncoder.encode_batch`], or not encoded yet.

        Returns:
            `dict`: `input_ids`, `attention_mask` and, if the rows have targets, `labels` (-100 for padding) and
            `decoder_input_ids`, all of shape `(batch_size, length)`.

        Raises:
            TypeError: A source or target is neither text nor a list of messages.
            ValueError: Rows have no source, or only some of them have a target.
        """
        batch = self.collate_sources([self._encode_row(row, index) for index, row in enumerate(rows)])
        labels = [self._row_labels(row, index) for index, row in enumerate(rows)]
        if num_missing := labels.count(None):
            if num_missing < len(rows):
                raise ValueError(
                    f"{num_missing} of {len(rows)} rows of a batch have no target, but all rows or none must have "
                    "one. Add it, or remove it from all rows."
                )
            return batch
        batch["labels"], _ = pad_ids(labels, LABELS_PADDING)
        if self.decoder_start_token_id is not None:
            shifted = [[self.decoder_start_token_id, *ids[:-1]] for ids in labels]
            batch["decoder_input_ids"], _ = pad_ids(shifted, self._pad_token_id)
        return batch

    def _encode_row(self, row, index):
        if "input_ids" in row:
            return EncodedSource(row["input_ids"], len(row["input_ids"]), "")
        column, _ = find_columns(row)
        return self.encode_source(row[column], where=f"`{column}` of row {index} of the batch")

    def _row_labels(self, row, index):
        if "labels" in row or "input_ids" in row:
            return row.get("labels")
        _, column = find_columns(row)
        if column not in row:
            return None
        return self.encode_target(row[column], where=f"`{column}` of row {index} of the batch")[0]

    # Tokens

    @property
    def _eos_token_id(self):
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"The tokenizer ({type(self.tokenizer).__name__}) has no end-of-text token, so a model cannot learn "
                "to stop. Set its `eos_token`."
            )
        return self.tokenizer.eos_token_id

    @property
    def _pad_token_id(self):
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token_id for token_id in ids if token_id is not None)

    def _tokenize(self, text, **options):
        """Token ids of a text, or of each of several."""
        return self.tokenizer(text, verbose=False, **{"truncation": False, **options})["input_ids"]

    def _is_too_long(self, ids):
        return self.max_source_length is not None and len(ids) > self.max_source_length

    def _shorten(self, text: str, count_tokens: Callable[[str], int], where: str) -> str:
        """Return the longest beginning of `text` with which the source fits `max_source_length`."""
        while text and (excess := count_tokens(text) - self.max_source_length) > 0:
            shorter = self._remove_tokens(text, excess)
            # Several tokens of one character end at the same offset.
            text = shorter if len(shorter) < len(text) else text[:-1]
        if (num_tokens := count_tokens(text)) > self.max_source_length:
            raise ValueError(
                f"The {where} has {num_tokens} tokens that cannot be truncated, but `max_source_length` is "
                f"{self.max_source_length}. Raise `max_source_length`, or leave the row out."
            )
        return text

    def _remove_tokens(self, text, num_tokens):
        if not self.tokenizer.is_fast:
            return self.tokenizer.decode(self._tokenize(text, add_special_tokens=False)[:-num_tokens])
        options = {"add_special_tokens": False, "return_offsets_mapping": True, "truncation": False}
        ends = [end for _, end in self.tokenizer(text, verbose=False, **options)["offset_mapping"]]
        return text[: ends[-num_tokens - 1]] if len(ends) > num_tokens else ""


def build_row_encoder(processing_class: PreTrainedTokenizerBase | ProcessorMixin, **kwargs) -> RowEncoder:
    """Build the row encoder of a model: for text from its tokenizer, for text and images from its processor.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): Of the model.
        kwargs: Other arguments of [`RowEncoder`].
    """
    if not isinstance(processing_class, ProcessorMixin):
        return RowEncoder(processing_class, **kwargs)
    from .image_rows import ImageRowEncoder

    return ImageRowEncoder(processing_class.tokenizer, processor=processing_class, **kwargs)


def encode_rows(
    dataset: Dataset | IterableDataset, encoder: Any, name: str, counts: Counter | None = None
) -> Dataset | IterableDataset:
    """Encode a dataset and log its lengths; returns it unchanged if it is encoded already.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): With the columns `source` and, if known,
            `target`; `prompt` and `completion`, or `question` and `answer`, mean the same.
        encoder ([`RowEncoder`]): Or an object with the same methods for datasets.
        name (`str`): Name of the dataset in messages.
        counts (`Counter`, *optional*): Receives the numbers of `rows` and of rows whose `source` or `target` is
            truncated; of a stream while it is read.

    Raises:
        ValueError: There are no rows, or no such columns.
    """
    dataset = encoder.prepare_dataset(dataset)
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The {name} must have at least one row, but has none. Check what it holds.")
    if encoder.is_encoded(first):
        return dataset
    if not any(source in first for source, _ in COLUMNS):
        raise ValueError(
            f"The {name} must have the columns `source` and `target`, or `prompt` and `completion`, but has "
            f"{', '.join(first)}. Rename them."
        )
    dropped = [column for column in first if column not in encoder.kept_columns]
    if images := {"images", "image"}.intersection(dropped):
        logger.warning(f"The {name} has images (`{images.pop()}`), which a text model does not read.")
    options = {"batched": True, "with_indices": True, "remove_columns": dropped}
    if isinstance(dataset, IterableDataset):
        return dataset.map(_count_while_reading(encoder, counts), **options)
    encoded = dataset.map(encoder.encode_batch, desc=f"Tokenizing the {name}", **options)
    numbers = [column for column in encoded.column_names if column.startswith("num_")]
    found = count_rows(encoded.select_columns(numbers)[:], encoder)
    if counts is not None:
        counts.update(found)
    logger.info(_describe_lengths(encoded, encoder, name, found))
    return encoded


def _count_while_reading(encoder, counts):
    def encode_batch(batch, indices):
        encoded = encoder.encode_batch(batch, indices)
        if counts is not None:
            counts.update(count_rows(encoded, encoder))
        return encoded

    return encode_batch


def count_rows(encoded: Mapping[str, Sequence], encoder: RowEncoder) -> Counter:
    """Count encoded rows, and those whose `source` or `target` was longer than the encoder allows."""
    counts = Counter(rows=len(next(iter(encoded.values()))))
    for kind, limit in (("source", encoder.max_source_length), ("target", encoder.max_target_length)):
        lengths = encoded.get(f"num_{kind}_tokens", ())
        counts[kind] = 0 if limit is None else sum(length > limit for length in lengths)
    return counts


def _describe_lengths(encoded, encoder, name, counts):
    parts = [f"{name.capitalize()}: {counts['rows']:,} row{'s' * (counts['rows'] != 1)}"]
    for kind, limit in (("source", encoder.max_source_length), ("target", encoder.max_target_length)):
        if (column := f"num_{kind}_tokens") in encoded.column_names:
            lengths = encoded[column][:]
            cut = f"{counts[kind]:,} truncated to {limit}" if counts[kind] else "none truncated"
            parts.append(f"{kind}s of {sum(lengths) / len(lengths):.0f} tokens (longest {max(lengths)}), {cut}")
    return "; ".join(parts) + "."


def find_columns(batch: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the source and target columns of rows.

    Raises:
        ValueError: There is no source column.
    """
    for names in COLUMNS:
        if names[0] in batch:
            return names
    raise ValueError(
        f"Rows must have `source` (or `prompt` or `question`), but have {', '.join(batch) or 'nothing'}. Rename the "
        "column; a `Trainer` also needs `remove_unused_columns=False` to pass columns that the model does not know."
    )


def as_plain_text(value: Any, where: str) -> str:
    """Return the plain text of text or messages; several messages are prefixed with their roles.

    Raises:
        TypeError: `value` is neither text nor a list of messages with text.
    """
    if isinstance(value, str):
        return value
    is_conversation = isinstance(value, Sequence) and value and all(isinstance(part, dict) for part in value)
    if not is_conversation or not all(isinstance(part.get("content"), str) for part in value):
        raise TypeError(
            f"The {where} must be text or a list of messages with `role` and text as `content`, got "
            f"{type(value).__name__} {value!r:.80}. Convert it, or leave the row out."
        )
    if len(value) == 1:
        return value[0]["content"]
    return "\n".join(f"{part['role']}: {part['content']}" for part in value)


def iterate_texts(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the sources and targets of rows as plain text, such as for [`~encdec_slm.vocabulary.trim_tokenizer`].

    Raises:
        ValueError: A row has no source.
        TypeError: A source or target is neither text nor a list of messages.
    """
    for number, row in enumerate(rows, start=1):
        columns = next((names for names in COLUMNS if row.get(names[0]) is not None), None)
        if columns is None:
            raise ValueError(
                f"Row {number} has the columns {format_list(row)}, but `source` and `target`, or `prompt` and "
                "`completion`, are required. Rename them."
            )
        for name in columns:
            if row.get(name) is not None:
                yield as_plain_text(row[name], f"`{name}` of row {number}")


def _replace_text(source, text):
    """Replace the text of a source that was truncated; a dialogue stays as it is."""
    if isinstance(source, str):
        return text
    return [{**source[0], "content": text}] if len(source) == 1 else source


def pad_ids(
    rows: Sequence[Sequence[int]],
    padding_value: int,
    pad_to_multiple_of: int | None = None,
    padding_side: str = "right",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad lists of ids to the longest.

    Args:
        rows (`Sequence[Sequence[int]]`): Ids of each row.
        padding_value (`int`): Fills the padding.
        pad_to_multiple_of (`int`, *optional*): Round the length up to a multiple of this.
        padding_side (`str`, *optional*, defaults to `"right"`): Or `"left"`.

    Returns:
        `tuple[torch.LongTensor, torch.LongTensor]`: Ids and attention mask of shape `(batch_size, length)`.
    """
    tensors = [torch.tensor(ids, dtype=torch.long) for ids in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=padding_value, padding_side=padding_side)
    ones = [torch.ones_like(tensor) for tensor in tensors]
    mask = pad_sequence(ones, batch_first=True, padding_side=padding_side)
    if pad_to_multiple_of and (missing := -ids.shape[1] % pad_to_multiple_of):
        width = (missing, 0) if padding_side == "left" else (0, missing)
        ids, mask = F.pad(ids, width, value=padding_value), F.pad(mask, width)
    return ids, mask


__all__ = [
    "EncodedSource",
    "RowEncoder",
    "build_row_encoder",
    "count_rows",
    "encode_rows",
    "iterate_texts",
    "pad_ids",
]
