# SPDX-License-Identifier: Apache-2.0
"""Engines that run a decoder-only teacher: they generate completions and predict distributions.

B batch, N target tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .output_heads import HeadReader
from .row_encoding import pad_ids
from .teacher_cache import DistributionSpec, model_fingerprint


# Logits of this many positions are computed at a time.
POSITIONS_PER_CHUNK = 256


@dataclass(frozen=True)
class CompletionSettings:
    """How a teacher generates targets.

    Args:
        max_new_tokens (`int`, *optional*, defaults to 64): Longest completion, in tokens of the teacher.
        num_completions (`int`, *optional*, defaults to 1): Completions per prompt.
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy search; above 0 samples.
        top_p (`float`, *optional*, defaults to 1.0): Sample from the most probable tokens of this total mass.
        stop (`str`, *optional*): Completions end before this text, such as `"\\n"`.

    Raises:
        ValueError: A number is out of its range, or several greedy completions are asked for.
    """

    max_new_tokens: int = 64
    num_completions: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    stop: str | None = None

    def __post_init__(self):
        for name, is_right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("num_completions", self.num_completions >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop", self.stop != "", "a text that is not empty"),
        ):
            if not is_right:
                raise ValueError(f"`{name}` must be {wanted}, got {getattr(self, name)!r}.")
        if self.num_completions > 1 and self.temperature == 0:
            raise ValueError(
                f"`num_completions` is {self.num_completions}, but greedy completions are all equal. Set "
                "`temperature` above 0."
            )


class Completion(NamedTuple):
    """A generated text, and whether the teacher ended it (rather than the limit of its length)."""

    text: str
    is_complete: bool


class Prediction(NamedTuple):
    """The stored distributions of one target; see [`~encdec_slm.trainers.teacher_cache.Example`]."""

    ids: list[np.ndarray]
    log_probs: list[np.ndarray] | None
    counts: list[np.ndarray] | None


class TransformersEngine:
    """Run a teacher in transformers: batched by length, with a key-value cache, on the model's device and dtype.

    Args:
        model ([`~transformers.PreTrainedModel`]): A causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model.
        batch_tokens (`int`, *optional*, defaults to 4096): Most tokens of a batch, padding included.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int = 4096):
        self.model, self.tokenizer, self.batch_tokens = model.eval(), tokenizer, batch_tokens
        self.vocab_size = model.config.get_text_config().vocab_size
        self.context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._read_hidden_states = HeadReader("teacher")

    @property
    def fingerprint(self) -> str:
        """Digest of the model's weights."""
        return model_fingerprint(self.model)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], settings: CompletionSettings, seed: int = 0
    ) -> list[list[Completion]]:
        """Generate `settings.num_completions` completions of each prompt.

        Args:
            prompts (`Sequence[Sequence[int]]`): Token ids.
            settings ([`CompletionSettings`]): How to generate.
            seed (`int`, *optional*, defaults to 0): Of sampling.
        """
        completions = [[] for _ in prompts]
        options = {"max_new_tokens": settings.max_new_tokens, "num_return_sequences": settings.num_completions}
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            options |= {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        if settings.stop is not None:
            options |= {"stop_strings": [settings.stop], "tokenizer": self.tokenizer}
        for indices in batch_by_length([len(ids) + settings.max_new_tokens for ids in prompts], self.batch_tokens):
            pad_token_id = _first_id(self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            ids, mask = pad_ids([prompts[index] for index in indices], pad_token_id, padding_side="left")
            inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
            with torch.random.fork_rng(enabled=settings.temperature > 0):
                torch.manual_seed(hash((seed, *indices)) % 2**31)
                generated = self.model.generate(**inputs, **options, pad_token_id=pad_token_id)
            rows = generated[:, ids.shape[1] :].tolist()
            for number, row in enumerate(rows):
                completions[indices[number // settings.num_completions]].append(self._completion(row, settings.stop))
        return completions

    def _completion(self, ids, stop):
        ends = set(np.atleast_1d(self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id).tolist())
        end = next((position for position, token_id in enumerate(ids) if token_id in ends), None)
        text = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
        before, found, _ = text.partition(stop) if stop is not None else (text, "", "")
        return Completion(before, end is not None or bool(found))

    @torch.inference_mode()
    def predict(
        self,
        prompts: Sequence[Sequence[int]],
        targets: Sequence[Sequence[int]],
        spec: DistributionSpec,
        seeds: Sequence[int],
    ) -> list[Prediction]:
        """Predict the distribution of each target token, given the prompt and the target before it.

        Args:
            prompts (`Sequence[Sequence[int]]`): Token ids; at least one for each.
            targets (`Sequence[Sequence[int]]`): Token ids.
            spec ([`DistributionSpec`]): What to keep of the distributions.
            seeds (`Sequence[int]`): Of the draws, for each target; not used for `topk`.
        """
        predictions = [None] * len(prompts)
        lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
        for indices in batch_by_length(lengths, self.batch_tokens):
            rows = [[*prompts[index], *targets[index]] for index in indices]
            ids, mask = pad_ids(rows, 0)
            inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
            hidden = self._read_hidden_states(self.model, **inputs, use_cache=False)  # (B, L, D)
            for row, index in enumerate(indices):
                first = len(prompts[index]) - 1
                states = hidden[row, first : first + len(targets[index])]  # (N, D)
                predictions[index] = self._keep(states, spec, seeds[index])
        return predictions

    def _keep(self, states, spec, seed):
        head = self._read_hidden_states.head(self.model)
        log_probs = (head.logits(chunk).log_softmax(-1) for chunk in states.split(POSITIONS_PER_CHUNK))
        return keep_distributions(log_probs, spec, seed)


def keep_distributions(chunks: Iterator[torch.Tensor], spec: DistributionSpec, seed: int) -> Prediction:
    """Keep what a cache stores of log-probabilities over the whole vocabulary.

    Args:
        chunks (iterator of `torch.Tensor` of shape `(num_positions, vocab_size)`): In nats.
        spec ([`DistributionSpec`]): What to keep.
        seed (`int`): Of the draws.
    """
    ids, log_probs, counts = [], [], []
    generator = torch.Generator().manual_seed(seed)
    for chunk in chunks:
        if spec.kind == "topk":
            values, kept = chunk.topk(min(spec.size, chunk.shape[-1]), dim=-1)
            ids += list(kept.cpu().numpy())
            log_probs += list(values.float().cpu().numpy())
        else:
            drawn = torch.multinomial(chunk.float().exp().cpu(), spec.size, replacement=True, generator=generator)
            for row in drawn.numpy():
                kept, count = np.unique(row, return_counts=True)
                ids.append(kept)
                counts.append(count)
    return Prediction(ids, log_probs or None, counts or None)


def batch_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Yield batches of indices of similar lengths, each of at most `batch_tokens` tokens with its padding.

    A row that is longer than that is a batch of its own.
    """
    batch = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _first_id(*ids):
    return next(token_id for token_id in ids if token_id is not None)


ENGINES: dict[str, Callable] = {"transformers": TransformersEngine}
