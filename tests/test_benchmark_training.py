# SPDX-License-Identifier: Apache-2.0
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
ARGUMENTS = (
    "--preset tiny --teacher-preset tiny --vocab-size 128 --batch-size 2 --source-length 8 --padded-source-length 12 "
    "--new-tokens 4 --repetitions 2 --positions 110,220"
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark_training")
    # torch 2.13's compiler, which TRL imports, warns of its own import.
    warnings = ["-W", "error", "-W", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"]
    command = [sys.executable, *warnings, "examples/benchmark_training.py", *ARGUMENTS.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*command, "--output", str(folder)], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished[0] / "benchmark_training.json").read_text(encoding="utf-8"))


def test_the_training_benchmark_writes_its_two_files_whole(finished):
    names = sorted(path.name for path in finished[0].iterdir())
    assert names == ["benchmark_training.json", "benchmark_training.png"]
    assert (finished[0] / "benchmark_training.png").read_bytes().startswith(b"\x89PNG")


def test_the_training_benchmark_prints_speeds_and_a_row_per_number_of_positions(finished):
    rows = [line.split("|")[1].strip() for line in finished[1].splitlines() if line.startswith("| ")]
    assert [row for row in rows if row.startswith(("on-policy step", "off-policy step"))] == [rows[2], rows[6]]
    assert sum(row.startswith("loss memory") for row in rows) == 2


def test_the_report_holds_all_raw_times(report):
    runs = report["runs"]
    assert list(runs) == [
        *("predecessor_padded", "predecessor_on_policy", "ours_on_policy", "needed_off_policy", "ours_off_policy")
    ]
    assert all(len(repetitions) == 2 for repetitions in runs.values())
    seconds = [value for repetitions in runs.values() for run in repetitions for value in run.values()]
    assert all(value > 0 for value in seconds)


def test_speeds_follow_from_the_raw_times(report):
    ours, predecessor = (
        [sum(run.values()) for run in report["runs"][f"{name}_on_policy"]] for name in ("ours", "predecessor")
    )
    assert report["num_tokens_per_step"] == 2 * 4
    rates = [8 / seconds for seconds in ours]
    assert report["tokens_per_second"]["ours_on_policy"]["median"] == pytest.approx(sum(rates) / 2)
    ratios = [other / seconds for seconds, other in zip(ours, predecessor, strict=True)]
    assert report["unpadded_speedup"]["median"] == pytest.approx(sum(ratios) / 2)
    assert report["on_policy_speedup"]["median"] > 0
    assert report["off_policy_share_of_needed_speed"]["median"] > 0


def test_memory_of_our_loss_stays_flat_where_that_of_the_dense_loss_grows(report):
    memory = report["loss_memory"]
    assert memory["vocab_size"] == 151_936
    ours, dense = ([peaks[size] for size in ("110", "220")] for peaks in memory["peak_bytes"].values())
    assert 0 < memory["chunk_positions"] < 110
    logits_bytes = 4 * 110 * memory["vocab_size"]
    assert ours[0] > logits_bytes / 2
    assert dense[1] - dense[0] > 3 * logits_bytes
    # Hidden states and their gradients do grow, by 28 KB; the rest is how pages happen to be used.
    assert abs(ours[1] - ours[0]) < logits_bytes / 5


def test_the_report_names_the_machine_and_the_models(report):
    assert {"cpu", "torch_threads", "torch", "transformers", "trl", "encdec_slm"} <= report["machine"].keys()
    assert report["num_parameters"]["teacher"] == pytest.approx(report["num_parameters"]["student"], rel=0.02)


def test_the_training_benchmark_says_what_a_run_needs(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    parse_arguments = runpy.run_path(str(ROOT / "examples" / "benchmark_training.py"))["parse_arguments"]
    with pytest.raises(SystemExit):
        parse_arguments(["--source-length", "9", "--padded-source-length", "8"])
    assert "padded source" in capsys.readouterr().err
