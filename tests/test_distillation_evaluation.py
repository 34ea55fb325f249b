# SPDX-License-Identifier: Apache-2.0
"""What a distillation run measures, prints and publishes."""

import json
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
    capture,
    floats,
    gold_pairs,
    greedy_text,
    ids_of,
    make_teacher,
    make_texts,
    make_trainer,
    metrics_of,
    plain_numbers,
    same_function_pair,
)
from huggingface_hub import ModelCard


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_evaluation_measures_means_over_all_tokens_whatever_the_batch_size(batch_size, tmp_path):
    rows = make_texts(7, seed=8)
    settings = {"beta": 0.3, "kd_temperature": 2.0, "kd_ratio": 0.3}
    trainer = make_trainer(
        tmp_path,
        build(mlp_dropout=0.2),
        arguments={"eval_dataset": Dataset.from_list(rows)},
        per_device_eval_batch_size=batch_size,
        label_smoothing_factor=0.2,
        **settings,
    )
    with torch.no_grad():
        expected = plain_numbers(build().eval(), make_teacher(), gold_pairs(rows), **settings)
    torch.testing.assert_close(metrics_of(trainer), floats(expected), **OTHER_ORDER)


def test_agreement_is_not_0_by_chance_alone(tmp_path):
    rows = [{**row, "prompt": f"{row['prompt']} <s>"} for row in make_texts(8)]
    trainer = make_trainer(tmp_path, *same_function_pair(), rows=rows)
    assert metrics_of(trainer, Dataset.from_list(rows))["teacher_agreement"] == 1.0
    half = make_texts(8)
    agreement = metrics_of(trainer, Dataset.from_list(half))["teacher_agreement"]
    # The first token of each row is predicted from different ones.
    assert agreement == pytest.approx(1 - 8 / sum(len(target) for _, target in gold_pairs(half)), abs=0.1)
    assert 0 < agreement < 1


@pytest.mark.parametrize("as_stream", [False, True])
def test_generated_texts_are_scored_in_the_order_of_the_rows(as_stream, tmp_path):
    rows, scored = make_texts(7, seed=8), []
    dataset = Dataset.from_list(rows)
    if as_stream:
        dataset = dataset.to_iterable_dataset()

    def compute_metrics(prediction):
        scored.append(prediction)
        return {"number": 0.25}

    trainer = make_trainer(
        tmp_path,
        arguments={"eval_dataset": dataset, "compute_metrics": compute_metrics},
        predict_with_generate=True,
        per_device_eval_batch_size=3,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_number"] == 0.25 and metrics["eval_kd_loss"] > 0
    (prediction,) = scored
    student = build().eval()
    for (source, target), written, labels in zip(
        gold_pairs(rows), prediction.predictions, prediction.label_ids, strict=True
    ):
        assert labels[labels != -100].tolist() == target
        text = greedy_text(student, source, begin=1)
        assert written[: len(text)].tolist() == text
        assert set(written[len(text) :].tolist()) <= {0, -100}
    output = trainer.predict(dataset)
    assert np.array_equal(output.predictions, prediction.predictions)
    assert output.metrics["test_number"] == 0.25


def test_raw_rows_are_evaluated_and_predicted(tmp_path):
    rows = make_texts(5, seed=9)
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        expected = floats(plain_numbers(build().eval(), make_teacher(), gold_pairs(rows)))
    torch.testing.assert_close(metrics_of(trainer, Dataset.from_list(rows)), expected, **OTHER_ORDER)
    renamed = [{"source": row["prompt"], "target": row["completion"]} for row in rows]
    torch.testing.assert_close(metrics_of(trainer, Dataset.from_list(renamed)), expected, **OTHER_ORDER)
    output = trainer.predict(Dataset.from_list(rows))
    torch.testing.assert_close(output.metrics["test_kd_loss"], expected["kd_loss"], **OTHER_ORDER)


def test_rows_without_targets_are_evaluated_on_what_the_student_writes(tmp_path):
    rows, texts = [{"prompt": row["prompt"]} for row in make_texts(5)], []
    trainer = make_trainer(tmp_path)
    capture(trainer, "student_texts", texts)
    metrics = metrics_of(trainer, Dataset.from_list(rows))
    pairs = [pair for (sources,), _, written in texts for pair in zip(sources, written, strict=True)]
    assert "ce_loss" not in metrics and len(pairs) == 5
    with torch.no_grad():
        expected = floats(plain_numbers(build().eval(), make_teacher(), pairs))
    torch.testing.assert_close(metrics, {name: expected[name] for name in metrics}, **OTHER_ORDER)


def test_a_stream_is_predicted_like_a_data_set(tmp_path):
    rows = Dataset.from_list(make_texts(7, seed=8))
    trainer = make_trainer(tmp_path, predict_with_generate=True, per_device_eval_batch_size=3)
    expected = trainer.predict(rows)
    streamed = trainer.predict(rows.to_iterable_dataset())
    assert np.array_equal(streamed.predictions, expected.predictions)
    assert np.array_equal(streamed.label_ids, expected.label_ids)
    torch.testing.assert_close(streamed.metrics["test_kd_loss"], expected.metrics["test_kd_loss"], **OTHER_ORDER)


def test_each_data_set_of_a_dict_is_evaluated(tmp_path):
    sets = {"near": make_texts(3, seed=8), "far": make_texts(4, seed=9)}
    trainer = make_trainer(
        tmp_path,
        arguments={"eval_dataset": {name: Dataset.from_list(rows) for name, rows in sets.items()}},
    )
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        with torch.no_grad():
            expected = plain_numbers(build().eval(), make_teacher(), gold_pairs(rows))
        torch.testing.assert_close(metrics[f"eval_{name}_kd_loss"], expected["kd_loss"].item(), **OTHER_ORDER)


def test_evaluation_in_training_leaves_no_trace_in_the_losses(tmp_path):
    histories = []
    for eval_strategy in ("no", "steps"):
        trainer = make_trainer(
            tmp_path,
            arguments={"eval_dataset": Dataset.from_list(make_texts(5))},
            **OFF_POLICY,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            eval_strategy=eval_strategy,
            eval_steps=1,
        )
        trainer.train()
        histories.append(history_of(trainer))
    torch.testing.assert_close(histories[0], histories[1], **OTHER_ORDER)
    assert len(histories[0]) == len(history_of(trainer, "eval_kd_loss")) == 3


def test_completions_are_printed_and_kept_beside_the_teachers_and_the_gold_ones(tmp_path, capsys):
    rows = make_texts(8)
    trainer = make_trainer(tmp_path, rows=rows, log_completions=True, max_steps=1, num_completions_to_print=3)
    trainer.train()
    printed = capsys.readouterr().out
    assert all(heading in printed for heading in ("Prompt", "Completion", "Teacher", "Gold"))
    table = pandas.read_parquet(tmp_path / "completions" / "completions_00001.parquet")
    assert list(table.columns) == ["step", "prompt", "completion", "teacher", "gold"] and len(table) == 3
    gold = {row["prompt"]: row["completion"] for row in rows}
    tokenizer, student, teacher = make_tokenizer(), trainer.model.eval(), make_teacher()

    def text(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    for row in table.itertuples():
        source = ids_of(row.prompt)
        assert row.step == 1 and row.gold == gold[row.prompt]
        assert row.teacher == text(greedy_text(teacher, source, begin=len(source)))
        assert row.completion == text(greedy_text(student, source, begin=1))


# Kinds of data


def test_the_card_names_teacher_data_objective_tags_and_results(tmp_path):
    student, teacher = build(), make_teacher()
    teacher.config._name_or_path = "somebody/big-teacher"
    trainer = make_trainer(
        tmp_path,
        student,
        teacher,
        arguments={"eval_dataset": Dataset.from_list(make_texts(5)), "teacher_processing_class": make_tokenizer()},
        lmbda=0.25,
        beta=0.0,
        kd_ratio=0.75,
        kd_temperature=2.0,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer.train()
    trainer.create_model_card("a-student", "some/data", tags="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert {"trl", "distillation", "encdec_slm", "mine"} <= set(card.data.tags)
    assert card.data.pipeline_tag == "text2text-generation" and card.data.datasets == "some/data"
    for part in (
        "[somebody/big-teacher](https://huggingface.co/somebody/big-teacher)",
        "[some/data](https://huggingface.co/datasets/some/data)",
        "0.75 x forward KL at temperature 2",
        "0.25 x cross-entropy",
        "written by the student (temperature 1.0, top-k off) in 25% of the batches, else those of the data",
        "| optimizer steps | 2 |",
        f"| kd_loss | {history_of(trainer, 'eval_kd_loss')[-1]:.4f} |",
        f"| teacher_agreement | {history_of(trainer, 'eval_teacher_agreement')[-1]:.4f} |",
    ):
        assert part in card.content, part


def test_pushing_uploads_the_model_with_its_card(tmp_path, monkeypatch):
    uploads = []

    class Url(str):
        repo_id = "me/a-student"

    def upload(api, **kwargs):
        folder = Path(kwargs["folder_path"])
        uploads.append(
            (kwargs["repo_id"], {path.name for path in folder.iterdir()}, (folder / "README.md").read_text())
        )

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **kwargs: Url("https://hub/me/a-student"))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    trainer = make_trainer(tmp_path, hub_model_id="me/a-student", kd_ratio=0.5, lmbda=0.0)
    trainer.train()
    trainer.push_to_hub(dataset_name="some/data")
    ((repository, files, card),) = uploads
    assert repository == "me/a-student"
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    assert "some/data" in card and "- trl" in card and 'model="me/a-student"' in card and "reverse KL" in card


# Models as strings, adapters and padded tables


def test_losses_and_metrics_reach_tensorboard(tmp_path):
    trainer = make_trainer(tmp_path, report_to=["tensorboard"], **OFF_POLICY)
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert {"train/loss", "train/kd_loss", "train/ce_loss", "train/teacher_agreement"} <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("train/loss")]
    torch.testing.assert_close(logged, history_of(trainer), **OTHER_ORDER)


def test_the_log_says_where_the_run_stands(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="steps", save_steps=2, **OFF_POLICY)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    num_tokens = sum(len(source) + len(target) for source, target in gold_pairs(make_texts()))
    assert state["log_history"][1]["num_tokens"] == num_tokens
    card = (tmp_path / "README.md").read_text()
    assert "| optimizer steps | 2 |" in card
