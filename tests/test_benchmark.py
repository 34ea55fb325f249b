# SPDX-License-Identifier: Apache-2.0
import itertools
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    arguments = "--preset tiny --source-length 16 --source-lengths 8 --new-tokens 8 --repetitions 2 --dtype float32"
    command = [sys.executable, "-W", "error", "examples/benchmark.py", *arguments.split(), "--output", str(folder)]
    # One thread: so small a model gains nothing from more, and threads of a busy machine wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished[0] / "benchmark.json").read_text(encoding="utf-8"))


def test_the_benchmark_writes_its_two_files_whole(finished):
    assert sorted(path.name for path in finished[0].iterdir()) == ["benchmark.json", "benchmark.png"]
    assert (finished[0] / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_prints_a_row_per_model_and_a_ratio_per_length(finished):
    lines = finished[1].splitlines()
    rows = [line.split("|")[1].strip() for line in lines if line.startswith("| ")]
    assert rows == ["model", "---", "encoder-decoder", "decoder-only twin"]
    assert sum(line.startswith("By the twin, ") for line in lines) == 2


def test_the_report_holds_every_raw_time(report):
    assert report["arguments"]["source_lengths"] == [8, 16]
    for contender in report["contenders"]:
        for result in contender["by_source_length"].values():
            runs = result["token_seconds"]
            assert [len(run) for run in runs] == [8, 8]
            assert all(0 < earlier < later for run in runs for earlier, later in itertools.pairwise(run))


def test_the_summary_follows_from_the_raw_times(report):
    for contender in report["contenders"]:
        result = contender["by_source_length"]["16"]
        runs = result["token_seconds"]
        rates = [7 / (run[-1] - run[0]) for run in runs]
        assert result["first_token_seconds"]["median"] == pytest.approx(sum(run[0] for run in runs) / 2)
        assert result["decode_tokens_per_second"]["median"] == pytest.approx(sum(rates) / 2)
        bandwidth = report["memory_bandwidth_bytes_per_second"]["median"]
        expected = result["bytes_read_per_token"] * sum(rates) / 2 / bandwidth
        assert result["share_of_memory_bandwidth"] == pytest.approx(expected)


def test_the_report_names_the_machine_and_the_needs_of_each_model(report):
    assert {"cpu", "cores", "torch_threads", "torch", "transformers", "encdec_slm"} <= report["machine"].keys()
    ours, twin = report["contenders"]
    assert ours["num_parameters"] == pytest.approx(twin["num_parameters"], rel=0.01)
    assert ours["peak_bytes"] > ours["bytes_before_the_model"] > 0
    needed = [contender["by_source_length"]["16"] for contender in (ours, twin)]
    # In float32: the decoder's and the head's 174,528 weights and 16 + 8 / 2 cached tokens of 128 numbers.
    assert needed[0]["bytes_read_per_token"] == 4 * (174_528 + 20 * 128)
    assert needed[0]["bytes_read_per_token"] < needed[1]["bytes_read_per_token"]
    assert needed[0]["first_token_flops"] < needed[1]["first_token_flops"]


def test_the_benchmark_says_what_a_run_needs(capsys):
    parse_arguments = runpy.run_path(str(ROOT / "examples" / "benchmark.py"))["parse_arguments"]
    with pytest.raises(SystemExit):
        parse_arguments(["--new-tokens", "1"])
    assert "2 new tokens" in capsys.readouterr().err
