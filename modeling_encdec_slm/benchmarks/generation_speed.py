# SPDX-License-Identifier: Apache-2.0
"""How soon a model's first token comes, and how fast the others follow."""

import time
from collections.abc import Sequence
from statistics import median

import torch
from transformers import PreTrainedModel


class TokenClock:
    """A streamer for `generate` that keeps when each token arrives; the prompt is the first thing to arrive."""

    def __init__(self):
        self.moments = []

    def put(self, token_ids):
        self.moments.append(time.perf_counter())

    def end(self):
        pass


def token_seconds(
    model: PreTrainedModel, source_ids: torch.LongTensor, num_new_tokens: int, **inputs: torch.Tensor
) -> list[float]:
    """Seconds from the call until each of the new tokens is known, by greedy search with a cache.

    Args:
        model ([`~transformers.PreTrainedModel`]): In eval mode, encoder-decoder or decoder-only.
        source_ids (`torch.LongTensor` of shape `(1, source_length)`): What it reads.
        num_new_tokens (`int`): It writes as many, whether or not its text ends before.
        inputs (`torch.Tensor`): What else it reads, such as `pixel_values`.
    """
    clock, start = TokenClock(), time.perf_counter()
    model.generate(
        source_ids,
        attention_mask=torch.ones_like(source_ids),
        max_new_tokens=num_new_tokens,
        min_new_tokens=num_new_tokens,
        do_sample=False,
        streamer=clock,
        **inputs,
    )
    return [moment - start for moment in clock.moments[1:]]


def decode_rate(seconds: Sequence[float]) -> float:
    """Tokens per second after the first."""
    return (len(seconds) - 1) / (seconds[-1] - seconds[0])


def compare_speed(
    contenders: Sequence[tuple[PreTrainedModel, Sequence[Sequence[int]]]], num_new_tokens: int
) -> list[dict[str, float]]:
    """Medians over sources of batch 1, the models in turn at each source: a busy moment of the machine hits all.

    Args:
        contenders (`Sequence[tuple]`): A model, and the ids that it reads for each source, equally many for all.
        num_new_tokens (`int`): Written per source.

    Returns:
        `list[dict]`: `first_token_seconds` and `tokens_per_second` of each contender.
    """
    runs = [[] for _ in contenders]
    for position in range(-1, len(contenders[0][1])):  # the first source once more, to warm up
        for (model, sources), seconds in zip(contenders, runs, strict=True):
            source_ids = torch.tensor([sources[max(position, 0)]], device=model.device)
            timed = token_seconds(model, source_ids, num_new_tokens)
            if position >= 0:
                seconds.append(timed)
    return [
        {
            "first_token_seconds": median(run[0] for run in seconds),
            "tokens_per_second": median(map(decode_rate, seconds)),
        }
        for seconds in runs
    ]
