# SPDX-License-Identifier: Apache-2.0
"""Calibrate the confidence of `encdec-slm shell` on a validation file, and measure its answers.

    python examples/calibrate_shell.py MODEL --validation FILE [FILE ...] [--test FILE ...] [--output-dir OUT]

The files have rows of `source` and `target`, which may be a list of commands that are all right. In the fit, all
validation files count equally. An answer is right if it has the same programs with the same flags as a target. Writes
shell_calibration.json into the folder MODEL. For each file it prints the metrics of the task `shell`, which it also
saves in OUT/<name of the file>, the expected calibration error without and with calibration, and how often answers of
which there is no doubt are right.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from encdec_slm_cli.calibration import CALIBRATION_FILE, Calibration, expected_calibration_error, fit_calibration
from encdec_slm_cli.shell_model import ShellModel, load_shell_model
from encdec_slm_cli.shell_syntax import first_program

from encdec_slm.run_results import RunResults
from encdec_slm.trainers.evaluation import evaluate_checkpoint
from encdec_slm.trainers.evaluation.shell_metrics import command_template


NUM_ANSWERS = 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Calibrate a model; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a shell model")
    parser.add_argument("--validation", nargs="+", required=True, type=Path, help="rows for the fit")
    parser.add_argument("--test", nargs="*", default=[], type=Path, help="rows for checks")
    parser.add_argument("--output-dir", type=Path, help="folder for the results of the files")
    parser.add_argument(
        "--threshold",
        type=float,
        help="confidence below which an answer is not sure; default: the share of right ones",
    )
    args = parser.parse_args(arguments)

    model, evaluated = load_shell_model(args.model), {}
    for path in (*args.validation, *args.test):
        output_dir = None if args.output_dir is None else args.output_dir / path.stem
        evaluated[path] = evaluate_answers(model, path, output_dir)
    parts = [evaluated[path][1] for path in args.validation]
    weights = [sum(map(len, parts)) / (len(parts) * len(part)) for part in parts for _ in part]
    scores, labels, programs = zip(*(answer for part in parts for answer in part), strict=True)
    calibration = fit_calibration(scores, labels, programs, weights, args.threshold)
    calibration.save(args.model)
    print(f"Wrote {CALIBRATION_FILE} to {args.model}.")
    print(f"Cross-validated calibration error: {calibration.expected_calibration_error:.3f}")
    for path, (results, answers) in evaluated.items():
        print(f"{path}: {', '.join(f'{name} {metric}' for name, metric in results.models[0].metrics.items())}")
        print_check(calibration, answers)


def evaluate_answers(
    model: ShellModel, path: Path, output_dir: Path | None
) -> tuple[RunResults, list[tuple[float, bool, str]]]:
    """Return the metrics of the answers to all requests, and of the first answer to each request its log-probability,
    whether it is right, and its first program.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    answers = {row["source"]: model.answer(row["source"], NUM_ANSWERS) for row in rows}

    def encdec_slm_shell(sources):
        return [[answer.command for answer in answers[source]] for source in sources]

    options = {"dataset_name": path, "output_dir": output_dir, "show_progress": False}
    results = evaluate_checkpoint(encdec_slm_shell, task="shell", **options)
    checked = []
    for row in rows:
        for answer in answers[row["source"]][:1]:
            targets = [row["target"]] if isinstance(row["target"], str) else row["target"]
            is_right = command_template(answer.command) in map(command_template, targets)
            checked.append((answer.log_probability, is_right, first_program(answer.command)))
    return results, checked


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
