# SPDX-License-Identifier: Apache-2.0
"""Confidence of the shell model: the probability that an answer is right, from the probability of its tokens."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


CALIBRATION_FILE = "shell_calibration.json"
NUM_BINS = 10
NUM_FOLDS = 5
MAX_STEPS = 100
# Of the logistic regression, so that scores without any information fit too.
RIDGE = 1e-6


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of log-probabilities (Platt, 1999): confidence = sigmoid(slope * score + intercept).

    Args:
        slope (`float`): Per nat.
        intercept (`float`): Log-odds of an answer with log-probability 0.
        threshold (`float`): Below this confidence, an answer is not sure.
        expected_calibration_error (`float`): From 0 to 1; of rows that were left out of the fit in turn.
        num_examples (`int`): Rows of the fit.
    """

    slope: float
    intercept: float
    threshold: float
    expected_calibration_error: float
    num_examples: int

    def confidence(self, score: float) -> float:
        """Return the probability that an answer with this log-probability is right."""
        return _sigmoid(self.slope * score + self.intercept)

    def save(self, folder: str | Path) -> None:
        """Write `shell_calibration.json` into the folder of a model."""
        path = Path(folder, CALIBRATION_FILE)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, *folders: str | Path) -> "Calibration | None":
        """Read the file in the first folder that has one; `None` if there is none.

        Raises:
            ValueError: The file is not one of [`Calibration.save`].
        """
        path = next(
            (Path(folder, CALIBRATION_FILE) for folder in folders if Path(folder, CALIBRATION_FILE).is_file()), None
        )
        if path is None:
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{field.name: field.type(values[field.name]) for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} is not a calibration ({type(error).__name__}: {error}). Delete it, or write it again "
                "with `examples/calibrate_shell.py`."
            ) from error


def fit_calibration(
    scores: Sequence[float], is_correct: Sequence[bool], threshold: float | None = None
) -> Calibration:
    """Fit the confidence to the answers of a validation file.

    Args:
        scores (`Sequence[float]`): Log-probability of each answer, in nats.
        is_correct (`Sequence[bool]`): Whether the answer is right.
        threshold (`float`, *optional*): Confidence below which an answer is not sure, from 0 to 1. `None` is the share
            of right answers: such an answer is less likely right than the average one.

    Raises:
        ValueError: There are fewer than 10 rows, the lengths differ, a score is not finite, or `threshold` is outside
            of 0 to 1.
    """
    scores, labels = [float(score) for score in scores], [bool(label) for label in is_correct]
    if len(scores) != len(labels) or len(scores) < 2 * NUM_FOLDS:
        raise ValueError(
            f"`scores` has {len(scores)} rows and `is_correct` {len(labels)}, but both must have the same number, at "
            f"least {2 * NUM_FOLDS}."
        )
    if not all(map(math.isfinite, scores)):
        raise ValueError("`scores` has a value that is not finite. Give log-probabilities.")
    if threshold is None:
        threshold = sum(labels) / len(labels)
    if not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must be between 0 and 1, got {threshold}.")
    slope, intercept = _fit_platt(scores, labels)
    confidences = [0.0] * len(scores)
    for fold in range(NUM_FOLDS):
        kept = [index for index in range(len(scores)) if index % NUM_FOLDS != fold]
        part = _fit_platt([scores[index] for index in kept], [labels[index] for index in kept])
        for index in range(fold, len(scores), NUM_FOLDS):
            confidences[index] = _sigmoid(part[0] * scores[index] + part[1])
    error = expected_calibration_error(confidences, labels)
    return Calibration(slope, intercept, threshold, error, len(scores))


def expected_calibration_error(confidences: Sequence[float], is_correct: Sequence[bool]) -> float:
    """Compute the mean distance of confidence and accuracy in 10 bins of equal width (arXiv 1706.04599).

    Args:
        confidences (`Sequence[float]`): From 0 to 1; at least one.
        is_correct (`Sequence[bool]`): Whether each answer is right.
    """
    gaps = [0.0] * NUM_BINS
    for confidence, label in zip(confidences, is_correct, strict=True):
        gaps[min(int(confidence * NUM_BINS), NUM_BINS - 1)] += confidence - label
    return sum(map(abs, gaps)) / len(confidences)


def _sigmoid(value):
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _fit_platt(scores, labels):
    """Return slope and intercept of a logistic regression, by Newton's method, with Platt's targets."""
    num_correct = sum(labels)
    correct, wrong = (num_correct + 1) / (num_correct + 2), 1 / (len(labels) - num_correct + 2)
    targets = [correct if label else wrong for label in labels]
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores)) or 1.0
    inputs = [(score - mean) / spread for score in scores]
    slope = offset = 0.0
    for _ in range(MAX_STEPS):
        step = _newton_step(inputs, targets, slope, offset)
        slope, offset = slope - step[0], offset - step[1]
        if max(map(abs, step)) < 1e-9:
            break
    return slope / spread, offset - slope * mean / spread


def _newton_step(inputs, targets, slope, offset):
    outputs = [_sigmoid(slope * value + offset) for value in inputs]
    weights = [output * (1 - output) for output in outputs]
    errors = [output - target for output, target in zip(outputs, targets, strict=True)]
    gradient = sum(map(math.prod, zip(errors, inputs, strict=True))) + RIDGE * slope, sum(errors)
    first = sum(weight * value * value for weight, value in zip(weights, inputs, strict=True)) + RIDGE
    mixed = sum(map(math.prod, zip(weights, inputs, strict=True)))
    last = sum(weights) + RIDGE
    determinant = first * last - mixed * mixed
    step = (
        (last * gradient[0] - mixed * gradient[1]) / determinant,
        (first * gradient[1] - mixed * gradient[0]) / determinant,
    )
    scale = min(1.0, 5 / max(1e-12, *map(abs, step)))  # far from the solution, a full step may overshoot
    return step[0] * scale, step[1] * scale


__all__ = ["CALIBRATION_FILE", "Calibration", "expected_calibration_error", "fit_calibration"]
