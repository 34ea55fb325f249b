# SPDX-License-Identifier: Apache-2.0
"""Compare the generations of an export with those of its model."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..generation_encdec_slm import generated_lengths
from .evaluation.metrics import text_scores
from .evaluation.results import mean_with_interval
from .tasks.docstrings import build_docstring_task


def describe_agreement(
    model: PreTrainedModel,
    exported: Any,
    tokenizer: PreTrainedTokenizerBase,
    num_rows: int = 100,
    max_source_length: int | None = None,
) -> str:
    """Compare a model and its export on held-out rows of the docstring task.

    Args:
        model ([`~transformers.PreTrainedModel`]): As in [`measure_agreement`], like the next two.
        exported: The export.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of both.
        num_rows (`int`, *optional*, defaults to 100): Number of rows at most.
        max_source_length (`int`, *optional*): Longer sources are left out, in tokens. `None` truncates them.
    """
    # Not the test split: its rows calibrate ONNX graphs.
    rows = build_docstring_task()["validation"].shuffle(seed=0)
    if max_source_length is not None:
        rows = rows.filter(lambda row: len(tokenizer(row["source"])["input_ids"]) <= max_source_length)
    rows = rows.select(range(min(num_rows, len(rows))))
    scores = measure_agreement(model, exported, tokenizer, rows["source"], rows["target"])
    lines = [
        f"On {len(rows)} held-out rows of the docstring task, compared with the model in {model.dtype}:",
        f"  equal tokens      {scores['token_match']:6.2f} %",
        f"  equal targets     {scores['exact_match']:6.2f} %",
        f"  ROUGE-L           {scores['rougeL_exported']:6.2f} (export), {scores['rougeL_model']:.2f} (model)",
    ]
    return "\n".join(lines)


def load_calibration_rows(num_rows: int = 32) -> list[str]:
    """Load sources of the docstring task to calibrate static quantization, spread over its test split."""
    sources = build_docstring_task()["test"]["source"]
    return sources[:: max(1, len(sources) // num_rows)][:num_rows]


def measure_agreement(
    model: PreTrainedModel,
    exported: Any,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    references: Sequence[str],
    max_new_tokens: int = 48,
    batch_size: int = 16,
) -> dict[str, float]:
    """Measure how many greedily generated tokens of a model and its export are equal, in percent.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model in float32, on the CPU.
        exported: An export with `generate`, such as [`~encdec_slm.export.CT2EncDecSLM`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of both.
        sources (`Sequence[str]`): Truncated to what tokenizer and model allow.
        references (`Sequence[str]`): Reference targets, one per source.
        max_new_tokens (`int`, *optional*, defaults to 48): Longest target, in tokens.
        batch_size (`int`, *optional*, defaults to 16): Sources per batch.

    Returns:
        `dict`: `token_match` (equal tokens per position of the longer target), `exact_match` (equal targets),
        `rougeL_model` and `rougeL_exported` (against `references`).
    """
    max_length = min(tokenizer.model_max_length, model.config.get_text_config().max_position_embeddings)
    pairs = []
    for batch in _encode_batches(tokenizer, sources, max_length, batch_size):
        targets = (_generate(each, batch, model.generation_config, max_new_tokens) for each in (model, exported))
        pairs.extend(zip(*targets, strict=True))
    positions = [token_id == other_id for pair in pairs for token_id, other_id in zip_longest(*pair)]
    texts = [
        [text.strip() for text in tokenizer.batch_decode(targets, skip_special_tokens=True)]
        for targets in zip(*pairs, strict=True)
    ]
    return {
        "token_match": round(100 * sum(positions) / len(positions), 2),
        "exact_match": round(100 * sum(first == second for first, second in pairs) / len(pairs), 2),
        "rougeL_model": _mean_rouge(texts[0], references),
        "rougeL_exported": _mean_rouge(texts[1], references),
    }


def _mean_rouge(texts, references):
    rows = [text_scores(text, [reference]) for text, reference in zip(texts, references, strict=True)]
    return mean_with_interval(rows)["rougeL"].value


def _encode_batches(tokenizer, sources, max_length, batch_size) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(sources), batch_size):
        texts = list(sources[start : start + batch_size])
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        yield {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _generate(model, batch, config, max_new_tokens):
    """Return the ids of each target, up to its end token."""
    sequences = model.generate(**batch, max_new_tokens=max_new_tokens, num_beams=1, do_sample=False)
    lengths = generated_lengths(sequences, config.eos_token_id, config.pad_token_id)
    return [row[1:length] for row, length in zip(sequences.tolist(), lengths.tolist(), strict=True)]


__all__ = ["describe_agreement", "load_calibration_rows", "measure_agreement"]
