# SPDX-License-Identifier: Apache-2.0
"""A teacher, its student and a student without it: two steps each, from rows to a saved folder and a table."""

import json
from dataclasses import replace

import pytest
from encdec_slm_cli import main
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm.trainers import Seq2SeqDistillationConfig, distilling
from encdec_slm.trainers.distilling import DistillArguments, distill


ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(40)]
SCORES = {"loss", "rougeL", "rougeL_other_rows", "exact", "teacher_agreement", "num_parameters", "train_seconds"}
NAMES = ("run", "run_teacher")
SPEEDS = {"first_token_seconds", "tokens_per_second"}


def write_rows(folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


def training_args(folder, **fields):
    defaults = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "use_cpu": True}
    defaults |= {"per_device_train_batch_size": 4, "disable_tqdm": True, "bf16": False, "report_to": []}
    defaults |= {"lmbda": 0.0, "kd_ratio": 0.5, "max_source_length": 64, "max_completion_length": 8}
    defaults |= {"generation_kwargs": {"no_repeat_ngram_size": 3}}
    return Seq2SeqDistillationConfig(str(folder), **{**defaults, **fields})


def arguments(rows_file, **fields):
    tiny = {"preset": "tiny", "teacher_preset": "tiny", "vocab_size": 300, "max_eval_samples": 3}
    return DistillArguments(train_file=rows_file, **{**tiny, "teacher_num_train_epochs": 0.25, **fields})


@pytest.fixture(scope="module", autouse=True)
def few_timed_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilling, "NUM_TIMED_SOURCES", 2)
        patch.setattr(distilling, "NUM_TIMED_TOKENS", 3)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and results of a run, and the file of its rows."""
    rows_file = write_rows(tmp_path_factory.mktemp("rows"))
    folder = tmp_path_factory.mktemp("distilled") / "student"
    return folder, distill(arguments(rows_file), training_args(folder)), rows_file


def test_a_run_compares_three_models_by_all_numbers(finished):
    _, results, _ = finished
    assert [row["name"] for row in results["models"]] == ["teacher", "distilled student", "student without teacher"]
    for row in results["models"]:
        assert set(row) == {"name"} | SCORES | SPEEDS
        assert row["loss"] > 0 and row["first_token_seconds"] > 0 and row["tokens_per_second"] > 0
    assert results["models"][0]["teacher_agreement"] == 100.0
    assert results["models"][1]["num_parameters"] == results["models"][2]["num_parameters"]
    assert results["train_steps"] == 2


def test_the_folders_hold_what_the_run_gave(finished):
    folder, results, _ = finished
    written = {"results.json", "predictions.jsonl", "loss.png", "README.md", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in folder.iterdir()} >= written
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    student = AutoModelForSeq2SeqLM.from_pretrained(folder)
    # As it was evaluated: 8 tokens behind the start token, and what `generation_kwargs` say.
    assert (student.generation_config.max_length, student.generation_config.no_repeat_ngram_size) == (9, 3)
    AutoModelForSeq2SeqLM.from_pretrained(f"{folder}_cross_entropy")
    teacher = AutoModelForCausalLM.from_pretrained(f"{folder}_teacher")
    assert teacher.num_parameters() == results["models"][0]["num_parameters"]
    assert AutoTokenizer.from_pretrained(f"{folder}_teacher").chat_template is not None
    assert AutoTokenizer.from_pretrained(folder).chat_template is None


def test_a_stopped_run_takes_the_teacher_that_it_has_trained(finished, monkeypatch):
    folder, results, rows_file = finished
    monkeypatch.setattr(distilling, "train_decoder_only", lambda *args: pytest.fail("the teacher is there"))
    again = distill(arguments(rows_file), training_args(folder, resume_from_checkpoint="true"))
    assert again["models"][0]["loss"] == results["models"][0]["loss"]
    assert again["models"][1]["loss"] == pytest.approx(results["models"][1]["loss"])


def test_any_teacher_and_student_can_be_named(finished, tmp_path):
    folder, _, rows_file = finished
    args = arguments(rows_file, teacher_preset=None, model_name_or_path=str(folder), compare_with_cross_entropy=False)
    results = distill(args, training_args(tmp_path / "run", teacher_model_name_or_path=f"{folder}_teacher"))
    teacher, student = results["models"]
    assert teacher["train_seconds"] is None and student["name"] == "distilled student"


def test_a_student_can_be_cut_from_the_teacher_that_is_trained_for_it_and_both_go_on_where_they_stopped(tmp_path):
    args = arguments(write_rows(tmp_path), student_from_teacher=True, compare_with_cross_entropy=False)
    options = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "true"}
    distill(args, training_args(tmp_path / "run", **options))
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "run_teacher")
    assert (student.config.encoder_num_hidden_layers, student.config.decoder_num_hidden_layers) == (4, 2)
    assert student.config.intermediate_size == teacher.config.intermediate_size
    # Steps of the teacher: 10 batches of 40 rows less those held out, a quarter of them, then twice as many.
    (tmp_path / "run_teacher" / "trained.json").unlink()
    args = replace(args, teacher_num_train_epochs=0.5)
    distill(args, training_args(tmp_path / "run", **{**options, "max_steps": 3}))
    steps = {name: {int(path.name[11:]) for path in (tmp_path / name).glob("checkpoint-*")} for name in NAMES}
    assert steps == {"run": {1, 2, 3}, "run_teacher": {1, 2, 3, 4}}


def test_the_command_prints_the_table_and_who_won(finished, tmp_path, capsys):
    _, _, rows_file = finished
    command = ["distill", "--config", "distill_docstrings", "--train_file", rows_file]
    command += ["--max_steps", "2", "--preset", "tiny", "--teacher_preset", "tiny", "--vocab_size", "300"]
    command += ["--teacher_num_train_epochs", "0.25", "--max_eval_samples", "3", "--max_completion_length", "8"]
    command += ["--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for name in ("teacher", "distilled student", "student without teacher"):
        assert any(line.startswith(name) for line in shown.splitlines())
    assert "After 2 steps each on the same rows, distillation" in shown
