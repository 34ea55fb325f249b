# SPDX-License-Identifier: Apache-2.0
"""Model cards: what they say, where it comes from, and that their snippets run."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from encdec_slm.hub_cards import write_card
from encdec_slm.hub_cards.eval_results import load_evaluations, write_eval_results
from encdec_slm.hub_cards.model_cards import CardContent, build_card, check_facts, read_card_metadata, read_model_facts
from encdec_slm.hub_cards.repository_checks import find_problem, remove_local_paths
from encdec_slm.run_results import DataSource, Metric, ModelResults, RunResults


EVALUATION = {
    "task": "docstrings",
    "dataset": {"name": "python/stdlib", "config": None, "split": "test", "revision": None},
    "model": "/home/me/model",
    "num_rows": 300,
    "metrics": {
        "rougeL": {"value": 15.02, "low": 14.1, "high": 16.0, "unit": "percent"},
        "exact": {"value": 1.5, "unit": "percent"},
    },
    "confidence": 0.95,
    "command": "encdec-slm evaluate --model /home/me/runs/model --task docstrings --output_dir=/tmp/x/",
    "device": "cpu",
    "versions": {"torch": "2.13.0"},
}


def build_training(kind="fine-tuning", **fields):
    models = [
        ModelResults("before", {"loss": Metric(9.9, unit="nats")}, 1234),
        ModelResults("after", {"loss": Metric(3.21, unit="nats")}, 1234, train_seconds=61.2),
    ]
    return RunResults(
        kind=kind,
        task="text",
        models=models,
        saved_model="after",
        num_rows={"train": 4321, "test": 11},
        train_steps=7,
        **fields,
    )


@pytest.fixture
def card_of(text_folder, tmp_path):
    """Build a card and read it back from its file."""

    def build(results=None, facts=None, folder=text_folder, **content):
        evaluations = load_evaluations(results)
        card = build_card(CardContent(folder, "me/tiny", evaluations=evaluations, facts=check_facts(facts), **content))
        card.save(tmp_path / "README.md")
        return ModelCard.load(tmp_path / "README.md")

    return build


def test_metadata_follows_the_format_of_the_hub(card_of):
    facts = {"base_model": "org/base", "datasets": ["org/rows", "/tmp/rows.jsonl"], "language": ["en", "code"]}
    data = card_of(EVALUATION, {**facts, "tags": "docstrings"}, is_published=True).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text2text-generation")
    assert (data.base_model, data.datasets, data.language) == ("org/base", ["org/rows"], ["en", "code"])
    assert data.license == "apache-2.0" and data.tags[0] == "encdec_slm" and data.tags[-1] == "docstrings"
    assert data.metrics == ["rougeL", "exact"]
    first, second = data.eval_results
    assert (first.metric_type, first.metric_value, first.dataset_type) == ("rougeL", 15.02, "python/stdlib")
    assert first.dataset_split == "test" and second.metric_value == 1.5


def test_results_have_intervals_and_commands_without_local_paths(card_of, tmp_path):
    text = card_of([EVALUATION, {"task": "copy", "metrics": {"exact": 99}}]).text
    assert "| 300 held-out rows | model |" in text and "| ROUGE-L (%) | 15.02 [14.10, 16.00] |" in text
    assert "python/stdlib, test" in text and "| exact match | 99 |" in text
    assert "\n    encdec-slm evaluate --model model --task docstrings --output_dir=x\n" in text
    assert find_problem(tmp_path / "README.md") is None


def test_missing_facts_are_marked_as_not_recorded(card_of, text_folder, tmp_path):
    text = card_of().text
    for label in ("training data", "teacher", "objective", "hardware", "energy"):
        assert f"| {label} | not recorded |" in text
    assert "Not evaluated." in text and "{{" not in text and "{%" not in text
    assert "base_model" not in (tmp_path / "README.md").read_text()


def test_parameters_are_counted_from_the_weights(text_folder, vision_folder):
    from transformers import AutoModelForSeq2SeqLM

    for folder in (text_folder, vision_folder):
        model = AutoModelForSeq2SeqLM.from_pretrained(folder)
        assert read_model_facts(folder).num_parameters == model.num_parameters()


def test_stated_facts_replace_recorded_ones(card_of):
    names = ("description", "training_data", "starting_point", "teacher", "objective", "optimizer_steps")
    names += ("training_time", "hardware", "energy")
    facts = {name: f"my {name}" for name in names}
    text = card_of(None, {**facts, "limits": "Only Python.", "example": 'say "x"'}, training=build_training()).text
    assert all(value in text for value in facts.values()) and "4,321" not in text
    assert "Only Python." in text and r'print(pipe("say \"x\"", ' in text


@pytest.mark.parametrize("value", [{"energy": 3}, {"price": "1"}, {"tags": []}, {"datasets": ["a", 1]}])
def test_facts_must_be_known_texts(value):
    with pytest.raises(ValueError, match="facts"):
        check_facts(value)


def test_the_card_of_a_trained_model_reports_its_training(text_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in text_folder.iterdir():
        (folder / path.name).symlink_to(path)
    training = build_training(base_model="tiny", dataset=DataSource("rows.jsonl"), device="cuda:0")
    training.num_cut_rows = {"train sources": 17}
    write_card(folder, training)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.library_name, card.data.license) == ("transformers", None)
    stated = ("# model", "| 4,321 rows of rows.jsonl |", "| 17 train sources |", "preset `tiny`", "| 61 seconds |")
    for text in (*stated, "| hardware | cuda:0 |", "| loss (nats per token) | 9.9 | 3.21 |"):
        assert text in card.text
    assert "DistillationTrainer" not in card.text and "agarwal2024onpolicy" not in card.text


def test_the_card_of_a_distilled_model_names_teacher_and_objective(card_of):
    training = build_training(
        "distillation", teacher="org/teacher", objective="0.9 x forward KL", base_model="org/student", targets="data"
    )
    card = card_of(training=training)
    assert card.data.base_model == "org/student"
    for text in ("| teacher | org/teacher |", "| objective | 0.9 x forward KL |", "agarwal2024onpolicy"):
        assert text in card.text


def test_an_adapter_keeps_its_card(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    write_card(tmp_path, build_training())
    assert not (tmp_path / "README.md").exists()


def test_a_model_of_another_family_gets_no_card(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_the_card_of_a_converted_model_names_its_origin_and_prompt(text_folder, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(text_folder / name)
    config = json.loads((text_folder / "config.json").read_text())
    rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope_parameters}))
    write_card(folder, converted=True)
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "mit" and "## Training" not in card.text
    for text in ("microsoft/encoder-decoder-slm", "###Question", "no tokenizer", "factor 4.0", "`use_cache=False`"):
        assert text in card.text
    (folder / "tokenizer.json").write_text("{}")
    # What a later publication keeps.
    text = str(build_card(CardContent(folder, "me/model", metadata=read_card_metadata(folder))))
    assert "microsoft/encoder-decoder-slm" in text and "no tokenizer" not in text and "license: mit" in text


def test_evaluations_become_entries_of_the_hub(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(EVALUATION))
    write_eval_results(load_evaluations([path, {**EVALUATION, "task": "a/b c"}]), tmp_path)
    files = sorted((tmp_path / ".eval_results").iterdir())
    assert [file.name for file in files] == ["a_b_c.yaml", "docstrings.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(files[1].read_text()))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("python/stdlib", "docstrings", 15.02),
        ("python/stdlib", "docstrings", 1.5),
    ]
    assert "300 rows" in entries[0].notes and "95% interval 14.1 to 16" in entries[0].notes
    assert "/home/me" not in files[1].read_text()


@pytest.mark.parametrize(
    ("results", "error"),
    [
        ({"metrics": {"a": 1}}, ValueError),
        ({"task": "x", "metrics": {}}, ValueError),
        ({"task": "x", "metrics": {"a": float("nan")}}, ValueError),
        ("no_such_file.json", ValueError),
        ([3], TypeError),
    ],
)
def test_evaluations_of_another_form_are_refused(results, error):
    with pytest.raises(error, match=r"results|no_such_file"):
        load_evaluations(results)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a --model=/home/me/x -o '/tmp/a b'", "a --model=x -o 'a b'"),
        (r"a --model C:\Users\me\x y/z ~/data/rows.json", "a --model x y/z rows.json"),
        ("/ and/or https://host/a/b cuda:0", "/ and/or https://host/a/b cuda:0"),
    ],
)
def test_local_paths_in_commands_are_shortened(text, expected):
    assert remove_local_paths(text) == expected


def run_snippets(card, folder, monkeypatch, workspace):
    """Run the Python of a card in an empty folder, with `MODEL` set to `folder`."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", card.content, re.DOTALL))
    assert code.count("revision=REVISION, trust_remote_code=True") == 3
    monkeypatch.chdir(workspace)
    code = code.replace('MODEL = "me/tiny"', f"MODEL = {str(folder)!r}")
    exec(compile(code, "README.md", "exec"), {})


# The snippet leaves the Trainer's default for memory that only a GPU has.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_snippets_of_a_text_card_run(card_of, text_folder, tmp_path, monkeypatch, capsys):
    run_snippets(card_of(), text_folder, monkeypatch, tmp_path)
    assert Path("finetuned", "model.safetensors").is_file() and Path("exported", "model.bin").is_file()
    assert len(capsys.readouterr().out.strip().splitlines()) >= 3


@pytest.mark.slow
def test_the_snippets_of_a_vision_card_run(card_of, vision_folder, tmp_path, monkeypatch, capsys):
    card = card_of(folder=vision_folder)
    assert card.data.pipeline_tag == "image-text-to-text" and "| vision tower | `" in card.text
    run_snippets(card, vision_folder, monkeypatch, tmp_path)
    assert Path("exported", "encoder_model.onnx").is_file()
    assert len(capsys.readouterr().out.strip().splitlines()) >= 2
