# SPDX-License-Identifier: Apache-2.0
"""Load the rows of a task: built-in, from local files, or from the Hub."""

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.lib
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from PIL import Image

from ...errors import format_list, summarize_error
from ..data_files import check_data_folder, find_file_ending, load_hub_dataset, read_data_file
from ..image_rows import IMAGE_COLUMNS, as_image_list, keep_images_encoded
from .tasks import EvaluationTask, Example


MAX_PATH_LENGTH = 1000  # longer texts are images in base64


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
    """Load the rows of a task as examples.

    Args:
        task_name (`str`): Name of the task in messages.
        task ([`EvaluationTask`]): The task.
        dataset_name (`str`, *optional*): A data file (see [`~encdec_slm.trainers.data_files.read_data_file`]), a
            folder of data files, or a data set on the Hub. `None` takes the rows of the task.
        dataset_config (`str`, *optional*): Configuration of the data set.
        dataset_revision (`str`, *optional*): Branch, tag or commit on the Hub.
        dataset_split (`str`, *optional*): Split of the data set. `None` takes that of the task, or the only split of
            a folder.
        columns (`Sequence[str]`, *optional*): Other names for the columns of the task.
        max_samples (`int`, *optional*): At most so many rows, drawn by `seed`. `None` takes all.
        seed (`int`, *optional*, defaults to 0): Draws rows, and generates images.

    Raises:
        ValueError: There are no such rows, or they lack a column.
        TypeError: A value is not text or an image.
    """
    if dataset_name is None and task.build is not None:
        rows = task.build(dataset_split or task.dataset_split, max_samples, seed)
    elif dataset_name is None and task.dataset_name is None:
        raise ValueError(
            f"The task {task_name!r} has no rows of its own. Set `dataset_name` to a data file, a folder, or a data "
            "set on the Hub."
        )
    elif dataset_name is not None and _is_file_name(dataset_name):
        rows = _load_file(Path(dataset_name))
    elif dataset_name is None:
        config, revision = dataset_config or task.dataset_config, dataset_revision or task.dataset_revision
        rows = _load_data_set(task, task.dataset_name, config, revision, dataset_split)
    else:
        rows = _load_data_set(task, dataset_name, dataset_config, dataset_revision, dataset_split)
    name = dataset_name or task_name
    if len(rows) == 0:
        raise ValueError(f"{name} has no rows, but at least one is required. Check the data.")
    return list(_build_examples(_draw(rows, max_samples, seed), task, columns, name))


def _is_file_name(name):
    """Return whether a name is that of a data file; a missing one is not looked for on the Hub."""
    path = Path(name)
    if not path.is_file() and path.suffix not in (".json", ".jsonl", ".csv", ".parquet", ".gz"):
        return False
    find_file_ending(path, "dataset_name")
    return True


def _load_file(path):
    """Read the rows of a file; paths of images are relative to it."""
    rows = list(read_data_file(path, "dataset_name"))
    for row in rows:
        for name in IMAGE_COLUMNS:
            if row.get(name) is not None:
                row[name] = [_resolve_path(cell, path.parent) for cell in as_image_list(row[name])]
    return rows


def _resolve_path(cell, folder):
    is_path = isinstance(cell, str) and len(cell) < MAX_PATH_LENGTH and (folder / cell).is_file()
    return str(folder / cell) if is_path else cell


def _load_data_set(task, name, config, revision, split):
    try:
        if Path(name).is_dir():
            return _load_folder(Path(name), config, split, task.dataset_split)
        return load_hub_dataset(name, config, revision=revision, split=split or task.dataset_split)
    except (OSError, ValueError, DatasetsError, pyarrow.lib.ArrowException) as error:
        check_data_folder(name)
        columns = ", ".join(names[0] for names in task.columns)
        raise ValueError(
            f"`dataset_name` {name!r} could not be loaded ({summarize_error(error)}). Without a network, give a local "
            f"data file or folder with the columns {columns}."
        ) from error


def _load_folder(folder, config, split, default_split):
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        splits = load_from_disk(folder)
    else:
        splits = load_dataset(str(folder), config)
    if isinstance(splits, Dataset):
        splits = DatasetDict({split or default_split: splits})
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if (wanted := split or default_split) not in splits:
        raise ValueError(f"it has the splits {format_list(splits)}, but not {wanted!r}: set `dataset_split`")
    return splits[wanted]


def _draw(rows, max_samples, seed):
    """Draw the rows that a training run with the same number and seed is measured on."""
    if max_samples is None or len(rows) <= max_samples:
        return rows
    if isinstance(rows, Dataset):
        return rows.shuffle(seed=seed).select(range(max_samples))
    order = Dataset.from_dict({"place": list(range(len(rows)))}).shuffle(seed=seed)
    return [rows[place] for place in order["place"][:max_samples]]


def _build_examples(rows, task, columns, name) -> Iterator[Example]:
    alternatives = task.columns if columns is None else [(name,) for name in columns]
    for number, row in enumerate(_iterate_lazily(rows), start=1):
        where = f"Row {number} of {name}"
        yield task.read([_find_value(row, names, task, where) for names in alternatives], where)


def _iterate_lazily(rows):
    """Yield rows whose images are read when they are called, because those of a data set may exceed the memory."""
    if not isinstance(rows, Dataset):
        yield from rows
        return
    names = [name for name in IMAGE_COLUMNS if name in rows.column_names]
    images = keep_images_encoded(rows.select_columns(names))
    for number, row in enumerate(rows.remove_columns(names)):
        yield {**row, **{name: functools.partial(_read_cell, images, number, name) for name in names}}


def _read_cell(images, number, name):
    return as_image_list(images[number][name])


def _find_value(row, names, task, where):
    for name in names:
        if name in row:
            return row[name]
    required = " or ".join(f"`{name}`" for name in names)
    advice = "set `source_column` and `target_column`" if task.columns_can_be_named else "rename a column"
    raise ValueError(f"{where} has the columns {format_list(row)}, but {required} is required. Add it, or {advice}.")


def compute_data_digest(examples: Sequence[Example]) -> str:
    """Return a digest of everything that the model reads or is compared with."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        row = [example.before, example.text, example.after, list(example.references)]
        digest.update(json.dumps(row).encode())
        for image in example.images():
            digest.update(_image_bytes(image))
    return digest.hexdigest()


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, (bytes, bytearray)):
        return image
    if isinstance(image, Image.Image):
        return f"{image.mode} {image.size}".encode() + image.tobytes()
    if isinstance(image, (str, Path)) and len(str(image)) < MAX_PATH_LENGTH and Path(image).is_file():
        return Path(image).read_bytes()
    return repr(image).encode()


__all__ = ["compute_data_digest", "load_examples"]
