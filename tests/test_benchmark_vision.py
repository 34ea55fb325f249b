# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow  # three processes, each of which imports everything

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark_vision")
    arguments = ["--preset", "tiny-vlm", "--images", "0", "1", "2", "--new_tokens", "3", "--repetitions", "2"]
    command = [
        sys.executable,
        "examples/benchmark_vision.py",
        *arguments,
        "--dtype",
        "float32",
        "--output",
        str(folder),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout, json.loads((folder / "benchmark_vision.json").read_text(encoding="utf-8"))


def test_it_writes_its_two_files_whole(finished):
    folder, _, _ = finished
    assert sorted(path.name for path in folder.iterdir()) == ["benchmark_vision.json", "benchmark_vision.png"]
    assert (folder / "benchmark_vision.png").read_bytes().startswith(b"\x89PNG")


def test_both_models_are_timed_for_every_number_of_images(finished):
    _, printed, report = finished
    for name in ("encoder-decoder", "LLaVA-NeXT twin"):
        assert set(report["token_seconds"][name]) == {"0", "1", "2"}
        assert all(len(run) == 3 for runs in report["token_seconds"][name].values() for run in runs)
        peaks = report["peak_bytes"][name]
        assert 10**8 < peaks["0"] <= peaks["1"] <= peaks["2"]
        assert printed.count(f"| {name} |") == 3
    assert report["source_tokens"]["2"] - report["source_tokens"]["1"] == 64
    ours, twin = report["num_parameters"].values()
    assert twin == pytest.approx(ours, rel=0.01)


def test_bytes_of_a_token_grow_by_keys_and_values_alone(finished):
    _, _, report = finished
    for name, num_layers in (("encoder-decoder", 2), ("LLaVA-NeXT twin", 6)):
        by_count = report["bytes_per_token"][name]
        assert by_count["2"] - by_count["1"] >= 64 * num_layers * 2 * 2 * 16 * 4
    assert "2 images: first token" in finished[1]
