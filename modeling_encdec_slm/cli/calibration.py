# SPDX-License-Identifier: Apache-2.0
"""Confidence of the shell model: the probability that an answer is right, from the probability of its tokens."""

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path


CALIBRATION_FILE = "shell_calibration.json"
NUM_BINS = 10
NUM_FOLDS = 5
# Answers that begin with a program need an offset of their own if there are at least this many.
MIN_ANSWERS = 50


@dataclass(frozen=True)
class Calibration:
    """Platt scaling of log-probabilities (Platt, 1999), with an offset for frequent programs.

    confidence = sigmoid(slope * score + intercept + offset of the first program)

    Args:
        slope (`float`): Per nat.
        intercept (`float`): Log-odds of an answer with log-probability 0.
        program_offsets (`dict[str, float]`): Log-odds that are added for answers that begin with a program, such as
            `find`, whose flags are a matter of taste more often.
        threshold (`float`): Below this confidence, an answer is not sure.
        expected_calibration_error (`float`): From 0 to 1; of rows that were left out of the fit in turn.
        num_examples (`int`): Rows of the fit.
    """

    slope: float
    intercept: float
    program_offsets: dict[str, float]
    threshold: float
    expected_calibration_error: float
    num_examples: int

    def confidence(self, score: float, program: str) -> float:
        """Return the probability that an answer with this log-probability and first program is right."""
        return _sigmoid(self.slope * score + self.intercept + self.program_offsets.get(program, 0.0))

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
    error = expected_calibration_error(confidences, labels)
    return Calibration(slope, intercept, offsets, threshold, error, len(scores))


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


def _fit_logistic(rows):
    """Return slope, intercept, and offsets of frequent programs; `rows` are score, program, label and weight."""
    from sklearn.linear_model import LogisticRegression

    counts = Counter(program for _, program, _, _ in rows)
    frequent = [program for program, count in counts.items() if count >= MIN_ANSWERS]
    # One right and one wrong answer more, as in Laplace's rule, so that no confidence becomes 0 or 1.
    mean = sum(row[0] for row in rows) / len(rows)
    rows = [*rows, (mean, "", True, 1.0), (mean, "", False, 1.0)]
    inputs = [[row[0], *(float(row[1] == program) for program in frequent)] for row in rows]
    model = LogisticRegression().fit(inputs, [row[2] for row in rows], sample_weight=[row[3] for row in rows])
    slope, *offsets = map(float, model.coef_[0])
    return slope, float(model.intercept_[0]), dict(zip(frequent, offsets, strict=True))


__all__ = ["CALIBRATION_FILE", "Calibration", "expected_calibration_error", "fit_calibration"]
