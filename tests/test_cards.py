# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
from huggingface_hub import ModelCard

from encdec_slm.hub_cards.cards import converted_card, model_card


RESULTS = {
    "num_parameters": 123_456,
    "train_steps": 7,
    "train_seconds": 1.5,
    "device": "cpu",
    "before": {"loss": 9.87, "rougeL": 0.12, "rougeL_other_rows": 0.11, "exact": 0.0},
    "after": {"loss": 3.21, "rougeL": 23.4, "rougeL_other_rows": 9.8, "exact": 1.5, "rows": 11},
    "rows": {"train": {"rows": 4321, "source": 17}},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
}


def test_a_card_states_what_was_measured_and_reads_back(tiny_config, tmp_path):
    model_card("A model", tiny_config, RESULTS).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text2text-generation"
    assert card.data.tags == ["encdec_slm"]
    after = "3.21 | 23.4 | 9.8 | 1.5"
    for stated in ("# A model", "123456 parameters", "2 layers read", "4,321 rows", "17 sources", after):
        assert stated in card.text
    assert "{{" not in card.text


def converted(config, tmp_path, has_tokenizer=True):
    prompt = 'Say "{question}"\n{context}\n'
    converted_card("A model", config, 367_616, prompt, has_tokenizer).save(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    assert "{{" not in card.text and "{%" not in card.text
    return card


def test_the_card_of_a_converted_model_says_where_it_is_from_and_how_it_is_asked(tiny_config, tmp_path):
    card = converted(tiny_config, tmp_path)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text2text-generation"
    assert card.data.license == "mit"
    assert card.data.tags == ["encdec_slm"]
    stated = ("microsoft/encoder-decoder-slm", "MIT licence", "arxiv.org/abs/2501.16273", "| 367,616 |", "4 / 2 x 12")
    for text in (*stated, r'PROMPT = "Say \"{question}\"\n{context}\n"'):
        assert text in card.text
    assert "There is no tokenizer" not in card.text and "use_cache=False" not in card.text


def test_the_card_of_a_converted_model_says_that_its_tokenizer_is_missing(tiny_config, tmp_path):
    assert "There is no tokenizer" in converted(tiny_config, tmp_path, has_tokenizer=False).text


@pytest.mark.parametrize("limit", ["beyond 64 tokens (NTK, factor 4.0)", "`use_cache=False`"])
def test_the_card_of_a_converted_model_with_scaled_frequencies_says_where_they_deviate(tiny_config, tmp_path, limit):
    rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    card = converted(dataclasses.replace(tiny_config, rope_parameters=rope_parameters), tmp_path)
    assert limit in card.text
