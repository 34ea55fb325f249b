# SPDX-License-Identifier: Apache-2.0
from huggingface_hub import ModelCard

from encdec_slm.hub_cards.cards import model_card


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
