# SPDX-License-Identifier: Apache-2.0
"""What the card of a published repository says, where it knows it from, and that its snippets run."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from onnx_bundles import tiny_text_model, word_tokenizer
from vision_folders import save_tiny_vision_model

from encdec_slm.hub_cards.eval_results import card_results, read_results, write_eval_results
from encdec_slm.hub_cards.published_cards import ModelFacts, check_facts, published_card, run_facts
from encdec_slm.hub_cards.repository_checks import problem_of, without_local_paths


RESULT = {
    "task": "docstrings",
    "dataset": {"name": "python/stdlib", "config": None, "split": "test", "revision": None},
    "model": "/home/me/model",
    "num_rows": 300,
    "metrics": {
        "rougeL": {"value": 15.02, "low": 14.1, "high": 16.0, "unit": "percent"},
        "exact": {"value": 1.5, "unit": "percent"},
    },
    "confidence": 0.95,
    "num_bootstrap": 1000,
    "command": "encdec-slm evaluate --model /home/me/runs/model --task docstrings --output_dir=/tmp/x/",
    "device": "cpu",
    "seconds": 12.3,
    "versions": {"torch": "2.13.0"},
}
FINETUNED = {
    "model": "tiny",
    "before": {"loss": 9.9},
    "after": {"loss": 3.21, "rougeL": 23.4, "rougeL_other_rows": 9.8, "exact": 1.5, "rows": 11},
    "train_steps": 7,
    "train_seconds": 61.2,
    "rows": {"train": {"rows": 4321, "source": 17}},
    "device": "cuda:0",
    "versions": {"torch": "2.13.0"},
}
DISTILLED_CARD = """\
---
base_model: org/student
datasets: [org/data]
library_name: transformers
license: mit
---

# model

## Training

| | |
| --- | --- |
| student before | a new `encdec_slm` model |
| teacher | [org/teacher](https://huggingface.co/org/teacher) |
| data | 1,000 rows of [org/data](https://huggingface.co/datasets/org/data) |
| targets | those of the data |
| loss | 0.9 x forward KL at temperature 1 |
| optimizer steps | 12 |

## Results
"""
MODEL = tiny_text_model()
SIZES = ModelFacts(MODEL.config, MODEL.num_parameters(), 272_000, "float32")


def card_of(run=None, results=None, facts=None, folder=None, sizes=SIZES):
    """The card as it is read back from a file."""
    facts = check_facts(facts)
    card = published_card("me/tiny", "tiny", sizes, run or run_facts(None), read_results(results), facts, {})
    card.save(folder / "README.md")
    return ModelCard.load(folder / "README.md")


def test_metadata_is_what_the_hub_reads(tmp_path):
    facts = {"base_model": "org/base", "datasets": ["org/rows", "/tmp/rows.jsonl"], "language": ["en", "code"]}
    data = card_of(results=RESULT, facts={**facts, "tags": "docstrings"}, folder=tmp_path).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text2text-generation")
    assert (data.base_model, data.datasets, data.language) == ("org/base", ["org/rows"], ["en", "code"])
    assert data.license == "apache-2.0" and data.tags[0] == "encdec_slm" and data.tags[-1] == "docstrings"
    assert data.metrics == ["rougeL", "exact"]
    first, second = data.eval_results
    assert (first.metric_type, first.metric_value, first.dataset_type) == ("rougeL", 15.02, "python/stdlib")
    assert first.dataset_split == "test" and second.metric_value == 1.5


def test_the_table_has_numbers_intervals_and_the_command_without_paths_of_a_machine(tmp_path):
    text = card_of(results=[RESULT, {"task": "copy", "metrics": {"exact": 99}}], folder=tmp_path).text
    assert "| docstrings | python/stdlib, test | 300 | rougeL | 15.02 % | 14.1 to 16 (95%) |" in text
    assert "| copy | copy | not recorded | exact | 99 | - |" in text
    assert "\n    encdec-slm evaluate --model model --task docstrings --output_dir=x\n" in text
    assert problem_of(tmp_path / "README.md") is None


def test_nothing_is_invented(tmp_path):
    text = card_of(folder=tmp_path).text
    for label in ("data", "teacher", "objective", "hardware", "energy"):
        assert f"| {label} | not recorded |" in text
    assert "Not evaluated." in text and "2501.16273" in text and "{{" not in text and "{%" not in text
    assert f"| {MODEL.num_parameters():,} |" in text and "base_model" not in (tmp_path / "README.md").read_text()


def test_facts_of_the_publisher_are_stated(tmp_path):
    facts = {
        key: f"my {key}" for key in ("description", "training_data", "teacher", "objective", "hardware", "energy")
    }
    text = card_of(facts={**facts, "limits": "Only Python.", "example": 'say "x"'}, folder=tmp_path).text
    assert all(value in text for value in facts.values())
    assert "Only Python." in text and r'print(pipe("say \"x\"", ' in text


def test_a_fine_tuning_tells_of_itself(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(FINETUNED))
    text = card_of(run_facts(tmp_path), folder=tmp_path).text
    stated = ("| data | 4,321 rows |", "| optimizer steps | 7 |", "| time | 61 seconds |", "preset `tiny`")
    for line in (*stated, "| hardware | `cuda:0` |", "| energy | not recorded |", "| ROUGE-L (%) | 23.4 |"):
        assert line in text


def test_a_distillation_tells_of_its_teacher_and_objective(tmp_path):
    models = [{"name": "teacher", "loss": 1.0}, {"name": "distilled student", "loss": 2.5, "train_seconds": 9.0}]
    (tmp_path / "results.json").write_text(json.dumps({"models": models, "train_steps": 12, "train_rows": 1000}))
    (tmp_path / "README.md").write_text(DISTILLED_CARD)
    card = card_of(run_facts(tmp_path), folder=tmp_path)
    assert (card.data.base_model, card.data.datasets, card.data.license) == ("org/student", ["org/data"], "mit")
    for line in ("[org/teacher](https://", "0.9 x forward KL", "1,000 rows of [org/data]", "| time | 9 seconds |"):
        assert line in card.text
    assert "| loss (nats per token) | 2.5 |" in card.text
    # A published card tells the same again.
    (tmp_path / "results.json").unlink()
    again = run_facts(tmp_path)
    assert "org/teacher" in again.teacher and again.objective.startswith("0.9 x") and again.energy is None


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"models": ["a"], "rows": [1], "tasks": [], "after": 1}'])
def test_a_results_file_that_cannot_be_read_tells_nothing(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert run_facts(tmp_path) == run_facts(None)


def test_results_are_entries_of_the_hub(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps([RESULT]))
    write_eval_results(read_results([path, {**RESULT, "task": "a/b c"}]), tmp_path)
    files = sorted((tmp_path / ".eval_results").iterdir())
    assert [file.name for file in files] == ["a_b_c.yaml", "docstrings.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(files[1].read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("python/stdlib", "docstrings", 15.02),
        ("python/stdlib", "docstrings", 1.5),
    ]
    assert "rougeL in percent" in entries[0].notes and "95% interval 14.1 to 16" in entries[0].notes
    assert "/home/me" not in files[1].read_text()
    assert not card_results([], "text2text-generation")


@pytest.mark.parametrize(
    "results, message",
    [
        ({"metrics": {"a": 1}}, r"`results\[0\]` has the keys \['metrics'\]"),
        ([{"task": "x", "metrics": [1]}], "`task` and `metrics` are needed"),
        ({"task": "x", "metrics": {}}, "no `metrics`"),
        ({"task": "x", "metrics": {"a": "1"}}, "'1', but a finite number"),
        ({"task": "x", "metrics": {"a": float("nan")}}, "nan, but a finite number"),
        ({"task": "x", "metrics": {"a": {"low": 1}}}, "no `value`"),
        ({"task": "x", "metrics": {"a": 1}, "dataset": [1]}, "`dataset` of"),
    ],
)
def test_results_of_another_shape_are_explained(results, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_results(results)
    assert "evaluation.json" in str(caught.value)


def test_results_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="has a int"):
        read_results([3])
    with pytest.raises(ValueError, match="must be a text"):
        check_facts({"energy": 3})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a --model=/home/me/x -o '/tmp/a b'", "a --model=x -o 'a b'"),
        (r"a --model C:\Users\me\x y/z ~/data/rows.json", "a --model x y/z rows.json"),
        ("/ and/or https://host/a/b cuda:0", "/ and/or https://host/a/b cuda:0"),
    ],
)
def test_commands_lose_the_folders_of_a_machine(text, expected):
    assert without_local_paths(text) == expected


def snippets(card, folder):
    """The card's Python, made to load `folder`."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
    return code.replace('MODEL = "me/tiny"', f"MODEL = {str(folder)!r}")


# The snippet leaves the Trainer's default for memory that only a GPU has.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_snippets_of_the_card_run_against_the_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    MODEL.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    card = card_of(folder=tmp_path)
    code = snippets(card.content, folder)
    assert code.count("revision=REVISION, trust_remote_code=True") == 3 and f"MODEL = {str(folder)!r}" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert Path("finetuned", "model.safetensors").is_file() and Path("exported", "model.bin").is_file()
    assert len(capsys.readouterr().out.strip().splitlines()) >= 3


@pytest.mark.slow
def test_the_snippets_of_a_vision_card_run_against_the_folder(tmp_path, monkeypatch, capsys):
    model = save_tiny_vision_model(tmp_path / "model")
    card = card_of(folder=tmp_path, sizes=ModelFacts(model.config, model.num_parameters(), 1_960_448, "float32"))
    assert card.data.pipeline_tag == "image-text-to-text" and "| vision tower | `" in card.text
    code = snippets(card.content, tmp_path / "model")
    assert code.count("revision=REVISION, trust_remote_code=True") == 3
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert Path("exported", "encoder_model.onnx").is_file()
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2
