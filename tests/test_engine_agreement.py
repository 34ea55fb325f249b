# SPDX-License-Identifier: Apache-2.0
"""What an export writes beside what the model writes."""

import pytest
import torch
from datasets import Dataset
from encdec_slm_cli import main

from conftest import randomised
from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.export import CT2EncDecSLM, export_ctranslate2
from encdec_slm.trainers.engine_agreement import agreement
from encdec_slm.trainers.new_models import preset_config, train_tokenizer
from encdec_slm.trainers.tasks import docstrings


SOURCES = [f"def function_{number}(x):\n    return x + {number}" for number in range(8)]
REFERENCES = [f"Add {number} to x." for number in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SOURCES + REFERENCES, 300, 32)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = preset_config("tiny", tokenizer)
    return randomised(EncDecSLMForConditionalGeneration(config)).eval()


class Scripted:
    """Writes the given rows."""

    def __init__(self, rows):
        self.rows = rows

    def generate(self, input_ids, **kwargs):
        rows, self.rows = self.rows[: len(input_ids)], self.rows[len(input_ids) :]
        return torch.tensor(rows)


def test_tokens_are_compared_position_by_position_up_to_the_end_of_the_longer_target(model, tokenizer):
    a, b = tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0]
    first = Scripted([[1, a, b, 2, 0, 0], [1, a, 2, 0, 0, 0], [1, a, b, a, b, a]])
    second = Scripted([[1, a, b, 2, 0], [1, b, a, 2, 0], [1, a, b, a, a]])
    first.config, first.generation_config = model.config, model.generation_config
    scores = agreement(first, second, tokenizer, SOURCES[:3], ["ab", "ba", "ab"], batch_size=2)
    # 3 of 3, 0 of 3, 3 of 5: the last target of `second` is cut after 4 tokens.
    assert scores["token_match"] == round(100 * 6 / 11, 2)
    assert scores["exact_match"] == 33.33
    assert scores["rougeL_model"] == 33.33
    assert scores["rougeL_exported"] == 66.67


def test_a_float32_export_agrees_wholly(model, tokenizer, tmp_path):
    export_ctranslate2(model, tmp_path / "out", "float32", tokenizer=tokenizer)
    exported = CT2EncDecSLM.from_pretrained(tmp_path / "out", intra_threads=1)
    scores = agreement(model, exported, tokenizer, SOURCES, REFERENCES, max_new_tokens=12, batch_size=3)
    assert scores["token_match"] == scores["exact_match"] == 100.0
    assert scores["rougeL_model"] == scores["rougeL_exported"]


def test_the_command_exports_and_prints_the_agreement(model, tokenizer, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = [tmp_path / "model", tmp_path / "out", "--quantization", "int8_float32", "--agreement", "--rows", "4"]
    # The whole standard library would be read, which the test of the task does.
    rows = Dataset.from_list([{"source": text, "target": text} for text in SOURCES])
    monkeypatch.setattr(docstrings, "build_docstring_task", lambda: {"validation": rows})
    assert main(["export", *map(str, arguments)]) == 0
    shown = capsys.readouterr().out
    assert "MB in int8_float32 to" in shown
    assert "On 4 held-out rows of the docstring task" in shown
    assert "equal tokens" in shown and "(export)" in shown
    assert CT2EncDecSLM.from_pretrained(tmp_path / "out").config.vocab_size == model.config.vocab_size
