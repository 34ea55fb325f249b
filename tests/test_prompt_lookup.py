# SPDX-License-Identifier: Apache-2.0
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from conftest import randomised
from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.trainers.new_models import train_tokenizer


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parent.parent / "examples" / "prompt_lookup.py"
    spec = importlib.util.spec_from_file_location("prompt_lookup", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, tiny_config):
    tokenizer = train_tokenizer(["def area(width, height): return width * height"], 300, 64)
    config = EncDecSLMConfig(**{**tiny_config.to_dict(), "vocab_size": len(tokenizer)})
    for part in (randomised(EncDecSLMForConditionalGeneration(config)), tokenizer):
        part.save_pretrained(tmp_path)
    return tmp_path


def run(script, folder, monkeypatch, *arguments):
    rows = [{"source": f"def area_{side}(width): return width * {side}"} for side in range(6)]
    monkeypatch.setattr(script, "build_docstring_task", lambda: {"test": Dataset.from_list(rows)})
    monkeypatch.setattr(sys, "argv", ["prompt_lookup.py", str(folder), *arguments])
    script.main()


def test_it_prints_a_line_for_each_way_to_decode(script, folder, monkeypatch, capsys):
    run(script, folder, monkeypatch, "--rows", "3", "--num-tokens", "1", "3")
    first, *lines = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("3 texts of ")
    assert [line.partition("  ")[0] for line in lines] == ["greedy search", "up to 1 candidates", "up to 3 candidates"]
    per_step = [float(re.search(r"([\d.]+) tokens per step", line)[1]) for line in lines]
    assert per_step[0] == 1
    assert all(1 <= rate <= 1 + most for rate, most in zip(per_step[1:], (1, 3), strict=True))


def test_a_text_that_differs_from_greedy_search_is_an_error(script, folder, monkeypatch):
    write_text = script.write_text

    def changed(model, source_ids, num_tokens, max_new_tokens):
        return [num_tokens], *write_text(model, source_ids, num_tokens, max_new_tokens)[1:]

    monkeypatch.setattr(script, "write_text", changed)
    with pytest.raises(SystemExit, match=r"2 texts differ from those of greedy search"):
        run(script, folder, monkeypatch, "--rows", "2", "--num-tokens", "2")


def test_numbers_below_one_are_refused(script, folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(script, folder, monkeypatch, "--num-tokens", "0")
    assert "must be at least 1" in capsys.readouterr().err
