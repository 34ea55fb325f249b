# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of vision-text models in two optimizer steps: what is saved, measured and refused."""

import json
import logging

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import Seq2SeqTrainingArguments

from conftest import save_text_folder
from encdec_slm import EncDecVLMProcessor
from encdec_slm.checkpoints import load_checkpoint
from encdec_slm.run_results import RunResults
from encdec_slm.trainers.figures import draw_contact_sheet
from encdec_slm.trainers.tasks.visual import build_visual_tasks
from encdec_slm.trainers.vision_job import (
    VisionArguments,
    choose_rows,
    finetune_vision,
    most_frequent_answers,
    score_answers,
)


SAVED = {"results.json", "predictions.jsonl", "loss.png", "contact_sheet.png", "model.safetensors", "config.json"}


def run(folder, tasks=("digits",), resume_from_checkpoint=None, **fields):
    sizes = {"num_train_rows": [12], "max_eval_samples": 4, "vocab_size": 300, "max_target_length": 4}
    training_args = Seq2SeqTrainingArguments(
        str(folder),
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        resume_from_checkpoint=resume_from_checkpoint,
    )
    return finetune_vision(VisionArguments(tasks=list(tasks), **{**sizes, **fields}), training_args)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and results of a run."""
    folder = tmp_path_factory.mktemp("vision")
    return folder, run(folder)


def test_a_run_saves_model_results_predictions_and_figures(finished):
    folder, results = finished
    assert {path.name for path in folder.iterdir()} >= SAVED
    assert RunResults.load(folder / "results.json") == results
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(predictions) == 4 and set(predictions[0]) == {"task", "question", "answer", "prediction"}
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 300 and len(sheet.convert("L").getcolors()) > 50


def test_two_steps_lower_the_loss_and_all_results_are_there(finished):
    _, results = finished
    before, after = results["before training"], results.saved
    assert after.metrics["loss"].value < before.metrics["loss"].value
    assert set(before.metrics) == set(after.metrics) == {"loss", "exact, digits"}
    assert set(results["most frequent answer"].metrics) == {"exact, digits"}
    assert results["images of other rows"].metrics["loss"].value > 0
    assert results.train_steps == 2 and results.num_rows == {"train": 12, "validation": 4, "test": 4}
    assert [entry["step"] for entry in results.validation_losses] == [1, 2]


def test_the_saved_folder_answers_as_it_was_measured_and_is_trained_further(finished, tmp_path, caplog):
    folder, before = finished
    model, processor = load_checkpoint(folder)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    assert processor.apply_chat_template([message], add_generation_prompt=True) == "<image>what?"
    assert model.generation_config.max_length == 5 and model.generation_config.no_repeat_ngram_size is None
    model.generation_config.update(max_length=3, no_repeat_ngram_size=2)
    for part in (model, processor):
        part.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING, logger="encdec_slm"):
        results = run(tmp_path / "run", model_name_or_path=str(tmp_path / "base"))
    assert "no_repeat_ngram_size=2" in caplog.text
    losses = [one.metrics["loss"].value for one in (results["before training"], before.saved)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert load_checkpoint(tmp_path / "run")[0].generation_config.max_length == 5


def test_pixels_of_training_images_are_centered(finished):
    image_processor = EncDecVLMProcessor.from_pretrained(finished[0]).image_processor
    images = build_visual_tasks(12, 1, seed=42, tasks=["digits"])["train"]["image"]
    values = np.stack([np.asarray(image) for image in images]).reshape(-1, 3) / 255
    np.testing.assert_allclose(image_processor.image_mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(image_processor.image_std, values.std(0), rtol=1e-6)


def test_frozen_parts_keep_their_weights(finished, tmp_path):
    folder, _ = finished
    run(tmp_path, model_name_or_path=str(folder), frozen_parts=["vision_tower", "text_model", "decoder"])
    before, after = (load_checkpoint(path)[0].state_dict() for path in (folder, tmp_path))
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed and all("multi_modal_projector" in name or "image_newline" in name for name in changed)


def test_models_and_arguments_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`preset`"):
        run(tmp_path / "run", preset="tiny")
    with pytest.raises(ValueError, match="nowhere"):
        run(tmp_path / "run", model_name_or_path=str(tmp_path / "nowhere"))
    save_text_folder(tmp_path / "text")
    with pytest.raises(ValueError, match="text model"):
        run(tmp_path / "run", model_name_or_path=str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"`frozen_parts`.*vision_tower, multi_modal_projector, text_model, decoder"):
        run(tmp_path / "run", frozen_parts=["tower"])
    with pytest.raises(ValueError, match=r"`tasks`.*`dataset_name`"):
        VisionArguments(tasks=["digits"], dataset_name="somebody/rows")


def test_a_checkpoint_that_does_not_exist_is_refused(tmp_path):
    for value in ("true", str(tmp_path / "checkpoint-9")):
        with pytest.raises(ValueError, match="`resume_from_checkpoint`"):
            run(tmp_path, resume_from_checkpoint=value)


def test_each_task_is_scored_separately():
    rows = Dataset.from_dict({"answer": ["1", "1", "2", "red"], "task": ["digits"] * 3 + ["charts"]})
    scores = score_answers(rows, ["1", "1", "1", "blue"])
    assert (scores["exact, digits"].value, scores["exact, digits"].num_rows) == (66.67, 3)
    assert (scores["exact, charts"].value, scores["exact, charts"].num_rows) == (0, 1)
    assert most_frequent_answers(rows) == ["1", "1", "1", "red"]


def test_chosen_rows_alternate_between_tasks_and_are_evenly_spaced():
    assert choose_rows(["a", "b"] * 50, 4) == [0, 1, 50, 51]
    assert choose_rows(["a"] * 100, 4) == [0, 25, 50, 75]
    assert choose_rows(["a", "a", "b"], 10) == [0, 2, 1]


def test_a_contact_sheet_shows_questions_and_whether_they_are_answered():
    question = {"question": "what is it, if anything, that costs $5 or $6?", "answer": "a dog"}
    rows = [{**question, "prediction": answer} for answer in ("a dog", "a cat", "a dog")]
    figure = draw_contact_sheet(rows, [[Image.new("RGB", (9, 9))], [Image.new("RGB", (9, 9))], []])
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes if axes.texts]
    assert ["correct" in lines[2] for lines in texts] == [True, False, True]
    assert all("$5 or $6" in lines[0].replace("\n", " ") for lines in texts)
    figure.canvas.draw()
