# SPDX-License-Identifier: Apache-2.0
"""Streams of documents, and rows that are made of them."""

import itertools

import pyarrow
import pyarrow.parquet
import pytest

from conftest import build_byte_tokenizer
from encdec_slm.trainers.corpora import (
    HELD_OUT,
    TRAIN,
    DenoisingDataset,
    Source,
    describe_sources,
    is_held_out,
    mix_documents,
    read_documents,
)
from encdec_slm.trainers.denoising import OBJECTIVES, add_sentinel_tokens


@pytest.fixture
def corpus(tmp_path):
    """A folder with 600 documents in a Parquet file and two in text files."""
    table = pyarrow.table({"text": [f"document {number} of a corpus." for number in range(600)]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    (tmp_path / "a.txt").write_text("\ufefffirst\r\ntext", encoding="utf-8")
    (tmp_path / "c.md").write_text("ä" * 50, encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    return tmp_path


def build_dataset(corpus, objective="ul2", **options):
    tokenizer = build_byte_tokenizer()
    sentinels = add_sentinel_tokens(tokenizer)
    return DenoisingDataset(
        [Source(str(corpus))], tokenizer, sentinels, OBJECTIVES[objective], **{"max_length": 16, **options}
    )


def test_documents_are_read_in_the_order_of_file_names(corpus):
    documents = list(read_documents(Source(str(corpus))))
    assert documents[0] == "first\ntext" and documents[1] == "document 0 of a corpus."
    assert len(documents) == 602 and documents[-1] == "ä" * 50


def test_a_text_without_line_ends_is_read_in_pieces(corpus):
    pieces = list(read_documents(Source(str(corpus / "c.md")), max_bytes=7))
    assert "".join(pieces) == "ä" * 50 and max(map(len, pieces)) <= 4


def test_sources_are_mixed_by_weight_and_go_on_when_one_ends(tmp_path):
    for name, count in (("a", 300), ("b", 30)):
        table = pyarrow.table({"text": [f"{name} {number}" for number in range(count)]})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    sources = [Source.parse(f"{tmp_path}/a.parquet=3"), Source.parse(f"{tmp_path}/b.parquet")]
    documents = list(mix_documents(sources, seed=0))
    assert sorted(documents) == sorted([f"a {n}" for n in range(300)] + [f"b {n}" for n in range(30)])
    assert sum(text.startswith("b") for text in documents[:80]) == pytest.approx(20, abs=8)
    assert documents == list(mix_documents(sources, seed=0)) != list(mix_documents(sources, seed=1))


def test_rows_are_the_same_for_a_seed_and_epoch_only(corpus):
    dataset = build_dataset(corpus)
    rows = list(dataset)
    assert rows == list(dataset) == list(build_dataset(corpus))
    assert all(row["input_ids"][-1] == row["labels"][-1] == 2 and len(row["input_ids"]) <= 17 for row in rows)
    dataset.set_epoch(1)
    assert rows != list(dataset) != list(build_dataset(corpus, seed=1))


def test_each_document_is_either_trained_on_or_held_out(corpus):
    documents = [text for text in read_documents(Source(str(corpus))) if text]
    held_out = [text for text in documents if is_held_out(text)]
    assert 0 < len(held_out) < 20
    num_pieces = {
        split: len(list(build_dataset(corpus, "prefix", split=split, max_length=64))) for split in (TRAIN, HELD_OUT)
    }
    assert num_pieces == {TRAIN: len(documents) - len(held_out) + 1, HELD_OUT: len(held_out)}  # 100 bytes are two


def test_the_standard_library_is_a_source_of_every_machine():
    assert len(list(itertools.islice(read_documents(Source("python")), 5))) == 5


def test_a_changed_file_is_another_corpus(corpus):
    before = describe_sources([Source(str(corpus))])
    (corpus / "a.txt").write_text("longer text")
    assert describe_sources([Source(str(corpus))]) != before


def write_damaged(folder, name):
    path = folder / name
    if name == "latin1.txt":
        path.write_bytes("café au lait".encode("latin-1"))
    elif name == "cut.txt":
        path.write_bytes(b"caf" + b"\xc3")
    elif name == "damaged.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 9}), path)
        path.write_bytes(path.read_bytes()[:-20])
    elif name == "column.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    elif name == "empty.txt":
        path.touch()
    return path


@pytest.mark.parametrize(
    "name", ["latin1.txt", "cut.txt", "damaged.parquet", "column.parquet", "empty.txt", "missing.txt"]
)
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    with pytest.raises(ValueError, match=name):
        list(read_documents(Source(str(write_damaged(tmp_path, name)))))


@pytest.mark.parametrize("text", ["a=0", "a=-1", "a=b", "a=inf", "a="])
def test_weights_are_positive_numbers(text):
    with pytest.raises(ValueError, match="weight"):
        Source.parse(text)
