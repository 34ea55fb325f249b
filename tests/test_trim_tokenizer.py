# SPDX-License-Identifier: Apache-2.0
import argparse
import ast
import collections
import functools
import inspect
import json
import os
import pathlib
import random
import subprocess
import sys
import typing

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, T5Tokenizer
from transformers.tokenization_utils_base import generate_merges

from conftest import build_byte_tokenizer, build_model
from encdec_slm.hub_cards import publish
from encdec_slm.vocabulary import old_token_ids, report_trim, trim_tokenizer


CORPUS = (
    "def parse(line, sep=','):\n    return [part.strip() for part in line.split(sep)]",
    "The parser reads lines and returns the parts of each line, without spaces around them.",
    "Der Zerteiler liest Zeilen und gibt die Teile jeder Zeile zurück; naïve café, señor.",
    "Парсер читает строки. 解析器读取每一行。 パーサーは行を読みます 🙂🙂 👩‍👩‍👧",
    "while True:\n\tlines = reader.readlines()\n\tif not lines:\n\t\tbreak\n\tprinted.append(printer(lines))",
)
USED = (CORPUS[0], CORPUS[1], "The readers return spaces.")
STRANGE = (
    *("", " ", "   leading and trailing  ", "\n\n\t\r\n", "\0\x01\x1b[0m", "e\u0301 n\u0303 a\u0300\u0301\u0302"),
    *("👩‍👩‍👧‍👦🏳️‍🌈🙂", "\ufffd\ufeff\u202e\u200b", "\U0010ffff\ue000", "بنت 한국어 ไทย हिन्दी ქართული"),
    *("<0x0A> <unk> </s> <|end|> ▁ Ġ", "x" * 5000, "🙂é" * 2000),
)
TEMPLATE = "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}<|end|>{% endfor %}"


@functools.cache
def byte_level_backend():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(CORPUS * 3, trainer)
    return backend.to_str()


def qwen_like():
    """Byte-level BPE with special tokens at the end, some of which nothing uses."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(byte_level_backend()), eos_token="<|end|>", pad_token="<|pad|>"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|vision|>", "<|fim|>"]})
    tokenizer.add_tokens(["<tool>", "<unused>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def llama3_like():
    """Byte-level BPE that takes whole words before it merges, with every pair that makes a token as a merge."""
    spec = json.loads(byte_level_backend())
    vocab = spec["model"]["vocab"] | {"zebra": len(spec["model"]["vocab"])}
    spec["model"] |= {"vocab": vocab, "merges": generate_merges(vocab), "ignore_merges": True}
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens(["<|begin|>", "<|end|>", "<|reserved|>"])
    begin = ("<|begin|>", backend.token_to_id("<|begin|>"))
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing("<|begin|> $A", special_tokens=[begin]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def llama2_like():
    """BPE over characters and, for others, bytes; special tokens first; several merges make one token."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(CORPUS[:3] * 3, trainers.BpeTrainer(vocab_size=300))
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*first, *sorted(trained.get_vocab(), key=trained.get_vocab().get)]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = generate_merges({token: index for token, index in vocab.items() if token not in first})
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(first[:3])
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram_backend(byte_fallback):
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never" if byte_fallback else "always")
    special_tokens = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=special_tokens, unk_token="<unk>")
    backend.train_from_iterator(CORPUS[:3] * 3, trainer)
    spec = json.loads(backend.to_str())
    if byte_fallback:
        spec["model"]["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        spec["model"]["byte_fallback"] = True
        spec["decoder"] = {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}
        ]}  # fmt: skip
    else:
        spec["model"]["vocab"] += [[f"<extra_id_{index}>", 0.0] for index in range(99, -1, -1)]
        spec["decoder"] = spec["pre_tokenizer"]
    return spec


def t5():
    spec = unigram_backend(byte_fallback=False)
    return T5Tokenizer(vocab=[tuple(piece) for piece in spec["model"]["vocab"]])


def unigram_with_bytes():
    backend = Tokenizer.from_str(json.dumps(unigram_backend(byte_fallback=True)))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


BUILDERS = (qwen_like, llama3_like, llama2_like, t5, unigram_with_bytes)


@pytest.fixture(scope="module", params=BUILDERS, ids=lambda build: build.__name__)
def tokenizer(request):
    return request.param()


@pytest.fixture(scope="module")
def trimmed_and_ids(tokenizer):
    return trim_tokenizer(tokenizer, USED)


def rendered(tokenizer, text):
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))


def merge_mixes(num_texts):
    """Random texts from pieces of the corpus, so that words are cut and joined where no corpus does."""
    generator = random.Random(0)
    text = "\n".join(CORPUS)
    for _ in range(num_texts):
        starts = (generator.randrange(len(text)) for _ in range(generator.randint(1, 5)))
        yield "".join(text[start : start + generator.randint(1, 9)] for start in starts)


def random_texts(num_texts):
    generator = random.Random(0)
    for _ in range(num_texts):
        codes = [generator.randrange(generator.choice((0x80, 0x800, 0x10000, 0x110000))) for _ in range(20)]
        yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def test_text_of_kept_tokens_is_tokenized_identically(tokenizer, trimmed_and_ids):
    trimmed, old_ids = trimmed_and_ids
    texts = [*USED, *merge_mixes(3000)]
    kept = set(old_ids)
    pairs = zip(tokenizer(texts)["input_ids"], trimmed(texts)["input_ids"], strict=True)
    unchanged = [(old, [old_ids[index] for index in new]) for old, new in pairs if kept.issuperset(old)]
    assert len(unchanged) > 200
    assert all(old == new for old, new in unchanged)


@pytest.mark.parametrize("texts", [USED, ["a"]], ids=["corpus", "letter"])
def test_any_text_survives_as_with_the_original(tokenizer, texts):
    trimmed, _ = trim_tokenizer(tokenizer, texts)
    for text in (*CORPUS, *STRANGE, *merge_mixes(300), *random_texts(300)):
        assert rendered(trimmed, text) == rendered(tokenizer, text)


def test_bytes_represent_any_text():
    trimmed, _ = trim_tokenizer(qwen_like(), ["a"])
    assert len(trimmed) == 256 + 3
    for text in (*CORPUS, *STRANGE, *random_texts(300)):
        assert rendered(trimmed, text) == text


def test_old_ids_are_those_of_the_kept_tokens_in_their_order(tokenizer, trimmed_and_ids):
    trimmed, old_ids = trimmed_and_ids
    assert old_ids == sorted(old_ids) and len(old_ids) == len(trimmed) < len(tokenizer)
    assert trimmed.convert_ids_to_tokens(range(len(trimmed))) == tokenizer.convert_ids_to_tokens(old_ids)
    for name, token in tokenizer.special_tokens_map.items():
        if isinstance(token, str):
            assert old_ids[getattr(trimmed, f"{name}_id")] == tokenizer.convert_tokens_to_ids(token)
    assert type(trimmed.backend_tokenizer.model) is type(tokenizer.backend_tokenizer.model)


@pytest.mark.parametrize("options", [{}, {"min_count": 2}, {"max_size": 290}], ids=str)
def test_trimming_twice_is_trimming_once(tokenizer, options):
    texts = [*USED, CORPUS[4]]
    once, old_ids = trim_tokenizer(tokenizer, texts, **options)
    twice, ids_again = trim_tokenizer(once, iter(texts), **options)
    assert ids_again == old_ids
    assert twice.backend_tokenizer.to_str() == once.backend_tokenizer.to_str()


def small_bpe(tokens, merges):
    """Byte-level BPE with some tokens behind the bytes."""
    vocab = {token: index for index, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def merged_tokens(tokenizer, texts, **options):
    trimmed, _ = trim_tokenizer(tokenizer, texts, **options)
    return trimmed.convert_ids_to_tokens(range(256, len(trimmed)))


def test_only_tokens_that_merges_pass_through_are_kept():
    merges = [("b", "c"), ("ab", "c"), ("a", "b"), ("a", "bc")]  # "abc" is made of "a" and "bc"
    tokenizer = small_bpe(["ab", "abc", "bc"], merges)
    assert merged_tokens(tokenizer, ["abc"]) == ["abc", "bc"]
    assert merged_tokens(tokenizer, ["abc"], max_size=257) == ["bc"]


def test_tokens_that_are_unused_without_others_are_dropped():
    # "abcd" is "ab", "cd"; without "ab" it is "a", "bc", "d".
    tokenizer = small_bpe(["cd", "bc", "ab"], [("a", "b"), ("b", "c"), ("c", "d")])
    texts = ["abcd"] * 2 + ["bc"] * 3
    assert merged_tokens(tokenizer, texts) == ["cd", "bc", "ab"]
    assert merged_tokens(tokenizer, texts, max_size=258) == ["bc"]


def test_unknown_text_of_unigram_keeps_its_score():
    pieces = {"<unk>": 0.0, "x": -9.0, "xby": -9.0, "y": -9.0, "xx": -0.1, "yy": -0.1, "unused": -30.0}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(list(pieces.items()), 0)))
    trimmed, _ = trim_tokenizer(tokenizer, ["xxbyy", "xxyy"])
    assert trimmed.tokenize("xxbyy") == tokenizer.tokenize("xxbyy") == ["x", "xby", "y"]


def test_the_most_frequent_tokens_are_kept_and_no_merge_is_broken():
    tokenizer = llama2_like()
    smallest = len(trim_tokenizer(tokenizer, ["a"])[1])
    _, old_ids = trim_tokenizer(tokenizer, CORPUS, max_size=smallest + 40)
    trimmed, fewer_ids = trim_tokenizer(tokenizer, CORPUS, max_size=smallest + 20)
    assert len(fewer_ids) == smallest + 20 and set(fewer_ids) < set(old_ids)
    merges = json.loads(trimmed.backend_tokenizer.to_str())["model"]["merges"]
    made = {"".join(pair) for pair in merges}
    for token in trimmed.get_vocab():
        pieces = tokenizer.backend_tokenizer.model.tokenize(token)
        if len(token) > 1 and [piece.value for piece in pieces] == [token]:
            assert token in made
            assert [piece.value for piece in trimmed.backend_tokenizer.model.tokenize(token)] == [token]


def test_min_count_drops_rare_tokens_and_keep_holds_them():
    tokenizer = qwen_like()
    common, rare = ["lines"] * 3, ["parser"]
    tokens = set(tokenizer.tokenize("lines")), set(tokenizer.tokenize("parser"))
    trimmed, _ = trim_tokenizer(tokenizer, common + rare, min_count=2)
    assert tokens[0] <= trimmed.get_vocab().keys() and not tokens[1] <= trimmed.get_vocab().keys()
    trimmed, _ = trim_tokenizer(tokenizer, common + rare, min_count=2, keep=[*tokens[1], "<unused>"])
    assert tokens[1] | {"<unused>"} <= trimmed.get_vocab().keys()
    assert trimmed.tokenize("parser") == tokenizer.tokenize("parser")


def test_added_tokens_are_kept_if_named_or_used_by_the_texts_or_the_template():
    trimmed, _ = trim_tokenizer(qwen_like(), ["a <tool> b"])
    added = list(trimmed.get_added_vocab())
    assert added == ["<|end|>", "<|pad|>", "<|user|>", "<tool>"]
    assert trimmed.extra_special_tokens == ["<|user|>"]
    messages = [{"role": "user", "content": "<tool>"}]
    ids = trimmed.apply_chat_template(messages, return_dict=False)
    assert trimmed.convert_ids_to_tokens(ids) == ["<|user|>", "<tool>", "<|end|>"]


def test_whole_words_that_no_merge_makes_are_kept():
    tokenizer = llama3_like()
    trimmed, old_ids = trim_tokenizer(tokenizer, ["zebra"])
    assert [old_ids[index] for index in trimmed("zebra")["input_ids"]] == tokenizer("zebra")["input_ids"]
    assert "zebra" in trimmed.get_vocab() and "<|reserved|>" not in trimmed.get_vocab()


def test_an_original_that_cuts_and_pads_is_counted_whole():
    tokenizer = qwen_like()
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding(length=8, pad_id=tokenizer.pad_token_id, pad_token="<|pad|>")
    trimmed, _ = trim_tokenizer(tokenizer, USED)
    assert trimmed.get_vocab() == trim_tokenizer(qwen_like(), USED)[0].get_vocab()
    assert trimmed.backend_tokenizer.padding is None


def test_a_tokenizer_that_its_class_would_rebuild_differently_is_kept_as_it_is(tmp_path):
    tokenizer = t5()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trimmed, _ = trim_tokenizer(tokenizer, USED)
    trimmed.save_pretrained(tmp_path)
    for one in (trimmed, AutoTokenizer.from_pretrained(tmp_path)):
        assert one(USED[1]).tokens() == tokenizer(USED[1]).tokens()
        assert one("a").keys() == tokenizer("a").keys()


def test_an_iterator_is_read_once():
    trimmed, _ = trim_tokenizer(qwen_like(), (text for text in CORPUS), min_count=2)
    assert trimmed.get_vocab() == trim_tokenizer(qwen_like(), CORPUS, min_count=2)[0].get_vocab()


def test_the_report_compares_held_out_texts():
    tokenizer = qwen_like()
    trimmed, _ = trim_tokenizer(tokenizer, USED)
    texts = [USED[0], CORPUS[3]]
    num_tokens = [[len(one(text)["input_ids"]) for text in texts] for one in (trimmed, tokenizer)]
    report = report_trim(trimmed, tokenizer, iter(texts))
    assert (report.num_tokens, report.num_original_tokens, report.num_texts) == (len(trimmed), len(tokenizer), 2)
    assert report.extra_tokens == pytest.approx(sum(num_tokens[0]) / sum(num_tokens[1]) - 1)
    assert report.identical_share == 0.5
    assert f"{len(trimmed):,} of {len(tokenizer):,}" in str(report)


RELOAD = """
import sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer.save_pretrained(sys.argv[2])
print(tokenizer(sys.argv[3])["input_ids"])
assert not any(name.startswith("encdec_slm") for name in sys.modules)
"""


@pytest.mark.parametrize("build", [qwen_like, t5])
def test_the_map_survives_saving_without_this_package(build, tmp_path):
    tokenizer = build()
    trimmed, old_ids = trim_tokenizer(tokenizer, USED)
    trimmed.save_pretrained(tmp_path / "first")
    command = [sys.executable, "-c", RELOAD, tmp_path / "first", tmp_path / "second", CORPUS[0]]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == trimmed(CORPUS[0])["input_ids"]
    loaded = AutoTokenizer.from_pretrained(tmp_path / "second")
    assert loaded.get_vocab() == trimmed.get_vocab()
    assert loaded("a").keys() == trimmed("a").keys() == tokenizer("a").keys()
    assert old_token_ids(loaded, tokenizer) == old_ids
    assert str(tmp_path) not in (tmp_path / "second" / "tokenizer_config.json").read_text()


@pytest.mark.slow  # loads the repository in a fresh process
def test_a_published_repository_has_the_map(tmp_path):
    tokenizer = build_byte_tokenizer(words=["Ġlines", "Ġunused"])
    trimmed, old_ids = trim_tokenizer(tokenizer, ["read lines"])
    for part in (build_model(vocab_size=len(trimmed), max_position_embeddings=512), trimmed):
        part.save_pretrained(tmp_path / "student")
    folder = publish(tmp_path / "student", output_dir=tmp_path / "published").folder
    assert old_token_ids(AutoTokenizer.from_pretrained(folder), tokenizer) == old_ids


def test_a_map_fits_its_original_with_tokens_added_since_and_no_other_tokenizer():
    tokenizer = qwen_like()
    trimmed, old_ids = trim_tokenizer(tokenizer, USED)
    tokenizer.add_tokens(["<new>"])
    assert old_token_ids(trimmed, tokenizer) == old_ids
    for other in (llama3_like(), trimmed):
        with pytest.raises(ValueError, match=f"{len(qwen_like()):,}"):
            old_token_ids(trimmed, other)
    with pytest.raises(ValueError, match="trim_tokenizer"):
        old_token_ids(tokenizer)


def word_piece():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")))


def word_level():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")))


def character_bpe(**options):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [], **options)))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (word_piece, "WordPiece"),
        (word_level, "WordLevel"),
        (ByT5Tokenizer, "ByT5Tokenizer"),
        (character_bpe, "BPE without bytes"),
        (lambda: character_bpe(end_of_word_suffix="</w>"), "</w>"),
    ],
)
def test_other_kinds_are_refused_by_name(build, name):
    with pytest.raises(ValueError, match=name):
        trim_tokenizer(build(), ["a"])


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ([], ValueError),
        (["", ""], ValueError),
        (["text", "PNG\0\0"], ValueError),
        (["text", "\udc89PNG"], ValueError),
        ([b"text"], TypeError),
        ("text", TypeError),
        (None, TypeError),
        ([{"text": "a"}], TypeError),
    ],
)
@pytest.mark.parametrize("options", [{}, {"min_count": 2}])
def test_a_corpus_without_text_is_refused(texts, error, options):
    with pytest.raises(error, match="`texts`"):
        trim_tokenizer(qwen_like(), texts, **options)


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n")
    with path.open(encoding="utf-8") as file, pytest.raises(ValueError, match="`texts`"):
        trim_tokenizer(qwen_like(), file)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"max_size": 200}, "200.*259"), ({"max_size": 0}, "max_size"), ({"max_size": 300.5}, "300.5"),
     ({"min_count": 0}, "min_count"), ({"keep": ["nowhere"]}, "nowhere")],
)  # fmt: skip
def test_impossible_sizes_and_unknown_tokens_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        trim_tokenizer(qwen_like(), USED, **options)


def test_tokens_added_to_a_trimmed_tokenizer_have_no_original():
    trimmed, _ = trim_tokenizer(qwen_like(), USED)
    trimmed.add_tokens([AddedToken("<image>")])
    with pytest.raises(ValueError, match="added"):
        trim_tokenizer(trimmed, ["<image>"])


def test_something_else_than_a_tokenizer_is_refused():
    with pytest.raises(TypeError, match="Tokenizer"):
        trim_tokenizer(Tokenizer(models.BPE()), ["a"])


# A real teacher's tokenizer


@pytest.fixture(scope="module")
def teacher_tokenizer():
    return AutoTokenizer.from_pretrained(os.environ["ENCDEC_TEACHER"])


@pytest.fixture(scope="module")
def library_code():
    """Parts of modules of Python's library, and others that are held out."""
    modules = (argparse, ast, collections, inspect, json, pathlib, random, subprocess, typing)
    texts = [text for module in modules for text in inspect.getsource(module).split("\n\n")]
    return texts[::2], texts[1::2]


@pytest.mark.teacher
@pytest.mark.parametrize("options", [{}, {"max_size": 3000}, {"min_count": 2}], ids=str)
def test_the_teachers_tokenizer_is_trimmed(teacher_tokenizer, library_code, options):
    texts, held_out = library_code
    trimmed, old_ids = trim_tokenizer(teacher_tokenizer, iter(texts), **options)
    kept = set(old_ids)
    lines = [line for text in held_out for line in text.splitlines()]
    pairs = zip(teacher_tokenizer(lines)["input_ids"], trimmed(lines)["input_ids"], strict=True)
    unchanged = [(old, [old_ids[index] for index in new]) for old, new in pairs if kept.issuperset(old)]
    assert len(unchanged) > len(lines) / 3
    assert all(old == new for old, new in unchanged)
    for text in (*CORPUS, *STRANGE, *random_texts(300)):
        assert rendered(trimmed, text) == rendered(teacher_tokenizer, text)
    twice, ids_again = trim_tokenizer(trimmed, texts, **options)
    assert ids_again == old_ids and twice.backend_tokenizer.to_str() == trimmed.backend_tokenizer.to_str()
    report = report_trim(trimmed, teacher_tokenizer, held_out)
    assert report.num_tokens < 12_000 and 0 <= report.extra_tokens < 0.4
    assert old_token_ids(trimmed, teacher_tokenizer) == old_ids
    messages = [{"role": "user", "content": "Return the parts of a line."}]
    ids = [one.apply_chat_template(messages, return_dict=False) for one in (trimmed, teacher_tokenizer)]
    assert not kept.issuperset(ids[1]) or [old_ids[index] for index in ids[0]] == ids[1]
