# SPDX-License-Identifier: Apache-2.0
"""Predictions of a run, appended to a file batch by batch so that an interrupted run can be resumed."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...checkpoints import write_file
from ...errors import format_list
from ...run_results import RunResults
from .tasks import Example


PREDICTIONS_NAME = "predictions.jsonl"
RUN_NAME = "evaluation_run.json"
RESULT_NAME = "evaluation.json"


class Predictions:
    """The predictions of a run so far, in the order of the rows.

    Args:
        folder (`Path`, *optional*): Existing folder of `predictions.jsonl`, which grows with each batch, and of
            `evaluation_run.json`, which identifies the run. `None` keeps the predictions in memory only.
        run (`dict`): Everything that decides the predictions. A run that differs in it cannot be resumed.
        num_rows (`int`): Number of rows of the run.

    Raises:
        ValueError: The folder holds predictions of another run, or other files of these names.
    """

    def __init__(self, folder: Path | None, run: dict[str, Any], num_rows: int):
        self.folder, self.run = folder, run
        self.texts: list[str] = []
        self.num_cut = 0  # rows whose source was truncated
        self.seconds = 0.0
        if folder is not None:
            self._resume(num_rows)
            self.save_state()

    @property
    def path(self) -> Path:
        """The file with one prediction per line."""
        return self.folder / PREDICTIONS_NAME

    def append(self, examples: Sequence[Example], texts: Sequence[str], were_cut: Sequence[bool]) -> None:
        """Append the predictions for the next rows, also to the file."""
        first = len(self.texts)
        self.texts += texts
        self.num_cut += sum(were_cut)
        if self.folder is None:
            return
        with self.path.open("a", encoding="utf-8") as file:
            rows = zip(examples, texts, were_cut, strict=True)
            for number, (example, text, is_cut) in enumerate(rows, start=first):
                row = {"row": number, "source": example.source, "references": list(example.references)}
                row |= {"is_cut": is_cut, "prediction": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def save_state(self) -> None:
        """Save what identifies the run, and how long it has taken."""
        if self.folder is not None:
            state = {"run": self.run, "seconds": round(self.seconds, 1)}
            write_file(self.folder / RUN_NAME, json.dumps(state, indent=2))

    def _resume(self, num_rows):
        state = self._state()
        self._check_other_files(state)
        if not self.path.is_file():
            return
        if state is None:
            raise ValueError(
                f"{self.path} exists, but without a readable {RUN_NAME} that identifies its run. Give another "
                "`output_dir`, or remove the file."
            )
        before = state["run"]
        if before != self.run:
            changes = ", ".join(
                f"`{name}` was {before.get(name)!r} and is {self.run.get(name)!r}"
                for name in {**before, **self.run}
                if before.get(name) != self.run.get(name)
            )
            raise ValueError(
                f"{self.path} belongs to another run ({changes}), which cannot be resumed by this one. Give another "
                "`output_dir`, or remove the file."
            )
        self.seconds = state["seconds"]
        rows = self._read()[:num_rows]
        self.texts = [row["prediction"] for row in rows]
        self.num_cut = sum(row["is_cut"] for row in rows)

    def _check_other_files(self, state):
        """Refuse to overwrite files that an evaluation did not write."""
        results = self.folder / RESULT_NAME
        is_foreign = {RUN_NAME: state is None and (self.folder / RUN_NAME).exists(), RESULT_NAME: False}
        if results.exists():
            try:
                is_foreign[RESULT_NAME] = RunResults.load(results).kind != "evaluation"
            except ValueError:
                is_foreign[RESULT_NAME] = True
        if found := [name for name, foreign in is_foreign.items() if foreign]:
            raise ValueError(
                f"`output_dir` {str(self.folder)!r} has {format_list(found)}, which an evaluation did not write. Give "
                "another `output_dir`."
            )

    def _state(self):
        try:
            state = json.loads((self.folder / RUN_NAME).read_text(encoding="utf-8"))
            return {name: state[name] for name in ("run", "seconds")}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _read(self):
        """Read the rows of complete lines; an incomplete line at the end, of an interrupted run, is removed."""
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        rows = []
        for number, line in enumerate(whole.decode("utf-8", errors="replace").split("\n")[:-1]):
            try:
                row = json.loads(line)
                if (row["row"], type(row["prediction"]), type(row["is_cut"])) != (number, str, bool):
                    raise ValueError
                rows.append(row)
            except (ValueError, KeyError, TypeError):
                raise ValueError(
                    f"{self.path}, line {number + 1}, is not the prediction for row {number} of this run. Give "
                    "another `output_dir`, or remove the file."
                ) from None
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return rows
