# SPDX-License-Identifier: Apache-2.0
"""From rows to a saved folder in two optimizer steps, the numbers it reports, and the script and its recipe."""

import json
import re

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import Seq2SeqTrainingArguments

from encdec_slm import EncDecVLMForConditionalGeneration, EncDecVLMProcessor
from encdec_slm.configuration.recipe_files import load_recipe, parse_recipe
from encdec_slm.trainers.tasks.visual import build_visual_tasks
from encdec_slm.trainers.vqa import VqaArguments, train_vqa
from encdec_slm.trainers.vqa_reports import contact_sheet, report, shown_places, task_table


WRITTEN = {"results.json", "predictions.jsonl", "loss.png", "contact_sheet.png", "model.safetensors", "config.json"}
SMALL = {"tasks": ["digits"], "num_train_rows": [12], "max_eval_samples": 4, "vocab_size": 300, "max_target_length": 4}


def training_args(folder, **fields):
    defaults = {"max_steps": 2, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "use_cpu": True}
    defaults |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 4, "disable_tqdm": True}
    return Seq2SeqTrainingArguments(str(folder), **{**defaults, "report_to": "none", **fields})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and results of a run of two steps."""
    folder = tmp_path_factory.mktemp("vqa")
    return folder, train_vqa(VqaArguments(**SMALL), training_args(folder))


def test_a_run_writes_the_model_the_numbers_the_predictions_and_the_pictures(finished):
    folder, results = finished
    assert {path.name for path in folder.iterdir()} >= WRITTEN
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert len(predictions) == 4 and set(predictions[0]) == {"task", "question", "answer", "prediction"}
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 300 and len(sheet.convert("L").getcolors()) > 50


def test_two_steps_lower_the_held_out_loss_and_every_number_is_there(finished):
    _, results = finished
    assert results["loss"]["after"] < results["loss"]["before"]
    assert set(results["tasks"]["digits"]) == {"rows", "most_frequent", "before", "after", "other_images"}
    assert results["train_steps"] == 2 and results["rows"] == {"train": 12, "validation": 4, "test": 4}
    assert [entry["step"] for entry in results["validation"]] == [1, 2]


def test_the_saved_folder_loads_answers_and_is_trained_on(finished, tmp_path):
    folder, before = finished
    processor = EncDecVLMProcessor.from_pretrained(folder)
    model = EncDecVLMForConditionalGeneration.from_pretrained(folder)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    assert prompt == "<image>what?"
    inputs = processor(images=Image.new("RGB", (72, 72)), text=prompt, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[0] == 1
    results = train_vqa(VqaArguments(**SMALL, model_name_or_path=str(folder)), training_args(tmp_path))
    assert results["loss"]["before"] == pytest.approx(before["loss"]["after"], abs=2e-4)


def test_pixels_of_training_images_are_centred(finished):
    image_processor = EncDecVLMProcessor.from_pretrained(finished[0]).image_processor
    images = build_visual_tasks(12, 1, seed=42, tasks=["digits"])["train"]["image"]
    values = np.stack([np.asarray(image) for image in images]).reshape(-1, 3) / 255
    np.testing.assert_allclose(image_processor.image_mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(image_processor.image_std, values.std(0), rtol=1e-6)


def test_a_text_preset_and_a_folder_without_a_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`preset` 'tiny' is a text model"):
        train_vqa(VqaArguments(**SMALL, preset="tiny"), training_args(tmp_path))
    args = VqaArguments(**SMALL, model_name_or_path=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"`model_name_or_path` '.*nowhere' could not be loaded"):
        train_vqa(args, training_args(tmp_path))


def test_frozen_parts_stay_and_others_learn(finished, tmp_path):
    folder, _ = finished
    args = VqaArguments(
        **SMALL, model_name_or_path=str(folder), frozen_parts=["vision_tower", "text_model", "decoder"]
    )
    train_vqa(args, training_args(tmp_path))
    before, after = (
        EncDecVLMForConditionalGeneration.from_pretrained(path).state_dict() for path in (folder, tmp_path)
    )
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed and all("multi_modal_projector" in name or "image_newline" in name for name in changed)


def test_an_unknown_part_is_answered_with_those_that_exist(tmp_path):
    with pytest.raises(ValueError, match="`frozen_parts` has 'tower', but the parts are vision_tower, multi_modal"):
        train_vqa(VqaArguments(**SMALL, frozen_parts=["tower"]), training_args(tmp_path))


def test_tasks_beside_a_data_set_are_refused():
    with pytest.raises(ValueError, match="rows come from one place"):
        VqaArguments(tasks=["digits"], dataset_name="somebody/rows")


def test_the_table_counts_each_task_for_itself():
    rows = Dataset.from_dict({"answer": ["1", "1", "2", "red"], "task": ["digits"] * 3 + ["charts"]})
    table = task_table(rows, ["", "", "", "red"], ["1", "1", "1", "red"], ["1", "2", "2", "blue"])
    assert table["digits"] == {"rows": 3, "most_frequent": 66.7, "before": 0, "after": 66.7, "other_images": 66.7}
    assert table["charts"] == {"rows": 1, "most_frequent": 100, "before": 100, "after": 100, "other_images": 0}


def test_rows_to_show_are_of_all_tasks_and_far_apart():
    assert shown_places(["a", "b"] * 50, 4) == [0, 1, 50, 51]
    assert shown_places(["a"] * 100, 4) == [0, 25, 50, 75]
    assert shown_places(["a", "a", "b"], 10) == [0, 2, 1]


def test_a_sheet_shows_each_question_and_whether_it_was_answered():
    asked = {"question": "what is it, if anything, that costs $5 or $6?", "answer": "a dog"}
    rows = [{"image": [Image.new("RGB", (9, 9))], **asked, "prediction": said} for said in ("a dog", "a cat")]
    figure = contact_sheet([*rows, {**rows[0], "image": []}])
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes if axes.texts]
    assert [lines[2] for lines in texts] == [
        "model: 'a dog' (right)",
        "model: 'a cat' (wrong)",
        "model: 'a dog' (right)",
    ]
    assert all("$5 or $6" in lines[0].replace("\n", " ") for lines in texts)
    figure.canvas.draw()


def test_the_recipe_parses_and_fits_the_tasks():
    args, _ = parse_recipe(
        (VqaArguments, Seq2SeqTrainingArguments), ["--config", "vqa_synthetic", "--use_cpu", "true"]
    )
    for key, value in load_recipe("vqa_synthetic", (VqaArguments, Seq2SeqTrainingArguments)).items():
        assert not hasattr(args, key) or getattr(args, key) == value


def test_the_report_shows_each_task_beside_what_is_earned_without_looking(finished):
    shown = report(finished[1], "folder")
    assert re.search(r"^digits +4 +0\.0 ", shown, re.MULTILINE) and "other images" in shown
    assert "12 questions on cpu" in shown and "folder" in shown
