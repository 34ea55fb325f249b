# SPDX-License-Identifier: Apache-2.0
"""Read rows from JSON Lines, JSON, CSV and Parquet files, and name the file, row and column of what is wrong.

Text is read by the standard library because the readers of datasets 5.2 change values: dates in JSON become
`datetime`, columns of mixed types in a JSON list become JSON text, half of a surrogate pair disappears, and "007" in
CSV becomes 7.
"""

import csv
import gzip
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset

from ..checkpoints import check_hub_name
from ..errors import format_list, summarize_error
from .prompt_templates import load_prompt_template


FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")
PARQUET_BATCH_ROWS = 100  # rows may hold images
csv.field_size_limit(2**31 - 1)  # characters per cell; 131,072 by default


def load_data_file(
    path: str | Path,
    columns: Mapping[str, str],
    argument: str = "path",
    streaming: bool = False,
    teacher_prompt_template: str | None = None,
) -> Dataset | IterableDataset:
    """Load text columns of a data file.

    Rows are kept in memory and never cached on disk, so that an edited file is read anew.

    Args:
        path (`str` or `Path`): See [`read_data_file`].
        columns (`Mapping[str, str]`): Name in the file of each column, such as `{"source": "article"}`.
        argument (`str`, *optional*): Name of `path` in messages.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed.
        teacher_prompt_template (`str`, *optional*): Template of an additional column, `teacher_prompt`; see
            [`~encdec_slm.trainers.prompt_templates.load_prompt_template`].

    Raises:
        ValueError: The file cannot be read, or lacks a column. Rows of a stream are checked when they are read.
        TypeError: A value is not text. The message names the row and the column.
    """
    find_file_ending(path, argument)
    options = {"path": str(path), "columns": dict(columns), "argument": argument, "template": teacher_prompt_template}
    if streaming:
        return IterableDataset.from_generator(_read_text_columns, gen_kwargs=options)
    return Dataset.from_list(list(_read_text_columns(**options)))


def _read_text_columns(path, columns, argument, template):
    render = None if template is None else load_prompt_template(template)
    for number, row in enumerate(read_data_file(path, argument), start=1):
        where = f"Row {number} of {path}"
        check_columns(row, columns, where)
        for column in columns.values():
            check_text(row[column], column, where)
        texts = {name: row[column] for name, column in columns.items()}
        yield texts if render is None else {**texts, "teacher_prompt": render(row)}


def load_hub_dataset(
    name: str, config: str | None = None, *, revision: str | None = None, **options: Any
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Load a data set of the Hub or a local folder of data files; an unreachable Hub is asked once.

    Args:
        name (`str`): As [`~datasets.load_dataset`] takes it.
        config (`str`, *optional*): Configuration of the data set.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        options: Passed to [`~datasets.load_dataset`].

    Raises:
        ValueError: The Hub refuses the name.
    """
    is_offline = datasets.config.HF_HUB_OFFLINE
    if not Path(name).exists() and not check_hub_name(name, revision, repo_type="dataset"):
        datasets.config.HF_HUB_OFFLINE = True  # use the cache
    try:
        return load_dataset(name, config, revision=revision, **options)
    finally:
        datasets.config.HF_HUB_OFFLINE = is_offline


def read_data_file(path: str | Path, argument: str = "path") -> Iterator[dict[str, Any]]:
    """Yield the rows of a data file in their order.

    Args:
        path (`str` or `Path`): A file that ends in `.jsonl`, `.json` (lines, a list of objects, or an object whose
            `data` is such a list), `.csv` or `.parquet`; `.gz` may follow. Text is UTF-8, with or without a byte order
            mark. All values of a CSV file are text, and empty cells are `None`. Images are left undecoded.
        argument (`str`, *optional*): Name of `path` in messages.

    Raises:
        ValueError: There is no such file, or it cannot be read. The message names the line or row.
    """
    ending = find_file_ending(path, argument)
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        with (gzip.open if Path(path).suffix == ".gz" else open)(path, "rb") as file:
            yield from readers[ending](file)
    except Exception as error:  # of pyarrow, csv, gzip and the operating system
        raise ValueError(f"`{argument}` {str(path)!r} could not be read: {summarize_error(error)}.") from error


def find_file_ending(path: str | Path, argument: str = "path") -> str:
    """Return the ending of an existing data file, without `.gz`.

    Raises:
        ValueError: There is no such file, or its name has another ending.
    """
    path = Path(path)
    ending = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if ending not in FILE_ENDINGS:
        raise ValueError(
            f"`{argument}` is {str(path)!r}, but data files end in {format_list(FILE_ENDINGS)}, and optionally in "
            ".gz. Rename or convert it."
        )
    if not path.is_file():
        raise ValueError(f"`{argument}` is {str(path)!r}, but there is no such file. Check the path.")
    return ending


def _read_parquet(file):
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(PARQUET_BATCH_ROWS):
        yield from batch.to_pylist()


def _decode_lines(file):
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} is not UTF-8 ({error.reason}). Save the file as UTF-8") from None


def _read_csv(file):
    reader = csv.reader(_decode_lines(file), strict=True)
    header = next(reader, [])
    for cells in reader:
        if len(cells) > len(header):
            raise ValueError(f"line {reader.line_num} has {len(cells)} cells, but the header has {len(header)}")
        if cells:
            yield {name: cell or None for name, cell in itertools.zip_longest(header, cells)}


def _read_json_lines(file):
    for number, line in enumerate(_decode_lines(file), start=1):
        if number == 1 and line.lstrip().startswith("["):
            file.seek(0)
            yield from _read_json(file)
            return
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON ({error.msg})") from None
            yield _check_row(row, line, f"line {number}")


def _read_json(file):
    text = "".join(_decode_lines(file))
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or text.lstrip().startswith("["):
            raise ValueError(f"line {error.lineno} is not JSON ({error.msg})") from None
        file.seek(0)  # these are JSON Lines
        yield from _read_json_lines(file)
        return
    rows = content.get("data", content) if isinstance(content, dict) else content
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        yield _check_row(row, text, f"row {number}")


def _check_row(row, text, where):
    if not isinstance(row, dict):
        raise ValueError(f"{where} is of type {type(row).__name__}, but each row must be a JSON object")
    if "\\u" in text:
        for column, value in row.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(f"{where} has half of a surrogate pair in `{column}`: {value!a:.80}") from None
    return row


def check_data_folder(folder: str | Path) -> None:
    """Check the data files in a folder that datasets could not load, whose message does not name the file or the row.

    Does nothing if there is no such folder.

    Raises:
        ValueError: A file cannot be read.
    """
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name.removesuffix(".gz").endswith(FILE_ENDINGS):
            for _ in read_data_file(path, "dataset_name"):
                pass


def check_columns(found: Iterable[str], columns: Mapping[str, str], where: str) -> None:
    """Check that rows have some columns.

    Args:
        found (`Iterable[str]`): The columns that there are.
        columns (`Mapping[str, str]`): Required columns; the option `source_column` names the column `"source"`.
        where (`str`): File or split, for messages.

    Raises:
        ValueError: A column is missing.
    """
    for name, column in columns.items():
        if column not in found:
            raise ValueError(
                f"{where} has the columns {format_list(found)}, but not `{column}`. Set `{name}_column` to one of "
                "them."
            )


def check_text(value: Any, column: str, where: str) -> None:
    """Check that a value of a row is text.

    Raises:
        TypeError: It is not.
    """
    if value is None:
        raise TypeError(
            f"{where} has no `{column}` (null or an empty cell), but text is required. Fill or remove the row."
        )
    if not isinstance(value, str):
        raise TypeError(
            f"{where} has a `{column}` of type {type(value).__name__} ({value!r:.80}), but text is required. Convert "
            "it to text or remove the row."
        )


__all__ = [
    *("check_columns", "check_data_folder", "check_text", "find_file_ending"),
    *("load_data_file", "load_hub_dataset", "read_data_file"),
]
