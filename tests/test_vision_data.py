# SPDX-License-Identifier: Apache-2.0
"""Rows of images of a named dataset, and a plain `Seq2SeqTrainer` over them."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from conftest import build_byte_tokenizer, build_config, build_processor, build_vision_config, build_vision_model
from encdec_slm.trainers.image_rows import find_images, read_images
from encdec_slm.trainers.row_encoding import build_row_encoder
from encdec_slm.trainers.vision_data import load_vision_splits, most_frequent_answer, shuffle_images
from encdec_slm.trainers.vision_job import VisionArguments


def image(shade):
    return Image.new("RGB", (8, 8), (shade, 255 - shade, shade))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("cat", "cat"),
        (["cat", "dog", "dog"], "dog"),
        (["cat", "dog"], "cat"),
        ([{"answer": "dog"}, {"answer": "cat"}, {"answer": "cat"}], "cat"),
    ],
)
def test_the_most_frequent_of_several_answers_is_used(answer, expected):
    assert most_frequent_answer(answer) == expected


@pytest.fixture
def named(tmp_path):
    """A local dataset of 20 rows with lists of answers, in columns of other names."""
    features = Features({"picture": ImageFeature(), "query": Value("string"), "answers": List(Value("string"))})
    rows = [{"picture": image(i), "query": f"which {i}?", "answers": ["no", str(i), str(i)]} for i in range(20)]
    (tmp_path / "zoo").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "zoo" / "train.parquet"))
    columns = {"image_column": "picture", "question_column": "query", "answer_column": "answers"}
    return {"dataset_name": str(tmp_path / "zoo"), **columns}


def test_a_named_dataset_gives_rows_and_holds_out_missing_splits(named):
    splits = load_vision_splits(VisionArguments(**named, max_eval_samples=1))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 16, "validation": 1, "test": 1}
    for row in splits["train"]:
        number = int(row["question"].removeprefix("which ").removesuffix("?"))
        assert row["answer"] == str(number) and row["task"] == "zoo"
        assert read_images(find_images(row), "row")[0].getpixel((0, 0)) == (number, 255 - number, number)


def test_data_that_does_not_fit_is_refused(named, tmp_path):
    for fields, message in (
        ({"question_column": "text"}, r"picture, query, answers.*`question_column`"),
        ({"dataset_train_split": "big"}, "`dataset_train_split`"),
        ({"dataset_name": str(tmp_path / "nowhere")}, "nowhere"),
    ):
        with pytest.raises(ValueError, match=message):
            load_vision_splits(VisionArguments(**{**named, **fields}))
    rows = Dataset.from_dict({"image": ["a.png"] * 3, "question": ["what?"] * 3, "answer": ["this", "that", None]})
    folder = tmp_path / "rows"
    folder.mkdir()
    rows.to_json(folder / "train.jsonl")
    with pytest.raises(TypeError, match=r"Row 3 .*`answer`"):
        load_vision_splits(VisionArguments(dataset_name=str(folder)))
    rows.select(range(2)).to_json(folder / "train.jsonl")
    with pytest.raises(ValueError, match="no test split"):
        load_vision_splits(VisionArguments(dataset_name=str(folder)))


def test_other_images_are_of_other_rows_of_the_same_task():
    rows = [{"image": image(i), "question": str(i), "answer": "", "task": "ab"[i % 2]} for i in range(8)]
    features = Features({"image": ImageFeature()} | {name: Value("string") for name in ("question", "answer", "task")})
    mixed = shuffle_images(Dataset.from_list(rows, features=features))
    shades = [row["image"].getpixel((0, 0))[0] for row in mixed]
    assert mixed["question"] == [str(i) for i in range(8)]
    assert sorted(shades) == list(range(8))
    assert all(shade != i and shade % 2 == i % 2 for i, shade in enumerate(shades))


def test_a_plain_trainer_with_the_row_encoder_trains_and_generates(tmp_path):
    tokenizer = build_byte_tokenizer(image_token="<image>")
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    config = build_vision_config(build_config(vocab_size=len(tokenizer)), image_token_id=image_token_id)
    model, processor = build_vision_model(config), build_processor(config, tokenizer)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"image": image(20 * i), "question": "what is it?", "answer": "ab"[i % 2]} for i in range(6)]
    rows[1]["image"] = None
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    data = Dataset.from_list(rows, features=features)
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        predict_with_generate=True,
        generation_max_length=6,
        remove_unused_columns=False,
        save_strategy="no",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    collate = build_row_encoder(processor).collate
    trainer = Seq2SeqTrainer(model, args, collate, data, data, processing_class=processor)
    trainer.train()
    # The model reads CLIP's second to last layer.
    unused = ("encoder.layers.2.", "post_layernorm")
    for name, parameter in model.named_parameters():
        assert any(part in name for part in unused) or not torch.equal(parameter, before[name]), name
    output = trainer.predict(data)
    assert output.predictions.shape[0] == 6 and np.isfinite(output.metrics["test_loss"])
    trainer.save_model()
    assert (tmp_path / "processor_config.json").is_file() or (tmp_path / "preprocessor_config.json").is_file()
