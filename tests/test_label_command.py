# SPDX-License-Identifier: Apache-2.0
import json

import pytest
import torch
from encdec_slm_cli import main
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import build_byte_tokenizer
from encdec_slm.trainers.teacher_cache import TeacherCache


ROWS = [{"source": f"question {number}", "target": f"answer {number}"} for number in range(5)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = build_byte_tokenizer(ends_sources=False)
    tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def test_a_file_is_labeled_and_a_second_run_resumes(teacher, rows, tmp_path, capsys):
    command = ["label", teacher, rows, str(tmp_path / "out"), "--distributions", "topk:8", "--rows-per-shard", "2"]
    for _ in range(2):
        assert main(command) == 0
        assert "5 rows" in capsys.readouterr().out
    cache = TeacherCache(tmp_path / "out")
    assert [example["row"] for example in cache.read(0, 5)] == list(range(5))
    assert len(cache.shards) == 3


def test_completions_follow_a_prompt_template(teacher, rows, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Example.\n{{ source }} {{ target }}")
    command = ["label", teacher, rows, str(tmp_path / "out"), "--completions", "--max-new-tokens", "4"]
    assert main([*command, "--prompt-template", str(tmp_path / "prompt.txt")]) == 0
    assert TeacherCache(tmp_path / "out").header.completions is not None
    assert main([*command, "--no-chat"]) == 1
    assert "template_fingerprint" in capsys.readouterr().err


def test_a_part_of_the_rows_is_labeled(teacher, rows, tmp_path, capsys):
    command = ["label", teacher, rows, str(tmp_path / "out"), "--distributions", "sampled:3", "--rows-per-shard", "2"]
    assert main([*command, "--rows", "2:5"]) == 0
    assert main([*command, "--rows", "0:2"]) == 0
    assert TeacherCache(tmp_path / "out").num_rows == 5


@pytest.mark.parametrize(
    ("options", "code", "named"),
    [
        ([], 2, "distributions"),
        (["--distributions", "best:3"], 2, "topk:K"),
        (["--completions", "--num-completions", "2"], 2, "temperature"),
        (["--completions", "--rows", "5"], 2, "START:STOP"),
        (["--distributions", "topk:3", "--target-column", "answer"], 1, "answer"),
        (["--completions", "--prompt-template", "{{ sorce }}"], 1, "sorce"),
        (["--completions", "--max-new-tokens", "127"], 1, "128"),
    ],
)
def test_wrong_usage_is_one_sentence(teacher, rows, tmp_path, capsys, options, code, named):
    assert main(["label", teacher, rows, str(tmp_path / "out"), *options]) == code
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_a_teacher_that_is_not_there_is_named(rows, tmp_path, capsys):
    assert main(["label", str(tmp_path / "no"), rows, str(tmp_path / "out"), "--completions"]) == 1
    assert "no folder" in capsys.readouterr().err
