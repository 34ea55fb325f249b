# SPDX-License-Identifier: Apache-2.0
"""The command `bench`: what it measures, writes and prints."""

import itertools
import json
from multiprocessing import get_context

import numpy as np
import pytest
from encdec_slm_cli import main


TORCH = ["*r/transformers/float32/cpu", "decoder-only/transformers/float32/cpu"]
# Without peers, which are large, and without compilation, which is slow.
ENGINES = [f"*coder*/{engine}/*" for engine in ("ctranslate2", "onnxruntime", "openvino", "transformers")]


def run(folder, *patterns):
    arguments = ["--preset", "tiny", "--settings", "16:8", "--settings", "8:4", "--repetitions", "2", "--threads", "1"]
    arguments += ["--output", str(folder / "report"), "--models", str(folder / "models")]
    arguments += [argument for pattern in patterns for argument in ("--only", pattern)]
    assert main(["bench", *arguments]) == 0
    return json.loads((folder / "report" / "benchmark.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        # Start processes without importing everything again; torch has one thread here.
        patch.setattr("encdec_slm.benchmarks.machine.get_context", lambda method: get_context("fork"))
        patch.setattr("encdec_slm.benchmarks.measuring.NUM_BUFFER_VALUES", 2**20)
        report = run(folder, *TORCH)
    return folder / "report", report


def test_the_benchmark_writes_two_files(finished):
    folder, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["benchmark.json", "benchmark.png"]
    assert (folder / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_has_all_raw_times_by_rising_source_length(finished):
    _, report = finished
    assert report["settings"] == [[8, 4], [16, 8]]
    (group,) = report["groups"]
    for times in group["token_seconds"].values():
        for (_, num_new_tokens), runs in zip(report["settings"], times, strict=True):
            assert [len(run) for run in runs] == [num_new_tokens] * 2
            assert all(0 < earlier < later for run in runs for earlier, later in itertools.pairwise(run))


def test_rows_and_ratios_follow_from_the_raw_times(finished):
    _, report = finished
    (group,) = report["groups"]
    ours, baseline = (row["name"] for row in report["rows"])
    for row in report["rows"]:
        for place, result in enumerate(row["settings"]):
            runs = group["token_seconds"][row["name"]][place]
            rates = [(len(run) - 1) / (run[-1] - run[0]) for run in runs]
            assert result["first_token_seconds"]["median"] == pytest.approx(np.median([run[0] for run in runs]))
            assert result["decode_tokens_per_second"]["median"] == pytest.approx(np.median(rates))
            assert result["end_to_end_seconds"]["median"] == pytest.approx(np.median([run[-1] for run in runs]))
            share = result["bytes_read_per_token"] * np.median(rates) / np.median(group["bandwidth"])
            assert result["share_of_memory_bandwidth"] == pytest.approx(share)
            assert result["peak_bytes"] >= row["bytes_before"] > 0
    (pair,) = report["pairs"]
    assert (pair["ours"], pair["opponent"]) == (ours, baseline)
    first = [a[0] / b[0] for a, b in zip(*(group["token_seconds"][name][1] for name in (ours, baseline)), strict=True)]
    assert pair["settings"][1]["first_token_seconds"]["median"] == pytest.approx(np.median(first))


def test_the_report_names_the_machine_and_sizes(finished):
    _, report = finished
    assert {"cpu", "cores", "torch_threads", "torch", "transformers", "encdec_slm"} <= report["machine"].keys()
    ours, baseline = report["rows"]
    assert ours["num_parameters"] == pytest.approx(baseline["num_parameters"], rel=0.01)
    assert ours["settings"][1]["bytes_read_per_token"] == 4 * (174_528 + 20 * 128)


@pytest.mark.slow
def test_every_engine_is_timed_beside_the_baseline_in_transformers(tmp_path, capsys):
    report = run(tmp_path, *ENGINES)
    printed = capsys.readouterr().out
    engines = {row["engine"] for row in report["rows"]}
    assert engines == {"transformers", "ctranslate2", "onnxruntime", "openvino"}
    assert len({group["contenders"][0] for group in report["groups"]}) == 1
    assert report["groups"][0]["contenders"][0].startswith("decoder-only/transformers/")
    assert "in the same engine" in printed and printed.count("| decoder-only | ctranslate2 |") == 4
    for row in report["rows"]:
        if row["precision"] == "int8" and row["engine"] != "openvino":
            (whole,) = (one for one in report["rows"] if one["name"] == row["name"].replace("int8", "float32"))
            assert row["file_bytes"] < 0.6 * whole["file_bytes"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--settings", "16:1"], "16:1"),
        (["--settings", "16"], "SOURCE:NEW"),
        (["--devices", "tpu"], "tpu"),
        (["--repetitions", "0"], "--repetitions"),
    ],
)
def test_wrong_options_are_named(arguments, named, capsys):
    assert main(["bench", *arguments]) == 2
    assert named in capsys.readouterr().err
