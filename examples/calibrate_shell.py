# SPDX-License-Identifier: Apache-2.0
"""Calibrate the confidence of `encdec-slm shell` on a validation file, and measure its answers.

    python examples/calibrate_shell.py MODEL --train FILE --validation FILE [FILE ...] [--test FILE ...] \\
        [--output-dir OUT]

The files have rows of `source` and `target`, which may be a list of several correct commands. In the fit, all
validation files count equally. An answer is right if it has the same programs with the same flags as a target. Writes
shell_calibration.json into the folder MODEL, with the programs of the training rows. For each file it prints the
metrics of the task `shell`, which it also saves in OUT/<name of the file>, the expected calibration error without and
with calibration, and how often answers that are not marked as "not sure" are right.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from encdec_slm_cli.calibration import CALIBRATION_FILE, Calibration
from encdec_slm_cli.shell_model import ShellModel, load_shell_model
from encdec_slm_cli.shell_syntax import first_program, list_programs
from sklearn.linear_model import LogisticRegression

from encdec_slm.run_results import RunResults
from encdec_slm.trainers.evaluation import evaluate_checkpoint
from encdec_slm.trainers.evaluation.predictions import RESULT_NAME
from encdec_slm.trainers.evaluation.results import public_path
from encdec_slm.trainers.evaluation.shell_metrics import command_template


NUM_ANSWERS = 5
NUM_BINS = 10
NUM_FOLDS = 5
# Answers that begin with a program need an offset of their own if there are at least this many.
MIN_ANSWERS = 50
# Programs of fewer training rows may be the names of somebody's scripts.
MIN_ROWS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate a model; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a shell model")
    parser.add_argument("--train", required=True, type=Path, help="rows that the model was trained on")
    parser.add_argument("--validation", nargs="+", required=True, type=Path, help="rows for the fit")
    parser.add_argument("--test", nargs="*", default=[], type=Path, help="rows for checks")
    parser.add_argument("--output-dir", type=Path, help="folder for the results of the files")
    parser.add_argument(
        "--threshold",
        type=float,
        help="confidence below which an answer is not sure; default: the share of right ones",
    )
    args = parser.parse_args(arguments)

    model, evaluated, programs = load_shell_model(args.model), {}, find_programs(args.train)
    model.calibration = Calibration(1.0, 0.0, {}, 0.0, 0.0, 0, programs)
    for path in (*args.validation, *args.test):
        output_dir = None if args.output_dir is None else args.output_dir / path.stem
        results, _ = evaluated[path] = evaluate_answers(model, path, output_dir)
        if output_dir is not None:
            files = [public_path(str(file)) for file in (args.train, *args.validation, path)]
            results.command = (
                f"python examples/calibrate_shell.py MODEL --train {files[0]} --validation {' '.join(files[1:-1])} "
                f"--test {files[-1]}"
            )
            results.save(output_dir / RESULT_NAME)
    parts = [evaluated[path][1] for path in args.validation]
    weights = [sum(map(len, parts)) / (len(parts) * len(part)) for part in parts for _ in part]
    scores, labels, first_programs = zip(*(answer for part in parts for answer in part), strict=True)
    calibration = fit_calibration(scores, labels, first_programs, weights, args.threshold)
    calibration = replace(calibration, programs=programs)
    calibration.save(args.model)
    print(f"Wrote {CALIBRATION_FILE} to {args.model}.")
    print(f"Cross-validated calibration error: {calibration.expected_calibration_error:.3f}")
    for path, (results, answers) in evaluated.items():
        print(f"{path}: {', '.join(f'{name} {metric}' for name, metric in results.models[0].metrics.items())}")
        print_check(calibration, answers)


def find_programs(path: Path) -> list[str]:
    """Return the names of the programs in at least 3 of the rows, sorted."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    counts = Counter(name for row in rows for name in set(list_programs(row["target"])))
    return sorted(
        name
        for name, count in counts.items()
        if count >= MIN_ROWS and re.fullmatch(r"(?=.*[A-Za-z])\w[\w.+-]*|\[\[?|[.:]", name)
    )


def evaluate_answers(
    model: ShellModel, path: Path, output_dir: Path | None
) -> tuple[RunResults, list[tuple[float, bool, str]]]:
    """Return the metrics of the answers to all requests, and of the first answer to each request its log-probability,
    whether it is right, and its first program.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    answers = {row["source"]: model.answer(row["source"], NUM_ANSWERS) for row in rows}

    def answer(sources):
        return [[answer.command for answer in answers[source]] for source in sources]

    answer.__name__ = "encdec-slm shell"
    options = {"dataset_name": path, "output_dir": output_dir, "show_progress": False}
    results = evaluate_checkpoint(answer, task="shell", **options)
    results.device = "cpu (CTranslate2, int8)"
    checked = []
    for row in rows:
        for answer in answers[row["source"]][:1]:
            targets = [row["target"]] if isinstance(row["target"], str) else row["target"]
            is_right = command_template(answer.command) in map(command_template, targets)
            checked.append((answer.log_probability, is_right, first_program(answer.command)))
    return results, checked


def fit_calibration(
    scores: Sequence[float],
    is_correct: Sequence[bool],
    programs: Sequence[str],
    weights: Sequence[float] | None = None,
    threshold: float | None = None,
) -> Calibration:
    """Fit the confidence to the answers of validation files, by logistic regression.

    Args:
        scores (`Sequence[float]`): Log-probability of each answer, in nats.
        is_correct (`Sequence[bool]`): Whether the answer is right.
        programs (`Sequence[str]`): First program of the answer.
        weights (`Sequence[float]`, *optional*): How much each answer counts; `None` counts all equally.
        threshold (`float`, *optional*): Confidence below which an answer is not sure, from 0 to 1. `None` is the share
            of right answers: such an answer is less likely right than the average one.

    Raises:
        ValueError: There are fewer than 10 rows, the lengths differ, a score is not finite, or `threshold` is outside
            of 0 to 1.
    """
    scores, labels = [float(score) for score in scores], [bool(label) for label in is_correct]
    weights = [1.0] * len(scores) if weights is None else list(weights)
    if len({len(scores), len(labels), len(programs), len(weights)}) > 1 or len(scores) < 2 * NUM_FOLDS:
        raise ValueError(
            f"`scores` has {len(scores)} rows, `is_correct` {len(labels)}, `programs` {len(programs)} and `weights` "
            f"{len(weights)}, but all must have the same number, at least {2 * NUM_FOLDS}."
        )
    if not all(map(math.isfinite, scores)):
        raise ValueError("`scores` has a value that is not finite. Give log-probabilities.")
    if threshold is None:
        threshold = sum(weight for weight, label in zip(weights, labels, strict=True) if label) / sum(weights)
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must be between 0 and 1, got {threshold}.")
    rows = list(zip(scores, programs, labels, weights, strict=True))
    slope, intercept, offsets = _fit_logistic(rows)
    confidences = [0.0] * len(rows)
    for fold in range(NUM_FOLDS):
        kept = [row for number, row in enumerate(rows) if number % NUM_FOLDS != fold]
        part = Calibration(*_fit_logistic(kept), threshold, 0.0, len(kept))
        for number in range(fold, len(rows), NUM_FOLDS):
            confidences[number] = part.confidence(*rows[number][:2])
    error = expected_calibration_error(confidences, labels, weights)
    return Calibration(slope, intercept, offsets, threshold, error, len(scores))


def _fit_logistic(rows):
    """Return slope, intercept, and offsets of frequent programs; `rows` are score, program, label and weight."""
    counts = Counter(program for _, program, _, _ in rows)
    frequent = [program for program, count in counts.items() if count >= MIN_ANSWERS]
    # One right and one wrong answer more, as in Laplace's rule, so that no confidence becomes 0 or 1.
    mean = sum(row[0] for row in rows) / len(rows)
    rows = [*rows, (mean, "", True, 1.0), (mean, "", False, 1.0)]
    inputs = [[row[0], *(float(row[1] == program) for program in frequent)] for row in rows]
    model = LogisticRegression().fit(inputs, [row[2] for row in rows], sample_weight=[row[3] for row in rows])
    slope, *offsets = map(float, model.coef_[0])
    return slope, float(model.intercept_[0]), dict(zip(frequent, offsets, strict=True))


def expected_calibration_error(
    confidences: Sequence[float], is_correct: Sequence[bool], weights: Sequence[float] | None = None
) -> float:
    """Compute the mean distance of confidence and accuracy in 10 bins of equal width (arXiv 1706.04599).

    Args:
        confidences (`Sequence[float]`): From 0 to 1; at least one.
        is_correct (`Sequence[bool]`): Whether each answer is right.
        weights (`Sequence[float]`, *optional*): How much each answer counts; `None` counts all equally.
    """
    weights = [1.0] * len(confidences) if weights is None else weights
    gaps = [0.0] * NUM_BINS
    for confidence, label, weight in zip(confidences, is_correct, weights, strict=True):
        gaps[min(int(confidence * NUM_BINS), NUM_BINS - 1)] += weight * (confidence - label)
    return sum(map(abs, gaps)) / sum(weights)


def print_check(calibration: Calibration, answers: Sequence[tuple[float, bool, str]]) -> None:
    """Print how well confidences tell right answers from wrong ones."""
    scores, labels, programs = zip(*answers, strict=True)
    confidences = list(map(calibration.confidence, scores, programs))
    sure = [
        label for confidence, label in zip(confidences, labels, strict=True) if confidence >= calibration.threshold
    ]
    print(
        f"  {len(labels)} answers, {sum(labels) / len(labels):.1%} right; calibration error "
        f"{expected_calibration_error(list(map(math.exp, scores)), labels):.3f} without and "
        f"{expected_calibration_error(confidences, labels):.3f} with calibration; {len(sure) / len(labels):.1%} "
        f"of the answers are sure, and {sum(sure) / max(1, len(sure)):.1%} of these are right"
    )


if __name__ == "__main__":
    main()
