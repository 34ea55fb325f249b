# SPDX-License-Identifier: Apache-2.0
"""Streams of documents for pre-training, from text files, Parquet files and data sets of the Hub."""

import codecs
import contextlib
import hashlib
import itertools
import logging
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from datasets.exceptions import DatasetsError
from torch.utils.data import IterableDataset

from ..errors import format_list, summarize_error
from .data_files import load_hub_dataset


logger = logging.getLogger(__name__)

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
# Documents are cut into pieces of so many characters per token, so that most are not longer than a row.
CHARACTERS_PER_TOKEN = 3
# A text file is a document, or several of this size: files and lines may have no end.
DOCUMENT_BYTES = 2**14
# Name of a source that every machine has: Python's standard library, without its tests.
STANDARD_LIBRARY = "python"
PARQUET_BATCH_ROWS = 1000
# Documents are held out by a hash of their text: the same ones in every run, whatever else is in the corpus.
HELD_OUT_PERCENT = 1
TRAIN, HELD_OUT = "train", "held-out"


class Source(NamedTuple):
    """A part of a corpus.

    Args:
        name (`str`): A text or Parquet file, a folder of them, a data set of the Hub (`"NAME"` or `"NAME:CONFIG"`),
            or `"python"` for the standard library of the running Python.
        weight (`float`): Share of its documents, beside those of other sources.
    """

    name: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Parse `NAME` or `NAME=WEIGHT`.

        Raises:
            ValueError: The weight is not a positive number.
        """
        name, _, weight = text.rpartition("=") if "=" in text else (text, "", "1")
        try:
            source = cls(name, float(weight))
        except ValueError:
            source = cls(name, 0.0)
        if not 0.0 < source.weight < float("inf"):
            raise ValueError(f"The weight of source {name!r} must be a positive number, got {weight!r}.")
        return source

    def list_files(self) -> list[Path]:
        """Return the files of the source in the order of their names; none for a data set of the Hub.

        Raises:
            ValueError: The path has no text or Parquet file.
        """
        path = Path(self.name)
        if self.name == STANDARD_LIBRARY and not path.exists():
            folder, left_out = Path(sysconfig.get_path("stdlib")), {"site-packages", "dist-packages", "test", "tests"}
            parts = [path for path in sorted(folder.iterdir()) if path.name not in left_out]
            files = (file for path in parts for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path]))
            return [file for file in files if file.suffix == ".py" and not left_out & {*file.parts}]
        if not path.exists():
            if path.suffix in (*TEXT_ENDINGS, ".parquet") or self.name.startswith((".", "/")):
                raise ValueError(f"The source {self.name!r} does not exist. Give a file, a folder or a Hub data set.")
            return []
        endings = (*TEXT_ENDINGS, ".parquet")
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        files = [file for file in files if file.is_file() and file.suffix in endings and file.stat().st_size]
        if not files:
            raise ValueError(f"The source {self.name!r} has no text in files that end in {format_list(endings)}.")
        return files


def describe_sources(sources: Sequence[Source], text_column: str = "text") -> list[list]:
    """Return what identifies a corpus: names, weights, and the names and sizes of files.

    Raises:
        ValueError: A file is missing, or a Parquet file is cut off or has no column of text.
    """
    for file in (file for source in sources for file in source.list_files() if file.suffix == ".parquet"):
        with _name_damaged(file):
            _check_text_column(pyarrow.parquet.read_schema(file), text_column, file)
    return [
        [source.name, source.weight, [[str(file), file.stat().st_size] for file in source.list_files()]]
        for source in sources
    ]


def read_documents(source: Source, text_column: str = "text", max_bytes: int = DOCUMENT_BYTES) -> Iterator[str]:
    """Yield the documents of a source: text files, in pieces if long, and rows of Parquet files and data sets.

    Raises:
        ValueError: A file is damaged, not UTF-8 or has no text column. The message names it.
    """
    files = source.list_files()
    if not files:
        yield from _read_hub_dataset(source.name, text_column)
    for file in files:
        if file.suffix == ".parquet":
            yield from _read_parquet(file, text_column)
        else:
            yield from _read_text(file, max_bytes)


def _read_text(file, max_bytes):
    decoder, parts, size = codecs.getincrementaldecoder("utf-8")(), [], 0
    with file.open("rb") as stream:
        is_ended = False
        while not is_ended:
            line = stream.readline(max_bytes)
            is_ended = not line
            try:
                parts.append(decoder.decode(line, final=is_ended))
            except UnicodeDecodeError as error:
                # `error.object` begins with the bytes that were left over from the line before.
                position = stream.tell() - len(error.object) + error.start
                raise ValueError(
                    f"{file} is not UTF-8 text: byte {position} cannot be read. Convert it, or remove it from the "
                    "source."
                ) from error
            size += len(line)
            if size >= max_bytes or is_ended:
                yield "".join(parts).replace("\r\n", "\n").removeprefix("\ufeff")
                parts, size = [], 0


def _read_parquet(file, text_column):
    with _name_damaged(file):
        table = pyarrow.parquet.ParquetFile(file)
        _check_text_column(table.schema_arrow, text_column, file)
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=[text_column]):
            yield from (text for text in batch[0].to_pylist() if text is not None)


@contextlib.contextmanager
def _name_damaged(file):
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is damaged ({summarize_error(error)}). Copy it again, or remove it from the source."
        ) from error


def _check_text_column(schema: pyarrow.Schema, text_column: str, file: Path) -> None:
    if text_column not in schema.names:
        raise ValueError(
            f"{file} has the columns {format_list(schema.names)}, but `text_column` is {text_column!r}. Set it to one "
            "of them."
        )
    kind = schema.field(text_column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_null(kind)):
        raise ValueError(f"The column {text_column!r} of {file} has values of type {kind}, but text is required.")


def _read_hub_dataset(name, text_column):
    repository, _, config = name.partition(":")
    try:
        dataset = load_hub_dataset(repository, config or None, streaming=True)
        rows = dataset["train" if "train" in dataset else next(iter(dataset))]
        for row in rows:
            if not isinstance(text := row.get(text_column, row), str | None):
                raise ValueError(f"it has the columns {format_list(row)}, and `text_column` is {text_column!r}")
            yield text or ""
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(
            f"The source {name!r} could not be read ({summarize_error(error)}). Give a file, a folder or a data set "
            "on the Hub with a column of text."
        ) from error


def mix_documents(sources: Sequence[Source], seed: int, text_column: str = "text") -> Iterator[str]:
    """Yield documents of several sources in the ratio of their weights, until all have ended.

    A source that ends early leaves its share to the others.
    """
    rng, sources = np.random.default_rng(seed), list(sources)
    streams = [read_documents(source, text_column) for source in sources]
    while streams:
        weights = np.array([source.weight for source in sources])
        number = int(rng.choice(len(streams), p=weights / weights.sum())) if len(streams) > 1 else 0
        document = next(streams[number], None)
        if document is None:
            if len(streams) > 1:
                logger.info(f"The source {sources[number].name} has ended; the others go on.")
            del streams[number], sources[number]
        elif document.strip():
            yield document


def is_held_out(document: str) -> bool:
    """Return whether a document is held out of training."""
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) % 100 < HELD_OUT_PERCENT


class CorpusDataset(IterableDataset):
    """Rows of `text`, a piece of a document, and `seed`, which is the same for the same seed, epoch and row.

    Documents are shuffled within a buffer and cut into pieces. Reading is cheap: tokens are made by the collator, so
    that each process makes only those of its own rows.

    Args:
        sources (`Sequence[Source]`): The corpus.
        max_length (`int`): Most tokens of a row; pieces have `CHARACTERS_PER_TOKEN` characters for each of them.
        split (`str`, *optional*): `"train"` or `"held-out"` documents.
        num_epochs (`int`, *optional*): Passes over the corpus. `None` never ends.
        seed (`int`, *optional*, defaults to 0): Of everything that is drawn.
        text_column (`str`, *optional*, defaults to `"text"`): Of Parquet files and data sets.
        shuffle_buffer (`int`, *optional*, defaults to 1000): Documents among which the next one is drawn.
        start_row (`int`, *optional*, defaults to 0): Rows to skip, which an earlier run has learned from.
        global_batch_size (`int`, *optional*, defaults to 1): Rows of a batch over all processes. Workers of a data
            loader take turns with such batches, so that their number does not change the order of rows.

    Raises:
        ValueError: While iterating: a source cannot be read, or has no text for an endless stream.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        max_length: int,
        split: str = TRAIN,
        num_epochs: int | None = 1,
        seed: int = 0,
        text_column: str = "text",
        shuffle_buffer: int = 1000,
        start_row: int = 0,
        global_batch_size: int = 1,
    ):
        self.sources, self.split, self.num_epochs = sources, split, num_epochs
        self.piece_length = max_length * CHARACTERS_PER_TOKEN
        self.seed, self.text_column, self.shuffle_buffer = seed, text_column, shuffle_buffer
        self.start_row, self.global_batch_size = start_row, global_batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for row_number, row in enumerate(itertools.islice(self._iterate_rows(), self.start_row, None)):
            if row_number // self.global_batch_size % count == number:
                yield row

    def _iterate_rows(self):
        for epoch in itertools.count() if self.num_epochs is None else range(self.num_epochs):
            number = 0
            for document in self._shuffle(epoch):
                for start in range(0, len(document), self.piece_length):
                    yield {"text": document[start : start + self.piece_length], "seed": (self.seed, epoch, number)}
                    number += 1
            if number == 0 and self.num_epochs is None:
                raise ValueError("The corpus has no documents to train on. Add more text to `sources`.")

    def _shuffle(self, epoch):
        """Yield the documents of the split, each drawn among those of a buffer."""
        rng, buffer = np.random.default_rng((self.seed, epoch)), []
        for document in mix_documents(self.sources, self.seed + epoch, self.text_column):
            if is_held_out(document) != (self.split == HELD_OUT):
                continue
            buffer.append(document)
            if len(buffer) > self.shuffle_buffer:
                yield buffer.pop(int(rng.integers(len(buffer))))
        while buffer:
            yield buffer.pop(int(rng.integers(len(buffer))))


__all__ = ["CorpusDataset", "Source", "describe_sources", "mix_documents", "read_documents"]
