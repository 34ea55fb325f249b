# SPDX-License-Identifier: Apache-2.0
"""The study of teachers with another tokenizer, with few rows and steps."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset


EXAMPLES = Path(__file__).parent.parent / "examples"
METHODS = ("cross-entropy", "sequence-level", "byte spans")


def test_a_study_trains_every_student_once(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    study = importlib.import_module("other_tokenizer_study")
    rows = [{"source": f"def f{n}(): return {n}", "target": f"Return {n}.", "name": f"m.f{n}"} for n in range(40)]
    monkeypatch.setattr(
        study, "build_docstring_task", lambda: dict.fromkeys(("train", "test"), Dataset.from_list(rows))
    )
    monkeypatch.setattr(study, "TEACHER_TOKENS", 290)
    monkeypatch.setattr(study, "STUDENT_TOKENS", 270)
    options = ["--steps", "2", "--eval-rows", "3", "--seeds", "0", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["other_tokenizer_study.py", *options, "--teacher-epochs", "1"])
    study.main()
    table = (tmp_path / "study.md").read_text("utf-8")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == [f"| {method}" for method in METHODS]
    assert table in capsys.readouterr().out
    runs = [json.loads(path.read_text("utf-8")) for path in tmp_path.glob("*-0.json")]
    assert {run["method"] for run in runs} == set(METHODS) and all(len(run["rouge_l"]) == 3 for run in runs)
    assert len({run["loss"] for run in runs}) == 3
    monkeypatch.setattr(study, "train", lambda *args: pytest.fail("it was trained before"))
    study.main()
