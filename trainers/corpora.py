# SPDX-License-Identifier: Apache-2.0
"""Streams of documents for pre-training, from text files, Parquet files and data sets of the Hub."""

import codecs
import hashlib
import logging
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from ..errors import format_list, summarize_error
from .data_files import load_hub_dataset
from .denoising import Denoiser, denoise


logger = logging.getLogger(__name__)

TEXT_ENDINGS = (".txt", ".md", ".rst", ".py")
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
        name (`str`): A text or Parquet file, a folder of them, a data set of the Hub, or `"python"` for the standard
            library of the running Python.
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


def describe_sources(sources: Sequence[Source]) -> list[list]:
    """Return what identifies a corpus: names, weights, and the names and sizes of files."""
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
                raise ValueError(
                    f"{file} is not UTF-8 text: it cannot be read near byte {stream.tell() - len(line)}. Convert it, "
                    "or remove it from the source."
                ) from error
            size += len(line)
            if size >= max_bytes or is_ended:
                yield "".join(parts).replace("\r\n", "\n").removeprefix("\ufeff")
                parts, size = [], 0


def _read_parquet(file, text_column):
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_column not in table.schema_arrow.names:
            raise ValueError(
                f"{file} has the columns {format_list(table.schema_arrow.names)}, but `text_column` is "
                f"{text_column!r}. Set it to one of them."
            )
        for batch in table.iter_batches(PARQUET_BATCH_ROWS, columns=[text_column]):
            yield from (str(text) for text in batch[0].to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is damaged ({summarize_error(error)}). Copy it again, or remove it from the source."
        ) from error


def _read_hub_dataset(name, text_column):
    dataset = load_hub_dataset(name, None, streaming=True)
    rows = dataset["train" if "train" in dataset else next(iter(dataset))]
    for row in rows:
        if text_column not in row:
            raise ValueError(f"{name} has the columns {format_list(row)}. Set `text_column` to one of them.")
        yield str(row[text_column])


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


class DenoisingDataset(IterableDataset):
    """Rows of `input_ids` and `labels` for pre-training, which are the same for the same seed and epoch.

    Documents are shuffled within a buffer and cut into pieces of at most `max_length` tokens; each piece is denoised
    by a denoiser that is drawn for it.

    Args:
        sources (`Sequence[Source]`): The corpus.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Of the model, with sentinels.
        sentinel_ids (`Sequence[int]`): From [`~encdec_slm.trainers.denoising.add_sentinel_tokens`].
        denoisers (`Sequence[Denoiser]`): Drawn evenly.
        max_length (`int`): Most tokens of a piece, at least 2.
        split (`str`, *optional*): `"train"` or `"held-out"` documents.
        seed (`int`, *optional*, defaults to 0): Of everything that is drawn.
        text_column (`str`, *optional*, defaults to `"text"`): Of Parquet files and data sets.
        shuffle_buffer (`int`, *optional*, defaults to 1000): Documents among which the next one is drawn.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        sentinel_ids: Sequence[int],
        denoisers: Sequence[Denoiser],
        max_length: int,
        split: str = TRAIN,
        seed: int = 0,
        text_column: str = "text",
        shuffle_buffer: int = 1000,
    ):
        self.sources, self.tokenizer, self.sentinel_ids, self.denoisers = sources, tokenizer, sentinel_ids, denoisers
        self.max_length, self.split, self.seed = max_length, split, seed
        self.text_column, self.shuffle_buffer = text_column, shuffle_buffer
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which decides the order and the noise; accelerate calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        eos_token_id = self.tokenizer.eos_token_id
        for number, document in enumerate(self._shuffle()):
            ids = self.tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            rng = np.random.default_rng((self.seed, self.epoch, number))
            for start in range(0, len(ids), self.max_length):
                piece = ids[start : start + self.max_length]
                if len(piece) < 2:
                    continue
                denoiser = self.denoisers[rng.integers(len(self.denoisers))]
                source, target = denoise(piece, denoiser, self.sentinel_ids, rng)
                yield {"input_ids": [*source, eos_token_id], "labels": [*target, eos_token_id]}

    def _shuffle(self):
        """Yield the documents of the split, each drawn among those of a buffer."""
        rng, buffer = np.random.default_rng((self.seed, self.epoch)), []
        for document in mix_documents(self.sources, self.seed + self.epoch, self.text_column):
            if is_held_out(document) != (self.split == HELD_OUT):
                continue
            buffer.append(document)
            if len(buffer) > self.shuffle_buffer:
                yield buffer.pop(int(rng.integers(len(buffer))))
        while buffer:
            yield buffer.pop(int(rng.integers(len(buffer))))


__all__ = ["DenoisingDataset", "Source", "describe_sources", "mix_documents", "read_documents"]
