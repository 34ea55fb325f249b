# SPDX-License-Identifier: Apache-2.0
"""The comparison of an export with its model."""

import pytest
import torch

from conftest import build_byte_tokenizer, build_model
from encdec_slm.export import CT2EncDecSLM, export_ctranslate2
from encdec_slm.trainers.engine_agreement import measure_agreement


SOURCES = [f"def function_{number}(x):\n    return x + {number}" for number in range(8)]
REFERENCES = [f"Add {number} to x." for number in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_byte_tokenizer(model_max_length=32)


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(vocab_size=len(tokenizer))


class Scripted:
    """Generates the given rows."""

    def __init__(self, rows):
        self.rows = rows

    def generate(self, input_ids, **kwargs):
        rows, self.rows = self.rows[: len(input_ids)], self.rows[len(input_ids) :]
        return torch.tensor(rows)


def test_tokens_are_compared_by_position_up_to_the_end_of_the_longer_target(model, tokenizer):
    a, b = tokenizer("ab")["input_ids"][:2]
    first = Scripted([[1, a, b, 2, 0, 0], [1, a, 2, 0, 0, 0], [1, a, b, a, b, a]])
    second = Scripted([[1, a, b, 2, 0], [1, b, a, 2, 0], [1, a, b, a, a]])
    first.config, first.generation_config = model.config, model.generation_config
    scores = measure_agreement(first, second, tokenizer, SOURCES[:3], ["ab", "ba", "ab"], batch_size=2)
    # 3 of 3, 0 of 3, 3 of 5: the last target of `second` has 4 tokens.
    assert scores == {
        **{"token_match": round(100 * 6 / 11, 2), "exact_match": 33.33},
        **{"rougeL_model": 33.33, "rougeL_exported": 66.67},
    }


def test_a_float32_export_agrees_with_its_model(model, tokenizer, tmp_path):
    export_ctranslate2(model, tmp_path / "out", "float32", tokenizer=tokenizer)
    exported = CT2EncDecSLM.from_pretrained(tmp_path / "out", intra_threads=1)
    scores = measure_agreement(model, exported, tokenizer, SOURCES, REFERENCES, max_new_tokens=12, batch_size=3)
    assert scores["token_match"] == scores["exact_match"] == 100.0
    assert scores["rougeL_model"] == scores["rougeL_exported"]
