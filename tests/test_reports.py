# SPDX-License-Identifier: Apache-2.0
import copy

import pytest

from encdec_slm.benchmarks.contenders import BASELINE, FLAN_T5, OURS
from encdec_slm.benchmarks.reports import build_figure, build_tables, build_verdict, check_claims


def spread(value):
    return {"median": value, "lower_quartile": 0.9 * value, "upper_quartile": 1.1 * value}


def build_row(model, engine="ctranslate2", precision="int8", decode=50.0):
    result = {
        "first_token_seconds": spread(0.5),
        "decode_tokens_per_second": spread(decode),
        "end_to_end_seconds": spread(2.0),
        "bytes_read_per_token": 100_000_000,
        "share_of_memory_bandwidth": 0.75,
        "peak_bytes": 900_000_000,
    }
    return {
        "name": f"{model}/{engine}/{precision}/cpu",
        **{"model": model, "engine": engine, "precision": precision, "device": "cpu"},
        **{"num_parameters": 10**9, "weights_per_token": 10**8, "file_bytes": 5 * 10**8, "bytes_before": 10**8},
        "settings": [result, copy.deepcopy(result)],
    }


def build_pair(ours, opponent, first_token, decode, memory=0.8):
    setting = {"first_token_seconds": spread(first_token), "decode_tokens_per_second": spread(decode)}
    settings = [{**setting, "added_memory": memory}, {**setting, "added_memory": memory}]
    return {"ours": ours["name"], "opponent": opponent["name"], "settings": settings}


@pytest.fixture
def report():
    ours, baseline, usual = build_row(OURS), build_row(BASELINE), build_row(BASELINE, "transformers", "float32")
    return {
        "machine": {"cpu": "A CPU", "cores": 2, "gpu": None},
        "settings": [[512, 64], [2048, 128]],
        "rows": [usual, ours, baseline, build_row(FLAN_T5, decode=40.0)],
        "pairs": [build_pair(ours, usual, 0.5, 5.0), build_pair(ours, baseline, 0.7, 2.5)],
    }


def test_tables_have_a_row_per_contender_and_setting(report):
    text = build_tables(report)
    assert text.count("| encoder-decoder | ctranslate2 | int8 | 500 (450 to 550) ms | 50.0 (45.0 to 55.0)/s |") == 2
    assert "512 source tokens" in text and "2,048 source tokens" in text
    assert "| 900 MB | 800 MB | 500 MB | 100.0 MB | 75% |" in text


def test_each_claim_holds_or_not_by_what_was_measured(report):
    assert [held for *_, held in check_claims(report)] == [True] * 7
    usual, same_engine = (pair["settings"] for pair in report["pairs"])
    usual[0]["first_token_seconds"], usual[0]["decode_tokens_per_second"] = spread(0.54), spread(4.6)
    same_engine[0]["decode_tokens_per_second"], same_engine[1]["added_memory"] = spread(2.3), 0.95
    report["rows"][3]["settings"][0]["decode_tokens_per_second"] = spread(60.0)
    assert [held for *_, held in check_claims(report)] == [False, False, True, False, False, True, False]


def test_the_best_engine_counts_for_the_claims_of_the_paper(report):
    other = build_row(OURS, "onnxruntime")
    report["pairs"].append(build_pair(other, report["rows"][0], 0.6, 9.0))
    measured = [measured for _, measured, _ in check_claims(report)]
    assert measured[0].startswith("0.50 x with encoder-decoder/ctranslate2")
    assert measured[1].startswith("9.00 x with encoder-decoder/onnxruntime")


def test_the_verdict_counts_and_names_claims(report):
    for result in report["rows"][1]["settings"]:
        result["share_of_memory_bandwidth"] = 0.5
    text = build_verdict(report)
    assert text.startswith("On A CPU, 2 cores, 6 of 7 claims held")
    assert "NOT held: encoder-decoder/ctranslate2/int8/cpu" in text and "50%" in text
    report["pairs"], report["rows"] = [], [build_row(OURS, "transformers", "float32")]
    assert list(check_claims(report)) == []


def test_the_figure_has_bars_for_every_contender(report):
    axes = build_figure(report).axes
    assert [len(one.patches) for one in axes] == [4] * 4
    assert "512 source, 64 new tokens" in axes[0].get_title()
