# SPDX-License-Identifier: Apache-2.0
"""Denoising objectives for pre-training: a list of token ids becomes a source and a target, and texts a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .packing import DataCollatorWithPacking
from .row_encoding import LABELS_PADDING


NUM_SENTINELS = 100
SENTINEL = "<extra_id_{}>"  # as in T5's tokenizers


class Denoiser(NamedTuple):
    """How tokens are chosen to be predicted.

    Args:
        mode (`str`): `"R"` (regular), `"S"` (sequential) or `"X"` (extreme), as UL2 names them.
        noise_density (`float`): Share of the tokens, between 0 and 1.
        mean_span_length (`float`, *optional*): Of the spans that they form, at least 1. `None` means one span at the
            end: its length is drawn uniformly, with a mean of `noise_density`.
    """

    mode: str
    noise_density: float
    mean_span_length: float | None = None


# T5's span corruption (arXiv 1910.10683, section 3.1.4) and prefix language modeling (section 3.2.3), and the seven
# denoisers that UL2 mixes evenly (arXiv 2205.05131, table 1).
OBJECTIVES = {
    "span": (Denoiser("R", 0.15, 3.0),),
    "prefix": (Denoiser("S", 0.5),),
    "ul2": (
        *(Denoiser("R", 0.15, 3.0), Denoiser("R", 0.15, 8.0), Denoiser("S", 0.25)),
        *(Denoiser("X", 0.5, 3.0), Denoiser("X", 0.5, 8.0), Denoiser("X", 0.15, 64.0), Denoiser("X", 0.5, 64.0)),
    ),
}


def add_sentinel_tokens(tokenizer: PreTrainedTokenizerBase, num_sentinels: int = NUM_SENTINELS) -> list[int]:
    """Add the tokens that stand for removed spans to a tokenizer, as special tokens; those that it has are kept.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Is changed; the embeddings of its model must fit.
        num_sentinels (`int`, *optional*, defaults to 100): Most spans of a row.

    Returns:
        `list[int]`: Ids of `<extra_id_0>`, `<extra_id_1>` and so on.
    """
    tokens = [SENTINEL.format(number) for number in range(num_sentinels)]
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(tokens)


def check_denoiser(denoiser: Denoiser) -> None:
    """Check the numbers of a denoiser.

    Raises:
        ValueError: One is out of its range.
    """
    if not 0.0 < denoiser.noise_density < 1.0:
        raise ValueError(f"`noise_density` must be between 0 and 1, got {denoiser.noise_density}.")
    if denoiser.mean_span_length is not None and not 1.0 <= denoiser.mean_span_length < float("inf"):
        raise ValueError(f"`mean_span_length` must be a number of at least 1, got {denoiser.mean_span_length}.")


def denoise(
    ids: Sequence[int], denoiser: Denoiser, sentinel_ids: Sequence[int], rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """Split tokens into a source and a target, without end-of-text tokens.

    Args:
        ids (`Sequence[int]`): At least 2 tokens.
        denoiser ([`Denoiser`]): What is removed from the source.
        sentinel_ids (`Sequence[int]`): From [`add_sentinel_tokens`].
        rng (`np.random.Generator`): Draws the spans.

    Raises:
        ValueError: There are fewer than 2 tokens, fewer sentinels than spans, or a number is out of its range.
    """
    check_denoiser(denoiser)
    if len(ids) < 2:
        raise ValueError(f"Denoising requires at least 2 tokens, got {len(ids)}. Leave the row out.")
    if denoiser.mean_span_length is None:
        return split_prefix(ids, denoiser.noise_density, rng)
    mask = draw_noise_mask(len(ids), denoiser.noise_density, denoiser.mean_span_length, rng)
    return corrupt_spans(ids, mask, sentinel_ids)


def split_prefix(ids: Sequence[int], noise_density: float, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Split tokens at one position: the target is uniformly 1 to `2 * noise_density` of them, and never all."""
    longest = min(len(ids) - 1, max(1, round(2 * noise_density * len(ids)) - 1))
    start = len(ids) - int(rng.integers(1, longest, endpoint=True))
    return list(ids[:start]), list(ids[start:])


def draw_noise_mask(
    length: int, noise_density: float, mean_span_length: float, rng: np.random.Generator
) -> np.ndarray:
    """Draw which tokens are noise, as T5's `random_spans_noise_mask` (text-to-text-transfer-transformer).

    The number of noise tokens is `length * noise_density`, rounded, and that of spans the number of noise tokens
    divided by `mean_span_length`, rounded. All divisions into so many spans are equally probable. Spans of kept tokens
    and of noise alternate, the first is kept.

    Returns:
        `np.ndarray` of `bool`, of shape `(length,)`.
    """
    num_noise = min(max(round(length * noise_density), 1), length - 1)
    num_spans = min(max(round(num_noise / mean_span_length), 1), num_noise, length - num_noise)
    noise, kept = (_draw_lengths(number, num_spans, rng) for number in (num_noise, length - num_noise))
    spans = np.stack((kept, noise), axis=1).reshape(-1)
    return np.repeat(np.arange(2 * num_spans) % 2 == 1, spans)


def _draw_lengths(total, num_parts, rng):
    """Draw one of all divisions of a total into positive parts."""
    cuts = np.sort(rng.choice(total - 1, num_parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def corrupt_spans(
    ids: Sequence[int], noise_mask: np.ndarray, sentinel_ids: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Replace each span of noise by a sentinel in the source; the target is the sentinels, each before its span.

    Raises:
        ValueError: There are fewer sentinels than spans.
    """
    starts = noise_mask & ~np.concatenate(([False], noise_mask[:-1]))
    if (num_spans := int(starts.sum())) > len(sentinel_ids):
        raise ValueError(
            f"A row has {num_spans} spans, but there are {len(sentinel_ids)} sentinel tokens. Lower `max_length`, or "
            "add more of them."
        )
    source, target, number = [], [], 0
    for token_id, is_noise, is_start in zip(ids, noise_mask, starts, strict=True):
        if is_start:
            source.append(sentinel_ids[number])
            target.append(sentinel_ids[number])
            number += 1
        (target if is_noise else source).append(token_id)
    return source, target


@dataclass
class DataCollatorForDenoising:
    """Tokenize pieces of text, cut them, denoise each part by a denoiser that is drawn for it, and pack them all.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model, with sentinels.
        denoisers (`Sequence[Denoiser]`): Drawn evenly, such as `OBJECTIVES["ul2"]`.
        max_length (`int`): Most tokens of a part, at least 2.
        decoder_start_token_id (`int`, *optional*): Of the model, to add `decoder_input_ids`.

    Raises:
        ValueError: A number of a denoiser is out of its range, or `max_length` is too small.
    """

    tokenizer: PreTrainedTokenizerBase
    denoisers: Sequence[Denoiser]
    max_length: int
    decoder_start_token_id: int | None = None

    def __post_init__(self):
        for denoiser in self.denoisers:
            check_denoiser(denoiser)
        if self.max_length < 2:
            raise ValueError(f"`max_length` must be at least 2, got {self.max_length}.")
        self._sentinel_ids = add_sentinel_tokens(self.tokenizer)
        self._pack = DataCollatorWithPacking(self.tokenizer, self.decoder_start_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of rows of `text` and `seed`, which decides the noise.

        Returns:
            `dict`: As of [`~encdec_slm.trainers.packing.DataCollatorWithPacking`].
        """
        return self._pack([part for row in rows for part in self.denoise_text(row["text"], row["seed"])])

    def denoise_text(self, text: str, seed: int | Sequence[int]) -> list[dict[str, list[int]]]:
        """Return `input_ids` and `labels` of each part; those of a text that is too short are empty."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        rng, eos_token_id, parts = np.random.default_rng(seed), self.tokenizer.eos_token_id, []
        for start in range(0, len(ids), self.max_length):
            if len(part := ids[start : start + self.max_length]) >= 2:
                denoiser = self.denoisers[rng.integers(len(self.denoisers))]
                source, target = denoise(part, denoiser, self._sentinel_ids, rng)
                parts.append({"input_ids": [*source, eos_token_id], "labels": [*target, eos_token_id]})
        return parts or [{"input_ids": [eos_token_id], "labels": [LABELS_PADDING]}]


__all__ = [
    "OBJECTIVES",
    "DataCollatorForDenoising",
    "Denoiser",
    "add_sentinel_tokens",
    "corrupt_spans",
    "denoise",
    "draw_noise_mask",
]
