# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


ROOT = Path(__file__).parent.parent
TORCH = ("*r/transformers/float32/cpu", "twin/transformers/float32/cpu")
# Without peers, which are large, and without compilation, which is slow.
ENGINES = [f"{model}/{engine}/*" for model in ("encoder-decoder", "twin") for engine in ("c*", "o*", "transformers")]


def run(folder, *patterns):
    settings = ["--preset", "tiny", "--settings", "16:8", "--settings", "8:4", "--repetitions", "2", "--threads", "1"]
    folders = ["--output", str(folder / "report"), "--models", str(folder / "models")]
    patterns = [word for pattern in patterns for word in ("--only", pattern)]
    command = [sys.executable, "-m", "encdec_slm_cli", "bench", *settings, *folders, *patterns]
    # One thread: so small a model gains nothing from more, and threads of a busy machine wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    report = json.loads((folder / "report" / "benchmark.json").read_text(encoding="utf-8"))
    return report, process.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, *run(folder, *TORCH)


@pytest.fixture(scope="module")
def report(finished):
    return finished[1]


def test_the_benchmark_writes_its_two_files_whole(finished):
    names = sorted(path.name for path in (finished[0] / "report").iterdir())
    assert names == ["benchmark.json", "benchmark.png"]
    assert (finished[0] / "report" / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_prints_a_table_per_setting_and_a_verdict(finished):
    lines = finished[2].splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows == ["model", "---", "encoder-decoder", "twin"] * 2
    assert any("claims held" in line for line in lines)


def test_the_report_holds_every_raw_time_in_the_order_of_settings(report):
    assert report["settings"] == [[8, 4], [16, 8]]
    (group,) = report["groups"]
    for of_settings in group["token_seconds"].values():
        for (_, num_new_tokens), runs in zip(report["settings"], of_settings, strict=True):
            assert [len(run) for run in runs] == [num_new_tokens] * 2
            assert all(0 < earlier < later for run in runs for earlier, later in itertools.pairwise(run))


def test_rows_and_ratios_follow_from_the_raw_times(report):
    (group,) = report["groups"]
    ours, twin = (row["name"] for row in report["rows"])
    for row in report["rows"]:
        for place, result in enumerate(row["settings"]):
            runs = group["token_seconds"][row["name"]][place]
            rates = [(len(run) - 1) / (run[-1] - run[0]) for run in runs]
            assert result["first_token_seconds"]["median"] == pytest.approx(np.median([run[0] for run in runs]))
            assert result["decode_tokens_per_second"]["median"] == pytest.approx(np.median(rates))
            assert result["end_to_end_seconds"]["median"] == pytest.approx(np.median([run[-1] for run in runs]))
            share = result["bytes_read_per_token"] * np.median(rates) / np.median(group["machine"]["bandwidth"])
            assert result["share_of_memory_bandwidth"] == pytest.approx(share)
            assert result["peak_bytes"] > row["bytes_before"] > 0
    (pair,) = report["pairs"]
    assert (pair["ours"], pair["opponent"]) == (ours, twin)
    first = [a[0] / b[0] for a, b in zip(*(group["token_seconds"][name][1] for name in (ours, twin)), strict=True)]
    assert pair["settings"][1]["first_token_seconds"]["median"] == pytest.approx(np.median(first))


def test_the_report_names_the_machine_and_the_needs_of_each_model(report):
    assert {"cpu", "cores", "torch_threads", "torch", "transformers", "encdec_slm"} <= report["machine"].keys()
    ours, twin = report["rows"]
    assert ours["num_parameters"] == pytest.approx(twin["num_parameters"], rel=0.01)
    assert ours["settings"][1]["bytes_read_per_token"] == 4 * (174_528 + 20 * 128)
    assert ours["settings"][1]["first_token_flops"] < twin["settings"][1]["first_token_flops"]


@pytest.mark.slow
def test_every_engine_is_timed_beside_the_twin_in_transformers(tmp_path):
    report, printed = run(tmp_path, *ENGINES)
    engines = {row["engine"] for row in report["rows"]}
    assert engines == {"transformers", "ctranslate2", "onnxruntime", "openvino"}
    usual = "twin/transformers/float32/cpu"
    assert all(group["contenders"][0] == usual for group in report["groups"])
    assert "beside the twin in the same engine" in printed
    for row in report["rows"]:
        if row["precision"] == "int8" and row["engine"] != "openvino":
            (whole,) = (one for one in report["rows"] if one["name"] == row["name"].replace("int8", "float32"))
            assert row["file_bytes"] < whole["file_bytes"] / 2
