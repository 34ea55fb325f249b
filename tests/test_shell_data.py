# SPDX-License-Identifier: Apache-2.0
"""The rows and models that the shell model is made of, and its decoder-only baseline."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from trl import ModelConfig

from conftest import build_byte_tokenizer
from encdec_slm.checkpoints import load_checkpoint
from encdec_slm.trainers.teacher_cache import CacheHeader, Example, write_shard
from encdec_slm.vocabulary import old_token_ids


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import everyday_rows  # noqa: E402
import shell_baseline  # noqa: E402
import shell_data  # noqa: E402
import shell_requests  # noqa: E402
import shell_teacher  # noqa: E402


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What examples/shell_data.py writes, of a tiny teacher and a few rows."""
    folder = tmp_path_factory.mktemp("shell")
    tokenizer = build_byte_tokenizer(ends_sources=False)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    teacher = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    weight = teacher.get_input_embeddings().weight.data
    letters = tokenizer.convert_tokens_to_ids(["a", "b", "z"])
    weight[letters[1]] = weight[letters[0]]
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    rows = [
        {"source": f"list {name} a b z", "target": f"ls {name}"} for name in ("files", "folders", "links", "users")
    ]
    pages = [{"platform": "common", "page": "df", "command": "df", "about": "Disk", "description": "Show free space:"}]
    options = {
        "nl2bash": write_jsonl(folder / "nl2bash.jsonl", rows),
        "held-out": write_jsonl(folder / "held_out.jsonl", rows[:1]),
        "tldr": write_jsonl(folder / "tldr.jsonl", [{**page, "example": "df"} for page in pages]),
        **{"teacher": str(folder / "teacher"), "preset": "tiny", "copies": "0", "everyday-copies": "1"},
        "vocabulary-size": "300",
    }
    arguments = [str(folder / "out"), *(part for name, value in options.items() for part in (f"--{name}", value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["shell_data.py", *arguments])
        shell_data.main()
    return folder / "out"


def test_rows_are_decontaminated_and_come_from_all_sources(folder):
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    targets = {row["target"] for row in rows if row["origin"] != "everyday"}
    assert targets == {"ls folders", "ls links", "ls users", "df"}
    assert {row["origin"] for row in rows} == {"nl2bash", "tldr", "everyday"}


@pytest.mark.parametrize("name", ["student", "baseline"])
def test_tokens_that_are_near_for_the_teacher_are_near_from_the_start(folder, name):
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    model = (
        AutoModelForCausalLM.from_pretrained(folder / name)
        if name == "baseline"
        else load_checkpoint(folder / name)[0]
    )
    first, second, other = model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(["a", "b", "z"])]
    torch.testing.assert_close(first, second)
    assert (first - other).norm() > 0.1 * first.norm()


def run_training(example, folder, monkeypatch, output_dir, **options):
    """Run two steps of an example that trains a decoder-only model."""
    rows = [{"source": "list files", "target": "ls"}] * 8
    options |= {
        f"{name}_file": write_jsonl(output_dir.with_suffix(".jsonl"), rows) for name in ("train", "validation", "test")
    }
    options |= {"output_dir": output_dir, "per_device_train_batch_size": 2, "use_cpu": "true", "max_steps": 2}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", [example.__file__, *arguments])
    example.main()


def test_the_baseline_is_trained_by_the_recipe(folder, monkeypatch, tmp_path):
    run_training(shell_baseline, folder, monkeypatch, tmp_path / "run", model_name_or_path=folder / "baseline")
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "baseline", tmp_path / "run"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])


def test_a_teacher_with_trimmed_embeddings_predicts_as_before(folder):
    teacher = AutoModelForCausalLM.from_pretrained(folder.parent / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "baseline")
    old_ids = old_token_ids(tokenizer)
    ids = torch.tensor([tokenizer("list a b")["input_ids"]])
    expected = teacher(torch.tensor(old_ids)[ids]).logits[..., old_ids]
    torch.testing.assert_close(shell_teacher.trim_embeddings(teacher, tokenizer)(ids).logits, expected)
    assert teacher.config.eos_token_id == tokenizer.eos_token_id


def test_the_teacher_is_tuned_and_saved_whole(folder, monkeypatch, tmp_path):
    options = {"model_name_or_path": folder.parent / "teacher", "tokenizer": folder / "baseline"}
    run_training(shell_teacher, folder, monkeypatch, tmp_path / "run", optimizer="adamw", lora_r=2, **options)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "merged", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(folder.parent / "teacher")
    name = "model.layers.0.mlp.up_proj.weight"
    assert tuned.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "run" / "merged"))
    assert not torch.allclose(before.state_dict()[name], tuned.state_dict()[name], atol=1e-4, rtol=0)


def test_decoder_only_models_have_the_attention_that_is_asked_for(folder):
    args, model_args = SimpleNamespace(tokenizer=folder / "baseline"), ModelConfig(attn_implementation="eager")
    for load, name in (
        (shell_baseline.load_baseline, folder / "baseline"),
        (shell_teacher.load_teacher, folder.parent / "teacher"),
    ):
        assert load(name, args, model_args)[0].config._attn_implementation == "eager"


def test_everyday_rows_are_written_without_held_out_requests(tmp_path, capsys):
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"source": "Show free memory", "target": "free -h"}) + "\n")
    options = ["--topics", "basics", "--copies", "2"]
    everyday_rows.main(
        [str(tmp_path / "rows" / "everyday.jsonl"), "--held-out", str(tmp_path / "held_out.jsonl"), *options]
    )
    rows = [json.loads(line) for line in (tmp_path / "rows" / "everyday.jsonl").read_text().splitlines()]
    assert f"{len(rows):,} rows" in capsys.readouterr().out and 1_000 < len(rows) < 1_300
    requests = {row["source"].lower() for row in rows}
    assert "show memory usage" in requests and "show free memory" not in requests
    with pytest.raises(ValueError, match="'cooking', but about basics"):
        everyday_rows.main([str(tmp_path / "everyday.jsonl"), "--topics", "cooking"])


def test_requests_of_a_teacher_become_training_rows(monkeypatch, tmp_path, capsys):
    rows = [{"source": "count the lines of a.txt", "target": "wc -l a.txt"}, {"source": "show x", "target": "cat x"}]
    texts = [[" how many lines has a.txt?\nassistant", "lines of another file"], ["what does x say?"]]
    examples = [
        Example(row, str(row), None, sample, text)
        for row, all_ in enumerate(texts)
        for sample, text in enumerate(all_)
    ]
    header = CacheHeader("teacher", *["x"] * 3, vocab_size=9, distributions=None, completions="{}", rows_per_shard=2)
    write_shard(tmp_path / "labels", header, 0, 2, examples)
    commands = {"how many lines has a.txt?": "wc -l", "what does x say?": "echo x"}
    model = SimpleNamespace(answer=lambda request, number: [SimpleNamespace(command=commands[request])])
    monkeypatch.setattr(shell_requests, "load_shell_model", lambda name: model)
    output = tmp_path / "requests.jsonl"
    arguments = [write_jsonl(tmp_path / "rows.jsonl", rows), str(output), "--labels", str(tmp_path / "labels")]
    monkeypatch.setattr(sys, "argv", ["shell_requests.py", *arguments])
    shell_requests.main()
    expected = {"source": "how many lines has a.txt?", "target": "wc -l a.txt", "origin": "teacher"}
    assert [json.loads(line) for line in output.read_text().splitlines()] == [expected]
    assert capsys.readouterr().out == "3 requests were written, and 1 are kept.\n"
