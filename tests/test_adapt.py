# SPDX-License-Identifier: Apache-2.0
"""From a decoder-only folder to a trained encoder-decoder, by the command."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from conftest import randomised
from encdec_slm.configuration import decoder_only_twin
from encdec_slm.trainers.run_reports import preset_config
from encdec_slm.trainers.seq2seq_data import train_tokenizer


ROOT = Path(__file__).parent.parent
ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(30)]
SHORT = [
    *("--max_steps", "1", "--max_eval_samples", "2", "--save_strategy", "no", "--max_source_length", "64"),
    *("--use_cpu", "true"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tokenizer = train_tokenizer((row["source"] for row in ROWS), 300, 64)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ bos_token }}"
    tokenizer.save_pretrained(folder)
    config = decoder_only_twin(preset_config("tiny", tokenizer))
    randomised(AutoModelForCausalLM.from_config(config)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def run_main(monkeypatch, *arguments, script="examples/adapt.py"):
    """The script's `main` in this process."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    runpy.run_path(str(ROOT / script))["main"]()


def test_a_checkpoint_is_adapted_saved_and_loaded(source, tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, source, tmp_path / "adapted", "--split", "1/2-1/2", "--strategy", "first-last")
    shown = capsys.readouterr().out
    assert "3 encoder and 3 decoder layers" in shown and "torch.bfloat16" in shown
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "adapted"))
    assert ours.chat_template == theirs.chat_template and ours.get_vocab() == theirs.get_vocab()
    assert ours("def f")["input_ids"] == theirs("def f")["input_ids"]
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapted").config.decoder_start_token_id == 1


def test_an_adapted_checkpoint_is_fine_tuned(source, rows_file, tmp_path, monkeypatch):
    recipe = ("--finetune", "finetune_docstrings", "--train_file", rows_file, "--output_dir", tmp_path / "tuned")
    run_main(monkeypatch, source, tmp_path / "adapted", *recipe, *SHORT, "--max_target_length", "8")
    results = json.loads((tmp_path / "tuned" / "results.json").read_text(encoding="utf-8"))
    assert results["model"] == str(tmp_path / "adapted") and results["train_steps"] == 1


def test_an_adapted_checkpoint_is_distilled_from_what_it_was_cut_from(source, rows_file, tmp_path, monkeypatch):
    recipe = ("--distill", "distill_adapted", "--train_file", rows_file, "--output_dir", tmp_path / "distilled")
    run_main(monkeypatch, source, tmp_path / "adapted", *recipe, *SHORT, "--max_completion_length", "8")
    results = json.loads((tmp_path / "distilled" / "results.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in results["models"]] == ["teacher", "distilled student"]
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "distilled")
    assert (student.dtype, student.config.encoder_num_hidden_layers) == (torch.float32, 4)


def test_what_is_wrong_ends_the_command_with_a_sentence(source):
    command = [sys.executable, "examples/adapt.py", str(source), str(source)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    # torchao, where it is installed, tells of kernels that it has not for this machine.
    said = [line for line in process.stderr.splitlines() if "torchao" not in line and "_pytree" not in line]
    assert said[0].startswith(f"adapt.py: The folder '{source}' is not empty")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{source}", "{output}", "--strategy", "odd"], "Unknown strategy 'odd'"),
        (["{output}/none", "{output}"], "is no folder here, and could not be loaded from the Hub"),
        (["{rows}", "{output}"], "has no tokenizer that can be loaded"),
    ],
)
def test_a_refusal_leaves_no_folder(source, rows_file, tmp_path, monkeypatch, arguments, message):
    names = {"source": source, "output": tmp_path / "output", "rows": rows_file.parent}
    with pytest.raises(ValueError, match=message):
        run_main(monkeypatch, *(argument.format(**names) for argument in arguments))
    assert not list(tmp_path.iterdir())


def test_an_unknown_key_is_refused_where_nothing_is_trained(source, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_main(monkeypatch, source, "output", "--seed", "1")
    assert "unrecognized arguments: --seed 1" in capsys.readouterr().err
