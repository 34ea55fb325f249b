# SPDX-License-Identifier: Apache-2.0
"""Time to the first token and decode rate of `generate`."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from transformers import PreTrainedModel


class _Streamer:
    """A streamer that records when tokens arrive; the prompt arrives first."""

    def __init__(self, clock):
        self.clock, self.moments = clock, []

    def put(self, token_ids):
        self.moments.append(self.clock())

    def end(self):
        pass


def token_seconds(
    model: PreTrainedModel,
    source_ids: torch.LongTensor,
    num_new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    **inputs: torch.Tensor,
) -> list[float]:
    """Return the seconds from the call until each new token is known, with greedy search and a cache.

    Args:
        model ([`~transformers.PreTrainedModel`]): In evaluation mode, encoder-decoder or decoder-only.
        source_ids (`torch.LongTensor` of shape `(1, source_length)`): Source or prompt.
        num_new_tokens (`int`): Tokens to generate; end-of-sequence tokens are not allowed before.
        clock (`Callable`, *optional*, defaults to `time.perf_counter`): Returns the seconds.
        inputs (`torch.Tensor`): Further inputs, such as `pixel_values`.
    """
    streamer, start = _Streamer(clock), clock()
    model.generate(
        source_ids,
        attention_mask=torch.ones_like(source_ids),
        max_new_tokens=num_new_tokens,
        min_new_tokens=num_new_tokens,
        do_sample=False,
        streamer=streamer,
        **inputs,
    )
    return [moment - start for moment in streamer.moments[1:]]


def decode_rate(seconds: Sequence[float]) -> float:
    """Return the tokens per second after the first token."""
    return (len(seconds) - 1) / (seconds[-1] - seconds[0])


def compare_speed(
    models: Sequence[tuple[PreTrainedModel, Sequence[Sequence[int]]]], num_new_tokens: int
) -> list[dict[str, float]]:
    """Time models that take turns at each source, so that a busy moment of the machine affects all of them.

    Args:
        models (`Sequence[tuple]`): A model, and its token ids of each source; as many sources for all models.
        num_new_tokens (`int`): Tokens to generate per source.

    Returns:
        `list[dict]`: `first_token_seconds` and `tokens_per_second` of each model, medians over the sources.
    """
    runs = [[] for _ in models]
    for position in range(-1, len(models[0][1])):  # the first source once more, to warm up
        for (model, sources), run in zip(models, runs, strict=True):
            source_ids = torch.tensor([sources[max(position, 0)]], device=model.device)
            seconds = token_seconds(model, source_ids, num_new_tokens)
            if position >= 0:
                run.append(seconds)
    return [
        {
            "first_token_seconds": median(seconds[0] for seconds in run),
            "tokens_per_second": median(map(decode_rate, run)),
        }
        for run in runs
    ]


__all__ = ["compare_speed", "decode_rate", "token_seconds"]
