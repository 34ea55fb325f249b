# SPDX-License-Identifier: Apache-2.0
"""Folders that the command `adapt` and the snippet of docs/adapt.md write, and what they refuse."""

import json
import re
from pathlib import Path

import pytest
from encdec_slm_cli import main
from huggingface_hub.errors import GatedRepoError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from conftest import build_byte_tokenizer, randomize
from encdec_slm.checkpoints import load_checkpoint


ROOT = Path(__file__).parent.parent
ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(30)]
SHORT = [
    *("--max_steps", "1", "--max_eval_samples", "2", "--save_strategy", "no", "--max_source_length", "64"),
    *("--use_cpu", "true"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Llama in bfloat16 whose tokenizer has a chat template and no padding token."""
    folder = tmp_path_factory.mktemp("source")
    template = "{{ messages[0]['content'] }}{{ bos_token }}"
    words = ["Ġreturn", "Ġunused"]
    tokenizer = build_byte_tokenizer(ends_sources=False, pad_token=None, chat_template=template, words=words)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6},
        **{"num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512},
        tie_word_embeddings=True,
    )
    randomize(AutoModelForCausalLM.from_config(config)).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def run(*arguments):
    assert main([str(argument) for argument in arguments]) in (None, 0)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_checkpoint_is_adapted_saved_and_loaded(source, tmp_path, capsys):
    run("adapt", source, tmp_path / "adapted", "--split", "1/2-1/2", "--strategy", "first-last")
    shown = capsys.readouterr().out
    assert "3 encoder and 3 decoder layers" in shown and "torch.bfloat16" in shown
    model, tokenizer = load_checkpoint(tmp_path / "adapted")
    original = AutoTokenizer.from_pretrained(source)
    assert tokenizer.chat_template == original.chat_template and tokenizer.get_vocab() == original.get_vocab()
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2
    assert model.config.decoder_start_token_id == 1


def test_the_documented_snippet_gives_a_folder_that_is_fine_tuned(source, rows_file, tmp_path, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adapt.md").read_text("utf-8"), re.DOTALL)
    snippet = re.sub(r"^source = .*", f"source = {str(source)!r}", snippet, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/adapt.md", "exec"), {})
    assert AutoTokenizer.from_pretrained("outputs/adapted").pad_token_id == 2
    recipe = ("--config", "finetune_docstrings", "--train_file", rows_file, "--output_dir", tmp_path / "tuned")
    run("finetune", *recipe, "--model_name_or_path", "outputs/adapted", *SHORT, "--max_target_length", "8")


@pytest.mark.parametrize("output", ["{source}", "{source}/adapted", "{source}/.."])
def test_an_output_that_overlaps_the_source_is_refused_and_nothing_changes(source, output, capsys):
    before = contents(source)
    assert main(["adapt", str(source), output.format(source=source), "--overwrite"]) == 1
    assert str(source) in capsys.readouterr().err
    assert contents(source) == before and not (source / "adapted").exists()


def test_overwrite_replaces_an_earlier_checkpoint_and_nothing_else(source, tmp_path, capsys):
    output = tmp_path / "adapted"
    run("adapt", source, output)
    assert main(["adapt", str(source), str(output)]) == 1
    run("adapt", source, output, "--encoder-layers", "2", "--overwrite")
    assert load_checkpoint(output)[0].config.encoder_num_hidden_layers == 2
    (output / "thesis.tex").write_text("precious")
    before = contents(output)
    assert main(["adapt", str(source), str(output), "--overwrite"]) == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert contents(output) == before


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{source}", "{output}", "--strategy", "odd"], "'odd'"),
        (["{output}/none", "{output}"], "none"),
        (["{rows}", "{output}"], "tokenizer"),
    ],
)
def test_a_refusal_leaves_no_folder(source, rows_file, tmp_path, arguments, named, capsys):
    names = {"source": source, "output": tmp_path / "output", "rows": rows_file.parent}
    assert main(["adapt", *(argument.format(**names) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_the_advice_of_the_hub_on_a_gated_repository_is_kept(tmp_path, monkeypatch, capsys):
    import httpx

    advice = "Visit https://huggingface.co/someone/gated to ask for access."
    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/someone/gated"))
    message = f"403 Client Error. (Request ID: Root=1-2;3)\n\nCannot access gated repo for url.\n{advice}"
    error = GatedRepoError(message, response=response)

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("encdec_slm.checkpoints.snapshot_download", refuse)
    monkeypatch.setattr("encdec_slm.checkpoints.check_hub_name", lambda *args: True)
    assert main(["adapt", "someone/gated", str(tmp_path / "output")]) == 1
    assert advice.rstrip(".") in capsys.readouterr().err


def test_an_unknown_key_without_a_training_is_refused(source, capsys):
    assert main(["adapt", str(source), "output", "--seed", "1"]) == 2
    assert "--seed" in capsys.readouterr().err


def test_the_vocabulary_is_trimmed_to_rows(source, rows_file, tmp_path, capsys):
    run("adapt", source, tmp_path / "adapted", "--trim-vocabulary", rows_file, "--vocabulary-size", 280)
    model, tokenizer = load_checkpoint(tmp_path / "adapted")
    assert model.config.vocab_size == len(tokenizer) < len(AutoTokenizer.from_pretrained(source))
    share = model.get_input_embeddings().weight.numel() / model.num_parameters()
    shown = capsys.readouterr().out
    assert f"{len(tokenizer)} of " in shown and f"{share:.1%} of the model" in shown


def test_the_loss_before_training_is_printed(source, rows_file, tmp_path, capsys):
    run("adapt", source, tmp_path / "adapted", "--calibration", rows_file)
    shown = float(re.search(r"([\d.]+) nats per target token, on 30 rows", capsys.readouterr().out)[1])
    model, tokenizer = load_checkpoint(tmp_path / "adapted")
    total = num_tokens = 0
    for row in ROWS:
        labels = tokenizer(row["target"] + tokenizer.eos_token, return_tensors="pt").input_ids
        inputs = tokenizer(row["source"], return_tensors="pt")
        total += labels.numel() * model(**inputs, labels=labels).loss.item()
        num_tokens += labels.numel()
    assert shown == pytest.approx(total / num_tokens, abs=0.02)


@pytest.mark.parametrize(("content", "named"), [("", "calibration"), ('{"source": "a"}\n', "targets")])
def test_rows_without_targets_are_refused_for_calibration(source, content, named, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(content)
    arguments = ["adapt", str(source), str(tmp_path / "adapted"), "--calibration", str(tmp_path / "rows.jsonl")]
    assert main(arguments) == 1
    assert named in capsys.readouterr().err and not (tmp_path / "adapted").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "empty"),
        ("\x89PNG\r\n\x1a\n\0\0", "line 1"),
        ('{"id": 1}\n', "`source`"),
        ('{"source": "\\u0000"}\n', "binary"),
        ('{"source": ""}\n', "`--trim-vocabulary` ("),
    ],
)
def test_rows_without_text_are_refused(source, content, named, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(content, encoding="latin-1")
    command = ["adapt", source, tmp_path / "adapted", "--trim-vocabulary", tmp_path / "rows.jsonl"]
    assert main([str(argument) for argument in command]) == 1
    assert named in capsys.readouterr().err and not (tmp_path / "adapted").exists()


def test_a_vocabulary_smaller_than_all_bytes_is_refused(source, rows_file, tmp_path, capsys):
    command = ["adapt", source, tmp_path / "adapted", "--trim-vocabulary", rows_file, "--vocabulary-size", "100"]
    assert main([str(argument) for argument in command]) == 1
    assert "`--vocabulary-size` is 100" in capsys.readouterr().err
