# SPDX-License-Identifier: Apache-2.0
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import build_byte_tokenizer


ROOT = Path(__file__).parent.parent
ARGUMENTS = (
    "--preset tiny --teacher-preset tiny --vocab-size 128 --batch-size 2 --source-length 8 --padded-source-length 12 "
    "--new-tokens 4 --repetitions 2 --positions 110,220"
)
LABEL_ARGUMENTS = "--preset tiny --vocab-size 300 --batch-size 2 --source-length 200 --repetitions 2 --positions 110"


@pytest.mark.slow
def test_steps_and_the_memory_of_the_loss_are_measured(tmp_path):
    # torch 2.13's compiler, which TRL imports, warns of its own import.
    warnings = ["-W", "error", "-W", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"]
    command = [sys.executable, *warnings, "examples/benchmark_training.py", *ARGUMENTS.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["benchmark_training.json", "benchmark_training.png"]
    report = json.loads((tmp_path / "benchmark_training.json").read_text(encoding="utf-8"))
    assert all(value > 0 for runs in report["runs"].values() for run in runs for value in run.values())
    ours, other = ([sum(run.values()) for run in report["runs"][f"{name}_on_policy"]] for name in ("ours", "original"))
    rates = [8 / seconds for seconds in ours]  # 2 rows of 4 tokens
    assert report["tokens_per_second"]["ours_on_policy"]["median"] == pytest.approx(sum(rates) / 2)
    ratios = [seconds / our_seconds for our_seconds, seconds in zip(ours, other, strict=True)]
    ratio = report["ratios"]["on-policy step, original without padding"]["median"]
    assert ratio == pytest.approx(sum(ratios) / 2)
    assert report["num_parameters"]["teacher"] == pytest.approx(report["num_parameters"]["student"], rel=0.02)
    rows = [line for line in process.stdout.splitlines() if line.startswith("| ")]
    assert sum("step" in row for row in rows) == 3 and sum("loss memory" in row for row in rows) == 2

    memory = report["loss_memory"]
    our_peaks, dense_peaks = ([peaks[size] for size in ("110", "220")] for peaks in memory["peak_bytes"].values())
    assert 0 < memory["chunk_positions"] < 110
    logits_bytes = 4 * 110 * memory["vocab_size"]
    assert our_peaks[0] > logits_bytes / 2
    assert dense_peaks[1] - dense_peaks[0] > 3 * logits_bytes
    # Hidden states and their gradients grow by 28 KB; the rest is how pages happen to be used.
    assert abs(our_peaks[1] - our_peaks[0]) < logits_bytes / 5


@pytest.mark.slow
def test_steps_with_labels_of_a_teacher_are_measured(tmp_path):
    tokenizer = build_byte_tokenizer(ends_sources=False)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, bos_token_id=1, eos_token_id=2))
    for part in (teacher, tokenizer):
        part.save_pretrained(tmp_path / "teacher")
    command = [sys.executable, "examples/benchmark_training.py", "--teacher", str(tmp_path / "teacher")]
    process = subprocess.run(
        [*command, *LABEL_ARGUMENTS.split(), "--output", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "out" / "benchmark_teacher_cache.json").read_text(encoding="utf-8"))
    assert set(report["tokens_per_second"]) == {"cross_entropy", "topk", "sampled", "teacher"}
    assert all(seconds > 0 for values in report["seconds"].values() for seconds in values)
    assert len(report["labels_per_second"]) == 3 and len(report["ratios"]) == 4


def test_numbers_that_do_not_fit_are_refused(capsys):
    parse_arguments = runpy.run_path(str(ROOT / "examples" / "benchmark_training.py"))["parse_arguments"]
    with pytest.raises(SystemExit):
        parse_arguments(["--source-length", "9", "--padded-source-length", "8"])
    assert "padded source" in capsys.readouterr().err
