# SPDX-License-Identifier: Apache-2.0
"""Splits of text rows from files, folders and streams."""

import json
import logging

import pytest
from datasets import IterableDataset

from encdec_slm.trainers.finetune_job import FinetuneArguments
from encdec_slm.trainers.seq2seq_data import load_splits


ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(40)]


@pytest.fixture
def jsonl(tmp_path):
    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


def load(**fields):
    return load_splits(FinetuneArguments(**fields))


def test_missing_splits_are_a_tenth_of_the_training_rows_each(jsonl, caplog):
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        splits = load(train_file=jsonl(ROWS))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 32, "validation": 4, "test": 4}
    assert sorted(row["source"] for rows in splits.values() for row in rows) == sorted(row["source"] for row in ROWS)
    assert "4 of 36" in caplog.text


def test_columns_of_other_names_become_source_and_target(jsonl):
    rows = [{"article": row["source"], "summary": row["target"], "id": 1} for row in ROWS]
    fields = {"source_column": "article", "target_column": "summary"}
    assert load(train_file=jsonl(rows), **fields)["train"].column_names == ["source", "target"]
    folder = jsonl(rows, "train.jsonl").removesuffix("/train.jsonl")
    assert load(dataset_name=folder, **fields)["train"].column_names == ["source", "target"]


@pytest.mark.parametrize("by_name", [False, True], ids=["files", "folder"])
def test_a_stream_is_read_as_needed_and_its_held_out_rows_are_limited(jsonl, by_name):
    paths = {f"{split}_file": jsonl(ROWS, f"{split}.jsonl") for split in ("train", "validation", "test")}
    where = {"dataset_name": paths["train_file"].removesuffix("/train.jsonl")} if by_name else paths
    splits = load(**where, dataset_streaming=True, max_eval_samples=7)
    assert isinstance(splits["train"], IterableDataset)
    assert len(splits["validation"]) == len(splits["test"]) == 7
    assert sorted(row["source"] for row in splits["train"]) == sorted(row["source"] for row in ROWS)


def test_a_stream_without_held_out_splits_is_refused(jsonl):
    with pytest.raises(ValueError, match="no validation split"):
        load(train_file=jsonl(ROWS), dataset_streaming=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_bad_row_of_a_named_dataset_is_refused_with_its_number_and_column(jsonl, streaming):
    rows = [*ROWS[:2], {"source": None, "target": "Return three."}, *ROWS]
    for split in ("train", "validation", "test"):
        jsonl(rows if split == "train" else ROWS, f"{split}.jsonl")
    folder = jsonl(rows, "train.jsonl").removesuffix("/train.jsonl")
    with pytest.raises(TypeError, match=r"Row 3 of the train split .*`source`"):
        list(load(dataset_name=folder, dataset_streaming=streaming)["train"])


def test_a_missing_column_of_a_named_dataset_is_refused_with_its_option(jsonl):
    path = jsonl([{"text": "a", "target": "b"}])
    with pytest.raises(ValueError, match=r"text, target.*`source_column`"):
        load(dataset_name=path.removesuffix("/train.jsonl"))


def test_a_bad_file_in_a_folder_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_bytes('{"source": "é", "target": "b"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"`dataset_name`.*train.jsonl.*line 1"):
        load(dataset_name=str(tmp_path))


def test_an_edited_folder_is_read_anew(jsonl):
    folder = jsonl(ROWS).removesuffix("/train.jsonl")
    load(dataset_name=folder)
    jsonl([{"source": "new", "target": row["target"]} for row in ROWS])
    assert set(load(dataset_name=folder)["train"]["source"]) == {"new"}


def test_an_empty_dataset_is_refused(jsonl):
    with pytest.raises(ValueError, match="train split has no rows"):
        load(train_file=jsonl([]))


def test_data_that_does_not_exist_is_refused(jsonl, tmp_path):
    folder = jsonl(ROWS).removesuffix("/train.jsonl")
    for fields in (
        {"train_file": "nowhere.jsonl"},
        {"dataset_name": str(tmp_path / "nowhere")},
        {"dataset_name": folder, "dataset_train_split": "all"},
    ):
        with pytest.raises(ValueError, match=f"`{list(fields)[-1]}`"):
            load(**fields)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("by_name", [False, True], ids=["files", "folder"])
def test_a_template_renders_the_teachers_prompt_from_all_columns(jsonl, tmp_path, by_name, streaming):
    rows = [{**row, "language": "Python"} for row in ROWS]
    paths = {f"{split}_file": jsonl(rows, f"{split}.jsonl") for split in ("train", "validation", "test")}
    where = {"dataset_name": str(tmp_path)} if by_name else paths
    args = FinetuneArguments(**where, dataset_streaming=streaming)
    splits = load_splits(args, teacher_prompt_template="{{ language }}: {{ source }}")
    for dataset in splits.values():
        row = next(iter(dataset))
        assert row.keys() == {"source", "target", "teacher_prompt"}
        assert row["teacher_prompt"] == f"Python: {row['source']}"
    with pytest.raises(ValueError, match="sorce"):
        load_splits(args, teacher_prompt_template="{{ sorce }}")
