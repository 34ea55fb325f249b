# SPDX-License-Identifier: Apache-2.0
"""Arguments that name a dataset, and its splits of `source` and `target` text."""

import logging
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError

from ..errors import format_list, summarize_error
from ..run_results import DataSource
from .data_files import check_columns, check_data_folder, check_text, load_data_file, load_hub_dataset
from .prompt_templates import load_prompt_template
from .tasks.docstrings import SPLITS, build_docstring_task
from .teacher_cache import TeacherCache


logger = logging.getLogger(__name__)

HELD_OUT_SHARE = 0.1
# Size of the buffer that streamed rows are shuffled in.
SHUFFLE_BUFFER_ROWS = 2000


@dataclass
class DatasetArguments:
    """Names of a dataset and its splits.

    Args:
        dataset_name (`str`, *optional*): A dataset on the Hub or a local folder, as `datasets.load_dataset` takes it.
        dataset_config (`str`, *optional*): Its configuration.
        dataset_revision (`str`, *optional*): Branch, tag or commit on the Hub.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): Split to train on.
        dataset_validation_split (`str`, *optional*, defaults to `"validation"`): Split for the loss curve; taken off
            the training rows if the dataset has none.
        dataset_test_split (`str`, *optional*, defaults to `"test"`): Split for the final numbers, likewise.
        max_eval_samples (`int`, *optional*, defaults to 200): Rows of each held-out split that are used.
    """

    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset or local folder of data files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_validation_split: str = field(default="validation", metadata={"help": "Split for the loss curve."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split for the final numbers."})
    max_eval_samples: int = field(default=200, metadata={"help": "Rows used of each held-out split."})

    def describe_source(self, name: str) -> DataSource:
        """Return where held-out rows come from; `name` is used if there is no `dataset_name`."""
        if self.dataset_name is None:
            return DataSource(name, split="test")
        return DataSource(self.dataset_name, self.dataset_config, self.dataset_test_split, self.dataset_revision)


@dataclass
class DataArguments(DatasetArguments):
    """Source of rows of `source` and `target` text: files, a dataset, or the docstring task.

    Args: those of [`DatasetArguments`], and
        train_file (`str`, *optional*): A JSON Lines, JSON, CSV or Parquet file; see
            [`~encdec_slm.trainers.data_files.read_data_file`]. `None`, without a `dataset_name`, builds the docstring
            task.
        validation_file (`str`, *optional*): Rows for the loss curve. `None` uses a tenth of the training rows.
        test_file (`str`, *optional*): Rows for the final numbers. `None` uses a tenth of the training rows.
        dataset_streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed, and store none.
            Requires `max_steps`.
        source_column (`str`, *optional*, defaults to `"source"`): Column that the encoder reads.
        target_column (`str`, *optional*, defaults to `"target"`): Column that the decoder learns to generate.

    Raises:
        ValueError: Both `train_file` and `dataset_name` are given.
    """

    train_file: str | None = field(default=None, metadata={"help": "JSON, CSV or Parquet file of training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "File of rows for the loss curve."})
    test_file: str | None = field(default=None, metadata={"help": "File of rows for the final numbers."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read rows as needed; set `max_steps`."})
    source_column: str = field(default="source", metadata={"help": "Column that the encoder reads."})
    target_column: str = field(default="target", metadata={"help": "Column that the decoder learns to generate."})

    def __post_init__(self):
        if self.train_file is not None and self.dataset_name is not None:
            raise ValueError(
                f"`train_file` is {self.train_file!r} and `dataset_name` is {self.dataset_name!r}, but rows come from "
                "one source. Set one of them."
            )

    @property
    def is_docstring_task(self) -> bool:
        """Whether rows are those of the built-in docstring task."""
        return self.train_file is None and self.dataset_name is None

    @property
    def data_files(self) -> list[str]:
        """The files that are given."""
        return [file for file in (self.train_file, self.validation_file, self.test_file) if file is not None]


def load_splits(
    args: DataArguments,
    seed: int = 0,
    teacher_prompt_template: str | None = None,
    teacher_cache: TeacherCache | None = None,
) -> dict[str, Dataset | IterableDataset]:
    """Load the splits `train`, `validation` and `test` with text columns `source` and `target`.

    Args:
        args ([`DataArguments`]): Names the data. Missing held-out splits are taken off the training rows; at most
            `max_eval_samples` rows of each are kept.
        seed (`int`, *optional*, defaults to 0): Draws the held-out rows, and shuffles streamed rows.
        teacher_prompt_template (`str`, *optional*): Template of an additional column, `teacher_prompt`; its fields are
            all columns of the data.
        teacher_cache ([`~encdec_slm.trainers.teacher_cache.TeacherCache`], *optional*): Labels of the training data,
            which become columns. Rows that are held out keep the targets of the data.

    Raises:
        ValueError: The data cannot be found or read, lacks a column or has no rows, the template has a field that
            is not a column, or the cache is of other data.
        TypeError: A `source` or `target` is not text.
    """
    columns = {"source": args.source_column, "target": args.target_column}
    if args.train_file is not None:
        splits = {
            split: load_data_file(file, columns, f"{split}_file", args.dataset_streaming, teacher_prompt_template)
            for split in SPLITS
            if (file := getattr(args, f"{split}_file")) is not None
        }
    elif args.dataset_name is not None:
        splits = load_named_splits(args, args.dataset_streaming)
        try:
            splits = {
                split: _select_text(dataset, columns, split, teacher_prompt_template)
                for split, dataset in splits.items()
            }
        except UnicodeDecodeError:  # its message names no file
            check_data_folder(args.dataset_name)
            raise
    else:
        splits = {
            split: _select_text(rows, {name: name for name in columns}, split, teacher_prompt_template)
            for split, rows in build_docstring_task().items()
        }
    for split, dataset in splits.items():
        if next(iter(dataset), None) is None:
            raise ValueError(f"The {split} split has no rows, but at least one is required. Check the data.")
    if teacher_cache is not None:
        splits = _attach_labels(splits, seed, teacher_cache)
    splits = hold_out_missing(splits, seed)
    for split in ("validation", "test"):
        splits[split] = limit_rows(splits[split], args.max_eval_samples, seed)
    if isinstance(splits["train"], IterableDataset):
        splits["train"] = splits["train"].shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_ROWS)
    return splits


def _attach_labels(splits, seed, teacher_cache):
    """Hold rows out, and add the labels to the other training rows."""
    columns = {"prompt_column": "source", "completion_column": "target"}
    if isinstance(splits["train"], Dataset):
        teacher_cache.attach(splits["train"], **columns)  # which checks all rows, those that are held out as well
        splits = {**splits, "train": splits["train"].add_column("row", list(range(len(splits["train"]))))}
        columns["row_column"] = "row"
    splits = hold_out_missing(splits, seed)
    train = teacher_cache.attach(splits["train"], **columns)
    held_out = {split: splits[split].select_columns(["source", "target"]) for split in ("validation", "test")}
    return {"train": train, **held_out}


def load_named_splits(args: DatasetArguments, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """Load a dataset of the Hub or a local folder of data files.

    Args:
        args ([`DatasetArguments`]): Names the dataset and its splits.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed.

    Returns:
        `dict`: The training split as `train` and, if the dataset has them, the others as `validation` and `test`.

    Raises:
        ValueError: The dataset cannot be loaded, or has no split that is named `args.dataset_train_split`.
    """
    try:
        loaded = load_hub_dataset(
            args.dataset_name, args.dataset_config, revision=args.dataset_revision, streaming=streaming
        )
    except (OSError, ValueError, DatasetsError) as error:
        check_data_folder(args.dataset_name)
        raise ValueError(
            f"`dataset_name` {args.dataset_name!r} could not be loaded ({summarize_error(error.__cause__ or error)}). "
            "Give the name of a dataset on the Hub or a local folder of data files."
        ) from error
    names = (args.dataset_train_split, args.dataset_validation_split, args.dataset_test_split)
    if names[0] not in loaded:
        raise ValueError(
            f"{args.dataset_name} has the splits {format_list(loaded)}, but `dataset_train_split` is {names[0]!r}. "
            "Set it to one of them."
        )
    return {split: loaded[name] for split, name in zip(SPLITS, names, strict=True) if name in loaded}


def _select_text(dataset, columns, split, template):
    """Rename columns of text, and check them before rows are shuffled, so that messages name the row of the split."""
    first_row = next(iter(dataset), None)
    if first_row is None:
        return dataset
    check_columns(first_row, columns, f"The {split} split")
    names = list(columns.values())
    if template is not None:
        render = load_prompt_template(template)
        dataset, names = dataset.map(lambda row: {"teacher_prompt": render(row)}), [*names, "teacher_prompt"]
    dataset = dataset.select_columns(names)
    dataset = dataset.rename_columns({column: name for name, column in columns.items() if column != name})

    def check(row, index):
        for name, column in columns.items():
            check_text(row[name], column, f"Row {index + 1} of the {split} split")
        return row

    if isinstance(dataset, IterableDataset):
        return dataset.map(check, with_indices=True)
    for index, row in enumerate(dataset):
        check(row, index)
    return dataset


def hold_out_missing(splits: dict[str, Dataset | IterableDataset], seed: int) -> dict[str, Dataset | IterableDataset]:
    """Take missing held-out splits off the training rows.

    Args:
        splits (`dict` of datasets): Has at least `train`.
        seed (`int`): Draws the held-out rows.

    Returns:
        `dict`: The splits `train`, `validation` and `test`.

    Raises:
        ValueError: A split is missing, and training rows are streamed or fewer than 2.
    """
    splits = dict(splits)
    for split in ("validation", "test"):
        if split in splits:
            continue
        num_rows = None if isinstance(splits["train"], IterableDataset) else len(splits["train"])
        if num_rows is None or num_rows < 2:
            raise ValueError(
                f"There is no {split} split, and {'streamed' if num_rows is None else num_rows} training rows cannot "
                "be split. Give data with such a split, or more rows."
            )
        num_held_out = max(1, round(HELD_OUT_SHARE * num_rows))
        parts = splits["train"].train_test_split(test_size=num_held_out, seed=seed)
        splits["train"], splits[split] = parts["train"], parts["test"]
        logger.info(f"The data has no {split} split: {num_held_out} of {num_rows} training rows are held out for it.")
    return splits


def limit_rows(dataset: Dataset | IterableDataset, max_rows: int, seed: int) -> Dataset:
    """Return at most `max_rows` rows: the first ones of a stream, otherwise rows drawn by `seed`."""
    if isinstance(dataset, IterableDataset):
        return Dataset.from_list(list(dataset.take(max_rows)))
    return dataset if len(dataset) <= max_rows else dataset.shuffle(seed=seed).select(range(max_rows))
