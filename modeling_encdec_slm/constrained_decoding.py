# SPDX-License-Identifier: Apache-2.0
"""Generate text of a given form: a JSON schema, a regular expression or a grammar.

The package `llguidance` compiles the form and says which tokens may follow.
"""

import functools
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from .errors import require_package


# Lark grammar of shell commands in one line whose quotes and brackets are closed.
SHELL_GRAMMAR = r"""
start: part+
part: TEXT | ESCAPE | SINGLE | DOUBLE | BACKTICKS | "(" part* ")" | "{" part* "}" | "[" part* "]"
TEXT: /[^'"`\\(){}\[\]\n]+/
ESCAPE: /\\[^\n]/
SINGLE: /'[^'\n]*'/
DOUBLE: /"(\\.|[^"\\\n])*"/
BACKTICKS: /`[^`\n]*`/
"""


class GrammarLogitsProcessor(LogitsProcessor):
    """Allow only tokens that continue a text of the given form; for the `logits_processor` argument of `generate`.

    Works with greedy search, sampling, beams and batches of encoder-decoders. A text that reaches `max_new_tokens` is
    cut off within the form. Beams that cannot be continued have a score of -inf.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Fast tokenizer of the model.
        json_schema (`str` or `dict`, *optional*): JSON schema of the text, which has no optional spaces.
        regex (`str`, *optional*): Regular expression that the whole text matches, in the syntax of Rust.
        grammar (`str`, *optional*): Lark grammar of the text, such as [`SHELL_GRAMMAR`].
        num_start_tokens (`int`, *optional*, defaults to 1): Tokens at the start of the decoder that do not belong to
            the text: 1 for `decoder_start_token_id`.

    Raises:
        ImportError: `llguidance` is not installed.
        ValueError: Not exactly one form is given, or it cannot be compiled, or the tokenizer is slow.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        json_schema: str | dict[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        num_start_tokens: int = 1,
    ):
        forms = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        given = [name for name, form in forms.items() if form is not None]
        if len(given) != 1:
            raise ValueError(f"Give one of `json_schema`, `regex` and `grammar`, got {', '.join(given) or 'none'}.")
        if not tokenizer.is_fast:
            raise ValueError(f"The tokenizer is a slow {type(tokenizer).__name__}, but a fast one is required.")
        self._matcher_class = require_package("llguidance").LLMatcher
        self._tokenizer, self._num_start_tokens = tokenizer, num_start_tokens
        self._grammar = _compile(self._matcher_class, given[0], forms[given[0]])
        self._ll_tokenizer, self._matchers = None, {}

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Set the scores of tokens that the form does not allow to -inf.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, length)`): Decoder ids so far.
            scores (`torch.FloatTensor` of shape `(batch_size, vocab_size)`): Of the next token.
        """
        if self._ll_tokenizer is None:
            from_tokenizer = require_package("llguidance.hf").from_tokenizer
            self._ll_tokenizer = from_tokenizer(self._tokenizer, n_vocab=scores.shape[-1])
        rows = [tuple(ids) for ids in input_ids[:, self._num_start_tokens :].tolist()]
        # Beams change places, so that the state of a row is found by its ids.
        self._matchers = {ids: self._find_matcher(ids) for ids in dict.fromkeys(rows)}
        allowed = torch.stack([self._find_allowed_tokens(self._matchers[ids], scores.shape[-1]) for ids in rows])
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _find_matcher(self, ids):
        """Return the state after the tokens `ids`; one step after a state of the last call, if there is one."""
        if ids and ids[:-1] in self._matchers:
            matcher, new_ids = self._matchers[ids[:-1]].deep_copy(), ids[-1:]
        else:
            matcher, new_ids = self._matcher_class(self._ll_tokenizer, self._grammar, log_level=0), ids
        for token_id in new_ids:
            if matcher.is_stopped():  # padding after the end, or a beam that cannot be continued
                break
            matcher.consume_token(token_id)
        return matcher

    def _find_allowed_tokens(self, matcher, vocab_size):
        if matcher.is_stopped() or matcher.is_error():
            allowed = torch.zeros(vocab_size, dtype=torch.bool)
            allowed[self._tokenizer.eos_token_id] = True
            return allowed
        return torch.frombuffer(bytearray(matcher.compute_logit_bias()), dtype=torch.uint8)[:vocab_size] > 0


def _compile(matcher_class, name, form):
    # A model that is not sure may repeat optional spaces until the limit of its length.
    compact = {"whitespace_flexible": False}
    build = {
        "json_schema": functools.partial(matcher_class.grammar_from_json_schema, overrides=compact),
        "regex": matcher_class.grammar_from_regex,
        "grammar": matcher_class.grammar_from_lark,
    }[name]
    try:
        grammar = build(form)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{name}` cannot be compiled: {error}") from error
    if message := matcher_class.validate_grammar(grammar):
        raise ValueError(f"`{name}` cannot be compiled: {message.strip()}")
    return grammar
