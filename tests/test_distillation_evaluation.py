# SPDX-License-Identifier: Apache-2.0
"""What a distillation run measures, logs and publishes."""

from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from ddp_worker import build, history_of, make_tokenizer
from distillation_worker import (
    OFF_POLICY,
    OTHER_ORDER,
    capture_completions,
    floats,
    gold_pairs,
    greedy_completion,
    make_teacher,
    make_texts,
    make_trainer,
    metrics_of,
    plain_numbers,
    same_function_pair,
    to_ids,
)
from huggingface_hub import ModelCard


ROWS = make_texts(7, seed=8)


@torch.no_grad()
def expected_metrics(pairs, **settings):
    return floats(plain_numbers(build().eval(), make_teacher(), pairs, **settings))


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluation_measures_means_over_all_tokens_for_every_batch_size(batch_size, tmp_path):
    settings = {"beta": 0.3, "kd_temperature": 2.0, "kd_ratio": 0.3}
    sizes = {"per_device_eval_batch_size": batch_size, "label_smoothing_factor": 0.2}
    arguments = {"eval_dataset": Dataset.from_list(ROWS)}
    trainer = make_trainer(tmp_path, build(mlp_dropout=0.2), arguments=arguments, **sizes, **settings)
    torch.testing.assert_close(metrics_of(trainer), expected_metrics(gold_pairs(ROWS), **settings), **OTHER_ORDER)


def test_agreement_is_that_of_the_most_probable_tokens(tmp_path):
    rows = [{**row, "prompt": f"{row['prompt']} <s>"} for row in make_texts(8)]
    trainer = make_trainer(tmp_path, *same_function_pair(), rows=rows)
    assert metrics_of(trainer, Dataset.from_list(rows))["teacher_agreement"] == 1.0
    # The first token of each row is predicted from different tokens.
    agreement = metrics_of(trainer, Dataset.from_list(make_texts(8)))["teacher_agreement"]
    num_tokens = sum(len(target) for _, target in gold_pairs(make_texts(8)))
    assert agreement == pytest.approx(1 - 8 / num_tokens, abs=0.1) and agreement < 1


@pytest.mark.parametrize("as_stream", [False, True])
def test_completions_are_scored_in_the_order_of_the_rows(as_stream, tmp_path):
    scored, dataset = [], Dataset.from_list(ROWS)
    dataset = dataset.to_iterable_dataset() if as_stream else dataset

    def compute_metrics(prediction):
        scored.append(prediction)
        return {"number": 0.25}

    arguments = {"eval_dataset": dataset, "compute_metrics": compute_metrics}
    settings = {"predict_with_generate": True, "per_device_eval_batch_size": 3, "include_for_metrics": ["loss"]}
    trainer = make_trainer(tmp_path, arguments=arguments, **settings)
    metrics, output = trainer.evaluate(), trainer.predict(dataset)
    assert metrics["eval_number"] == output.metrics["test_number"] == 0.25 and metrics["eval_kd_loss"] > 0
    assert np.array_equal(output.predictions, scored[0].predictions)
    assert as_stream or len(scored[0].losses) == len(ROWS)
    student, rows = build().eval(), zip(gold_pairs(ROWS), scored[0].predictions, scored[0].label_ids, strict=True)
    for (source, target), completion, labels in rows:
        assert labels[labels != -100].tolist() == target
        expected = greedy_completion(student, source, 1)
        assert completion[: len(expected)].tolist() == expected
        assert set(completion[len(expected) :].tolist()) <= {0, -100}


@pytest.mark.parametrize("names", [("prompt", "completion"), ("source", "target")])
def test_rows_of_text_are_evaluated_and_predicted(names, tmp_path):
    rows, trainer = Dataset.from_list(make_texts(7, seed=8, names=names)), make_trainer(tmp_path)
    expected = expected_metrics(gold_pairs(ROWS))
    torch.testing.assert_close(metrics_of(trainer, rows), expected, **OTHER_ORDER)
    torch.testing.assert_close(trainer.predict(rows).metrics["test_kd_loss"], expected["kd_loss"], **OTHER_ORDER)


def test_rows_without_targets_are_evaluated_on_completions_of_the_student(tmp_path):
    trainer = make_trainer(tmp_path)
    pairs = capture_completions(trainer)
    metrics = metrics_of(trainer, Dataset.from_list([{"prompt": row["prompt"]} for row in ROWS]))
    assert "ce_loss" not in metrics and len(pairs) == len(ROWS)
    expected = expected_metrics(pairs)
    torch.testing.assert_close(metrics, {name: expected[name] for name in metrics}, **OTHER_ORDER)


def test_each_dataset_of_a_dict_is_evaluated_and_leaves_no_trace_in_the_losses(tmp_path):
    sets, histories = {"near": make_texts(3, seed=8), "far": make_texts(4, seed=9)}, []
    datasets = {name: Dataset.from_list(rows) for name, rows in sets.items()}
    for eval_strategy in ("no", "steps"):
        sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
        evaluation = {"eval_strategy": eval_strategy, "eval_steps": 1}
        trainer = make_trainer(tmp_path, arguments={"eval_dataset": datasets}, **OFF_POLICY, **sizes, **evaluation)
        if eval_strategy == "no":
            metrics = trainer.evaluate()
        trainer.train()
        histories.append(history_of(trainer))
    for name, rows in sets.items():
        expected = expected_metrics(gold_pairs(rows))
        torch.testing.assert_close(metrics[f"eval_{name}_kd_loss"], expected["kd_loss"], **OTHER_ORDER)
        assert len(history_of(trainer, f"eval_{name}_kd_loss")) == 3
    torch.testing.assert_close(histories[0], histories[1], **OTHER_ORDER)


def test_completions_are_printed_and_saved_beside_the_teachers_and_the_gold_ones(tmp_path, capsys):
    rows = make_texts(8)
    trainer = make_trainer(tmp_path, rows=rows, log_completions=True, max_steps=1, num_completions_to_print=3)
    trainer.train()
    printed = capsys.readouterr().out
    assert all(heading in printed for heading in ("Prompt", "Completion", "Teacher", "Gold"))
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(table.columns) == ["step", "prompt", "completion", "teacher", "gold"] and len(table) == 3
    gold = {row["prompt"]: row["completion"] for row in rows}
    student, teacher = trainer.model.eval(), make_teacher()
    for row in table.itertuples():
        source = to_ids(row.prompt)
        completions = greedy_completion(student, source, 1), greedy_completion(teacher, source, len(source))
        texts = make_tokenizer().batch_decode(completions, skip_special_tokens=True)
        assert row.step == 1 and row.gold == gold[row.prompt] and [row.completion, row.teacher] == texts


def test_losses_reach_tensorboard(tmp_path):
    trainer = make_trainer(tmp_path, report_to=["tensorboard"], **OFF_POLICY)
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert {"train/loss", "train/kd_loss", "train/ce_loss", "train/teacher_agreement"} <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("train/loss")]
    torch.testing.assert_close(logged, history_of(trainer), **OTHER_ORDER)


def test_numbers_of_tokens_and_lengths_of_completions_are_logged(tmp_path):
    gold = gold_pairs(make_texts())
    trainer = make_trainer(tmp_path, **OFF_POLICY)
    trainer.train()
    assert history_of(trainer, "num_tokens")[1] == sum(len(source) + len(target) for source, target in gold)
    trainer = make_trainer(tmp_path, lmbda=1.0, max_completion_length=40)
    pairs = capture_completions(trainer)
    trainer.train()
    assert history_of(trainer, "num_tokens")[1] == sum(len(source) + len(ids) for source, ids in pairs)
    entry, lengths = trainer.state.log_history[0], [len(ids) for _, ids in pairs[:8]]
    complete = [len(ids) for _, ids in pairs[:8] if ids[-1] == 2]
    assert 0 < len(complete) < 8 and entry["completions/clipped_ratio"] == 1 - len(complete) / 8
    for name, values in (("", lengths), ("terminated_", complete)):
        numbers = {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
        for reduction, value in numbers.items():
            assert entry[f"completions/{reduction}_{name}length"] == pytest.approx(value)


# The card and the Hub


def test_a_checkpoint_comes_with_a_card_of_teacher_objective_and_results(tmp_path):
    teacher = make_teacher()
    teacher.config._name_or_path = "somebody/big-teacher"
    arguments = {"eval_dataset": Dataset.from_list(ROWS), "teacher_processing_class": make_tokenizer()}
    objective = {"lmbda": 0.25, "beta": 0.0, "kd_ratio": 0.75, "kd_temperature": 2.0}
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, build(), teacher, arguments=arguments, **objective, **steps)
    trainer.train()
    assert "somebody/big-teacher" in (tmp_path / "README.md").read_text()
    trainer.create_model_card("a-student", "some/data", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"trl", "distillation", "encdec_slm", "mine"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text2text-generation" and card.data.datasets == "some/data"
    assert 'pipeline("text2text-generation"' in card.text and 'pipeline("text-generation"' not in card.text
    for name, value in objective.items():
        assert f"| {name} | {value} |" in card.text
    assert "| optimizer steps | 2 |" in card.text
    assert f"| eval_kd_loss | {history_of(trainer, 'eval_kd_loss')[-1]:.4f} |" in card.text


def test_pushing_uploads_the_model_with_its_card(tmp_path, monkeypatch):
    uploads = []

    class Url(str):
        repo_id = "me/a-student"

    def upload(api, **kwargs):
        folder = Path(kwargs["folder_path"])
        names = {path.name for path in folder.iterdir()}
        uploads.append((kwargs["repo_id"], names, (folder / "README.md").read_text()))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: Url("https://hub/me/a-student"))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    trainer = make_trainer(tmp_path, hub_model_id="me/a-student", kd_ratio=0.5, lmbda=0.0)
    trainer.train()
    trainer.push_to_hub(dataset_name="some/data")
    ((repository, names, card),) = uploads
    assert repository == "me/a-student"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= names
    assert "some/data" in card and "- trl" in card and 'model="me/a-student"' in card
