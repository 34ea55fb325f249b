# SPDX-License-Identifier: Apache-2.0
"""Streams of documents, and rows that are made of them."""

import itertools

import pyarrow
import pyarrow.parquet
import pytest
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from torch.utils.data import DataLoader

from encdec_slm.trainers.corpora import (
    HELD_OUT,
    TRAIN,
    CorpusDataset,
    Source,
    describe_sources,
    is_held_out,
    mix_documents,
    read_documents,
)


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


def build_dataset(corpus, **options):
    return CorpusDataset([Source(str(corpus))], **{"max_length": 16, **options})


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


def test_an_endless_stream_repeats_the_corpus_in_another_order_and_can_start_at_any_row(corpus):
    once = list(build_dataset(corpus))
    stream = list(itertools.islice(build_dataset(corpus, num_epochs=None), 2 * len(once)))
    assert stream[: len(once)] == once
    second = stream[len(once) :]
    assert sorted(row["text"] for row in second) == sorted(row["text"] for row in once)
    assert [row["text"] for row in second] != [row["text"] for row in once]
    assert len({row["seed"] for row in stream}) == len(stream)
    later = build_dataset(corpus, num_epochs=None, start_row=len(once) + 7)
    assert next(iter(later)) == stream[len(once) + 7]
    assert [row["seed"] for row in build_dataset(corpus, seed=1)] != [row["seed"] for row in once]


# torch warns of two data-loader workers on a machine with one CPU.
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize("num_processes", [1, 3])
def test_processes_and_workers_share_rows_without_duplicates_or_losses(corpus, num_processes):
    expected = list(itertools.islice(build_dataset(corpus, num_epochs=None), 48))
    batches = [[] for _ in range(num_processes)]
    for process in range(num_processes):
        dataset = build_dataset(corpus, num_epochs=None, global_batch_size=4 * num_processes)
        shard = IterableDatasetShard(dataset, 4, num_processes=num_processes, process_index=process)
        for workers in (0, 2):
            loader = DataLoader(shard, 4, num_workers=workers, collate_fn=list)
            batches[process].append(list(itertools.islice(loader, 12 // num_processes)))
        assert batches[process][0] == batches[process][1]
    rows = [row for step in zip(*(found[0] for found in batches), strict=True) for batch in step for row in batch]
    assert rows == expected


def test_each_document_is_either_trained_on_or_held_out(corpus):
    documents = [text for text in read_documents(Source(str(corpus))) if text]
    held_out = [text for text in documents if is_held_out(text)]
    assert 0 < len(held_out) < 20
    found = {split: [row["text"] for row in build_dataset(corpus, split=split)] for split in (TRAIN, HELD_OUT)}
    assert sorted(found[HELD_OUT]) == sorted(held_out)
    assert sorted(found[TRAIN]) == sorted([*(set(documents) - {*held_out, "ä" * 50}), "ä" * 48, "ää"])


def test_an_endless_stream_without_documents_is_refused(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="sources"):
        next(iter(build_dataset(tmp_path, num_epochs=None)))


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
    elif name == "numbers.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), path)
    elif name == "latin1.parquet":
        values = pyarrow.array(["café".encode("latin-1")], pyarrow.binary()).view(pyarrow.string())
        pyarrow.parquet.write_table(pyarrow.table({"text": values}), path)
    elif name == "empty.txt":
        path.touch()
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("latin1.txt", "cut.txt", "empty.txt", "missing.txt", "damaged.parquet", "column.parquet"),
        *("numbers.parquet", "latin1.parquet"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    source = Source(str(write_damaged(tmp_path, name)))
    with pytest.raises(ValueError, match=name):
        list(read_documents(source))
    if name not in ("latin1.txt", "cut.txt", "latin1.parquet"):  # which cannot be seen before they are read
        with pytest.raises(ValueError, match=name):
            describe_sources([source])


def test_the_byte_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode() * 20 + b"\n" + b"x" * 30 + b"\xff")
    with pytest.raises(ValueError, match="byte 71"):
        list(read_documents(Source(str(tmp_path / "a.txt")), max_bytes=7))


def test_a_data_set_of_the_hub_is_streamed_with_its_config(monkeypatch):
    rows = Dataset.from_dict({"text": ["one", None, "two"], "label": [0, 1, 2]}).to_iterable_dataset()
    names = []

    def load(*name, **options):
        names.append(name)
        return {"validation": [], "train": rows}

    monkeypatch.setattr("encdec_slm.trainers.corpora.load_hub_dataset", load)
    assert list(read_documents(Source("user/data:en"))) == ["one", "", "two"]
    assert names == [("user/data", "en")]
    for column in ("body", "label"):
        with pytest.raises(ValueError, match=f"user/data.*{column}"):
            list(read_documents(Source("user/data"), column))


@pytest.mark.parametrize("text", ["a=0", "a=-1", "a=b", "a=inf", "a="])
def test_weights_are_positive_numbers(text):
    with pytest.raises(ValueError, match="weight"):
        Source.parse(text)
