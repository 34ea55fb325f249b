# SPDX-License-Identifier: Apache-2.0
"""A teacher behind an OpenAI-compatible endpoint."""

import functools
import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ..errors import require_package, summarize_error
from .teacher_cache import DistributionSpec
from .teacher_engines import Completion, CompletionSettings, Prediction


class OpenAIEngine:
    """Run a teacher behind an OpenAI-compatible endpoint: completions, and their log-probabilities if it returns them.

    The key is read from the environment variable `OPENAI_API_KEY` and never written anywhere. Requests that are
    refused for their rate, time out or fail are repeated with growing pauses by the `openai` package.

    Args:
        model (`str`): Name of the model at the endpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Of the model; needed for log-probabilities.
        base_url (`str`, *optional*): Such as `"http://localhost:8000/v1"`. `None` takes `OPENAI_BASE_URL`, or OpenAI.
        parallel_requests (`int`, *optional*, defaults to 8): Requests at a time.
        requests_per_minute (`float`, *optional*): Most requests that are started in a minute.
        max_retries (`int`, *optional*, defaults to 8): Repetitions of a failed request.
        timeout (`float`, *optional*, defaults to 60): In seconds, for one request.

    Raises:
        ImportError: The package `openai` is not installed.
        ValueError: `requests_per_minute` is not above 0.
    """

    reads_text = True
    # OpenAI returns the log-probabilities of at most 20 tokens.
    max_top_logprobs = 20

    def __init__(
        self,
        model,
        tokenizer=None,
        base_url=None,
        parallel_requests=8,
        requests_per_minute=None,
        max_retries=8,
        timeout=60,
    ):
        if requests_per_minute is not None and not requests_per_minute > 0:
            raise ValueError(f"`requests_per_minute` must be above 0, got {requests_per_minute}.")
        self._openai = require_package("openai")
        key = os.environ.get("OPENAI_API_KEY", "not needed by local servers")
        self.client = self._openai.OpenAI(api_key=key, base_url=base_url, max_retries=max_retries, timeout=timeout)
        self.model, self.tokenizer, self.parallel_requests = model, tokenizer, parallel_requests
        self.fingerprint = f"openai:{self.client.base_url}:{model}"
        self.vocab_size, self.context_length = 0 if tokenizer is None else len(tokenizer), None
        self._pace = _Pace(requests_per_minute)

    @functools.cached_property
    def _token_ids(self):
        """Ids by the bytes that their tokens decode to."""
        ids = range(len(self.tokenizer))
        return {self.tokenizer.decode([token_id]): token_id for token_id in reversed(ids)}

    def generate(
        self,
        prompts: Sequence[Any],
        settings: CompletionSettings,
        seed: int = 0,
        distributions: DistributionSpec | None = None,
    ) -> list[list[Completion]]:
        """Generate completions, and their distributions.

        Args:
            prompts (`Sequence[str]` or lists of messages): Text goes to `/completions`, messages to
                `/chat/completions`.
            settings ([`CompletionSettings`]): How to generate.
            seed (`int`, *optional*, defaults to 0): Sent to the endpoint.
            distributions ([`DistributionSpec`], *optional*): `topk` of up to 20 tokens.

        Raises:
            ValueError: The endpoint refuses, cannot be reached, or answers in another form.
        """
        if distributions is not None:
            self._check_distributions(distributions)
        with ThreadPoolExecutor(self.parallel_requests) as pool:
            requests = [pool.submit(self._complete, prompt, settings, seed, distributions) for prompt in prompts]
            try:
                return [request.result() for request in requests]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _check_distributions(self, spec):
        if spec.kind != "topk" or spec.size > self.max_top_logprobs or self.tokenizer is None:
            raise ValueError(
                f"An endpoint returns `topk` of at most {self.max_top_logprobs} tokens, and its tokenizer is needed "
                f"to read them, got {str(spec)!r} and {'no' if self.tokenizer is None else 'a'} tokenizer."
            )

    def _complete(self, prompt, settings, seed, distributions):
        self._pace.wait()
        options = {"model": self.model, "max_tokens": settings.max_new_tokens, "n": settings.num_completions}
        options |= {"temperature": settings.temperature, "top_p": settings.top_p, "stop": settings.stop, "seed": seed}
        try:
            if isinstance(prompt, str):
                if distributions is not None:
                    options["logprobs"] = distributions.size
                answer = self.client.completions.create(prompt=prompt, **options)
                return [
                    self._completion(choice.text, choice, _text_logprobs(choice), distributions)
                    for choice in answer.choices
                ]
            if distributions is not None:
                options |= {"logprobs": True, "top_logprobs": distributions.size}
            answer = self.client.chat.completions.create(messages=prompt, **options)
            return [
                self._completion(choice.message.content, choice, _chat_logprobs(choice), distributions)
                for choice in answer.choices
            ]
        except self._openai.OpenAIError as error:
            raise ValueError(
                f"The endpoint {self.client.base_url} did not answer for the model {self.model!r} "
                f"({summarize_error(error)}). Labels so far are kept: run the command again to resume."
            ) from error
        except (AttributeError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"The endpoint {self.client.base_url} answered in another form than OpenAI's API "
                f"({summarize_error(error)}). Check its address; it usually ends in /v1."
            ) from error

    def _completion(self, text, choice, logprobs, distributions):
        if not isinstance(text, str):
            raise TypeError(f"the text of a completion is {text!r}")
        is_complete = choice.finish_reason == "stop"
        if distributions is None:
            return Completion(text, is_complete)
        if logprobs is None:
            raise ValueError(
                f"The endpoint {self.client.base_url} returns no log-probabilities for {self.model!r}. Label "
                "completions only."
            )
        target_ids, ids, values = [], [], []
        for token, candidates in logprobs:
            if token not in self._token_ids:
                raise ValueError(
                    f"The endpoint generates the token {token!r}, which the tokenizer does not have. Give the "
                    f"tokenizer of {self.model!r}."
                )
            known = [(self._token_ids[name], value) for name, value in candidates if name in self._token_ids]
            known = sorted(known, key=lambda pair: -pair[1])[: distributions.size]
            target_ids.append(self._token_ids[token])
            ids.append(np.array([token_id for token_id, _ in known], np.uint32))
            values.append(np.array([min(value, 0.0) for _, value in known]))
        if is_complete:  # the endpoint does not return the distribution that ends the text
            target_ids.append(self.tokenizer.eos_token_id)
            ids.append(np.array([], np.uint32))
            values.append(np.array([]))
        return Completion(text, is_complete, target_ids, Prediction(ids, values, None))


def _text_logprobs(choice):
    """Tokens of a text completion with their candidates, or `None`."""
    logprobs = getattr(choice, "logprobs", None)
    if logprobs is None or logprobs.top_logprobs is None:
        return None
    return [(token, list(best.items())) for token, best in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)]


def _chat_logprobs(choice):
    """Tokens of a chat completion with their candidates, or `None`."""
    logprobs = getattr(choice, "logprobs", None)
    if logprobs is None or logprobs.content is None:
        return None
    return [(one.token, [(best.token, best.logprob) for best in one.top_logprobs]) for one in logprobs.content]


class _Pace:
    """Spreads the start of requests evenly over time."""

    def __init__(self, requests_per_minute):
        self.interval = 60 / requests_per_minute if requests_per_minute else 0.0
        self.lock, self.next_start = threading.Lock(), 0.0

    def wait(self):
        with self.lock:
            start = max(time.monotonic(), self.next_start)
            self.next_start = start + self.interval
        time.sleep(max(0.0, start - time.monotonic()))
