# SPDX-License-Identifier: Apache-2.0
"""How far an exported model writes what the model writes, on held-out rows."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .evaluation.metrics import text_scores
from .evaluation.results import mean_with_interval


def agreement(
    model: PreTrainedModel,
    exported: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    references: Sequence[str],
    max_new_tokens: int = 48,
    batch_size: int = 16,
) -> dict[str, float]:
    """Greedy targets of a model beside those of its export, in percent.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32, on the CPU.
        exported: A `CT2EncDecSLM`, or anything else with `generate` of ids and a mask.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of both.
        sources (`Sequence[str]`): Cut to what tokenizer and model allow.
        references (`Sequence[str]`): What was to be written, equally many.
        max_new_tokens (`int`, *optional*, defaults to 48): The most that is written, in tokens.
        batch_size (`int`, *optional*, defaults to 16): Sources at a time.

    Returns:
        `dict`: `token_match` (positions where both targets have the same token, of those of the longer one),
        `exact_match` (rows with equal targets), `rougeL_model` and `rougeL_exported` (against `references`).
    """
    written = [
        pair
        for batch in _batches(tokenizer, sources, _longest_source(tokenizer, model), batch_size)
        for pair in zip(
            *(_targets(each, batch, model.generation_config, max_new_tokens) for each in (model, exported)),
            strict=True,
        )
    ]
    positions = [token == other for pair in written for token, other in zip_longest(*pair)]
    texts = [
        [text.strip() for text in tokenizer.batch_decode(targets, skip_special_tokens=True)]
        for targets in zip(*written, strict=True)
    ]
    return {
        "token_match": round(100 * sum(positions) / len(positions), 2),
        "exact_match": round(100 * sum(first == second for first, second in written) / len(written), 2),
        "rougeL_model": _rouge(texts[0], references),
        "rougeL_exported": _rouge(texts[1], references),
    }


def _rouge(texts, references):
    rows = [text_scores(text, [reference]) for text, reference in zip(texts, references, strict=True)]
    return mean_with_interval(rows)["rougeL"].value


def _longest_source(tokenizer, model):
    return min(tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings)


def _batches(tokenizer, sources, max_length, batch_size) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(sources), batch_size):
        texts = list(sources[start : start + batch_size])
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        yield {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _targets(model, batch, generation_config, max_new_tokens):
    """Ids of each target, from the first token to the end of the text."""
    sequences = model.generate(**batch, max_new_tokens=max_new_tokens, num_beams=1, do_sample=False)[:, 1:]
    eos_token_id = generation_config.eos_token_id
    ends = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    return [_until_end(row, ends) for row in sequences.tolist()]


def _until_end(ids, ends):
    return ids[: next((place for place, token_id in enumerate(ids, start=1) if token_id in ends), len(ids))]


__all__ = ["agreement"]
