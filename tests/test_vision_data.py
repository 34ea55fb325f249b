# SPDX-License-Identifier: Apache-2.0
"""Batches of images, questions and answers, rows of a named data set, and a plain `Seq2SeqTrainer` over them."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from encdec_slm import EncDecSLMConfig, EncDecVLMConfig, EncDecVLMForConditionalGeneration
from encdec_slm.trainers.seq2seq_data import train_tokenizer
from encdec_slm.trainers.vision_data import (
    VisionTextCollator,
    load_vqa_splits,
    most_frequent_answer,
    row_images,
    with_other_images,
)
from encdec_slm.trainers.vqa import VqaArguments, new_processor


TILE, PATCH = 16, 8


def image(shade, size=(TILE, TILE)):
    return Image.new("RGB", size, (shade, 255 - shade, shade))


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["what is it?", "a grey square"], 300, 64)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.fixture(scope="module")
def config(tokenizer):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    layers = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    tower = {"model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": TILE, "patch_size": PATCH}
    return EncDecVLMConfig(
        text_config=EncDecSLMConfig(vocab_size=len(tokenizer), **sizes, **layers).to_dict(),
        vision_config={**sizes, **tower},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[TILE, TILE]],
    )


@pytest.fixture(scope="module")
def processor(config, tokenizer):
    return new_processor(config, tokenizer)


def test_labels_hold_the_answer_and_the_end_and_nothing_of_the_padding(processor, tokenizer):
    rows = [{"image": image(9), "question": "what?", "answer": text} for text in ("a grey square", "b")]
    batch = VisionTextCollator(processor)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "image_sizes", "labels"}
    for labels, row in zip(batch["labels"], rows, strict=True):
        kept = labels[labels != -100]
        assert kept[-1] == tokenizer.eos_token_id and (labels[len(kept) :] == -100).all()
        assert tokenizer.decode(kept[:-1]) == row["answer"]
    assert (batch["labels"][1] == -100).any()


def test_rows_with_several_images_one_and_none_share_a_batch(processor, config):
    several = {"image": [image(1), image(2)], "question": "what?", "answer": "a"}
    placed = {"image": [image(3)], "question": "is <image> grey?", "answer": "a"}
    rows = [several, {"question": "what?", "answer": "b"}, placed, {"image": None, "question": "?", "answer": "b"}]
    batch = VisionTextCollator(processor)(rows)
    num_tokens = processor.image_processor.num_image_tokens(TILE, TILE)
    of_rows = (batch["input_ids"] == config.image_token_id).sum(1).tolist()
    assert of_rows == [2 * num_tokens, 0, num_tokens, 0]
    assert batch["image_sizes"].tolist() == [[TILE, TILE]] * 3
    assert batch["input_ids"][0, 0] == config.image_token_id != batch["input_ids"][2, 0]
    model = EncDecVLMForConditionalGeneration(config)
    assert torch.isfinite(model(**batch).loss)


def test_rows_without_any_image_make_a_batch_of_text(processor):
    batch = VisionTextCollator(processor)(
        [{"image": [], "question": "what?", "answer": "a"}, {"question": "why?", "answer": "b"}]
    )
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_rows_without_answers_have_no_labels(processor):
    assert "labels" not in VisionTextCollator(processor)([{"image": image(1), "question": "what?"}])


def test_a_long_answer_is_cut_and_still_ends(processor, tokenizer):
    rows = [{"image": image(1), "question": "what?", "answer": "a grey square " * 9}]
    labels = VisionTextCollator(processor, max_target_length=5)(rows)["labels"]
    assert labels.shape == (1, 5) and labels[0, -1] == tokenizer.eos_token_id


def test_the_decoders_start_token_is_left_out_of_labels(processor, tokenizer):
    first = tokenizer("x")["input_ids"][0]
    rows = [{"question": "what?", "answer": "xa"}]
    whole = VisionTextCollator(processor)(rows)["labels"][0].tolist()
    assert VisionTextCollator(processor, decoder_start_token_id=first)(rows)["labels"][0].tolist() == whole[1:]


def test_columns_can_have_other_names(processor):
    names = {"image_column": "picture", "question_column": "query", "answer_column": "label"}
    row = {"picture": image(1), "query": "what?", "label": "a"}
    assert set(VisionTextCollator(processor, **names)([row])) >= {"pixel_values", "labels"}


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (
            [{"labels": 1}],
            ValueError,
            "Row 0 of the batch has labels, but `question` is needed.*remove_unused_columns",
        ),
        ([{"question": "a", "answer": "b"}, {"question": "a"}], ValueError, "1 of 2 rows have `answer`"),
        ([{"question": "a", "answer": 3}], TypeError, "Row 0 of the batch has a `answer` of type int"),
    ],
)
def test_rows_that_do_not_fit_are_refused(processor, rows, kind, message):
    with pytest.raises(kind, match=message):
        VisionTextCollator(processor)(rows)


def test_a_tokenizer_that_cannot_end_a_text_and_no_room_are_refused(processor):
    with pytest.raises(ValueError, match="`processor` is a object without an end-of-text token"):
        VisionTextCollator(object())
    with pytest.raises(ValueError, match="`max_target_length` is 1"):
        VisionTextCollator(processor, max_target_length=1)


def test_a_plain_trainer_with_the_processor_trains_and_writes_answers(processor, config, tmp_path):
    rows = [{"image": image(20 * i), "question": "what is it?", "answer": "ab"[i % 2]} for i in range(6)]
    rows[1]["image"] = None
    data = Dataset.from_list(
        rows, features=Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    )
    model = EncDecVLMForConditionalGeneration(config)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
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
    trainer = Seq2SeqTrainer(model, args, VisionTextCollator(processor), data, data, processing_class=processor)
    trainer.train()
    # CLIP's last layer and final norm stand behind the hidden state that is read.
    unread = ("encoder.layers.1.", "post_layernorm")
    for name, parameter in model.named_parameters():
        assert any(part in name for part in unread) or not torch.equal(parameter, before[name]), name
    output = trainer.predict(data)
    assert output.predictions.shape[0] == 6 and np.isfinite(output.metrics["test_loss"])
    trainer.save_model()
    assert (tmp_path / "processor_config.json").is_file() or (tmp_path / "preprocessor_config.json").is_file()


@pytest.mark.parametrize(
    ("answer", "counted"),
    [
        ("cat", "cat"),
        (["cat", "dog", "dog"], "dog"),
        (["cat", "dog"], "cat"),
        (
            [{"answer": "dog", "answer_id": 1}, {"answer": "cat", "answer_id": 2}, {"answer": "cat", "answer_id": 3}],
            "cat",
        ),
    ],
)
def test_of_several_answers_the_most_frequent_counts(answer, counted):
    assert most_frequent_answer(answer) == counted


@pytest.fixture
def named(tmp_path):
    """A local data set of 20 rows with lists of answers, in columns of other names."""
    features = Features({"picture": ImageFeature(), "query": Value("string"), "answers": List(Value("string"))})
    rows = [{"picture": image(i), "query": f"which {i}?", "answers": ["no", str(i), str(i)]} for i in range(20)]
    (tmp_path / "zoo").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "zoo" / "train.parquet"))
    columns = {"image_column": "picture", "question_column": "query", "answer_column": "answers"}
    return {"dataset_name": str(tmp_path / "zoo"), **columns}


def test_a_named_data_set_gives_rows_and_holds_out_what_it_lacks(named):
    splits = load_vqa_splits(VqaArguments(**named, max_eval_samples=1))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 16, "validation": 1, "test": 1}
    for row in splits["train"]:
        number = int(row["question"].removeprefix("which ").removesuffix("?"))
        assert row["answer"] == str(number) and row["task"] == "zoo"
        assert row_images(row)[0].getpixel((0, 0)) == (number, 255 - number, number)


def test_a_missing_column_split_or_data_set_is_answered_with_what_to_set(named, tmp_path):
    with pytest.raises(ValueError, match=r"columns picture, query, answers, but not `text`. Set `question_column`"):
        load_vqa_splits(VqaArguments(**{**named, "question_column": "text"}))
    with pytest.raises(ValueError, match="`dataset_train_split` is 'big'"):
        load_vqa_splits(VqaArguments(**named, dataset_train_split="big"))
    with pytest.raises(ValueError, match="could not be loaded"):
        load_vqa_splits(VqaArguments(dataset_name=str(tmp_path / "nowhere")))
    rows = Dataset.from_dict({"image": ["a.png"] * 2, "question": ["what?"] * 2, "answer": ["this"] * 2})
    (tmp_path / "few").mkdir()
    rows.to_json(tmp_path / "few" / "train.jsonl")
    with pytest.raises(ValueError, match="There is no test split, and 1 training rows cannot be divided"):
        load_vqa_splits(VqaArguments(dataset_name=str(tmp_path / "few")))


@pytest.mark.parametrize(
    "cell", [image(9), {"bytes": None, "path": "{file}"}, {"bytes": b"{file}", "path": None}, None]
)
def test_cells_of_a_data_set_are_read_in_any_form(cell, tmp_path):
    file = tmp_path / "picture.png"
    image(9).save(file)
    forms = {"{file}": str(file), b"{file}": file.read_bytes()}
    if isinstance(cell, dict):
        cell = {name: forms.get(value, value) for name, value in cell.items()}
    for given in (cell, [cell, cell]) if cell is not None else (None, []):
        for read in row_images({"image": given, "question": "what?"}):
            assert np.array_equal(read, image(9))


def test_a_damaged_image_is_refused_by_its_question(processor, tmp_path):
    noise = Image.effect_noise((64, 64), 90)
    noise.save(tmp_path / "whole.png")
    damaged = {"bytes": (tmp_path / "whole.png").read_bytes()[:999], "path": None}
    rows = [{"image": image(9), "question": "what?", "answer": "this"}]
    rows += [{"image": [image(9), damaged], "question": "which one?", "answer": "that"}]
    features = Features({"image": List(ImageFeature()), "question": Value("string"), "answer": Value("string")})
    rows[0]["image"] = [rows[0]["image"]]
    (tmp_path / "zoo").mkdir()
    Dataset.from_list(rows * 4, features=features).to_parquet(str(tmp_path / "zoo" / "train.parquet"))
    train = load_vqa_splits(VqaArguments(dataset_name=str(tmp_path / "zoo")))["train"]
    with pytest.raises(
        ValueError, match=r"The row with the `question` 'which one\?': Image 1 cannot be read: .*trunc"
    ):
        VisionTextCollator(processor)([*train])


def test_other_images_are_those_of_other_rows_of_the_same_task():
    rows = [{"image": image(i), "question": str(i), "answer": "", "task": "ab"[i % 2]} for i in range(8)]
    features = Features({"image": ImageFeature()} | {name: Value("string") for name in ("question", "answer", "task")})
    mixed = with_other_images(Dataset.from_list(rows, features=features))
    shades = [row["image"].getpixel((0, 0))[0] for row in mixed]
    assert mixed["question"] == [str(i) for i in range(8)]
    assert sorted(shades) == list(range(8))
    assert all(shade != i and shade % 2 == i % 2 for i, shade in enumerate(shades))
