# SPDX-License-Identifier: Apache-2.0
"""Calibrate the confidence of `encdec-slm shell` on a validation file, and check it on other files.

    python examples/calibrate_shell.py MODEL --validation validation.jsonl [--test test.jsonl ...]

The files have rows of `source` and `target`. An answer is right if it has the same programs with the same flags as the
target. Writes shell_calibration.json into the folder MODEL, and prints for each file the share of right answers, the
expected calibration error without and with calibration, and how often answers of which there is no doubt are right.
"""

import argparse
import json
import math
from collections.abc import Sequence

from encdec_slm_cli.calibration import CALIBRATION_FILE, Calibration, expected_calibration_error, fit_calibration
from encdec_slm_cli.shell_model import ShellModel, load_shell_model

from encdec_slm.trainers.evaluation.shell_metrics import command_template


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate a model; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a shell model")
    parser.add_argument("--validation", required=True, help="rows for the fit")
    parser.add_argument("--test", nargs="*", default=[], help="rows for checks")
    parser.add_argument(
        "--threshold",
        type=float,
        help="confidence below which an answer is not sure; default: the share of right ones",
    )
    args = parser.parse_args(arguments)

    model = load_shell_model(args.model)
    scores, labels = score_answers(model, args.validation)
    calibration = fit_calibration(scores, labels, args.threshold)
    calibration.save(args.model)
    print(
        f"Wrote {CALIBRATION_FILE} to {args.model}: {calibration.expected_calibration_error:.3f} cross-validated error"
    )
    print_check(args.validation, calibration, scores, labels)
    for path in args.test:
        print_check(path, calibration, *score_answers(model, path))


def score_answers(model: ShellModel, path: str) -> tuple[list[float], list[bool]]:
    """Return the log-probability of the first answer to each request, and whether it is right."""
    scores, labels = [], []
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    for row in rows:
        for answer in model.answer(row["source"]):
            scores.append(answer.log_probability)
            labels.append(command_template(answer.command) == command_template(row["target"]))
    return scores, labels


def print_check(path: str, calibration: Calibration, scores: Sequence[float], labels: Sequence[bool]) -> None:
    """Print one line about a file."""
    confidences = [calibration.confidence(score) for score in scores]
    sure = [
        label for confidence, label in zip(confidences, labels, strict=True) if confidence >= calibration.threshold
    ]
    print(
        f"{path}: {len(labels)} answers, {sum(labels) / len(labels):.1%} right; calibration error "
        f"{expected_calibration_error(list(map(math.exp, scores)), labels):.3f} without and "
        f"{expected_calibration_error(confidences, labels):.3f} with calibration; {len(sure) / len(labels):.1%} "
        f"of the answers are sure, and {sum(sure) / max(1, len(sure)):.1%} of these are right"
    )


if __name__ == "__main__":
    main()
