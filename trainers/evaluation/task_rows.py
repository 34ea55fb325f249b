# SPDX-License-Identifier: Apache-2.0
"""Rows of a task: made on the spot, read from local files, or loaded from the Hub."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.lib
import pyarrow.parquet
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image

from ...checkpoint_folders import first_line
from ..distillation_data import undecoded
from ..distillation_images import image_list
from .tasks import EvaluationTask, Example


IMAGE_NAMES = ("image", "images")
FILE_SUFFIXES = (".json", ".jsonl", ".parquet")


def load_examples(
    task_name: str,
    task: EvaluationTask,
    *,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    dataset_split: str | None = None,
    columns: Sequence[str] | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> list[Example]:
    """The rows of a task, as a model reads them.

    Args:
        task_name (`str`): For messages.
        task ([`EvaluationTask`]): What a row must have.
        dataset_name (`str`, *optional*): A JSON, JSONL or parquet file, a folder of data files, or a data set on the
            Hub. `None` takes the task's own rows.
        dataset_config (`str`, *optional*): A configuration of it. `None` takes the task's for its own data set.
        dataset_revision (`str`, *optional*): Likewise.
        dataset_split (`str`, *optional*): Likewise; of a folder with one split, `None` takes this one.
        columns (`Sequence[str]`, *optional*): Other names for the task's columns.
        max_samples (`int`, *optional*): At most so many rows, drawn by `seed`. `None` takes all.
        seed (`int`, *optional*, defaults to 0): Decides which rows are drawn, or how images are made.

    Raises:
        ValueError: There are no such rows, or they lack what the task needs.
        TypeError: They hold something else than text or images where these are needed.
    """
    if dataset_name is not None and _is_file(Path(dataset_name)):
        rows = _rows_of_file(Path(dataset_name))
    elif dataset_name is None and task.build is not None:
        rows = task.build(dataset_split or task.dataset_split, max_samples, seed)
    else:
        if dataset_name is None and task.dataset_name is None:
            raise ValueError(
                f"`task` is {task_name!r} and `dataset_name` is not set, but this task has no rows of its own. Set it "
                "to a JSON, JSONL or parquet file, a folder, or a data set on the Hub."
            )
        rows = _loaded(task_name, task, dataset_name, dataset_config, dataset_revision, dataset_split)
    shown_name = task_name if dataset_name is None else dataset_name
    if len(rows) == 0:
        raise ValueError(f"{shown_name} has no rows, but at least one is needed. Check what it holds.")
    rows = _drawn(rows, max_samples, seed)
    return list(_examples(rows, task, columns, shown_name))


def _drawn(rows, max_samples, seed):
    """The rows that training runs measure too when they are given this number and seed."""
    if max_samples is None or len(rows) <= max_samples:
        return rows
    if isinstance(rows, Dataset):
        return rows.shuffle(seed=seed).select(range(max_samples))
    order = Dataset.from_dict({"place": list(range(len(rows)))}).shuffle(seed=seed)
    return [rows[place] for place in order["place"][:max_samples]]


def _examples(rows, task, columns, shown_name) -> Iterator[Example]:
    alternatives = task.columns if columns is None else [(name,) for name in columns]
    for number, row in enumerate(_without_reading_images(rows)):
        where = f"Row {number} (from 0) of {shown_name}"
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{where} is a {type(row).__name__}, but must have columns. Write one JSON object per row."
            )
        values = [_value(row, names, task, where) for names in alternatives]
        yield task.read(values, where)


def _without_reading_images(rows):
    """Rows whose images are read when they are called for: those of a whole data set may not fit into memory."""
    if not isinstance(rows, Dataset):
        yield from rows
        return
    names = [name for name in IMAGE_NAMES if name in rows.column_names]
    images = undecoded(rows.select_columns(names))
    for number, row in enumerate(rows.remove_columns(names)):
        yield {**row, **{name: functools.partial(_image_cells, images, number, name) for name in names}}


def _image_cells(images, number, name):
    return image_list(images[number][name])


def _value(row, names, task, where):
    for name in names:
        if name in row:
            return row[name]
    wanted = " or ".join(f"`{name}`" for name in names)
    remedy = "name yours by `source_column` and `target_column`" if task.columns_can_be_named else "rename yours"
    raise ValueError(f"{where} has {', '.join(row) or 'nothing'}, but {wanted} is needed. Add it, or {remedy}.")


def _is_file(path):
    """Whether rows come from a file; one that is meant by its name but not there is no data set of the Hub."""
    if path.suffix in FILE_SUFFIXES and not path.exists():
        raise ValueError(f"`dataset_name` is {str(path)!r}, but there is no such file. Correct its path.")
    return path.is_file()


def _rows_of_file(path: Path) -> Sequence[Mapping[str, Any]]:
    if path.suffix not in FILE_SUFFIXES:
        raise ValueError(
            f"`dataset_name` is {str(path)!r}, but files of rows end in {', '.join(FILE_SUFFIXES)}. Convert it."
        )
    try:
        if path.suffix == ".parquet":
            return Dataset(pyarrow.parquet.read_table(path))
        rows = list(_json_rows(path))
    except (UnicodeDecodeError, pyarrow.lib.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({first_line(error)}). Give a whole file of the kind that its name says."
        ) from error
    return [_with_image_paths(row, path.parent) for row in rows]


def _json_rows(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            # Lines of JSON often have this ending too; what else is wrong is said with its line.
            if error.msg != "Extra data":
                raise ValueError(f"{path} is not JSON: {error}. Write a list of objects.") from None
        else:
            rows = content.get("data") if isinstance(content, dict) and "data" in content else content
            yield from rows if isinstance(rows, list) else [rows]
            return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}, is not JSON: {error}. Write one object per line.") from None


def _with_image_paths(row, folder):
    """A row whose images are found beside its file, not beside the process."""
    if not isinstance(row, dict):
        return row
    found = {}
    for name in IMAGE_NAMES:
        if row.get(name) is not None:
            cells = row[name] if isinstance(row[name], list) else [row[name]]
            found[name] = [_beside(cell, folder) for cell in cells]
    return {**row, **found}


def _beside(cell, folder):
    # A picture in base64 is longer than any path.
    if isinstance(cell, str) and len(cell) < 1000 and (folder / cell).is_file():
        return str(folder / cell)
    return cell


def _loaded(task_name, task, name, config, revision, split):
    is_own = name is None
    name = task.dataset_name if is_own else name
    if is_own:
        config, revision = config or task.dataset_config, revision or task.dataset_revision
    wanted = split or task.dataset_split
    try:
        if Path(name).is_dir():
            return _split_of_folder(Path(name), config, wanted, is_asked_for=split is not None)
        return load_dataset(name, config, revision=revision, split=wanted)
    except (OSError, ValueError, DatasetsError, pyarrow.lib.ArrowException) as error:
        columns = ", ".join(names[0] for names in task.columns)
        raise ValueError(
            f"The data set {name!r} could not be loaded ({first_line(error)}). The Hub needs a network; without one, "
            f"give a local JSON, JSONL or parquet file, or a folder of them, with {columns} as `dataset_name`."
        ) from error


def _split_of_folder(folder, config, split, is_asked_for):
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        splits = load_from_disk(folder)
    else:
        splits = load_dataset(str(folder), config)
    if isinstance(splits, Dataset):
        splits = DatasetDict({split: splits})
    if split not in splits and len(splits) == 1 and not is_asked_for:
        return next(iter(splits.values()))
    if split not in splits:
        raise ValueError(f"it has the splits {', '.join(splits)}, but not {split}: set `dataset_split`")
    return splits[split]


def data_digest(examples: Sequence[Example]) -> str:
    """A short text that changes with anything that a model reads or is compared with."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        row = [example.before, example.text, example.after, list(example.references)]
        digest.update(json.dumps(row).encode())
        for image in example.images():
            digest.update(_image_bytes(image))
    return digest.hexdigest()


def _image_bytes(image):
    if isinstance(image, (bytes, bytearray)):
        return image
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size}".encode() + image.tobytes()
    if isinstance(image, (str, Path)) and len(str(image)) < 1000 and Path(image).is_file():
        return Path(image).read_bytes()
    return repr(image).encode()
