# SPDX-License-Identifier: Apache-2.0
"""The study of ways to start, with a tiny source and a few steps."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import build_byte_tokenizer, randomize


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The script's module, whose `run(*starts)` returns the output folder."""
    path = ROOT / "examples" / "adaptation_study.py"
    spec = importlib.util.spec_from_file_location("adaptation_study", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["adaptation_study"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    rows = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(20)]
    module.build_docstring_task = lambda: dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))
    module.choose_dtype = lambda: module.torch.float32

    source = tmp_path_factory.mktemp("source")
    tokenizer = build_byte_tokenizer(ends_sources=False, chat_template="{{ messages[0]['content'] }}{{ bos_token }}")
    tokenizer.save_pretrained(source)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    randomize(AutoModelForCausalLM.from_config(config)).save_pretrained(source)
    output_dir = tmp_path_factory.mktemp("study")

    def run(*starts, steps=12, output_dir=output_dir):
        options = ["--steps", str(steps), "--batch-size", "2", "--eval-rows", "3", "--output_dir", str(output_dir)]
        sys.argv = ["adaptation_study.py", str(source), *options, "--starts", *starts]
        module.main()
        return output_dir

    module.run = run
    return module


def test_a_study_trains_every_start_once(study, monkeypatch, capsys):
    folder = study.run("default", "even", "source norm")
    runs = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert set(runs) == {"default-0", "even-0", "source_norm-0"}
    for run in runs.values():
        assert list(run["losses"]) == ["0", "6", "12"]  # 12 steps read 20 rows more than once
        assert run["losses"]["12"]["loss"] < run["losses"]["0"]["loss"]
    # The cross-attention starts at zero, so that the encoder's norm makes no difference.
    assert runs["source_norm-0"]["losses"]["0"] == runs["default-0"]["losses"]["0"]
    monkeypatch.setattr(study, "train", lambda *args: pytest.fail("it was trained before"))
    monkeypatch.setattr(study, "read_rows", lambda *args: pytest.fail("the teacher has read the rows"))
    study.run("default")
    header, _, *rows = (folder / "study.md").read_text().splitlines()
    assert header.startswith("| start | seeds | loss at step 0 |") and len(rows) == 3
    assert rows[0] in capsys.readouterr().out


def test_the_loss_before_training_is_measured_alone(study, tmp_path):
    study.run("copied cross-attention", "influence decoder", steps=0, output_dir=tmp_path)
    runs = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(runs) == 2 and all(list(run["losses"]) == ["0"] for run in runs)


def test_starts_select_layers(study):
    assert study.choose_layers("outer", 24, 8) == [0, 1, 2, 15, 17, 19, 21, 23]
    assert study.choose_layers("contiguous", 24, 8) == [0, 1, 2, 19, 20, 21, 22, 23]
    assert study.choose_layers("last", 6, 2) == [4, 5]
    assert study.choose_layers("first", 6, 4) == [0, 1, 2, 3]
    assert study.choose_layers("even", 6, 2) == [0, 5]
