# SPDX-License-Identifier: Apache-2.0
"""The study of objectives and optimizers, with tiny models and a few steps."""

import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import pretraining_study  # noqa: E402
import shell_results  # noqa: E402


def test_docs_state_what_the_results_file_says():
    text = pretraining_study.PAGE.read_text(encoding="utf-8")
    assert shell_results.update_blocks(text, pretraining_study.BLOCKS, pretraining_study.load_runs()) == text


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Run the study with tiny models; returns the runs of the results file."""
    (tmp_path / "page.md").write_text(
        "<!-- pretraining study: written by examples/pretraining_study.py -->\n<!-- end -->\n"
    )
    arms = (("span", "adamw"), ("ul2", "muon"), pretraining_study.NO_PRETRAINING)
    changed = {"RESULTS": tmp_path / "results.jsonl", "PAGE": tmp_path / "page.md", "ARMS": arms}
    for name, value in {**changed, "VOCAB_SIZE": 300, "MAX_LENGTH": 16}.items():
        monkeypatch.setattr(pretraining_study, name, value)
    (tmp_path / "corpus").mkdir()
    for number in range(400):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"The number {number} is followed by {number + 1}.")
    for name in ("train", "test"):
        rows = [{"source": f"list folder {number}", "target": f"ls -l {number}"} for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def study(*options):
        small = ["--preset", "tiny", "--steps", "2", "--finetuning_steps", "1", "--eval_rows", "4", "--seeds", "0"]
        paths = ["--output_dir", str(tmp_path / "study"), "--sources", str(tmp_path / "corpus")]
        pretraining_study.main([*paths, "--tasks", f"shell={tmp_path}", *small, "--use_cpu", *options])
        return pretraining_study.load_runs()

    return study


def test_each_arm_is_pretrained_and_finetuned_once(study, tmp_path):
    runs = study()
    assert [run["objective"] for run in runs] == ["span", "ul2", None]
    assert all(set(run["losses"]) == {"span", "prefix", "ul2"} and "nlc2cmd" in run["tasks"]["shell"] for run in runs)
    assert len({run["losses"]["span"] for run in runs}) == 3
    pretraining_study.RESULTS.write_text("".join(json.dumps(run) + "\n" for run in runs[1:]))
    study("--table_only")
    page = (tmp_path / "page.md").read_text()
    assert page.count(" | 1 | ") == 2 and "missing" in page and "shell nlc2cmd" in page
    assert study()[:2] == runs[1:]
    assert {run["settings"]["steps"] for run in study("--steps", "1")} == {1}
