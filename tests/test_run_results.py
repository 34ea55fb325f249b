# SPDX-License-Identifier: Apache-2.0
import json

import pytest

from encdec_slm.run_results import DataSource, Metric, ModelResults, RunResults, comparison_table, format_table


EVALUATION_0_1 = {
    "task": "docstrings",
    "dataset": {"name": "docstrings", "config": None, "split": "test", "revision": None},
    "model": "docstring-writer",
    "num_rows": 710,
    "num_cut_rows": 445,
    "metrics": {"rougeL": {"value": 20.25, "low": 19.07, "high": 21.43, "unit": "percent"}},
    "confidence": 0.95,
    "num_bootstrap": 1000,
    "settings": {"max_new_tokens": 48},
    "command": "encdec-slm evaluate --model docstring-writer",
    "device": "cpu",
    "seconds": 18.6,
    "date": "2026-11-27",
    "versions": {"python": "3.11.7"},
}


@pytest.fixture
def results():
    before = ModelResults("before training", {"loss": Metric(8.25, unit="nats")}, 1234)
    metrics = {"loss": Metric(2.5, unit="nats"), "rougeL": Metric(15, 14.1, 16, "percent")}
    after = ModelResults("after training", metrics, 1234, train_seconds=61.2, tokens_per_second=594.4)
    return RunResults(
        kind="fine-tuning",
        task="text",
        models=[before, after],
        saved_model="after training",
        dataset=DataSource("user/data", split="test"),
        num_rows={"train": 4321, "test": 300},
        validation_losses=[{"step": 3, "loss": 4.5}],
        samples=[{"source": "ä", "prediction": "ß"}],
        settings={"learning_rate": 1e-3},
    )


def test_results_are_the_same_after_saving_and_loading(results, tmp_path):
    results.save(tmp_path / "results.json")
    loaded = RunResults.load(tmp_path / "results.json")
    assert loaded == results and loaded.saved.metrics["rougeL"].high == 16
    assert "torch" in loaded.versions and loaded.date
    content = loaded.to_dict()
    assert RunResults.from_dict(content) == RunResults.from_dict(content) == results


def test_a_table_has_a_row_per_number_and_a_column_per_model(results):
    table = comparison_table(results)
    assert table == [
        ["300 held-out rows", "before training", "after training"],
        ["parameters", "1,234", "1,234"],
        ["loss (nats per token)", "8.25", "2.5"],
        ["ROUGE-L (%)", "-", "15.00 [14.10, 16.00]"],
        ["tokens per second", "-", "594"],
        ["training (s)", "-", "61"],
    ]
    assert "| ROUGE-L (%) | - | 15.00 [14.10, 16.00] |" in format_table(table, markdown=True)
    assert len(set(map(len, format_table(table).splitlines()))) == 1


def test_an_evaluation_of_version_0_1_is_read(tmp_path):
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION_0_1))
    results = RunResults.load(tmp_path / "evaluation.json")
    assert (results.kind, results.task, results.date) == ("evaluation", "docstrings", "2026-11-27")
    assert results.saved.name == "docstring-writer" and results.saved.metrics["rougeL"].low == 19.07
    assert (results.num_rows, results.num_cut_rows) == ({"test": 710}, {"test": 445})
    assert str(results.dataset) == "docstrings, test" and results.versions == {"python": "3.11.7"}


def test_results_of_other_tools_need_a_task_and_metrics():
    results = RunResults.from_dict({"task": "copy", "dataset": "user/data", "metrics": {"exact": 99}})
    assert results.saved.metrics == {"exact": Metric(99)} and results.dataset.name == "user/data"


@pytest.mark.parametrize(
    "content, named",
    [
        ("{", "evaluation.json"),
        ("[]", "list"),
        ("{}", "format"),
        ('{"task": "x", "metrics": {"a": "1"}}', "value"),
        ('{"task": "x", "metrics": {"a": {"low": 1}}}', "value"),
        ('{"task": "x", "metrics": {"a": 1}, "dataset": [1]}', "DataSource"),
        ('{"format": "encdec_slm.run_results", "version": 2}', "version 2"),
        ('{"format": "encdec_slm.run_results", "version": 1}', "models"),
        ('{"format": "encdec_slm.run_results", "version": 1, "models": [{"name": "a"}]}', "kind"),
        ('{"format": "encdec_slm.run_results", "version": 1, "models": "a"}', "str"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, content, named):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=named):
        RunResults.load(path)


def test_the_saved_model_must_be_one_of_the_models(results, tmp_path):
    results.save(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="saved_model"):
        RunResults.from_dict({**content, "saved_model": "teacher"})
