# SPDX-License-Identifier: Apache-2.0
"""Rows of `source` and `target` text for encoder-decoder training: loaded, checked and turned into token ids."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import format_list, summarize_error
from .data_files import check_columns, check_data_folder, check_text, load_data_file
from .tasks.docstrings import SPLITS, build_docstring_task


logger = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
HELD_OUT_SHARE = 0.1
TOKENIZER_ROWS = 20_000
# Streamed rows are shuffled within a window of this many.
SHUFFLE_BUFFER_ROWS = 2000


@dataclass
class DataArguments:
    """Where rows of `source` and `target` text come from.

    Args:
        train_file (`str`, *optional*): A JSON Lines, JSON, CSV or Parquet file; see
            [`~encdec_slm.trainers.data_files.read_data_file`]. `None`, without a `dataset_name`, builds the docstring
            task.
        validation_file (`str`, *optional*): Rows for the loss curve. `None` holds out a tenth of the training rows.
        test_file (`str`, *optional*): Rows for the final numbers. `None` holds out a tenth of the training rows.
        dataset_name (`str`, *optional*): A dataset of the Hub or a local folder, as `datasets.load_dataset` takes it.
        dataset_config (`str`, *optional*): Its configuration.
        dataset_revision (`str`, *optional*): Its branch, tag or commit on the Hub.
        dataset_streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed and store none. Needs
            `max_steps`.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): Name of a split of `dataset_name`.
        dataset_validation_split (`str`, *optional*, defaults to `"validation"`): Held out of training if missing.
        dataset_test_split (`str`, *optional*, defaults to `"test"`): Held out of training if missing.
        source_column (`str`, *optional*, defaults to `"source"`): Column that the encoder reads.
        target_column (`str`, *optional*, defaults to `"target"`): Column that the decoder learns to write.
        max_eval_samples (`int`, *optional*, defaults to 200): Rows of each held-out split that are used.

    Raises:
        ValueError: Two sources of data are named.
    """

    train_file: str | None = field(default=None, metadata={"help": "JSON, CSV or Parquet file of training rows."})
    validation_file: str | None = field(default=None, metadata={"help": "File of rows for the loss curve."})
    test_file: str | None = field(default=None, metadata={"help": "File of rows for the final numbers."})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub dataset or local folder of data files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the dataset."})
    dataset_streaming: bool = field(default=False, metadata={"help": "Read rows as needed; set `max_steps`."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_validation_split: str = field(default="validation", metadata={"help": "Split for the loss curve."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split for the final numbers."})
    source_column: str = field(default="source", metadata={"help": "Column that the encoder reads."})
    target_column: str = field(default="target", metadata={"help": "Column that the decoder learns to write."})
    max_eval_samples: int = field(default=200, metadata={"help": "Rows used of each held-out split."})

    def __post_init__(self):
        if self.train_file is not None and self.dataset_name is not None:
            raise ValueError(
                f"`train_file` is {self.train_file!r} and `dataset_name` is {self.dataset_name!r}, but rows come from "
                "one place. Leave one of them out."
            )


def load_splits(args: DataArguments, seed: int = 0) -> dict[str, Dataset | IterableDataset]:
    """Load the splits `train`, `validation` and `test` with text columns `source` and `target`.

    Args:
        args ([`DataArguments`]): Names the data. Missing held-out splits are taken off the training rows; at most
            `max_eval_samples` rows of each are kept.
        seed (`int`, *optional*, defaults to 0): Draws the held-out rows, and shuffles streamed rows.

    Raises:
        ValueError: The data cannot be found or read, lacks a column or has no rows.
        TypeError: A `source` or `target` is not text.
    """
    columns = {"source": args.source_column, "target": args.target_column}
    if args.train_file is not None:
        splits = {
            split: load_data_file(file, columns, f"{split}_file", args.dataset_streaming)
            for split in SPLITS
            if (file := getattr(args, f"{split}_file")) is not None
        }
    elif args.dataset_name is not None:
        splits = load_named_splits(args, args.dataset_streaming)
        try:
            splits = {split: _select_text(dataset, columns, split) for split, dataset in splits.items()}
        except UnicodeDecodeError:  # its message names no file
            check_data_folder(args.dataset_name)
            raise
    else:
        splits = {split: rows.select_columns(list(columns)) for split, rows in build_docstring_task().items()}
    for split, dataset in splits.items():
        if next(iter(dataset), None) is None:
            raise ValueError(f"The {split} split has no rows, but at least one is required. Check the data.")
    splits = hold_out_missing(splits, seed)
    for split in ("validation", "test"):
        splits[split] = bounded(splits[split], args.max_eval_samples, seed)
    if isinstance(splits["train"], IterableDataset):
        splits["train"] = splits["train"].shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER_ROWS)
    return splits


def load_named_splits(args: Any, streaming: bool = False) -> dict[str, Dataset | IterableDataset]:
    """Load a dataset of the Hub or a local folder of data files.

    Args:
        args ([`DataArguments`] or [`~encdec_slm.trainers.vqa.VqaArguments`]): Its `dataset_*` fields are read.
        streaming (`bool`, *optional*, defaults to `False`): Read rows as they are needed.

    Returns:
        `dict`: The training split as `train` and, if the dataset has them, the others as `validation` and `test`.

    Raises:
        ValueError: The dataset cannot be loaded, or has no split that is named `args.dataset_train_split`.
    """
    try:
        loaded = load_dataset(
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


def _select_text(dataset, columns, split):
    """Rename columns of text, and check them before rows are shuffled, so that messages name the row of the split."""
    first_row = next(iter(dataset), None)
    if first_row is None:
        return dataset
    check_columns(first_row, columns, f"The {split} split")
    dataset = dataset.select_columns(list(columns.values()))
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
    """The splits `train`, `validation` and `test`, of which those that are missing are taken off the training rows.

    Args:
        splits (`dict` of datasets): With `train` at least.
        seed (`int`): Decides which rows are held out.

    Raises:
        ValueError: Training rows are streamed, or fewer than 2.
    """
    splits = dict(splits)
    for split in ("validation", "test"):
        if split in splits:
            continue
        num_rows = None if isinstance(splits["train"], IterableDataset) else len(splits["train"])
        if num_rows is None or num_rows < 2:
            raise ValueError(
                f"There is no {split} split, and {'streamed' if num_rows is None else num_rows} training rows cannot "
                "be divided. Name data that has such a split, or more rows."
            )
        num_held_out = max(1, round(HELD_OUT_SHARE * num_rows))
        parts = splits["train"].train_test_split(test_size=num_held_out, seed=seed)
        splits["train"], splits[split] = parts["train"], parts["test"]
        logger.info(f"No {split} split was given: {num_held_out} of {num_rows} training rows are held out for it.")
    return splits


def bounded(dataset: Dataset | IterableDataset, max_rows: int, seed: int) -> Dataset:
    """At most `max_rows` rows: of a stream the first ones, else those that `seed` draws."""
    if isinstance(dataset, IterableDataset):
        return Dataset.from_list(list(dataset.take(max_rows)))
    return dataset if len(dataset) <= max_rows else dataset.shuffle(seed=seed).select(range(max_rows))


def train_tokenizer(texts: Iterable[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that ends every text in `</s>`, saved and loaded like any other.

    Args:
        texts (`Iterable[str]`): What merges are learnt from; training rows only.
        vocab_size (`int`): Upper bound of the vocabulary, with `<pad>` 0, `<s>` 1 (which starts every target), `</s>`
            2 and the 256 bytes. Texts that are few or short give fewer entries.
        model_max_length (`int`): Source length in tokens that the model is trained for, with `</s>`.

    Raises:
        ValueError: `vocab_size` leaves no room for the special tokens and the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"`vocab_size` is {vocab_size}, but {len(SPECIAL_TOKENS)} special tokens and {len(alphabet)} bytes need "
            f"{smallest}. Set it to at least that; 4096 suits a small corpus."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = SPECIAL_TOKENS
    # As in T5, encoder input and target both end in </s>; the tokenizer file says so, in whatever process reads it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )


def first_texts(dataset: Dataset | IterableDataset, num_rows: int = TOKENIZER_ROWS) -> Iterator[str]:
    """Sources and targets of the first `num_rows` rows, in turn: enough to learn a tokenizer from."""
    for row in itertools.islice(dataset, num_rows):
        yield from (row["source"], row["target"])


def tokenize_splits(
    splits: dict[str, Dataset | IterableDataset] | DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    max_source_length: int,
    max_target_length: int,
    decoder_start_token_id: int | None = None,
) -> tuple[dict[str, Dataset | IterableDataset], dict[str, Counter]]:
    """Token ids of all splits, and how many rows were cut.

    Args:
        splits (`dict` of datasets): With string columns `source` and `target`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A fast tokenizer with an end-of-text token.
        max_source_length (`int`): Longest `input_ids`, in tokens.
        max_target_length (`int`): Longest `labels`, in tokens with the end-of-text token, which each of them ends in.
        decoder_start_token_id (`int`, *optional*): Of the model. Labels leave it out where the tokenizer begins its
            texts with it: the decoder is given this token, and has not to write it.

    Returns:
        `tuple`: Datasets with `input_ids`, `attention_mask` and `labels`; and per split a `Counter` of `rows`,
        `source` and `target` (rows of which this was cut). A streamed split is counted while it is read.
    """
    tokenized, counts = {}, {split: Counter() for split in splits}
    for split, dataset in splits.items():

        def encode(batch, split=split):
            sources, num_cut_sources = _truncated(tokenizer, batch["source"], max_source_length)
            labels, num_cut_targets = _labels(tokenizer, batch["target"], max_target_length, decoder_start_token_id)
            counts[split].update(rows=len(labels), source=num_cut_sources, target=num_cut_targets)
            return {"input_ids": sources, "attention_mask": [[1] * len(ids) for ids in sources], "labels": labels}

        options = {"batched": True, "remove_columns": ["source", "target"]}
        if not isinstance(dataset, IterableDataset):
            # Rows read from a cache would not be counted.
            options |= {"desc": f"Tokenizing {split}", "load_from_cache_file": False}
        tokenized[split] = dataset.map(encode, **options)
        if not isinstance(dataset, IterableDataset):
            log_cut_rows(split, counts[split], max_source_length, max_target_length)
    return tokenized, counts


def _labels(tokenizer, texts, max_length, decoder_start_token_id):
    """Ids of each target, which end in the end-of-text token, and how many targets were cut."""
    labels, num_cut = _truncated(tokenizer, texts, max_length)
    return [target_ids(ids, tokenizer.eos_token_id, max_length, decoder_start_token_id) for ids in labels], num_cut


def target_ids(ids: list[int], eos_token_id: int, max_length: int, decoder_start_token_id: int | None) -> list[int]:
    """The tokens that a decoder is to write, from those of a tokenizer.

    Args:
        ids (`list[int]`): At most `max_length` of them.
        eos_token_id (`int`): What the result ends in.
        max_length (`int`): Of the result.
        decoder_start_token_id (`int`, *optional*): Of the model, which is given it and has not to write it.
    """
    # Llama's tokenizers put the token in front that starts every target.
    ids = ids[1:] if ids[:1] == [decoder_start_token_id] else ids
    # Not every tokenizer ends a text by itself, and a model that is never taught to stop never does.
    return ids if ids[-1:] == [eos_token_id] else [*ids[: max_length - 1], eos_token_id]


def _truncated(tokenizer, texts, max_length):
    """Ids of each text, at most `max_length` of them, and of how many texts there were more."""
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_overflowing_tokens=True)
    pieces_per_text = Counter(encoded["overflow_to_sample_mapping"])
    first_pieces = dict(reversed(list(zip(encoded["overflow_to_sample_mapping"], encoded["input_ids"], strict=True))))
    num_cut = sum(count > 1 for count in pieces_per_text.values())
    return [first_pieces[index] for index in range(len(texts))], num_cut


def log_cut_rows(split: str, counts: Counter, max_source_length: int, max_target_length: int) -> None:
    """Logs how many rows of a split were longer than the model is trained for."""
    logger.info(
        f"{split}: {counts['rows']:,} rows; {counts['source']:,} sources cut to {max_source_length} tokens, "
        f"{counts['target']:,} targets cut to {max_target_length}."
    )
