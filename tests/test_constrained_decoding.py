# SPDX-License-Identifier: Apache-2.0
"""Constrained decoding: every generated text has the given form, for greedy search, sampling, beams and batches."""

import json
import re

import pytest
import torch

from conftest import build_byte_tokenizer, build_model
from encdec_slm.constrained_decoding import SHELL_GRAMMAR, GrammarLogitsProcessor


SCHEMA = {
    "type": "object",
    "properties": {"tool": {"enum": ["add", "divide"]}, "value": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["tool", "value"],
    "additionalProperties": False,
}
SEARCHES = [{}, {"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "temperature": 3.0}]


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_tokenizer(words=("Ġadd", "value", "tool"))


@pytest.fixture(scope="module")
def model(tokenizer):
    model = build_model(vocab_size=len(tokenizer), initializer_range=0.4, max_position_embeddings=512)
    model.generation_config.update(
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id,
    )
    return model


def generate(model, tokenizer, processor, **settings):
    inputs = tokenizer(["add one", "divide by nine, and add two"], return_tensors="pt", padding=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ids = model.generate(**inputs, logits_processor=[processor], max_new_tokens=120, **settings)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("settings", SEARCHES)
def test_texts_follow_a_json_schema(model, tokenizer, settings):
    texts = generate(model, tokenizer, GrammarLogitsProcessor(tokenizer, json_schema=SCHEMA), **settings)
    assert len(texts) == 2 * settings.get("num_return_sequences", 1)
    for text in texts:
        call = json.loads(text)
        assert set(call) == {"tool", "value"} and call["tool"] in ("add", "divide") and 0 <= call["value"] <= 99


@pytest.mark.parametrize("settings", SEARCHES)
def test_texts_match_a_regular_expression(model, tokenizer, settings):
    expression = r"[A-Z][a-z]{2,5} (é|ü|🙂){1,3} [0-9]{3}!"
    for text in generate(model, tokenizer, GrammarLogitsProcessor(tokenizer, regex=expression), **settings):
        assert re.fullmatch(expression, text)


def test_quotes_and_brackets_of_shell_commands_are_closed(model, tokenizer):
    processor = GrammarLogitsProcessor(tokenizer, grammar=SHELL_GRAMMAR)
    inputs = tokenizer(["add one"] * 8, return_tensors="pt")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ids = model.generate(**inputs, logits_processor=[processor], max_new_tokens=60, do_sample=True)
    ended = [row for row in ids if tokenizer.eos_token_id in row[1:]]
    assert ended
    for text in tokenizer.batch_decode(ended, skip_special_tokens=True):
        outside = re.sub(r"""\\.|'[^']*'|"(\\.|[^"\\])*"|`[^`]*`""", "", text)
        assert not re.search("['\"`]", outside) and all(
            outside.count(a) == outside.count(b) for a, b in ("()", "{}", "[]")
        )


@pytest.mark.parametrize(
    ("command", "is_allowed"),
    [
        ("find . \\( -name '*.c' -o -name \"*.[ch]\" \\) -exec grep -l x {} \\;", True),
        ("echo $(date +%s) `id`", True),
        ('awk \'{ print $1 }\' "a \\" b"', True),
        ("echo 'a", False),
        ("echo (a", False),
        ("echo a)", False),
        ('echo "a', False),
    ],
)
def test_the_grammar_of_shell_commands_accepts_real_ones(tokenizer, command, is_allowed):
    processor = GrammarLogitsProcessor(tokenizer, grammar=SHELL_GRAMMAR)
    ids = tokenizer(command, add_special_tokens=False).input_ids
    scores = torch.zeros(1, len(tokenizer))
    can_be_continued = True
    for end in range(len(ids) + 1):
        allowed = processor(torch.tensor([[0, *ids[:end]]]), scores)[0].isfinite()
        can_be_continued &= bool(allowed[ids[end] if end < len(ids) else tokenizer.eos_token_id])
    assert can_be_continued == is_allowed


def test_a_text_that_has_the_form_already_is_not_changed(model, tokenizer):
    inputs = tokenizer(["add one"], return_tensors="pt")
    others = [id for token, id in tokenizer.get_vocab().items() if not token.isascii() and id > 3]
    settings = {"max_new_tokens": 20, "suppress_tokens": others}
    processor = GrammarLogitsProcessor(tokenizer, regex=r"(?s:.*)")
    free = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, logits_processor=[processor]), free)
    processor = GrammarLogitsProcessor(tokenizer, regex="exactly this")
    forced = model.generate(**inputs, max_new_tokens=20, logits_processor=[processor])
    assert tokenizer.decode(forced[0], skip_special_tokens=True) == "exactly this"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "none"),
        ({"regex": "a", "grammar": "start: A"}, "regex, grammar"),
        ({"regex": "("}, "regex"),
        ({"json_schema": {"type": "nothing"}}, "json_schema"),
        ({"json_schema": "{"}, "json_schema"),
        ({"grammar": "start: MISSING"}, "grammar"),
    ],
)
def test_forms_that_cannot_be_used_are_refused(tokenizer, options, match):
    with pytest.raises(ValueError, match=match):
        GrammarLogitsProcessor(tokenizer, **options)
