# SPDX-License-Identifier: Apache-2.0
"""The study of objectives and optimizers, with tiny models and a few steps."""

import importlib.util
import json
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent.parent / "examples" / "pretraining_study.py"


@pytest.fixture
def study(tmp_path, monkeypatch, capsys):
    """Run the script; returns what it prints, and the folder."""
    spec = importlib.util.spec_from_file_location("pretraining_study", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VOCAB_SIZE", 300)
    monkeypatch.setattr(module, "MAX_LENGTH", 16)
    monkeypatch.setattr(module, "ARMS", (("span", "adamw"), ("ul2", "muon"), module.NO_PRETRAINING))
    (tmp_path / "corpus").mkdir()
    for number in range(400):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"The number {number} is followed by {number + 1}.")
    for name in ("train", "test"):
        rows = [{"source": f"list folder {number}", "target": f"ls -l {number}"} for number in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def study(*options):
        small = ["--preset", "tiny", "--steps", "2", "--finetuning_steps", "1", "--eval_rows", "4", "--seeds", "0"]
        paths = ["--output_dir", str(tmp_path / "study"), "--sources", str(tmp_path / "corpus")]
        module.main([*paths, "--tasks", f"shell={tmp_path}", *small, "--use_cpu", *options])
        return capsys.readouterr().out, tmp_path / "study"

    return study


def test_each_arm_is_pretrained_and_finetuned_once(study):
    output, folder = study()
    paths = sorted(folder.glob("*.json"))
    assert [path.stem for path in paths] == ["none-adamw-0", "span-adamw-0", "ul2-muon-0"]
    assert output.count(" | 1 | ") == 3 and "shell nlc2cmd" in output
    runs = [json.loads(path.read_text()) for path in paths]
    assert all(set(run["losses"]) == {"span", "prefix", "ul2"} and "nlc2cmd" in run["tasks"]["shell"] for run in runs)
    assert len({run["losses"]["span"] for run in runs}) == 3
    times = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    output, _ = study("--table_only")
    assert output.count(" | 1 | ") == 2 and "missing" in output
    study()
    assert [path.stat().st_mtime_ns for path in paths[1:]] == times[1:] and paths[0].exists()
