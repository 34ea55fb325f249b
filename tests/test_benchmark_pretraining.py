# SPDX-License-Identifier: Apache-2.0
"""The benchmark of pre-training, with tiny models."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from conftest import build_model


SCRIPT = Path(__file__).parent.parent / "examples" / "benchmark_pretraining.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("benchmark_pretraining", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = {"vocab_size": 32128, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    tiny = {
        "T5": lambda: T5ForConditionalGeneration(
            T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
        ),
        "ours": lambda: build_model(vocab_size=32128),
    }
    monkeypatch.setattr(module, "CONTENDERS", tiny)
    return module


def test_speeds_are_reported_beside_those_of_t5(benchmark, tmp_path, capsys):
    options = ["--source-length", "8", "--target-length", "4", "--repetitions", "2", "--rounds", "1"]
    benchmark.main([*options, "--output", str(tmp_path)])
    report = json.loads((tmp_path / "benchmark_pretraining.json").read_text())
    assert set(report["seconds"]) == {"T5", "ours"} and all(len(times) == 2 for times in report["seconds"].values())
    assert all(0 < row["matrix_share"] < 1 for row in report["rows"].values())
    assert "| 1.00 |" in capsys.readouterr().out


def test_operations_count_each_weight_with_the_tokens_that_pass_it(benchmark):
    model = benchmark.CONTENDERS["T5"]()
    batch = {"input_ids": torch.zeros(1, 10), "labels": torch.zeros(1, 3)}
    attention, feed_forward, head = 4 * 16 * 16, 3 * 16 * 24, 16 * 32128
    expected = 10 * (attention + feed_forward + attention / 2) + 3 * (1.5 * attention + feed_forward + head)
    assert benchmark.count_operations(model, batch) == 6 * expected
