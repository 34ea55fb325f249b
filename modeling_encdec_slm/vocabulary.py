# SPDX-License-Identifier: Apache-2.0
"""Trim a tokenizer to the tokens that a corpus uses, with a map to the token ids of the original tokenizer."""

import contextlib
import hashlib
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .errors import format_list, summarize_error


# Key of the map in tokenizer_config.json, which transformers loads and saves without this package.
MAP_KEY = "vocabulary_map"
BATCH_CHARACTERS = 2**20
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# What tokenizers write instead of spaces is under these keys of normalizers and pre-tokenizers.
SPACE_KEYS = ("replacement", "content", "prepend")
KINDS = "byte-level BPE, BPE with byte fallback, and Unigram"
CONVERSATION = ("system", "user", "assistant")


@dataclass(frozen=True)
class VocabularyMap:
    """Where the tokens of a trimmed tokenizer come from.

    Args:
        old_ids (`list[int]`): Entry `new_id` is the id of the token in the original tokenizer; ascending.
        original_size (`int`): Number of ids of the original tokenizer.
        fingerprint (`str`): SHA-256 of the original tokenizer's ids and tokens.
    """

    old_ids: list[int]
    original_size: int
    fingerprint: str


@dataclass(frozen=True)
class TrimReport:
    """A trimmed tokenizer beside its original on held-out texts.

    Args:
        num_tokens (`int`): Size of the trimmed vocabulary.
        num_original_tokens (`int`): Size of the original vocabulary.
        num_texts (`int`): Number of held-out texts.
        extra_tokens (`float`): Relative increase in the number of tokens: 0.03 means 3 % more.
        identical_share (`float`): Share of the texts that both tokenizers split identically, from 0 to 1.
    """

    num_tokens: int
    num_original_tokens: int
    num_texts: int
    extra_tokens: float
    identical_share: float

    def __str__(self) -> str:
        return (
            f"{self.num_tokens:,} of {self.num_original_tokens:,} tokens; {self.num_texts:,} held-out texts take "
            f"{self.extra_tokens:.1%} more tokens, and {self.identical_share:.1%} of them are tokenized identically."
        )


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    min_count: int = 1,
    max_size: int | None = None,
    keep: Iterable[str] = (),
) -> tuple[PreTrainedTokenizerBase, list[int]]:
    """Trim a tokenizer to the tokens that a corpus uses, renumbered without gaps in their original order.

    Text whose tokens are all kept is tokenized as before, and any text that the original tokenizer can represent can
    still be represented, in more tokens. The map to the original ids is saved in `tokenizer_config.json`; read it
    with [`old_token_ids`].

    The frequency of a token counts each time it is produced, also as a part of a longer token. Always kept are all
    bytes (byte-level BPE, byte fallback) or all single characters (Unigram without byte fallback), the unknown token,
    the named special tokens, and the added tokens that the post-processor or the chat template uses. Other added
    tokens are kept if the texts use them.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerFast`]): Byte-level BPE (Qwen, Llama 3, SmolLM, GPT-2), BPE with
            byte fallback (Llama 2, Mistral, Gemma) or Unigram (T5). It is not changed.
        texts (`Iterable[str]`): Corpus, read in batches. With `min_count` or `max_size` it is read several times; an
            iterator is copied to a temporary file for that.
        min_count (`int`, *optional*, defaults to 1): Drop tokens that occur less often.
        max_size (`int`, *optional*): Keep only the most frequent tokens, so that the vocabulary has at most this size.
        keep (`Iterable[str]`, *optional*): Tokens to keep in any case, spelled as in `tokenizer.get_vocab()`.

    Returns:
        `tuple`: The trimmed tokenizer, and the list whose entry `new_id` is the original id. If `tokenizer` is itself
        trimmed, these are ids of its original.

    Raises:
        TypeError: `tokenizer` is not a tokenizer, or `texts` contains something other than text.
        ValueError: The tokenizer is of another kind, the corpus is empty or binary, `max_size` is less than what must
            be kept, or `keep` has an unknown token.
    """
    for name, value in (("min_count", min_count), ("max_size", max_size)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"`{name}` is {value!r}, but must be an integer of at least 1.")
    model = _TokenModel(tokenizer)
    special_tokens = _special_tokens(tokenizer, model.spec) & model.vocab.keys()
    required = model.with_parts(model.required | special_tokens | _keep(keep, model.vocab))
    if max_size is not None and len(required) > max_size:
        raise ValueError(
            f"`max_size` is {max_size:,}, but {len(required):,} tokens are always kept (bytes or characters, special "
            "tokens and `keep`). Give a larger `max_size`."
        )
    is_cut, kept, previous = min_count > 1 or max_size is not None, set(model.vocab), None
    with _replayable(texts, is_needed=is_cut) as read_texts:
        # Where a token is cut, others may be unused as well: count again until nothing changes.
        while previous is None or (is_cut and kept != previous):
            totals = model.count_with_parts(_count_tokens(_load_backend(model.trim(kept)), read_texts()))
            frequent = [token for token in totals.keys() - required if totals[token] >= min_count]
            # A part is at least as frequent as the whole, and shorter, so that no cut separates them.
            frequent.sort(key=lambda token: (-totals[token], len(token), model.vocab[token]))
            room = None if max_size is None else max_size - len(required)
            previous, kept = kept, required | set(frequent[:room])
    return _build_tokenizer(tokenizer, model, kept)


# The map


def read_vocabulary_map(tokenizer: PreTrainedTokenizerBase) -> VocabularyMap | None:
    """Return the map of a trimmed tokenizer, or `None` for any other tokenizer.

    Raises:
        ValueError: The map is damaged.
    """
    fields = tokenizer.init_kwargs.get(MAP_KEY)
    if fields is None:
        return None
    try:
        vocabulary_map = VocabularyMap(**fields)
        is_valid = all(0 <= old_id < vocabulary_map.original_size for old_id in vocabulary_map.old_ids)
    except TypeError:
        is_valid = False
    if not is_valid or len(vocabulary_map.old_ids) > len(tokenizer):
        raise ValueError(
            f"`{MAP_KEY}` in tokenizer_config.json is not a map that `trim_tokenizer` wrote. Trim the tokenizer again."
        )
    return vocabulary_map


def old_token_ids(tokenizer: PreTrainedTokenizerBase, original: PreTrainedTokenizerBase | None = None) -> list[int]:
    """Return the list whose entry `new_id` is the id of that token in the original tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): From [`trim_tokenizer`], also after saving and loading.
        original ([`~transformers.PreTrainedTokenizerBase`], *optional*): The teacher's. Check that the ids are those
            of this tokenizer; tokens that were added at its end since do not matter. `None` checks nothing.

    Raises:
        ValueError: `tokenizer` is not trimmed, or from another tokenizer than `original`.
    """
    vocabulary_map = read_vocabulary_map(tokenizer)
    if vocabulary_map is None:
        raise ValueError("The tokenizer has no map to original token ids. Make one with `trim_tokenizer`.")
    size = vocabulary_map.original_size
    if original is not None and tokenizer_fingerprint(original, size) != vocabulary_map.fingerprint:
        raise ValueError(
            f"The tokenizer was trimmed from a tokenizer with {size:,} ids, which is not the teacher's with "
            f"{_num_ids(original):,} ids: their tokens differ. Trim the teacher's tokenizer with `trim_tokenizer`."
        )
    return vocabulary_map.old_ids


def _num_ids(tokenizer):
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, num_ids: int | None = None) -> str:
    """Return the SHA-256 of a tokenizer's ids and tokens, or of its first `num_ids` ids."""
    num_ids = _num_ids(tokenizer) if num_ids is None else num_ids
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index < num_ids)
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def report_trim(
    trimmed: PreTrainedTokenizerBase, original: PreTrainedTokenizerBase, texts: Iterable[str]
) -> TrimReport:
    """Compare a trimmed tokenizer with its original on held-out texts, without special tokens around them.

    Raises:
        TypeError, ValueError: `texts` is empty or binary.
    """
    num_tokens, num_texts, num_identical = np.zeros(2, dtype=int), 0, 0
    backends = [_load_backend(json.loads(tokenizer.backend_tokenizer.to_str())) for tokenizer in (trimmed, original)]
    for batch in _batches(_check_texts(texts)):
        rows = [backend.encode_batch_fast(batch, add_special_tokens=False) for backend in backends]
        num_tokens += [sum(map(len, encodings)) for encodings in rows]
        num_identical += sum(ours.tokens == theirs.tokens for ours, theirs in zip(*rows, strict=True))
        num_texts += len(batch)
    return TrimReport(
        num_tokens=len(trimmed),
        num_original_tokens=len(original),
        num_texts=num_texts,
        extra_tokens=float(num_tokens[0] / max(num_tokens[1], 1) - 1),
        identical_share=num_identical / num_texts,
    )


def describe_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe the share of embeddings and head in a model's parameters, and what it would be untrimmed.

    Args:
        model ([`~transformers.PreTrainedModel`]): With the vocabulary of `tokenizer`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): From [`trim_tokenizer`].
    """
    vocabulary_map = read_vocabulary_map(tokenizer)
    tables = {
        id(table): table for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    }
    size, num_parameters = sum(table.numel() for table in tables.values()), model.num_parameters()
    old_size = sum(table.shape[1] for table in tables.values()) * vocabulary_map.original_size
    old_share = old_size / (num_parameters - size + old_size)
    return (
        f"Vocabulary: {len(tokenizer):,} of {vocabulary_map.original_size:,} tokens. Embeddings: {size:,} parameters, "
        f"{size / num_parameters:.1%} of the model; untrimmed {old_size:,}, {old_share:.1%}."
    )


# The corpus


def _check_texts(texts):
    """Yield texts; refuse a corpus that is empty or binary, where it shows."""
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise TypeError(f"`texts` is a {type(texts).__name__}, but must be an iterable of texts, such as a list.")
    num_texts, is_empty = 0, True
    try:
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(
                    f"Item {num_texts} of `texts` is a {type(text).__name__}, but must be a str. Give decoded text, "
                    "such as one column of a data set."
                )
            if "\0" in text or not _is_encodable(text):
                raise ValueError(
                    f"Item {num_texts} of `texts` is binary: it has NUL characters or undecodable bytes. Give text, "
                    "or leave it out."
                )
            num_texts, is_empty = num_texts + 1, is_empty and not text
            yield text
    except UnicodeDecodeError as error:
        raise ValueError(
            f"`texts` is not UTF-8 text after item {num_texts} ({error.reason}). Give text, or leave that file out."
        ) from error
    if is_empty:
        raise ValueError("`texts` is empty, so that no token is used. Give at least one text.")


def _is_encodable(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@contextlib.contextmanager
def _replayable(texts: Iterable[str], is_needed: bool) -> Iterator[Callable[[], Iterator[str]]]:
    """Yield a function that reads the texts from the beginning each time it is called."""
    if not is_needed or not isinstance(texts, Iterator):
        yield lambda: _check_texts(texts)
        return
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(text)}\n" for text in _check_texts(texts))

        def read_texts():
            file.seek(0)
            return map(json.loads, file)

        yield read_texts


def _batches(texts):
    batch, num_characters = [], 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _count_tokens(backend, texts) -> Counter:
    counts = np.zeros(max(backend.get_vocab().values()) + 1, dtype=np.int64)
    for batch in _batches(texts):
        ids = [np.array(one.ids, dtype=np.int64) for one in backend.encode_batch_fast(batch, add_special_tokens=False)]
        counts += np.bincount(np.concatenate(ids), minlength=len(counts))
    return Counter({backend.id_to_token(int(index)): int(counts[index]) for index in counts.nonzero()[0]})


# Kinds of tokenizers


class _TokenModel:
    """A tokenizer as the JSON of `tokenizers`, and how its tokens are made of each other."""

    def __init__(self, tokenizer):
        self.spec = _read_spec(tokenizer)
        self.vocab = tokenizer.get_vocab()
        model = self.spec["model"]
        self.required = {token for token in _space_tokens(self.spec) if token in self.vocab}
        self._merges_by_token, self._ranks = defaultdict(list), {}
        if model["type"] == "BPE":
            self.required |= (BYTE_TOKENS if model["byte_fallback"] else set(ByteLevel.alphabet())) & self.vocab.keys()
            self.required |= {model["unk_token"]} & self.vocab.keys()
            for rank, pair in enumerate(map(tuple, model["merges"])):
                self._ranks[pair] = rank
                self._merges_by_token["".join(pair)].append(pair)
        else:
            self.required |= _unigram_pieces(model)
        self._parts = {}

    def parts(self, token: str) -> tuple[str, ...]:
        """Return the tokens that the last merge of a token joins; none if it is not merged."""
        if token not in self._parts:
            merges = self._merges_by_token.get(token, [])
            if len(merges) > 1 and (pair := self._last_merge(token)) is not None:
                merges = [pair]
            self._parts[token] = tuple(part for pair in merges for part in pair)
        return self._parts[token]

    def _last_merge(self, token):
        """Merge the characters of a token as `tokenizers` does: the pair of the lowest rank first, from the left."""
        pieces = list(token)
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            rank, position = min((self._ranks.get(pair, len(self._ranks)), index) for index, pair in enumerate(pairs))
            if rank == len(self._ranks):
                return None
            pieces[position : position + 2] = ["".join(pairs[position])]
        return pairs[0]

    def with_parts(self, tokens: set[str]) -> set[str]:
        """Return tokens with all tokens that their merges pass through."""
        return set(self.count_with_parts(Counter(tokens)))

    def count_with_parts(self, counts: Counter) -> Counter:
        """Add the count of each token to the tokens that its merges pass through."""
        totals, by_length = Counter(counts), defaultdict(set)
        for token in counts:
            by_length[len(token)].add(token)
        for length in range(max(by_length), 0, -1):
            for token in by_length.pop(length, ()):
                for part in self.parts(token):
                    totals[part] += totals[token]
                    by_length[len(part)].add(part)
        return totals

    def trim(self, kept: set[str]) -> dict[str, Any]:
        """Return the JSON of the tokenizer that has only some tokens."""
        new_ids = {token: index for index, token in enumerate(sorted(kept, key=self.vocab.__getitem__))}
        model = dict(self.spec["model"])
        if model["type"] == "BPE":
            model["vocab"] = {token: new_ids[token] for token in model["vocab"] if token in new_ids}
            model["merges"] = [
                pair for pair in model["merges"] if all(token in new_ids for token in (*pair, "".join(pair)))
            ]
        else:
            if model["unk_id"] is not None:
                model["unk_id"] = new_ids[model["vocab"][model["unk_id"]][0]]
            model["vocab"] = [
                piece
                for index, piece in enumerate(model["vocab"])
                if piece[0] in new_ids and self.vocab[piece[0]] == index
            ]
        added_tokens = [token for token in self.spec["added_tokens"] if token["content"] in new_ids]
        return {
            **self.spec,
            "model": model,
            "added_tokens": [{**token, "id": new_ids[token["content"]]} for token in added_tokens],
            "post_processor": _renumber(self.spec["post_processor"], new_ids),
            "padding": None,
            "truncation": None,
        }


def _read_spec(tokenizer) -> dict[str, Any]:
    """Return the JSON of a fast tokenizer of a kind that can be trimmed."""
    name = type(tokenizer).__name__
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"`tokenizer` is a {name}, but must be a tokenizer that `AutoTokenizer` loads.")
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{name} is a slow tokenizer, which cannot be trimmed. Kinds that can: {KINDS}.")
    try:
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # tokenizers raises a bare Exception for parts written in Python
        raise ValueError(f"{name} cannot be saved, so it cannot be trimmed ({summarize_error(error)}).") from error
    model = spec["model"]
    is_byte_level = "ByteLevel" in json.dumps([spec["pre_tokenizer"], spec["normalizer"]])
    kind = model["type"]
    if kind == "BPE" and (affix := model["continuing_subword_prefix"] or model["end_of_word_suffix"]):
        kind = f"BPE with the affix {affix!r}"
    elif kind == "BPE" and not (is_byte_level or model["byte_fallback"]):
        kind = "BPE without bytes"
    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"{name} is a {kind} tokenizer, which cannot be trimmed. Kinds that can: {KINDS}.")
    return spec


def _unigram_pieces(model):
    """The pieces that unknown text needs, and one of the lowest score, which decides the score of unknown text."""
    pieces = [piece for piece, _ in model["vocab"]]
    required = {min(model["vocab"], key=lambda piece: piece[1])[0]}
    if model["unk_id"] is not None:
        required.add(pieces[model["unk_id"]])
    if model.get("byte_fallback") and set(pieces) >= BYTE_TOKENS:
        return required | BYTE_TOKENS
    return required | {piece for piece in pieces if len(piece) == 1}


def _space_tokens(spec):
    """Yield the characters that stand for spaces."""
    components = [spec["normalizer"], spec["pre_tokenizer"]]
    while components:
        component = components.pop()
        if isinstance(component, list):
            components.extend(component)
        elif isinstance(component, dict):
            components.extend(value for value in component.values() if isinstance(value, dict | list))
            for key in SPACE_KEYS:
                yield from component.get(key) or ""


# Special tokens


def _special_tokens(tokenizer, spec) -> set[str]:
    """Return the special tokens in use: named, or of the post-processor, the padding or the chat template."""
    tokens = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    tokens |= set(_post_processor_tokens(spec["post_processor"]))
    added = {token["content"] for token in spec["added_tokens"]}
    templates = tokenizer.chat_template or ""
    text = "\n".join(
        [*(templates.values() if isinstance(templates, dict) else [templates]), *_conversations(tokenizer)]
    )
    return tokens | {token for token in added if token in text}


def _conversations(tokenizer):
    """Yield conversations as the chat template renders them: it may put its tokens together from pieces."""
    for roles in (CONVERSATION, CONVERSATION[1:]):
        messages = [{"role": role, "content": "text"} for role in roles]
        # A template may refuse a role, or need what only its own model is given.
        with contextlib.suppress(Exception):
            yield tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            yield tokenizer.apply_chat_template(messages, tokenize=False)


def _post_processor_tokens(processor):
    if processor is None:
        return
    for part in processor.get("processors", ()):
        yield from _post_processor_tokens(part)
    for name in ("sep", "cls"):
        yield from processor.get(name, ())[:1]
    for entry in (processor.get("special_tokens") or {}).values():
        yield from entry["tokens"]


def _renumber(processor, new_ids):
    """Return the JSON of a post-processor with new ids."""
    if processor is None:
        return None
    processor = dict(processor)
    if "processors" in processor:
        processor["processors"] = [_renumber(part, new_ids) for part in processor["processors"]]
    for name in {"sep", "cls"} & processor.keys():
        processor[name] = [processor[name][0], new_ids[processor[name][0]]]
    if processor.get("special_tokens"):
        processor["special_tokens"] = {
            name: {**entry, "ids": [new_ids[token] for token in entry["tokens"]]}
            for name, entry in processor["special_tokens"].items()
        }
    return processor


def _keep(keep, vocab) -> set[str]:
    keep = [keep] if isinstance(keep, str) else list(keep)
    if unknown := [token for token in keep if token not in vocab]:
        raise ValueError(
            f"`keep` has {format_list(map(repr, unknown))}, which the tokenizer does not have. Spell tokens as in "
            "`tokenizer.get_vocab()`."
        )
    return set(keep)


# The trimmed tokenizer


def _load_backend(spec) -> Tokenizer:
    """Load a tokenizer that neither pads, cuts nor drops merges at random."""
    model = spec["model"] | ({"dropout": None} if spec["model"]["type"] == "BPE" else {})
    return Tokenizer.from_str(json.dumps({**spec, "model": model, "padding": None, "truncation": None}))


def _build_tokenizer(tokenizer, model, kept) -> tuple[PreTrainedTokenizerBase, list[int]]:
    tokens = sorted(kept, key=model.vocab.__getitem__)
    spec = model.trim(kept)
    vocabulary_map = _compose_map(tokenizer, [model.vocab[token] for token in tokens])
    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(tokenizer, spec, vocabulary_map, Path(folder))
        # Loading proves that the folder is enough. Some classes rebuild the tokenizer in their own way, such as T5's,
        # which adds its sentinels again.
        for tokenizer_class in (type(tokenizer), PreTrainedTokenizerFast):
            with contextlib.suppress(ValueError, TypeError, KeyError):
                trimmed = tokenizer_class.from_pretrained(folder)
                if _is_built(trimmed, spec, tokens):
                    trimmed.name_or_path = trimmed.init_kwargs["name_or_path"] = ""
                    return trimmed, list(vocabulary_map.old_ids)
    raise ValueError(f"{type(tokenizer).__name__} cannot be trimmed: its token ids are not those of its vocabulary.")


def _compose_map(tokenizer, old_ids) -> VocabularyMap:
    """Map to the ids of the tokenizer, or, if it is trimmed itself, of its original."""
    previous = read_vocabulary_map(tokenizer)
    if previous is None:
        num_ids = _num_ids(tokenizer)
        return VocabularyMap(old_ids, num_ids, tokenizer_fingerprint(tokenizer, num_ids))
    if old_ids[-1] >= len(previous.old_ids):
        raise ValueError(
            "Tokens were added to a trimmed tokenizer, which have no id in its original. Trim the original tokenizer."
        )
    return VocabularyMap([previous.old_ids[index] for index in old_ids], previous.original_size, previous.fingerprint)


def _write_tokenizer(tokenizer, spec, vocabulary_map, folder):
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():  # vocabularies in other formats
        if not path.name.startswith(("tokenizer_config", "chat_template", "additional_chat_templates")):
            path.unlink()
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if extra := config.get("extra_special_tokens"):
        added = {token["content"] for token in spec["added_tokens"]}
        config["extra_special_tokens"] = [token for token in extra if token in added]
    # Class attributes, which another class would not have.
    config |= {name: getattr(tokenizer, name) for name in ("model_input_names", "padding_side", "truncation_side")}
    config[MAP_KEY] = asdict(vocabulary_map)
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def _is_built(tokenizer, spec, tokens):
    """Return whether a loaded tokenizer is the one that was written; its vocabulary is compared as ids."""
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    components = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    return (
        tokenizer.get_vocab() == {token: index for index, token in enumerate(tokens)}
        and all(loaded[name] == spec[name] for name in components)
        and all(loaded["model"][name] == value for name, value in spec["model"].items() if name != "vocab")
    )


__all__ = [
    "TrimReport",
    "VocabularyMap",
    "describe_embeddings",
    "old_token_ids",
    "read_vocabulary_map",
    "report_trim",
    "tokenizer_fingerprint",
    "trim_tokenizer",
]
