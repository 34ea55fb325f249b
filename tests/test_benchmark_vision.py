# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_both_models_are_timed_for_every_number_of_images(tmp_path):
    arguments = ["--preset", "tiny-vlm", "--images", "0", "1", "2", "--new_tokens", "3", "--repetitions", "2"]
    arguments += ["--dtype", "float32", "--output", str(tmp_path)]
    process = subprocess.run(
        [sys.executable, "examples/benchmark_vision.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "benchmark_vision.json").read_text(encoding="utf-8"))
    assert (tmp_path / "benchmark_vision.png").read_bytes().startswith(b"\x89PNG")
    for name, num_layers in (("encoder-decoder", 2), ("LLaVA-NeXT", 6)):
        times, peaks = report["token_seconds"][name], report["peak_bytes"][name]
        assert all(len(run) == 3 for runs in times.values() for run in runs)
        assert set(times) == {"0", "1", "2"} and 10**8 < peaks["0"] <= peaks["1"] <= peaks["2"]
        assert process.stdout.count(f"| {name} |") == 3
        # Bytes per token grow only by keys and values.
        read = report["bytes_per_token"][name]
        assert read["2"] - read["1"] >= 64 * num_layers * 2 * 2 * 16 * 4
    assert report["source_tokens"]["2"] - report["source_tokens"]["1"] == 64
    ours, baseline = report["num_parameters"].values()
    assert baseline == pytest.approx(ours, rel=0.01)
    assert "2 images: first token" in process.stdout
