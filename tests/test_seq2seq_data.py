# SPDX-License-Identifier: Apache-2.0
"""Rows from files, folders and streams; what is refused; the tokenizer; and what is cut."""

import json
import logging

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import processors
from transformers import AutoTokenizer

from encdec_slm.trainers.finetuning import FinetuneArguments
from encdec_slm.trainers.seq2seq_data import load_splits, tokenize_splits, train_tokenizer


ROWS = [{"source": f"def f{number}(): return {number}", "target": f"Return {number}."} for number in range(40)]


@pytest.fixture
def jsonl(tmp_path):
    def write(rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="module")
def tokenizer():
    texts = [text for row in ROWS for text in row.values()]
    return train_tokenizer(texts, vocab_size=300, model_max_length=32)


def load(**fields):
    return load_splits(FinetuneArguments(**fields))


def test_a_local_file_gives_rows_and_a_tenth_is_held_out_twice(jsonl, caplog):
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        splits = load(train_file=jsonl(ROWS))
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 32, "validation": 4, "test": 4}
    assert sorted(row["source"] for rows in splits.values() for row in rows) == sorted(row["source"] for row in ROWS)
    assert "No test split was given: 4 of 36 training rows are held out for it." in caplog.messages


def test_columns_of_other_names_become_source_and_target(jsonl):
    rows = [{"article": row["source"], "summary": row["target"], "id": 1} for row in ROWS]
    fields = {"source_column": "article", "target_column": "summary"}
    assert load(train_file=jsonl(rows), **fields)["train"].column_names == ["source", "target"]
    folder = jsonl(rows, "train.jsonl").removesuffix("/train.jsonl")
    assert load(dataset_name=folder, **fields)["train"].column_names == ["source", "target"]


@pytest.mark.parametrize("by_name", [False, True], ids=["files", "folder"])
def test_a_stream_is_read_as_it_is_needed_and_its_held_out_rows_are_bounded(jsonl, by_name):
    paths = {f"{split}_file": jsonl(ROWS, f"{split}.jsonl") for split in ("train", "validation", "test")}
    where = {"dataset_name": paths["train_file"].removesuffix("/train.jsonl")} if by_name else paths
    splits = load(**where, dataset_streaming=True, max_eval_samples=7)
    assert isinstance(splits["train"], IterableDataset)
    assert len(splits["validation"]) == len(splits["test"]) == 7
    assert sorted(row["source"] for row in splits["train"]) == sorted(row["source"] for row in ROWS)


def test_a_stream_without_held_out_splits_is_refused(jsonl):
    with pytest.raises(ValueError, match="no validation split, and streamed training rows cannot be divided"):
        load(train_file=jsonl(ROWS), dataset_streaming=True)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_bad_row_of_a_named_dataset_is_refused_with_its_place_before_rows_are_shuffled(jsonl, streaming):
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


def test_data_that_cannot_be_found_is_answered_with_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"`train_file` is 'nowhere.jsonl', but there is no such file"):
        load(train_file="nowhere.jsonl")
    with pytest.raises(ValueError, match=r"could not be loaded .* Give the name of a dataset on the Hub"):
        load(dataset_name=str(tmp_path / "nowhere"))


def test_a_training_split_that_does_not_exist_is_answered_with_those_that_do(jsonl):
    folder = jsonl(ROWS).removesuffix("/train.jsonl")
    with pytest.raises(ValueError, match="has the splits train, but `dataset_train_split` is 'all'"):
        load(dataset_name=folder, dataset_train_split="all")


def test_every_text_ends_in_one_end_of_text_token_and_decodes_to_itself(tokenizer):
    text = "def f(x):\n    return 'Größe →' + x  # \t."
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(ROWS[0]["source"]).data == tokenizer(ROWS[0]["source"]).data
    assert set(loaded(ROWS[0]["source"])) == {"input_ids", "attention_mask"}
    assert loaded.model_max_length == 32


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="`vocab_size` is 100, but 3 special tokens and 256 bytes need 259"):
        train_tokenizer(["a"], vocab_size=100, model_max_length=8)


def test_long_rows_are_cut_before_their_end_of_text_token_and_counted(tokenizer, caplog):
    texts = ["w" * 20, "v", "u" * 9]
    rows = Dataset.from_list([{"source": text, "target": text[::-1]} for text in texts])
    with caplog.at_level(logging.INFO, logger="encdec_slm"):
        tokenized, counts = tokenize_splits({"test": rows}, tokenizer, max_source_length=8, max_target_length=12)
    assert [len(ids) for ids in tokenized["test"]["input_ids"]] == [8, 2, 8]
    assert [len(ids) for ids in tokenized["test"]["labels"]] == [12, 2, 10]
    assert all(ids[-1] == tokenizer.eos_token_id for ids in tokenized["test"]["labels"])
    assert counts["test"] == {"rows": 3, "source": 2, "target": 1}
    assert "test: 3 rows; 2 sources cut to 8 tokens, 1 targets cut to 12." in caplog.messages


def test_targets_end_in_the_end_of_text_token_whatever_the_tokenizer_does(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    plain.backend_tokenizer.post_processor = None
    rows = Dataset.from_list([{"source": "abc", "target": text} for text in ("abc", "z" * 9)])
    tokenized, _ = tokenize_splits({"test": rows}, plain, 8, 6)
    assert [len(ids) for ids in tokenized["test"]["labels"]] == [4, 6]
    assert all(ids[-1] == plain.eos_token_id for ids in tokenized["test"]["labels"])


def test_targets_leave_out_the_token_that_the_decoder_starts_with(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    llama_like = AutoTokenizer.from_pretrained(tmp_path)
    llama_like.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", llama_like.bos_token_id)]
    )
    rows = Dataset.from_list([{"source": "abc", "target": "abc"}])
    tokenized, _ = tokenize_splits({"test": rows}, llama_like, 8, 8, decoder_start_token_id=llama_like.bos_token_id)
    expected, _ = tokenize_splits({"test": rows}, tokenizer, 8, 8)
    assert tokenized["test"]["labels"][0] == expected["test"]["labels"][0]
    assert tokenized["test"]["input_ids"][0][0] == llama_like.bos_token_id
