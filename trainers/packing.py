# SPDX-License-Identifier: Apache-2.0
"""Pack several rows into one sequence on both sides, for models that take `segment_ids` and `decoder_segment_ids`."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainer

from ..errors import format_list
from .row_encoding import LABELS_PADDING


def assign_rows(
    source_lengths: Sequence[int],
    target_lengths: Sequence[int],
    max_source_length: int | None = None,
    max_target_length: int | None = None,
) -> list[list[int]]:
    """Assign rows to as few packs as first-fit decreasing finds: the longest rows first, each to the first with room.

    Args:
        source_lengths (`Sequence[int]`): Tokens of each row's source.
        target_lengths (`Sequence[int]`): Tokens of each row's target.
        max_source_length (`int`, *optional*): Most source tokens of a pack. `None` means the longest source, so that
            packs are no longer than padded rows.
        max_target_length (`int`, *optional*): Most target tokens of a pack, likewise.

    Returns:
        `list[list[int]]`: Numbers of the rows of each pack; the same for the same lengths.

    Raises:
        ValueError: A row is longer than a pack.
    """
    limits = []
    for kind, lengths, limit in (
        ("source", source_lengths, max_source_length),
        ("target", target_lengths, max_target_length),
    ):
        longest = max(lengths, default=0)
        if limit is not None and longest > limit:
            raise ValueError(
                f"A {kind} has {longest} tokens, but `packed_{kind}_length` is {limit}. Raise it, or truncate rows to "
                f"fewer {kind} tokens."
            )
        limits.append(max(longest if limit is None else limit, 1))
    lengths = list(zip(source_lengths, target_lengths, strict=True))
    shares = [max(length / limit for length, limit in zip(row, limits, strict=True)) for row in lengths]
    packs, rooms = [], []
    for row in sorted(range(len(lengths)), key=lambda row: -shares[row]):
        source_length, target_length = lengths[row]
        fitting = (n for n, room in enumerate(rooms) if source_length <= room[0] and target_length <= room[1])
        if (number := next(fitting, None)) is None:
            number = len(packs)
            packs.append([])
            rooms.append(limits)
        packs[number].append(row)
        rooms[number] = (rooms[number][0] - source_length, rooms[number][1] - target_length)
    return packs


def pack_ids(
    rows: Sequence[Sequence[int]], packs: Sequence[Sequence[int]], padding_value: int, min_length: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Concatenate the ids of the rows of each pack.

    Args:
        rows (`Sequence[Sequence[int]]`): Ids of each row.
        packs (`Sequence[Sequence[int]]`): From [`assign_rows`].
        padding_value (`int`): Fills the padding.
        min_length (`int`, *optional*, defaults to 1): Length of the result is at least this.

    Returns:
        `tuple[torch.LongTensor, torch.LongTensor]`: Ids and the numbers of their segments, of shape
        `(num_packs, length)`. Padding at the end is a segment of its own.
    """
    ids = [[token_id for row in pack for token_id in rows[row]] for pack in packs]
    segments = [[number for number, row in enumerate(pack) for _ in rows[row]] for pack in packs]
    length = max(min_length, *map(len, ids))
    for pack, pack_ids, numbers in zip(packs, ids, segments, strict=True):
        missing = length - len(pack_ids)
        pack_ids += [padding_value] * missing
        numbers += [len(pack)] * missing
    return torch.tensor(ids), torch.tensor(segments)


def locate_rows(packs: Sequence[Sequence[int]], lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pack of each row, and where its tokens begin there, of shape `(num_rows,)`."""
    pack_numbers, starts = torch.empty(2, len(lengths), dtype=torch.long)
    for number, pack in enumerate(packs):
        start = 0
        for row in pack:
            pack_numbers[row], starts[row] = number, start
            start += lengths[row]
    return pack_numbers, starts


def check_packing(model: PreTrainedModel) -> None:
    """Check that a model keeps packed rows apart.

    Raises:
        ValueError: It does not take `segment_ids`, as models of other families and vision-text models.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "decoder_segment_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"`packing` requires a text model that takes `segment_ids` and `decoder_segment_ids`, but "
            f"{type(model).__name__} does not. Set `packing` to false."
        )


@dataclass
class DataCollatorWithPacking:
    """Pack the rows of a batch, as the `data_collator` of a [`~transformers.Seq2SeqTrainer`].

    The batch size is the number of rows to pack, so that a step learns from the same rows as without packing; the same
    rows are packed alike in every run and process, and a resumed or streamed run needs no state.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model. Its padding fills the ends of packs.
        decoder_start_token_id (`int`, *optional*): Of the model, to add `decoder_input_ids`, which label smoothing
            needs. `None` leaves them to the model.
        packed_source_length (`int`, *optional*): Most source tokens of a pack. `None` means the longest source of the
            batch.
        packed_target_length (`int`, *optional*): Most target tokens of a pack, likewise.

    Raises:
        ValueError: A length is not positive.
    """

    tokenizer: PreTrainedTokenizerBase
    decoder_start_token_id: int | None = None
    packed_source_length: int | None = None
    packed_target_length: int | None = None

    def __post_init__(self):
        for name in ("packed_source_length", "packed_target_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            rows (`Sequence[Mapping]`): With `input_ids` and `labels`, not padded.

        Returns:
            `dict`: `input_ids` and `segment_ids` of shape `(num_packs, source_length)`, `labels` (-100 for padding)
            and `decoder_segment_ids` of shape `(num_packs, target_length)`, and perhaps `decoder_input_ids`.

        Raises:
            ValueError: A row has no `labels`, or is longer than a pack.
        """
        for number, row in enumerate(rows):
            if row.get("input_ids") is None or row.get("labels") is None:
                raise ValueError(
                    f"Row {number} of a batch has {format_list(row)}, but packing requires `input_ids` and `labels`. "
                    "Encode rows before."
                )
        sources, labels = ([list(row[name]) for row in rows] for name in ("input_ids", "labels"))
        padding = self.tokenizer.pad_token_id or 0
        limits = self.packed_source_length, self.packed_target_length
        packs = assign_rows([len(ids) for ids in sources], [len(ids) for ids in labels], *limits)
        batch = {}
        batch["input_ids"], batch["segment_ids"] = pack_ids(sources, packs, padding)
        batch["labels"], batch["decoder_segment_ids"] = pack_ids(labels, packs, LABELS_PADDING)
        if self.decoder_start_token_id is not None:
            shifted = [[self.decoder_start_token_id, *ids][: len(ids)] for ids in labels]
            shifted = [[padding if token_id == LABELS_PADDING else token_id for token_id in ids] for ids in shifted]
            batch["decoder_input_ids"], _ = pack_ids(shifted, packs, padding)
        return batch


class PackingSeq2SeqTrainer(Seq2SeqTrainer):
    """A Trainer that packs training rows only: evaluation generates, which takes one row per source.

    Args:
        packing_collator ([`DataCollatorWithPacking`]): Makes the training batches.
        args, kwargs: As in [`~transformers.Seq2SeqTrainer`].
    """

    def __init__(self, *args: Any, packing_collator: DataCollatorWithPacking, **kwargs: Any):
        self.packing_collator = packing_collator
        super().__init__(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """As [`~transformers.Trainer.get_train_dataloader`], with packed batches."""
        collator, self.data_collator = self.data_collator, self.packing_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator


__all__ = [
    "DataCollatorWithPacking",
    "PackingSeq2SeqTrainer",
    "assign_rows",
    "check_packing",
    "locate_rows",
    "pack_ids",
]
