# SPDX-License-Identifier: Apache-2.0
"""Calibrate the confidence of `encdec-slm shell` on a validation file, and measure its answers.

    python examples/calibrate_shell.py MODEL --validation FILE [FILE ...] [--test FILE ...] [--output-dir OUT]

The files have rows of `source` and `target`, which may be a list of commands that are all right. The fit uses as many
rows of each validation file as the smallest one has, its first ones. An answer is right if it has the same
programs with the same flags as a target. Writes shell_calibration.json into the folder MODEL. For each file it prints
the metrics of the task `shell`, which it also saves in OUT/<name of the file>, the expected calibration error without
and with calibration, and how often answers of which there is no doubt are right.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from encdec_slm_cli.calibration import CALIBRATION_FILE, Calibration, expected_calibration_error, fit_calibration
from encdec_slm_cli.shell_model import ShellModel, load_shell_model

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
    size = min(len(evaluated[path][1]) for path in args.validation)
    scores, labels = ([value for path in args.validation for value in evaluated[path][part][:size]] for part in (1, 2))
    calibration = fit_calibration(scores, labels, args.threshold)
    calibration.save(args.model)
    print(f"Wrote {CALIBRATION_FILE} to {args.model}.")
    print(f"Cross-validated calibration error: {calibration.expected_calibration_error:.3f}")
    for path, (results, scores, labels) in evaluated.items():
        print(f"{path}: {', '.join(f'{name} {metric}' for name, metric in results.models[0].metrics.items())}")
        print_check(calibration, scores, labels)


def evaluate_answers(
    model: ShellModel, path: Path, output_dir: Path | None
) -> tuple[RunResults, list[float], list[bool]]:
    """Return the metrics of the answers to all requests, the log-probability of the first answer to each request, and
    whether it is right.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    answers = {row["source"]: model.answer(row["source"], NUM_ANSWERS) for row in rows}

    def encdec_slm_shell(sources):
        return [[answer.command for answer in answers[source]] for source in sources]

    options = {"dataset_name": path, "output_dir": output_dir, "show_progress": False}
    results = evaluate_checkpoint(encdec_slm_shell, task="shell", **options)
    scores, labels = [], []
    for row in rows:
        for answer in answers[row["source"]][:1]:
            scores.append(answer.log_probability)
            targets = [row["target"]] if isinstance(row["target"], str) else row["target"]
            labels.append(command_template(answer.command) in map(command_template, targets))
    return results, scores, labels


def print_check(calibration: Calibration, scores: Sequence[float], labels: Sequence[bool]) -> None:
    """Print how well confidences tell right answers from wrong ones."""
    confidences = [calibration.confidence(score) for score in scores]
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
