# SPDX-License-Identifier: Apache-2.0
"""The proof of the teacher cache, with a tiny teacher and a few steps."""

import importlib.util
import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig

from conftest import build_byte_tokenizer, randomize


SCRIPT = Path(__file__).parent.parent / "examples" / "teacher_cache_proof.py"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = build_byte_tokenizer(ends_sources=False)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes, bos_token_id=1)
    randomize(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prove(teacher, tmp_path, monkeypatch, capsys):
    """Run the script; returns what it prints, and the folder."""
    spec = importlib.util.spec_from_file_location("teacher_cache_proof", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [{"source": f"def f{n}(): return {n}", "target": f"Return {n}.", "name": f"f{n}"} for n in range(20)]
    task = {split: Dataset.from_list(rows) for split in ("train", "validation", "test")}
    monkeypatch.setattr(module, "build_docstring_task", lambda: task)
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 8)
    for settings in module.LABELS.values():
        monkeypatch.setattr(settings, "rows_per_shard", 8)
    monkeypatch.setitem(module.TRAINING, "max_completion_length", 6)

    def prove(*options):
        folder = tmp_path / "proof"
        small = ["--preset", "tiny", "--steps", "2", "--eval_rows", "3", "--dtype", "float32", "--seeds", "0"]
        module.main([teacher, "--output_dir", str(folder), *small, "--use_cpu", *options])
        return capsys.readouterr().out, folder

    return prove


def test_each_arm_is_trained_for_each_seed_and_finished_runs_are_kept(prove):
    output, folder = prove()
    paths = sorted((folder / "runs").glob("*.json"))
    assert len(paths) == 3 and output.count(" | 1 |") == 3 and "20 training rows" in output
    for path in paths:
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["loss"] > 0 and len(run["rougeL"]) == 3 and run["settings"]["num_train_rows"] == 20
    times = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    output, _ = prove("--table_only", "--label_minutes", "0")
    assert output.count(" | 1 |") == 2 and output.count("missing") == 1
    prove("--label_minutes", "0")
    assert [path.stat().st_mtime_ns for path in paths[1:]] == times[1:] and paths[0].exists()
