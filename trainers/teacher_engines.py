# SPDX-License-Identifier: Apache-2.0
"""Engines that run a decoder-only teacher: they generate completions and predict distributions.

B batch, N target tokens, D width, V vocabulary.
"""

import copy
import functools
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import require_package, summarize_error
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
    """A generated target.

    Args:
        text (`str`): Without the end token.
        is_complete (`bool`): Whether the teacher ended it, rather than the limit of its length.
        target_ids (`list[int]`, *optional*): Its tokens, if the engine returns their distributions at once.
        prediction ([`Prediction`], *optional*): The distributions of these tokens.
    """

    text: str
    is_complete: bool
    target_ids: list[int] | None = None
    prediction: "Prediction | None" = None


class Prediction(NamedTuple):
    """The stored distributions of one target; see [`~encdec_slm.trainers.teacher_cache.Example`].

    A position without ids has no distribution.
    """

    ids: list[np.ndarray]
    log_probs: list[np.ndarray] | None
    counts: list[np.ndarray] | None


class TransformersEngine:
    """Run a teacher in transformers: batched by length, with a key-value cache, on the model's device and dtype.

    What all prompts begin with, such as instructions and examples, is computed once.

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

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the model's weights."""
        return model_fingerprint(self.model)

    @property
    def _eos_token_ids(self):
        ids = self.model.generation_config.eos_token_id
        ids = self.tokenizer.eos_token_id if ids is None else ids
        return set(ids if isinstance(ids, list) else [ids])

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
        prefix, cache = self._run_prefix(prompts)
        for indices in batch_by_length([len(ids) + settings.max_new_tokens for ids in prompts], self.batch_tokens):
            pad_token_id = _first_id(self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            ids, mask = pad_ids([prompts[i][len(prefix) :] for i in indices], pad_token_id, padding_side="left")
            ids = torch.cat((torch.tensor([prefix] * len(ids), dtype=ids.dtype), ids), 1)
            inputs = self._add_prefix(ids, mask, prefix, cache, settings.num_completions)
            with torch.random.fork_rng(enabled=settings.temperature > 0):
                torch.manual_seed(hash((seed, *indices)) % 2**31)
                generated = self.model.generate(**inputs, **options, pad_token_id=pad_token_id)
            for number, row in enumerate(generated[:, ids.shape[1] :].tolist()):
                completion = decode_completion(self.tokenizer, row, self._eos_token_ids, settings.stop)
                completions[indices[number // settings.num_completions]].append(completion)
        return completions

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
        prefix, cache = self._run_prefix(prompts)
        lengths = [len(prompt) + len(target) for prompt, target in zip(prompts, targets, strict=True)]
        for indices in batch_by_length(lengths, self.batch_tokens):
            rows = [[*prompts[index][len(prefix) :], *targets[index]] for index in indices]
            inputs = self._add_prefix(*pad_ids(rows, 0), prefix, cache)
            hidden = self._read_hidden_states(self.model, **inputs, use_cache=cache is not None)  # (B, L, D)
            for row, index in enumerate(indices):
                first = len(prompts[index]) - len(prefix) - 1
                states = hidden[row, first : first + len(targets[index])]  # (N, D)
                predictions[index] = self._keep(states, spec, seeds[index])
        return predictions

    def _run_prefix(self, prompts):
        """Return the ids that all prompts begin with, and their keys and values; none if the cache cannot be copied.

        At least one token of each prompt is left.
        """
        if len(prompts) < 2:
            return [], None
        shortest = min(map(len, prompts))
        num_shared = next((n for n, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), shortest)
        prefix = list(prompts[0][: min(num_shared, shortest - 1)])
        if not prefix:
            return [], None
        self._read_hidden_states(self.model, input_ids=self._tensor([[0]]), use_cache=False)  # which finds the head
        cache = self.model(input_ids=self._tensor([prefix]), use_cache=True).past_key_values
        return (prefix, cache) if type(cache) is DynamicCache else ([], None)

    def _add_prefix(self, ids, mask, prefix, cache, num_completions=1):
        """Return the inputs of a batch that continues the prefix."""
        inputs = {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
        if cache is None:
            return inputs
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(ids) * num_completions)
        mask = torch.cat((torch.ones(len(mask), len(prefix), dtype=mask.dtype), mask), 1)
        return {**inputs, "attention_mask": mask.to(self.model.device), "past_key_values": cache}

    def _tensor(self, ids):
        return torch.tensor(ids, device=self.model.device)

    def _keep(self, states, spec, seed):
        head = self._read_hidden_states.head(self.model)
        log_probs = (head.logits(chunk).log_softmax(-1) for chunk in states.split(POSITIONS_PER_CHUNK))
        return keep_distributions(log_probs, spec, seed)


def decode_completion(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], eos_token_ids: set[int], stop: str | None
) -> Completion:
    """Decode generated ids up to the first end token or stop string."""
    end = next((position for position, token_id in enumerate(ids) if token_id in eos_token_ids), None)
    text = tokenizer.decode(ids[:end], skip_special_tokens=True)
    before, found, _ = (text, "", "") if stop is None else text.partition(stop)
    return Completion(before, end is not None or bool(found))


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


class CTranslate2Engine:
    """Run a teacher in CTranslate2, with int8 weights: faster than transformers on a CPU, and almost as exact.

    Args:
        folder (`str` or `Path`): Folder of a causal language model that `save_pretrained` wrote.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model.
        batch_tokens (`int`, *optional*, defaults to 2048): Most tokens of a batch. Logits of all of them are in memory
            at once, in float32.
        quantization (`str`, *optional*, defaults to `"int8"`): Of the weights, as CTranslate2 names it.

    Raises:
        ImportError: CTranslate2 is not installed.
        ValueError: CTranslate2 cannot convert the model.
    """

    def __init__(self, folder, tokenizer, batch_tokens: int = 2048, quantization: str = "int8"):
        ctranslate2 = require_package("ctranslate2")
        self.tokenizer, self.batch_tokens, self.quantization = tokenizer, batch_tokens, quantization
        config = AutoConfig.from_pretrained(folder).get_text_config()
        self.vocab_size, self.context_length = config.vocab_size, getattr(config, "max_position_embeddings", None)
        require_package("ctranslate2.converters")
        with tempfile.TemporaryDirectory(prefix="encdec_slm-ctranslate2-") as converted:
            try:
                converter = ctranslate2.converters.TransformersConverter(str(folder))
                converter.convert(converted, quantization=quantization, force=True)
            except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
                raise ValueError(
                    f"CTranslate2 cannot convert {str(folder)!r} ({summarize_error(error)}). Use another engine, such "
                    "as `transformers`."
                ) from error
            with Path(converted, "model.bin").open("rb") as file:
                self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
            threads = torch.get_num_threads()
            self.generator = ctranslate2.Generator(converted, device="auto", intra_threads=threads)
        self._cpu = ctranslate2.Device.cpu

    def generate(self, prompts, settings: CompletionSettings, seed: int = 0) -> list[list[Completion]]:
        """Generate completions; see [`TransformersEngine.generate`]."""
        require_package("ctranslate2").set_random_seed(seed % 2**31)
        options = {"max_length": settings.max_new_tokens, "include_prompt_in_result": False}
        options |= {"num_hypotheses": settings.num_completions, "return_end_token": True, "sampling_topk": 1}
        if settings.temperature > 0:
            options |= {"sampling_topk": 0, "sampling_topp": settings.top_p}
            options["sampling_temperature"] = settings.temperature
        completions = [[] for _ in prompts]
        for indices in batch_by_length([len(ids) + settings.max_new_tokens for ids in prompts], self.batch_tokens):
            tokens = [self.tokenizer.convert_ids_to_tokens(prompts[index]) for index in indices]
            end_token = self.tokenizer.eos_token
            results = self.generator.generate_batch(tokens, end_token=end_token, **options)
            for index, result in zip(indices, results, strict=True):
                ends = {self.tokenizer.eos_token_id}
                completions[index] = [
                    decode_completion(self.tokenizer, ids, ends, settings.stop) for ids in result.sequences_ids
                ]
        return completions

    def predict(self, prompts, targets, spec: DistributionSpec, seeds) -> list[Prediction]:
        """Predict distributions; see [`TransformersEngine.predict`]."""
        predictions = [None] * len(prompts)
        rows = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
        for indices in batch_by_length([len(row) for row in rows], self.batch_tokens):
            scores = self.generator.forward_batch([rows[index] for index in indices], return_log_probs=True)
            scores = torch.from_numpy(
                np.array(scores.to_device(require_package("ctranslate2").Device.cpu))
            )  # (B, L, V)
            for row, index in enumerate(indices):
                first = len(prompts[index]) - 1
                states = scores[row, first : first + len(targets[index]), : self.vocab_size]
                chunks = (chunk.float() for chunk in states.split(POSITIONS_PER_CHUNK))
                predictions[index] = keep_distributions(chunks, spec, seeds[index])
        return predictions


class VLLMEngine:
    """Run a teacher in vLLM.

    Args:
        model (`str`): Folder or Hub name of a causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model.
        kwargs: Passed to `vllm.LLM`.

    Raises:
        ImportError: vLLM is not installed.
    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, **kwargs):
        self._vllm, self.tokenizer = require_package("vllm"), tokenizer
        config = AutoConfig.from_pretrained(model).get_text_config()
        self.vocab_size, self.context_length = config.vocab_size, getattr(config, "max_position_embeddings", None)
        self.fingerprint = f"vllm:{model}"
        # By default, vLLM returns the log-probabilities of at most 20 tokens.
        self.llm = self._vllm.LLM(model, max_logprobs=kwargs.pop("max_logprobs", 1024), **kwargs)

    def generate(self, prompts, settings: CompletionSettings, seed: int = 0) -> list[list[Completion]]:
        """Generate completions; see [`TransformersEngine.generate`]."""
        parameters = self._vllm.SamplingParams(
            n=settings.num_completions,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_new_tokens,
            stop=settings.stop,
            seed=seed,
        )
        outputs = self.llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], parameters, use_tqdm=False)
        return [[Completion(one.text, one.finish_reason == "stop") for one in output.outputs] for output in outputs]

    def predict(self, prompts, targets, spec: DistributionSpec, seeds) -> list[Prediction]:
        """Predict the `topk` of each target token; see [`TransformersEngine.predict`].

        Raises:
            ValueError: `sampled` is asked for, which vLLM cannot draw at given targets.
        """
        if spec.kind != "topk":
            raise ValueError(f"vLLM returns the most probable tokens only, got {str(spec)!r}. Use `topk:K`.")
        parameters = self._vllm.SamplingParams(max_tokens=1, prompt_logprobs=spec.size)
        rows = [{"prompt_token_ids": [*prompt, *target]} for prompt, target in zip(prompts, targets, strict=True)]
        outputs = self.llm.generate(rows, parameters, use_tqdm=False)
        predictions = []
        for prompt, target, output in zip(prompts, targets, outputs, strict=True):
            positions = output.prompt_logprobs[len(prompt) : len(prompt) + len(target)]
            # The token of the prompt itself is added to the most probable ones: at most `size` are kept.
            best = [sorted(((e.logprob, i) for i, e in one.items()), reverse=True)[: spec.size] for one in positions]
            ids = [np.array([token_id for _, token_id in one]) for one in best]
            predictions.append(Prediction(ids, [np.array([value for value, _ in one]) for one in best], None))
        return predictions
