# SPDX-License-Identifier: Apache-2.0
"""Metrics against published examples, and intervals against known distributions."""

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from encdec_slm.run_results import Metric
from encdec_slm.trainers.evaluation.metrics import (
    chart_scores,
    docstring_scores,
    exact_scores,
    is_relaxed_match,
    smoothed_bleu,
    squad_scores,
    summary_scores,
)
from encdec_slm.trainers.evaluation.results import build_command, mean_with_interval, public_path
from encdec_slm.trainers.evaluation.vqa_answers import normalize_answer, vqa_accuracy


def test_rouge_gives_the_example_of_the_rouge_score_package():
    scores = summary_scores("The quick brown dog jumps on the log.", ["The quick brown fox jumps over the lazy dog"])
    assert scores["rouge1"] == pytest.approx(12 / 17) and scores["rougeL"] == pytest.approx(10 / 17)
    assert summary_scores("jumping dogs", ["jumped dog"])["rouge2"] == 1  # words are stemmed


def test_squad_gives_the_example_of_the_metric_card():
    predictions = ["1976", "Beyonce", "climate change"]
    answers = ["1976", "Beyoncé and Bruno Mars", "climate change"]
    rows = [squad_scores(text, [answer]) for text, answer in zip(predictions, answers, strict=True)]
    metrics = mean_with_interval(rows)
    assert {name: metric.value for name, metric in metrics.items()} == dict.fromkeys(
        ("exact", "f1", "HasAns_exact", "HasAns_f1"), 66.67
    )


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 1, 1),
        ("in the 10th century", ["10th century", "the 10th"], 0, 0.8),
        ("denmark, iceland", ["Denmark, Iceland and Norway"], 0, 2 / 3),
        ("", ["Paris"], 0, 0),
        ("", [], 1, 1),
        ("Unanswerable.", [], 1, 1),
        ("no answer", [], 1, 1),
        ("Paris", [], 0, 0),
        ("the", ["the"], 1, 1),
    ],
)
def test_squad_scores_spans_and_missing_answers(prediction, answers, exact, f1):
    scores = squad_scores(prediction, answers)
    assert (scores["exact"], scores["f1"]) == (exact, pytest.approx(f1))
    kind = "NoAns" if answers in ([], ["the"]) else "HasAns"
    assert {name for name, value in scores.items() if value is None} == {
        f"{other}_{name}" for other in {"NoAns", "HasAns"} - {kind} for name in ("exact", "f1")
    }


def test_smoothed_bleu_is_add_one_bleu_for_long_texts():
    pairs = [
        ("returns the sum of the two numbers", "return the sum of two numbers"),
        ("a cat sat on the mat today", "the cat sat on a mat"),
        ("nothing at all in common here", "an entirely different sentence"),
    ]
    metric = BLEU(smooth_method="add-k", smooth_value=1, tokenize="none", effective_order=False)
    for prediction, reference in pairs:
        expected = metric.sentence_score(prediction, [reference]).score / 100
        # Without a common word, sacrebleu counts half a word and CodeXGLUE none.
        expected = 0 if not set(prediction.split()) & set(reference.split()) else expected
        assert smoothed_bleu(prediction, reference) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Return the area.", "return the area .", 1),
        ("return the area", "return the area of it", math.exp(1 - 6 / 4)),
        ("foo_bar", "foo _ bar", 1),
        ("", "one two three", math.exp(1 - 4)),
        # One word of two, one pair of one and none of none: (1/2 * (0+1)/(1+1) * 1 * 1) ** (1/4).
        ("red car", "red bus", (1 / 4) ** (1 / 4)),
    ],
)
def test_smoothed_bleu_follows_its_formula(prediction, reference, expected):
    assert smoothed_bleu(prediction, reference) == pytest.approx(expected)
    assert docstring_scores(prediction, [reference])["bleu"] == pytest.approx(expected)


@pytest.mark.parametrize(("num_people", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_depends_on_how_many_of_ten_people_agree(num_people, expected):
    answers = ["yes"] * num_people + ["no"] * (10 - num_people)
    assert vqa_accuracy("Yes.", answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("oclock", "o'clock"),
        ("its", "its"),
        ("1,000", "1000"),
        ("3.14", "3.14"),
        ("U.S. Open.", "us open"),
        ("black/white", "black white"),
        ("wait... what?", "wait what"),
        ("10:30", "10:30"),
        ("line\nbreak", "line break"),
    ],
)
def test_answers_are_normalized_as_in_the_vqa_challenge(text, expected):
    assert normalize_answer(text) == expected


def test_vqa_accuracy_requires_two_answers():
    with pytest.raises(ValueError, match="at least 2"):
        vqa_accuracy("yes", ["yes"])


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("10.4", "10", True),
        ("10.5", "10", True),
        ("1.05", "1", True),
        ("10.6", "10", False),
        ("-9.6", "-10", True),
        ("12%", "0.12", True),
        ("12%", "12", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("Yes", "yes", True),
        ("yess", "yes", False),
        ("about 10", "10", False),
        ("nan", "10", False),
    ],
)
def test_relaxed_accuracy_allows_five_percent_for_numbers(prediction, answer, expected):
    assert is_relaxed_match(prediction, answer) is expected
    assert chart_scores(prediction, ["something else", answer])["relaxed_accuracy"] == expected


def test_exact_match_ignores_outer_white_space():
    assert exact_scores(" 7\n", ["7"])["exact"] == 1 and exact_scores("A", ["a"])["exact"] == 0


def test_the_interval_of_a_proportion_is_binomial():
    rows = [{"exact": float(number % 4 == 0)} for number in range(400)]
    metric = mean_with_interval(rows, num_bootstrap=4000)["exact"]
    half = 196 * math.sqrt(0.25 * 0.75 / 400)
    assert metric.value == 25 and metric.unit == "percent"
    assert (metric.low, metric.high) == (pytest.approx(25 - half, abs=0.4), pytest.approx(25 + half, abs=0.4))


def test_intervals_cover_the_truth_as_often_as_stated():
    generator = np.random.default_rng(3)
    covered = 0
    for seed in range(100):
        rows = [{"x": value} for value in generator.random(60)]
        metric = mean_with_interval(rows, num_bootstrap=100, seed=seed)["x"]
        covered += metric.low <= 50 <= metric.high
    # 95 of 100, less chance and the small number of rows.
    assert 86 <= covered <= 99


def test_intervals_depend_on_the_seed_and_ignore_rows_without_the_metric():
    rows = [{"a": 1.0, "b": None, "c": None}, {"a": 0.0, "b": 0.5, "c": None}, {"a": 1.0, "b": 0.5, "c": None}]
    metrics = mean_with_interval(rows, num_bootstrap=50, seed=5)
    assert metrics == mean_with_interval(rows, num_bootstrap=50, seed=5)
    assert metrics["a"] != mean_with_interval(rows, num_bootstrap=50, seed=6)["a"] or metrics["a"].low == 0
    assert metrics["b"] == Metric(50, 50, 50, "percent", num_rows=2)
    assert set(metrics) == {"a", "b"}


def test_the_interval_of_one_row_has_no_width():
    assert mean_with_interval([{"a": 1.0}], num_bootstrap=5)["a"] == Metric(100, 100, 100, "percent")


def test_commands_have_no_defaults_and_no_local_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert public_path("outputs/model") == "outputs/model"
    assert public_path(tmp_path / "a b") == "a b"
    assert public_path("/somewhere/else/model") == "model"
    command = build_command({"model": "a b", "batch_size": 8, "num_beams": 2}, {"batch_size": 8})
    assert command == "encdec-slm evaluate --model 'a b' --num-beams 2"
