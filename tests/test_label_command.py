# SPDX-License-Identifier: Apache-2.0
import json
import shutil

import pytest
import torch
from encdec_slm_cli import main
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import build_byte_tokenizer
from encdec_slm.checkpoints import load_checkpoint
from encdec_slm.run_results import RunResults
from encdec_slm.trainers import distill_job
from encdec_slm.trainers.teacher_cache import TeacherCache
from encdec_slm.vocabulary import old_token_ids


ROWS = [{"source": f"question {number}", "target": f"answer {number}"} for number in range(5)]
# A small run by the default recipe.
TRAINING = {
    **{"preset": "tiny", "max_steps": 2, "per_device_train_batch_size": 2, "max_eval_samples": 2, "eval_steps": 2},
    **{"save_strategy": "no", "use_cpu": "true", "disable_tqdm": "true", "logging_steps": 1},
}


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


def test_an_engine_that_would_drop_an_adapter_refuses_it(teacher, rows, tmp_path, capsys):
    adapter = {"base_model_name_or_path": teacher, "peft_type": "LORA"}
    shutil.copytree(teacher, tmp_path / "adapted")
    (tmp_path / "adapted" / "adapter_config.json").write_text(json.dumps(adapter))
    command = ["label", str(tmp_path / "adapted"), rows, str(tmp_path / "out"), "--completions"]
    assert main([*command, "--engine", "ctranslate2"]) == 1
    assert "merge_and_unload" in capsys.readouterr().err


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
        (["--distributions", "topk:3", "--rows", "512:600"], 1, "512"),
        (["--distributions", "topk:3", "--temperature", "1"], 2, "--completions"),
        (["--completions", "--base-url", "http://localhost"], 2, "--engine openai"),
        (["--completions", "--engine", "openai", "--requests-per-minute", "-1"], 1, "-1"),
    ],
)
def test_wrong_usage_is_one_sentence(teacher, rows, tmp_path, capsys, options, code, named):
    assert main(["label", teacher, rows, str(tmp_path / "out"), *options]) == code
    assert named in capsys.readouterr().err.splitlines()[-1]


def test_labels_replace_neither_a_file_nor_their_teacher(teacher, rows, capsys):
    assert main(["label", teacher, rows, rows, "--distributions", "topk:3"]) == 1
    assert rows in capsys.readouterr().err
    assert main(["label", teacher, rows, teacher, "--distributions", "topk:3"]) == 1
    assert teacher in capsys.readouterr().err


def test_the_built_in_task_is_labeled_by_its_name(teacher, tmp_path):
    command = ["label", teacher, "docstrings", str(tmp_path / "out"), "--distributions", "topk:3", "--no-chat"]
    assert main([*command, "--rows", "0:2", "--rows-per-shard", "2", "--prompt-template", "{{ source[:40] }}"]) == 0
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1


def test_a_teacher_that_is_not_there_is_named(rows, tmp_path, capsys):
    assert main(["label", str(tmp_path / "no"), rows, str(tmp_path / "out"), "--completions"]) == 1
    assert "no folder" in capsys.readouterr().err


@pytest.fixture
def distill(rows, tmp_path, monkeypatch):
    """Run `distill` with a cache on the labeled rows; returns the exit code."""
    monkeypatch.setattr(distill_job, "NUM_TIMED_SOURCES", 1)
    monkeypatch.setattr(distill_job, "NUM_TIMED_TOKENS", 2)

    def distill(cache, **settings):
        paths = {"teacher_cache": cache, "train_file": rows, "output_dir": str(tmp_path / "student")}
        settings = {**paths, **TRAINING, **settings}
        return main(["distill", *(text for name, value in settings.items() for text in (f"--{name}", str(value)))])

    return distill


@pytest.fixture(scope="module")
def labels(teacher, tmp_path_factory):
    """Folders of labels: of given targets, and completions."""
    folder = tmp_path_factory.mktemp("labels")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["label", teacher, str(folder / "rows.jsonl"), str(folder / "given"), "--distributions", "topk:8"]
    assert main(command) == 0
    command = ["label", teacher, str(folder / "rows.jsonl"), str(folder / "completions"), "--completions"]
    assert main([*command, "--max-new-tokens", "4", "--num-completions", "2", "--temperature", "1"]) == 0
    return folder


@pytest.mark.parametrize("streams", [False, True])
def test_distill_needs_no_teacher_beside_its_labels(labels, distill, rows, tmp_path, capsys, streams):
    held_out = {"validation_file": rows, "test_file": rows, "dataset_streaming": True} if streams else {}
    assert distill(labels / "given", trim_vocabulary="true", **held_out) == 0
    results = RunResults.load(tmp_path / "student" / "results.json")
    assert [model.name for model in results.models] == ["distilled student", "student without teacher"]
    assert not (tmp_path / "student_teacher").exists() and "teacher_agreement" not in results.saved.metrics
    student, tokenizer = load_checkpoint(tmp_path / "student")
    assert student.config.vocab_size == len(tokenizer) == len(old_token_ids(tokenizer))
    original = TeacherCache(labels / "given").load_tokenizer()
    assert tokenizer.tokenize("question 3") == original.tokenize("question 3")
    assert "Generating" not in capsys.readouterr().err


def test_distill_trains_on_stored_completions_and_measures_on_the_targets_of_the_data(labels, distill, tmp_path):
    assert distill(labels / "completions", kd_ratio=0) == 0
    results = RunResults.load(tmp_path / "student" / "results.json")
    assert results.num_rows["train"] == 6 and "generated by the teacher" in results.targets
    assert {sample["reference"] for sample in results.samples} <= {row["target"] for row in ROWS}


def test_labels_without_a_tokenizer_teach_a_student_with_a_new_one(labels, distill, tmp_path, capsys):
    shutil.copytree(labels / "completions", tmp_path / "labels", ignore=shutil.ignore_patterns("tokenizer"))
    assert distill(tmp_path / "labels", kd_ratio=0, vocab_size=270) == 0
    assert load_checkpoint(tmp_path / "student")[0].config.vocab_size <= 270
    assert distill(tmp_path / "labels", kd_ratio=0, trim_vocabulary="true") == 1
    assert "trim_vocabulary" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "code", "named"),
    [
        ({"teacher_model_name_or_path": "somewhere"}, 2, "teacher_model_name_or_path"),
        ({"seq_kd": "true"}, 2, "seq_kd"),
        ({"student_from_teacher": "true"}, 1, "student_from_teacher"),
        ({"teacher_prompt_template": "{{ source }}"}, 1, "teacher_prompt_template"),
        ({"source_column": "target", "target_column": "source"}, 1, "Row "),
        ({"teacher_cache": "nowhere"}, 1, "nowhere"),
    ],
)
def test_settings_that_do_not_fit_the_labels_are_one_sentence(labels, distill, capsys, settings, code, named):
    assert distill(**{"cache": labels / "given", **settings}) == code
    assert named in capsys.readouterr().err.splitlines()[-1]
