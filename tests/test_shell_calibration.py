# SPDX-License-Identifier: Apache-2.0
"""The fit of confidences in examples/calibrate_shell.py."""

import math
import random
import sys
from pathlib import Path

import pytest
from encdec_slm_cli.calibration import Calibration


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from calibrate_shell import expected_calibration_error, fit_calibration


def draw_answers(num_answers, slope, intercept):
    generator = random.Random(0)
    scores = [-generator.expovariate(0.3) for _ in range(num_answers)]
    labels = [generator.random() < 1 / (1 + math.exp(-slope * score - intercept)) for score in scores]
    return scores, labels


def test_calibration_recovers_the_probabilities(tmp_path):
    scores, labels = draw_answers(5000, slope=0.7, intercept=1.5)
    fitted = fit_calibration(scores, labels, [str(number) for number in range(5000)], threshold=0.4)
    assert fitted.slope == pytest.approx(0.7, abs=0.06) and fitted.intercept == pytest.approx(1.5, abs=0.15)
    assert fitted.expected_calibration_error < 0.03 and fitted.threshold == 0.4 and fitted.num_examples == 5000
    fitted.save(tmp_path)
    assert Calibration.load(tmp_path / "nowhere", tmp_path) == fitted


@pytest.mark.parametrize("labels", [[True] * 20, [False] * 20, [True, False] * 10])
def test_calibration_of_answers_that_scores_do_not_tell_apart(labels):
    fitted = fit_calibration([-1.0] * 20, labels, ["ls"] * 20)
    assert fitted.threshold == sum(labels) / 20
    assert fitted.confidence(-1.0, "ls") == pytest.approx(sum(labels) / 20, abs=0.06)
    separated = fit_calibration([-1.0, -9.0] * 10, [True, False] * 10, ["ls"] * 20)
    assert separated.confidence(-9.0, "ls") < 0.1 < 0.9 < separated.confidence(-1.0, "ls")


def test_frequent_programs_have_a_confidence_of_their_own():
    """Of the answers with the same probability, three of four of `ls` are right, and one of four of `find`."""
    labels = [number % 4 != 0 for number in range(400)] + [number % 4 == 0 for number in range(400)]
    programs = ["ls"] * 400 + ["find"] * 400
    fitted = fit_calibration([-1.0] * 800, labels, programs)
    assert fitted.confidence(-1.0, "ls") == pytest.approx(0.75, abs=0.02)
    assert fitted.confidence(-1.0, "find") == pytest.approx(0.25, abs=0.02)
    assert fitted.confidence(-1.0, "df") == pytest.approx(0.5, abs=0.05)
    weights = [3.0 if label else 1.0 for label in labels]
    assert fit_calibration([-1.0] * 800, labels, programs, weights).threshold == 0.75


def test_expected_calibration_error_is_the_gap_in_each_bin():
    assert expected_calibration_error([0.25] * 4, [True, False, False, False]) == 0
    assert expected_calibration_error([0.9, 0.9, 0.1, 1.0], [True, False, False, True]) == pytest.approx(0.225)
    weights = [2, 2, 1, 3]
    assert expected_calibration_error([0.9, 0.9, 0.1, 1.0], [True, False, False, True], weights) == pytest.approx(
        0.2125
    )


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (([-1.0] * 20, [True] * 19, ["ls"] * 20), "is_correct"),
        (([-1.0] * 3, [True] * 3, ["ls"] * 3), "3"),
        (([-math.inf] * 20, [True] * 20, ["ls"] * 20), "scores"),
        (([-1.0] * 20, [True] * 20, ["ls"] * 20, None, 1.5), "threshold"),
    ],
)
def test_calibration_refuses(arguments, name):
    with pytest.raises(ValueError, match=name):
        fit_calibration(*arguments)
