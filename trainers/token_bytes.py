# SPDX-License-Identifier: Apache-2.0
"""The bytes that the tokens of a tokenizer stand for."""

import contextlib
import json
from collections import defaultdict

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..errors import summarize_error
from ..vocabulary import BYTE_TOKENS


CHARACTERS = bytes_to_unicode()
BYTES = {character: byte for byte, character in CHARACTERS.items()}
SPACE = "▁"


class TokenBytes:
    """The bytes of each token of a tokenizer whose tokens make up the text.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): Byte-level BPE (Qwen, Llama 3, SmolLM, GPT-2), or BPE or
            Unigram that write spaces as `▁` (Llama 2, Mistral, Gemma, T5).
        role (`str`): Name of the model in error messages.

    Attributes:
        texts (`dict[int, bytes]`): Bytes of each token that is text; may be part of a character.
        special_tokens (`dict[int, str]`): All other tokens.
        adds_space (`bool`): Whether the tokenizer puts a space before each text.

    Raises:
        ValueError: The tokenizer is slow or of another kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, role: str):
        self.tokenizer = tokenizer
        spec = _read_spec(tokenizer, role)
        self._model = tokenizer.backend_tokenizer.model
        self._is_byte_level = "ByteLevel" in spec["text"]
        self._has_byte_tokens = bool(spec["model"].get("byte_fallback"))
        self.texts, self.special_tokens = {}, {}
        self._ids, self._splits = defaultdict(list), {}
        added_tokens = tokenizer.added_tokens_decoder
        special_ids = {token_id for token_id, token in added_tokens.items() if token.special}
        special_ids.update(tokenizer.all_special_ids)
        for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
            if token_id in special_ids:
                self.special_tokens[token_id] = token
            else:
                self.texts[token_id] = token.encode() if token_id in added_tokens else self._to_bytes(token)
                self._ids[self.texts[token_id]].append(token_id)
        for ids in self._ids.values():  # a character comes before its byte, which is used if there is no character
            ids.sort(key=self._is_byte_token)
        self.adds_space = self.join(self.encode("a")).startswith(b" ")

    def _is_byte_token(self, token_id):
        return self._has_byte_tokens and self.tokenizer.convert_ids_to_tokens(token_id) in BYTE_TOKENS

    def _to_bytes(self, token):
        if self._is_byte_level and BYTES.keys() >= set(token):
            return bytes(BYTES[character] for character in token)
        if self._has_byte_tokens and token in BYTE_TOKENS:
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    @property
    def num_ids(self) -> int:
        """Number of token ids."""
        return max([*self.texts, *self.special_tokens]) + 1

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text without special tokens around it."""
        return self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of tokens as it is, without special tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def join(self, token_ids: list[int]) -> bytes:
        """Return the bytes of tokens; special tokens have none."""
        return b"".join(self.texts.get(token_id, b"") for token_id in token_ids)

    def find(self, text: bytes) -> list[int]:
        """Return the tokens with these bytes; the one that the tokenizer uses comes first."""
        return self._ids.get(text, [])

    def split(self, text: bytes) -> list[int]:
        """Split bytes, such as those of a token of another tokenizer, into tokens; the rest may be missing."""
        if text not in self._splits:
            self._splits[text] = self._split(text)
        return self._splits[text]

    def _split(self, text):
        token_ids = []
        with contextlib.suppress(Exception):  # not UTF-8, or not in the vocabulary, which is a bare Exception
            token_ids = [token.id for token in self._model.tokenize(self._to_string(text))]
        return token_ids if self.join(token_ids) == text else self._split_greedily(text)

    def _to_string(self, text):
        if self._is_byte_level:
            return "".join(CHARACTERS[byte] for byte in text)
        return text.decode().replace(" ", SPACE)

    def _split_greedily(self, text):
        """Take the longest token that the rest begins with, again and again."""
        token_ids = []
        while text:
            end = next((end for end in range(len(text), 0, -1) if text[:end] in self._ids), None)
            if end is None:
                break
            token_ids.append(self.find(text[:end])[0])
            text = text[end:]
        return token_ids


def _read_spec(tokenizer, role):
    """Return the JSON of a fast tokenizer whose tokens make up the text; `text` is what changes and splits it."""
    name = type(tokenizer).__name__
    prefix = f"`token_alignment='byte_spans'` is not supported for the {role}'s tokenizer ({name}), which"
    if not tokenizer.is_fast:
        raise ValueError(f"{prefix} is slow. Use a fast one, or `kd_ratio=0` and `seq_kd=True`.")
    try:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raises a bare Exception for parts written in Python
        raise ValueError(f"{prefix} cannot be read ({summarize_error(error)}).") from error
    model = spec["model"]
    text = json.dumps([spec["normalizer"], spec["pre_tokenizer"], spec["decoder"]], ensure_ascii=False)
    has_affix = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] not in ("BPE", "Unigram") or has_affix or not ("ByteLevel" in text or SPACE in text):
        raise ValueError(
            f"{prefix} is {model['type']} without the spaces of the text. Supported are byte-level BPE, and BPE and "
            f"Unigram that write spaces as {SPACE!r}."
        )
    return {**spec, "text": text}


__all__ = ["TokenBytes"]
