# SPDX-License-Identifier: Apache-2.0
"""Teacher cache: what a teacher predicts for a data set, stored once as Parquet shards.

A shard holds the examples of a range of rows. One example has the token ids of a target in the teacher's vocabulary,
and for each of them what the teacher predicts: its most probable tokens (`topk`), or tokens drawn from its
distribution (`sampled`, arXiv 2503.16870). Log-probabilities are normalized over the full vocabulary.

N tokens of a target, K stored entries per token, V vocabulary.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import (
    Dataset,
    IterableDataset,
    are_progress_bars_disabled,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..checkpoints import write_file
from ..errors import format_list, summarize_error


FORMAT_VERSION = 1
METADATA_KEY = b"encdec_slm.teacher_cache"
SHARD_NAME = "labels-{start:010d}-{stop:010d}.parquet"
SHARD_PATTERN = re.compile(r"labels-(\d{10})-(\d{10})\.parquet")
TOKENIZER_NAME = "tokenizer"
# Names of the labels among the columns of a data set.
LABEL_COLUMNS = ("label_target_ids", "label_ids", "label_num_ids", "label_log_probs", "label_counts", "label_tail")
# Sorted by probability, ids and log-probabilities are smallest when their bytes are stored in separate streams.
BYTE_STREAM_SPLIT = ("label_target_ids", "label_ids", "label_log_probs", "label_tail")
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "sample": pa.int32(),
        "row_fingerprint": pa.string(),
        "completion": pa.string(),
        "label_target_ids": pa.list_(pa.uint32()),
        "label_ids": pa.list_(pa.uint32()),
        "label_num_ids": pa.list_(pa.uint16()),
        "label_log_probs": pa.list_(pa.float16()),
        "label_counts": pa.list_(pa.uint16()),
        "label_tail": pa.list_(pa.float16()),
    }
)


@dataclass(frozen=True)
class DistributionSpec:
    """How the teacher's distributions are stored.

    Args:
        kind (`str`): `"topk"`: the most probable tokens, their log-probabilities and the mass of all others.
            `"sampled"`: how often each token was drawn.
        size (`int`): Number of tokens per position: the k of the top k, or the number of draws.

    Raises:
        ValueError: The kind is unknown, or the size is not in 1 to 65,535.
    """

    kind: str
    size: int

    def __post_init__(self):
        if self.kind not in ("topk", "sampled") or not 1 <= self.size <= 65_535:
            raise ValueError(
                f"`distributions` must be 'topk:K' or 'sampled:N' with a number from 1 to 65,535, got {str(self)!r}."
            )

    def __str__(self):
        return f"{self.kind}:{self.size}"

    @classmethod
    def parse(cls, text: str) -> "DistributionSpec":
        """Parse a text such as `"topk:32"` or `"sampled:12"`."""
        kind, _, size = text.partition(":")
        return cls(kind, int(size) if size.isdigit() else 0)


@dataclass(frozen=True)
class CacheHeader:
    """What all shards of a cache have in common; labels of different headers must not be mixed.

    Args:
        teacher (`str`): Name of the teacher, for messages.
        teacher_fingerprint (`str`): From [`model_fingerprint`], or the name of a remote model.
        tokenizer_fingerprint (`str`): From [`~encdec_slm.vocabulary.tokenizer_fingerprint`].
        template_fingerprint (`str`): Digest of the chat template or prompt template that the teacher reads.
        vocab_size (`int`): Number of tokens that the teacher scores.
        distributions (`str`, *optional*): Such as `"topk:32"`; `None` if only completions are stored.
        completions (`str`, *optional*): Settings of the generated targets as JSON; `None` if targets are the data's.
        rows_per_shard (`int`): Rows of each shard but the last.
    """

    teacher: str
    teacher_fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    vocab_size: int
    distributions: str | None
    completions: str | None
    rows_per_shard: int
    version: int = FORMAT_VERSION

    def to_metadata(self) -> dict[bytes, bytes]:
        """Return the header as metadata of a Parquet file."""
        return {METADATA_KEY: json.dumps(dataclasses.asdict(self), sort_keys=True).encode()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, path: Path) -> "CacheHeader":
        """Read the header of a shard.

        Raises:
            ValueError: The file is not a shard of a teacher cache, or of a newer version.
        """
        try:
            fields = json.loads((metadata or {})[METADATA_KEY])
            if fields.get("version") == FORMAT_VERSION:
                return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a shard of a teacher cache ({summarize_error(error)}).") from error
        raise ValueError(
            f"{path} has version {fields.get('version')} of the cache format, but this package reads version "
            f"{FORMAT_VERSION}. Label the data again, or update the package."
        )


@dataclass
class Example:
    """One labeled target.

    Args:
        row (`int`): Index of its row in the data set.
        row_fingerprint (`str`): From [`row_fingerprint`].
        target_ids (`np.ndarray` of shape `(N,)`, *optional*): Ids of the target in the teacher's vocabulary, end token
            included. `None` if only the text is stored, for students with any tokenizer.
        sample (`int`, *optional*, defaults to 0): Number of the completion, if there are several for a row.
        completion (`str`, *optional*): Text that the teacher generated.
        ids (list of N `np.ndarray`, *optional*): Token ids for each position: the most probable first. A position
            without ids has no distribution.
        log_probs (list of N `np.ndarray`, *optional*): Their log-probabilities over the full vocabulary, in nats.
        counts (list of N `np.ndarray`, *optional*): How often each was drawn.
    """

    row: int
    row_fingerprint: str
    target_ids: np.ndarray | None
    sample: int = 0
    completion: str | None = None
    ids: list[np.ndarray] | None = None
    log_probs: list[np.ndarray] | None = None
    counts: list[np.ndarray] | None = None

    def to_columns(self) -> dict[str, Any]:
        """Return the example as a row of [`SCHEMA`]."""
        columns = dict.fromkeys(SCHEMA.names)
        columns |= {"row": self.row, "sample": self.sample, "row_fingerprint": self.row_fingerprint}
        columns["completion"] = self.completion
        if self.target_ids is not None:
            columns["label_target_ids"] = np.asarray(self.target_ids, np.uint32)
        if self.ids is not None:
            columns["label_num_ids"] = np.array([len(ids) for ids in self.ids], np.uint16)
            columns["label_ids"] = _concatenate(self.ids, np.uint32)
        if self.counts is not None:
            columns["label_counts"] = _concatenate(self.counts, np.uint16)
        if self.log_probs is not None:
            columns["label_log_probs"] = _concatenate(self.log_probs, np.float16)
            tail = [max(0.0, 1.0 - float(np.exp(values.astype(np.float64)).sum())) for values in self.log_probs]
            columns["label_tail"] = np.array(tail, np.float16)
        return columns


def _concatenate(arrays, dtype):
    return np.concatenate([np.asarray(array, dtype) for array in arrays]) if arrays else np.array([], dtype)


def row_fingerprint(prompt: Any, completion: str | None) -> str:
    """Return a digest of what was labeled: 16 hexadecimal digits.

    Args:
        prompt (`str` or list of messages): As in the data set.
        completion (`str`, *optional*): The given target; `None` if the teacher generated it.
    """
    text = json.dumps([prompt, completion], ensure_ascii=True, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's weights; tied weights count once."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# Write


def write_shard(folder: Path, header: CacheHeader, start: int, stop: int, examples: Sequence[Example]) -> Path:
    """Write the labels of the rows `start` to `stop` (not included) atomically, and return the file.

    Raises:
        ValueError: A log-probability is NaN or positive.
    """
    rows = [example.to_columns() for example in examples]
    for row in rows:
        values = row["label_log_probs"]
        if values is not None and not (values <= 0).all():
            raise ValueError(
                f"The teacher {header.teacher} gives a log-probability of {values[~(values <= 0)][0]} in row "
                f"{row['row']}, but they must be numbers up to 0. Check the teacher's weights and dtype."
            )
    table = pa.Table.from_pylist(
        rows, SCHEMA.with_metadata({**header.to_metadata(), b"rows": f"{start}:{stop}".encode()})
    )
    encodings = {f"{name}.list.element": "BYTE_STREAM_SPLIT" for name in BYTE_STREAM_SPLIT}
    path = folder / SHARD_NAME.format(start=start, stop=stop)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(
        path,
        lambda temporary: pq.write_table(
            table, temporary, compression="zstd", use_dictionary=False, column_encoding=encodings
        ),
    )
    return path


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the teacher's tokenizer in a cache, from which new students get theirs; one that is there is kept."""
    target = folder / TOKENIZER_NAME
    if target.exists():
        return
    temporary = folder / f".{TOKENIZER_NAME}-{uuid.uuid4().hex}"
    try:
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, target)
    except OSError:
        if not target.exists():  # else another worker was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# Read


class TeacherCache:
    """The labels in a folder; see [`~encdec_slm.trainers.teacher_labels.label_dataset`], which writes it.

    Args:
        folder (`str` or `Path`): Folder of the shards.

    Raises:
        ValueError: There are no shards, one is damaged or from another run, or rows between two shards are missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.shards = find_shards(self.folder)
        if not self.shards:
            raise ValueError(f"{str(folder)!r} holds no teacher cache. Write one with `encdec-slm label`.")
        self.header = read_header(self.shards[0][2])
        stop = 0
        for start, next_stop, path in self.shards:
            if start != stop:
                raise ValueError(
                    f"The teacher cache {str(folder)!r} has no labels for the rows {stop} to {start - 1}. Run "
                    "`encdec-slm label` again; it resumes."
                )
            check_header(read_header(path), self.header, path)
            stop = next_stop
        self.num_rows = stop

    @property
    def distributions(self) -> DistributionSpec | None:
        """How distributions are stored; `None` if there are none."""
        return None if self.header.distributions is None else DistributionSpec.parse(self.header.distributions)

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Load the teacher's tokenizer; `None` if the teacher was an endpoint with an unknown one."""
        folder = self.folder / TOKENIZER_NAME
        return AutoTokenizer.from_pretrained(folder, local_files_only=True) if folder.is_dir() else None

    def attach(
        self,
        dataset: Dataset | IterableDataset,
        prompt_column: str,
        completion_column: str,
        row_column: str | None = None,
    ) -> Dataset | IterableDataset:
        """Add the labels to the rows that they belong to, as the columns [`LABEL_COLUMNS`].

        A row with several completions is repeated. With generated targets the column `completion_column` is replaced.

        Args:
            dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): Rows that were labeled.
            prompt_column (`str`): Column with the prompt.
            completion_column (`str`): Column with the target.
            row_column (`str`, *optional*): Column with the index of each row in the data that was labeled; it is
                removed. `None` means all rows in their order, as does a stream.

        Raises:
            ValueError: A row is not the one that was labeled, or has no labels.
        """
        if isinstance(dataset, IterableDataset):
            rows = _AttachStream(self, prompt_column, completion_column)
            return dataset.map(rows, with_indices=True, batched=True, batch_size=self.header.rows_per_shard)
        indices = np.arange(len(dataset)) if row_column is None else np.array(dataset[row_column][:])
        if indices.max(initial=0) >= self.num_rows:
            raise ValueError(
                f"The teacher cache {str(self.folder)!r} has labels for {self.num_rows:,} rows, but the data set has "
                f"at least {indices.max() + 1:,}. Run `encdec-slm label` on all of it."
            )
        for _, _, path in self.shards:
            read_shard(path)  # which checks it
        with _hide_progress_bars():
            return self._attach(dataset, indices, prompt_column, completion_column, row_column)

    def _attach(self, dataset, indices, prompt_column, completion_column, row_column):
        labels = Dataset.from_parquet([str(path) for _, _, path in self.shards])
        rows = np.array(labels["row"][:])
        starts, stops = (np.searchsorted(rows, indices, side) for side in ("left", "right"))
        labels = labels.select(np.concatenate([np.arange(*span) for span in zip(starts, stops, strict=True)]))
        repeated = dataset.select(np.repeat(np.arange(len(dataset)), stops - starts))
        repeated = repeated if row_column is None else repeated.remove_columns(row_column)
        self._check_rows(repeated, labels, prompt_column, completion_column)
        if self.header.completions is None:
            labels = labels.remove_columns("completion")
        else:
            if completion_column in repeated.features:
                repeated = repeated.remove_columns(completion_column)
            if completion_column != "completion":
                labels = labels.rename_column("completion", completion_column)
        return concatenate_datasets([repeated, labels.remove_columns(["row", "sample", "row_fingerprint"])], axis=1)

    def _check_rows(self, dataset, labels, prompt_column, completion_column):
        has_targets = self.header.completions is None and completion_column in dataset.features
        completions = dataset[completion_column] if has_targets else [None] * len(dataset)
        columns = (labels["row"], dataset[prompt_column], completions, labels["row_fingerprint"])
        for row, prompt, completion, expected in zip(*columns, strict=True):
            self.check_row(row, prompt, completion, expected)

    def check_row(self, row: int, prompt: Any, completion: str | None, expected: str) -> None:
        """Check that a row is the one that was labeled.

        Raises:
            ValueError: It is another one.
        """
        if row_fingerprint(prompt, completion) != expected:
            raise ValueError(
                f"Row {row} is not the one that the teacher cache {str(self.folder)!r} has labels for: the data set "
                "was changed, shuffled or is another one. Label it again, or use the data that was labeled."
            )

    def read(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Yield the labels of the rows `start` to `stop` (not included), one dictionary per example."""
        for shard_start, shard_stop, path in self.shards:
            if shard_start < stop and start < shard_stop:
                for example in read_shard(path).to_pylist():
                    if start <= example["row"] < stop:
                        yield example


@dataclass
class _AttachStream:
    """Adds labels to batches of consecutive rows of a stream."""

    cache: TeacherCache
    prompt_column: str
    completion_column: str

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        if indices[-1] >= self.cache.num_rows:
            raise ValueError(
                f"The teacher cache {str(self.cache.folder)!r} has labels for {self.cache.num_rows:,} rows, but the "
                "data set has more. Run `encdec-slm label` on all of it."
            )
        given = self.cache.header.completions is None
        out = {name: [] for name in {**batch, self.completion_column: None, **dict.fromkeys(LABEL_COLUMNS)}}
        for example in self.cache.read(indices[0], indices[-1] + 1):
            row = {name: values[example["row"] - indices[0]] for name, values in batch.items()}
            completion = row.get(self.completion_column) if given else None
            self.cache.check_row(example["row"], row[self.prompt_column], completion, example["row_fingerprint"])
            row[self.completion_column] = row.get(self.completion_column) if given else example["completion"]
            for name in out:
                out[name].append(row[name] if name in row else example[name])
        return out


@contextmanager
def _hide_progress_bars():
    """Hide the progress bars of datasets, which name steps that are not ours."""
    are_hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not are_hidden:
            enable_progress_bars()


def find_shards(folder: Path) -> list[tuple[int, int, Path]]:
    """Return the first row, the row after the last one, and the file of each shard in a folder, in their order."""
    names = ((SHARD_PATTERN.fullmatch(path.name), path) for path in folder.glob("*.parquet"))
    return sorted((int(match[1]), int(match[2]), path) for match, path in names if match)


def read_header(path: Path) -> CacheHeader:
    """Read the header of a shard, which shows too that the file is complete.

    Raises:
        ValueError: The file is damaged or not a shard.
    """
    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_damaged(path, error)) from error
    return CacheHeader.from_metadata(schema.metadata, path)


def read_shard(path: Path) -> pa.Table:
    """Read a shard.

    Raises:
        ValueError: The file is damaged, or holds log-probabilities that are not numbers.
    """
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(_damaged(path, error)) from error
    values = table["label_log_probs"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if not (values <= 0).all():
        raise ValueError(f"{path} holds log-probabilities that are NaN or positive. Delete the file and label again.")
    return table


def _damaged(path, error):
    return f"{path} cannot be read ({summarize_error(error)}): it is damaged or cut off. Delete it and label again."


def check_header(found: CacheHeader, expected: CacheHeader, path: Path) -> None:
    """Check that a shard belongs to a cache.

    Raises:
        ValueError: It has another teacher, tokenizer, template or other settings. The message names the differences.
    """
    pairs = zip(dataclasses.asdict(found).items(), dataclasses.asdict(expected).values(), strict=True)
    # The name of the teacher may be another path to the same weights.
    pairs = ((name, value, other) for (name, value), other in pairs if name != "teacher")
    differences = [f"`{name}` {value!r}, not {other!r}" for name, value, other in pairs if value != other]
    if differences:
        raise ValueError(
            f"{path} belongs to another teacher cache: it has {format_list(differences)}. Use another output folder."
        )
