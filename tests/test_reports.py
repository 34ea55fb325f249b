# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

from encdec_slm.benchmarks.contenders import FLAN_T5, OURS, TWIN
from encdec_slm.benchmarks.reports import claims, figure, tables, verdict


def spread(value):
    return {"median": value, "lower_quartile": 0.9 * value, "upper_quartile": 1.1 * value}


def row(model, engine="ctranslate2", precision="int8", decode=50.0):
    result = {
        "first_token_seconds": spread(0.5),
        "decode_tokens_per_second": spread(decode),
        "end_to_end_seconds": spread(2.0),
        "bytes_read_per_token": 100_000_000,
        "share_of_memory_bandwidth": 0.75,
        "first_token_flops": 10**9,
        "share_of_matmul_rate": 0.5,
        "peak_bytes": 900_000_000,
    }
    return {
        "name": f"{model}/{engine}/{precision}/cpu",
        **{"model": model, "engine": engine, "precision": precision, "device": "cpu"},
        **{"num_parameters": 10**9, "weights_per_token": 10**8, "file_bytes": 5 * 10**8, "bytes_before": 10**8},
        "settings": [result, copy.deepcopy(result)],
    }


def pair(ours, opponent, first_token, decode, memory=0.8):
    setting = {"first_token_seconds": spread(first_token), "decode_tokens_per_second": spread(decode)}
    return {"ours": ours["name"], "opponent": opponent["name"], "settings": [{**setting, "added_memory": memory}] * 2}


@pytest.fixture
def report():
    ours, twin, usual = row(OURS), row(TWIN), row(TWIN, "transformers", "float32")
    return {
        "machine": {"cpu": "A CPU", "cores": 2, "gpu": None},
        "settings": [[512, 64], [2048, 128]],
        "rows": [usual, ours, twin, row(FLAN_T5, decode=40.0)],
        "pairs": [pair(ours, usual, 0.5, 5.0), pair(ours, twin, 0.7, 2.5)],
    }


def test_tables_have_a_row_per_contender_and_setting(report):
    text = tables(report)
    assert text.count("| encoder-decoder | ctranslate2 | int8 | 500 (450 to 550) ms | 50.0 (45.0 to 55.0)/s |") == 2
    assert "512 source tokens, 64 new ones" in text and "2,048 source tokens, 128 new ones" in text
    assert "| 900 MB | 800 MB | 500 MB | 100.0 MB | 75% | 50% |" in text


def test_every_claim_is_held_or_not_by_what_was_measured(report):
    assert [claim["held"] for claim in claims(report)] == [True] * 7
    report["pairs"][0]["settings"][0]["first_token_seconds"] = spread(0.54)
    report["pairs"][0]["settings"][0]["decode_tokens_per_second"] = spread(4.6)
    report["pairs"][1]["settings"] = [
        {**report["pairs"][1]["settings"][0], "decode_tokens_per_second": spread(2.3)},
        {**report["pairs"][1]["settings"][1], "added_memory": 0.95},
    ]
    report["rows"][3]["settings"][0]["decode_tokens_per_second"] = spread(60.0)
    assert [claim["held"] for claim in claims(report)] == [False, False, False, True, False, True, False]


def test_the_verdict_counts_and_names_what_did_not_hold(report):
    report["rows"][1]["settings"] = [
        {**one, "share_of_memory_bandwidth": 0.5} for one in report["rows"][1]["settings"]
    ]
    text = verdict(report)
    assert text.startswith("On A CPU, 2 cores, 6 of 7 claims held:")
    assert "NOT held: encoder-decoder/ctranslate2/int8 decodes at 70% of bandwidth; measured 50%." in text


def test_without_opponents_nothing_is_claimed(report):
    report["pairs"], report["rows"] = [], [row(OURS, "transformers", "float32")]
    assert list(claims(report)) == []


def test_the_picture_has_bars_for_every_contender(report):
    axes = figure(report).axes
    assert len(axes) == 4
    assert [len(one.patches) for one in axes] == [4] * 4
    assert "512 source, 64 new tokens" in axes[0].get_title()
