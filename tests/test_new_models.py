# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that are trained on rows."""

import pytest
from transformers import AutoTokenizer

from encdec_slm.trainers.new_models import train_tokenizer


TEXTS = [f"def f{number}(): return {number}" for number in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, model_max_length=32)


def test_texts_end_in_one_end_of_text_token_and_decode_to_themselves(tokenizer):
    text = "def f(x):\n    return 'Größe →' + x  # \t."
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS[0]).data == tokenizer(TEXTS[0]).data
    assert set(loaded(TEXTS[0])) == {"input_ids", "attention_mask"}
    assert loaded.model_max_length == 32


def test_a_vocabulary_that_is_too_small_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match=r"`vocab_size`.*259"):
        train_tokenizer(["a"], vocab_size=100, model_max_length=8)
