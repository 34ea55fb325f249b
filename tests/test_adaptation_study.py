# SPDX-License-Identifier: Apache-2.0
"""The study's runs of one step, what goes on after an interruption, and its table, verdict and plot."""

import importlib.util
import json
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM


ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(30)]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = Path(__file__).parent.parent / "examples" / "adaptation_study.py"
    spec = importlib.util.spec_from_file_location("adaptation_study", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows_file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows_file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    module.FinetuneArguments = partial(module.FinetuneArguments, train_file=str(rows_file), max_eval_samples=2)
    module.SOURCE_RUN = {"max_steps": 1}
    module.STUDENT_RUN = {"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    return module


@pytest.fixture(scope="module")
def finished(study, tmp_path_factory):
    """The folder of a study and the numbers of one student of each kind."""
    folder = tmp_path_factory.mktemp("study")
    study.train_source("tiny", folder / "source")
    return folder, {name: study.train_student(folder, name, 0) for name in study.BEGINNINGS}


def test_students_have_one_shape_and_as_many_steps(finished):
    _, runs = finished
    assert list(runs) == ["even", "first-last", "random"]
    assert len({(run["num_parameters"], run["train_steps"]) for run in runs.values()}) == 1
    assert len({run["loss"] for run in runs.values()}) == 3
    assert all([entry["step"] for entry in run["validation_losses"]] == [1] for run in runs.values())


def test_a_copied_student_knows_the_source_and_a_random_one_does_not(study, finished, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(finished[0] / "source")
    for beginning, is_copied in (("even", True), ("random", False)):
        study.write_student(finished[0] / "source", beginning, 0, tmp_path / beginning)
        student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / beginning)
        difference = student.get_input_embeddings().weight - source.get_input_embeddings().weight
        assert (difference.abs().max() == 0) == is_copied


def test_what_is_finished_is_not_trained_again(study, finished, monkeypatch):
    folder, runs = finished
    for name in ("train_decoder_only", "finetune"):
        monkeypatch.setattr(study, name, lambda *args, **kwargs: pytest.fail("it is there"))
    study.train_source("tiny", folder / "source")
    assert study.train_student(folder, "even", 0) == runs["even"]


@pytest.fixture
def runs(finished):
    """Two seeds each; `even` has losses 2 and 3, `first-last` 3 and 4, `random` 5 and 6."""
    first = {"even": 2.0, "first-last": 3.0, "random": 5.0}
    losses = [(name, seed, first[name] + seed) for name in first for seed in (0, 1)]
    return [{**finished[1][name], "seed": seed, "loss": loss} for name, seed, loss in losses]


def test_the_table_has_mean_and_spread_over_the_seeds(study, runs):
    header, _, *rows = study.study_table(runs).splitlines()
    assert header.startswith("| begins as | loss (nats per token) |")
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| even", "2.500 ± 0.707"],
        ["| first-last", "3.500 ± 0.707"],
        ["| random", "5.500 ± 0.707"],
    ]


def test_the_verdict_names_the_winner(study, runs):
    assert study.verdict(runs).startswith("'even' begins best: even 2.500, first-last 3.500, random 5.500 nats")
    for run in runs:
        run["loss"] = -run["loss"]
    assert study.verdict(runs).startswith("No strategy beats random weights: random -5.500")


def test_the_plot_has_a_curve_for_each_way_to_begin(study, runs):
    axes = study.study_figure(runs).axes[0]
    assert [line.get_label() for line in axes.get_lines()] == list(study.BEGINNINGS)
    assert len(axes.collections) == 3
