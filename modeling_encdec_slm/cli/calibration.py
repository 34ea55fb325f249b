# SPDX-License-Identifier: Apache-2.0
"""Confidence of the shell model: the probability that an answer is right, from the probability of its tokens."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


CALIBRATION_FILE = "shell_calibration.json"


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
        programs (`list[str]`, *optional*): Programs that the model was trained on; an answer with another one is not
            sure. Without any, all are known.
    """

    slope: float
    intercept: float
    program_offsets: dict[str, float]
    threshold: float
    expected_calibration_error: float
    num_examples: int
    programs: list[str] = field(default_factory=list)

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
            return cls(**{one.name: one.type(values[one.name]) for one in fields(cls) if one.name in values})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{str(path)!r} is not a calibration ({type(error).__name__}: {error}). Delete it, or write it again "
                "with `examples/calibrate_shell.py`."
            ) from error


def _sigmoid(value):
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


__all__ = ["CALIBRATION_FILE", "Calibration"]
