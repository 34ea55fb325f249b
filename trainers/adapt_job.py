# SPDX-License-Identifier: Apache-2.0
"""Adapt a decoder-only checkpoint into a folder, with a vocabulary trimmed to rows and the loss before training."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adaptation import from_decoder_only, load_tokenizer
from ..checkpoints import write_folder
from ..vocabulary import describe_embeddings
from .data_files import read_data_file
from .row_encoding import RowEncoder
from .vocabulary import trim_to_rows


def adapt(
    source: str | Path,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    trim_vocabulary: str | Path | None = None,
    vocabulary_size: int | None = None,
    calibration: str | Path | None = None,
    **shape: Any,
) -> list[str]:
    """Write an encoder-decoder made from a decoder-only checkpoint, with its tokenizer.

    Args:
        source (`str` or `Path`): Folder or Hub name of the decoder-only checkpoint.
        output_dir (`str` or `Path`): Folder to write.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an earlier checkpoint.
        trim_vocabulary (`str` or `Path`, *optional*): Data file; only tokens that its rows use are kept. `None` keeps
            all.
        vocabulary_size (`int`, *optional*): With `trim_vocabulary`, keep only so many tokens, the most frequent.
        calibration (`str` or `Path`, *optional*): Data file with sources and targets to measure the loss on.
        shape: Passed to [`~encdec_slm.adaptation.from_decoder_only`].

    Returns:
        `list[str]`: A report, line by line.

    Raises:
        ValueError: The checkpoint cannot be adapted, a file has no rows, or `output_dir` cannot be written.
    """
    rows = None if calibration is None else _read_rows(calibration)
    with write_folder(output_dir, overwrite=overwrite, sources=[source]) as folder:
        tokenizer = load_tokenizer(source)
        if trim_vocabulary is not None:
            names = (f"`trim_vocabulary` ({str(trim_vocabulary)!r})", "`vocabulary_size`")
            trimming_rows = read_data_file(trim_vocabulary, "trim_vocabulary")
            tokenizer = trim_to_rows(tokenizer, trimming_rows, vocabulary_size, names)
        model = from_decoder_only(source, tokenizer=tokenizer, **shape)
        loss = None if rows is None else measure_loss(model, tokenizer, rows)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = model.config
    layers = f"{config.encoder_num_hidden_layers} encoder and {config.decoder_num_hidden_layers} decoder layers"
    lines = [f"Wrote {model.num_parameters():,} parameters in {model.dtype}, {layers}, to {output_dir}."]
    if trim_vocabulary is not None:
        lines.append(describe_embeddings(model, tokenizer))
    if loss is not None:
        lines.append(
            f"Loss before training: {loss:.2f} nats per target token, on {len(rows):,} rows; a uniform guess has "
            f"{math.log(config.vocab_size):.2f}."
        )
    return lines


def _read_rows(path):
    rows = list(read_data_file(path, "calibration"))
    if not rows:
        raise ValueError(f"`calibration` is {str(path)!r}, which has no rows. Give a file with sources and targets.")
    return rows


@torch.no_grad()
def measure_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int = 8,
) -> float:
    """Measure the mean cross-entropy of the targets of rows, in nats per token.

    Args:
        model ([`~transformers.PreTrainedModel`]): An encoder-decoder in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        rows (`Sequence[Mapping]`): As [`~encdec_slm.trainers.row_encoding.RowEncoder`] takes them.
        batch_size (`int`, *optional*, defaults to 8): Rows per batch.

    Raises:
        ValueError: The rows have no targets.
    """
    encoder, total, num_tokens = RowEncoder(tokenizer), 0.0, 0
    for first in range(0, len(rows), batch_size):
        batch = encoder.collate(rows[first : first + batch_size])
        if "labels" not in batch:
            raise ValueError("The rows of `calibration` have no targets. Give rows with sources and targets.")
        count = int((batch["labels"] >= 0).sum())
        total, num_tokens = total + count * model(**batch).loss.item(), num_tokens + count
    return total / num_tokens


__all__ = ["adapt", "measure_loss"]
