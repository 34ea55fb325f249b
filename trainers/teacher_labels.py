# SPDX-License-Identifier: Apache-2.0
"""Label a data set once with a teacher: its completions, its distributions, or both, into a teacher cache."""

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetsError
from transformers import AutoTokenizer

from ..checkpoints import check_hub_name, check_no_adapter, find_checkpoint_folder
from ..errors import summarize_error
from ..vocabulary import tokenizer_fingerprint
from .causal_models import load_causal_model
from .data_files import load_hub_dataset, read_data_file
from .prompt_templates import load_prompt_template
from .row_encoding import RowEncoder
from .tasks.docstrings import build_docstring_task
from .teacher_cache import (
    CacheHeader,
    DistributionSpec,
    Example,
    TeacherCache,
    check_header,
    find_shards,
    read_header,
    read_shard,
    row_fingerprint,
    save_tokenizer,
    write_shard,
)
from .teacher_endpoint import OpenAIEngine
from .teacher_engines import CompletionSettings, CTranslate2Engine, TransformersEngine, VLLMEngine


logger = logging.getLogger(__name__)


@dataclass
class LabelSettings:
    """What to label.

    Args:
        distributions ([`DistributionSpec`], *optional*): Store the teacher's distributions of the targets.
        completions ([`CompletionSettings`], *optional*): Let the teacher generate the targets. `None` takes those of
            the data.
        max_target_length (`int`, *optional*): Longest target, in tokens of the teacher; longer ones are truncated.
        rows_per_shard (`int`, *optional*, defaults to 256): Rows that are lost if a run is killed.
        seed (`int`, *optional*, defaults to 0): Of everything that is drawn.

    Raises:
        ValueError: Neither distributions nor completions are asked for.
    """

    distributions: DistributionSpec | None = None
    completions: CompletionSettings | None = None
    max_target_length: int | None = None
    rows_per_shard: int = 256
    seed: int = 0

    def __post_init__(self):
        if self.distributions is None and self.completions is None:
            raise ValueError("Neither `distributions` nor `completions` is given. Set at least one of them.")
        if self.rows_per_shard < 1:
            raise ValueError(f"`rows_per_shard` must be at least 1, got {self.rows_per_shard}.")


def label_dataset(
    dataset: Dataset | IterableDataset,
    engine: Any,
    output_dir: str | Path,
    settings: LabelSettings,
    *,
    teacher: str,
    rows: tuple[int, int] | None = None,
    prompt_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> TeacherCache | None:
    """Label a data set and write the labels as shards of a teacher cache; resume a run that was stopped.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): With `prompt` (text or messages) and, unless
            completions are generated, `completion`. A `source`, if there is one, identifies the row instead of the
            prompt that was rendered from it.
        engine: Such as [`~encdec_slm.trainers.teacher_engines.TransformersEngine`].
        output_dir (`str` or `Path`): Folder of the cache. Shards that are there already are kept.
        settings ([`LabelSettings`]): What to label.
        teacher (`str`): Name of the teacher, for messages.
        rows (`tuple[int, int]`, *optional*): First row and the row after the last one, to divide the work between
            machines; the first must be a multiple of `rows_per_shard`. `None` labels all rows.
        prompt_template (`str`, *optional*): How prompts were rendered; labels of other templates are refused.
        chat_template_kwargs (`dict`, *optional*): Variables of the teacher's chat template.

    Returns:
        [`TeacherCache`]: `None` if only a range of rows was labeled, because others may be missing.

    Raises:
        ValueError: The folder holds the labels of another teacher or data set, a row is empty or too long for the
            teacher, or its predictions are not numbers.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            f"The output {str(folder)!r} is a file, but labels are written to a folder. Give another path."
        )
    header = build_header(engine, settings, teacher, [prompt_template, chat_template_kwargs or {}])
    done = {(start, stop): path for start, stop, path in find_shards(folder)}
    for path in done.values():
        check_header(read_header(path), header, path)
    labeler = _Labeler(engine, settings, header, chat_template_kwargs)
    first, last = rows or (0, None)
    if first % settings.rows_per_shard:
        raise ValueError(
            f"`rows` starts at {first}, but must start at a multiple of `rows_per_shard` ({settings.rows_per_shard})."
        )
    if isinstance(dataset, Dataset) and first >= len(dataset):
        raise ValueError(f"`rows` starts at {first}, but the data has {len(dataset)} rows, counted from 0.")
    started, num_rows, num_tokens = time.perf_counter(), 0, 0
    for start, batch in _batches(dataset, first, last, settings.rows_per_shard):
        span = (start, start + len(batch))
        if span in done:
            _check_labeled_rows(done[span], batch, start, settings)
            continue
        examples = labeler.label(batch, start)
        write_shard(folder, header, *span, examples)
        num_rows += len(batch)
        num_tokens += sum(len(example.target_ids or ()) for example in examples)
        seconds = time.perf_counter() - started
        speed = f", {num_tokens / seconds:.0f} target tokens/s" if num_tokens else ""
        logger.info(f"Labeled rows {start:,} to {span[1] - 1:,}: {num_rows / seconds:.1f} rows/s{speed}.")
    if engine.tokenizer is not None:
        save_tokenizer(engine.tokenizer, folder)
    return TeacherCache(folder) if rows is None else None


def build_header(engine, settings: LabelSettings, teacher: str, prompt_settings: Any = None) -> CacheHeader:
    """Build the header of the shards that a run writes; `prompt_settings` is what prompts depend on."""
    chat_template = getattr(engine.tokenizer, "chat_template", None)
    template = [chat_template, prompt_settings, settings.max_target_length, settings.seed]
    digest = hashlib.sha256(json.dumps(template, sort_keys=True, default=str).encode()).hexdigest()
    completions = settings.completions
    return CacheHeader(
        teacher=teacher,
        teacher_fingerprint=engine.fingerprint,
        tokenizer_fingerprint="" if engine.tokenizer is None else tokenizer_fingerprint(engine.tokenizer),
        template_fingerprint=digest[:32],
        vocab_size=engine.vocab_size,
        distributions=None if settings.distributions is None else str(settings.distributions),
        completions=None if completions is None else json.dumps(asdict(completions), sort_keys=True),
        rows_per_shard=settings.rows_per_shard,
    )


def _batches(dataset, first, last, size) -> Iterator[tuple[int, list[dict]]]:
    """Yield the first index and the rows of each shard."""
    if isinstance(dataset, IterableDataset):
        iterator = iter(dataset.skip(first))
        rows = itertools.islice(iterator, None if last is None else last - first)
    else:
        rows = (dataset[index] for index in range(first, len(dataset) if last is None else min(last, len(dataset))))
    for start in itertools.count(first, size):
        batch = list(itertools.islice(rows, size))
        if not batch:
            return
        yield start, batch


def _check_labeled_rows(path, batch, start, settings):
    table = read_shard(path)
    found = dict(zip(table["row"].to_pylist(), table["row_fingerprint"].to_pylist(), strict=True))
    for row, values in enumerate(batch, start=start):
        if found.get(row) != _fingerprint(values, settings):
            raise ValueError(
                f"Row {row} of the data is not the one that {path} has labels for: the data was changed since. Use "
                "another output folder, or delete the labels."
            )


def _fingerprint(row, settings):
    completion = None if settings.completions is not None else row.get("completion")
    return row_fingerprint(row.get("source", row["prompt"]), completion)


class _Labeler:
    """Labels the rows of one shard."""

    def __init__(self, engine, settings, header, chat_template_kwargs):
        self.engine, self.settings, self.header = engine, settings, header
        self.chat_template_kwargs = chat_template_kwargs
        self.encoder = RowEncoder(engine.tokenizer, max_target_length=settings.max_target_length)

    def label(self, rows: Sequence[dict], start: int) -> list[Example]:
        reads_text = getattr(self.engine, "reads_text", False)
        prompts = [self._check_prompt(row, index) if reads_text else self._encode_prompt(row, index)
                   for index, row in enumerate(rows, start=start)]  # fmt: skip
        if reads_text:
            return self._from_text(rows, prompts, start)
        if self.settings.completions is None:
            examples = [self._given(row, index) for index, row in enumerate(rows, start=start)]
        else:
            examples = self._generated(rows, prompts, start)
        if self.settings.distributions is not None:
            self._add_distributions(examples, prompts, start)
        return examples

    def _from_text(self, rows, prompts, start):
        """Label by an engine that reads text and returns distributions together with completions."""
        if self.settings.completions is None:
            raise ValueError("This engine cannot score given targets. Let it generate them: `completions`.")
        generated = self.engine.generate(
            prompts, self.settings.completions, seed=self.settings.seed, distributions=self.settings.distributions
        )
        examples = []
        for index, (row, completions) in enumerate(zip(rows, generated, strict=True), start=start):
            for sample, (text, _, ids, prediction) in enumerate(completions):
                stored = {} if prediction is None else prediction._asdict()
                examples.append(Example(index, _fingerprint(row, self.settings), ids, sample, text, **stored))
        return examples

    @staticmethod
    def _check_prompt(row, index):
        if "prompt" not in row:
            raise ValueError(f"Row {index} has the columns {', '.join(row)}, but `prompt` is required. Rename one.")
        if not row["prompt"]:
            raise ValueError(f"The prompt of row {index} is empty, but the teacher needs a text to continue.")
        return row["prompt"]

    def _encode_prompt(self, row, index):
        ids = self.encoder.encode_prompt(
            self._check_prompt(row, index),
            where=f"`prompt` of row {index}",
            chat_template_kwargs=self.chat_template_kwargs,
        ).input_ids
        limit, completions = self.engine.context_length, self.settings.completions
        num_new = completions.max_new_tokens if completions is not None else 1
        if limit is not None and len(ids) + num_new > limit:
            raise ValueError(
                f"The prompt of row {index} has {len(ids):,} tokens, but the teacher's context is {limit:,} tokens, "
                f"of which {num_new} are for the target. Shorten it, or leave the row out."
            )
        return ids

    def _given(self, row, index):
        if row.get("completion") is None:
            raise ValueError(
                f"Row {index} has no `completion`. Add it, or let the teacher generate it: `completions`."
            )
        ids, _ = self.encoder.encode_target(
            row["completion"], as_continuation=True, where=f"`completion` of row {index}"
        )
        return Example(index, _fingerprint(row, self.settings), ids)

    def _generated(self, rows, prompts, start):
        generated = self.engine.generate(prompts, self.settings.completions, seed=self.settings.seed + start)
        examples = []
        for index, (row, completions) in enumerate(zip(rows, generated, strict=True), start=start):
            for sample, completion in enumerate(completions):
                ids, _ = self.encoder.encode_target(completion.text, as_continuation=True)
                if not completion.is_complete:  # the student must not learn to stop where only the limit was reached
                    ids = [token_id for token_id in ids if token_id != self.engine.tokenizer.eos_token_id]
                ids = None if self.settings.distributions is None else ids
                examples.append(Example(index, _fingerprint(row, self.settings), ids, sample, completion.text))
        return examples

    def _add_distributions(self, examples, prompts, start):
        seeds = [(self.settings.seed << 40) + (example.row << 8) + example.sample for example in examples]
        predictions = self.engine.predict(
            [prompts[example.row - start] for example in examples],
            [example.target_ids for example in examples],
            self.settings.distributions,
            seeds,
        )
        for example, prediction in zip(examples, predictions, strict=True):
            example.ids, example.log_probs, example.counts = prediction


def load_label_rows(
    data: str,
    source_column: str,
    target_column: str | None,
    split: str = "train",
    prompt_template: str | None = None,
    chat: bool = False,
) -> Dataset:
    """Load the rows to label as `source`, `prompt` and, if they have a target, `completion`.

    Args:
        data (`str`): A data file, the name of a data set on the Hub, or `"docstrings"` for the training rows of the
            built-in task.
        source_column (`str`): Column with the prompt.
        target_column (`str`, *optional*): Column with the target; `None` if the teacher generates it.
        split (`str`, *optional*, defaults to `"train"`): Split of a data set on the Hub.
        prompt_template (`str`, *optional*): Template of the prompt; its fields are the columns.
        chat (`bool`, *optional*, defaults to `False`): Make the prompt a message of the user.

    Raises:
        ValueError: The data cannot be read, or lacks a column.
    """
    if data == "docstrings" and not Path(data).exists():
        dataset = build_docstring_task()["train"]
    elif Path(data).suffix and not Path(data).is_dir():
        dataset = Dataset.from_list(list(read_data_file(data, "data")))
    else:
        try:
            dataset = load_hub_dataset(data, split=split)
        except (OSError, ValueError, DatasetsError) as error:
            raise ValueError(f"The data set {data!r} could not be loaded ({summarize_error(error)}).") from error
    if len(dataset) == 0:
        raise ValueError(f"{data!r} has no rows.")
    for column in (source_column, target_column):
        if column is not None and column not in dataset.column_names:
            raise ValueError(f"{data!r} has the columns {', '.join(dataset.column_names)}, but not `{column}`.")
    render = None if prompt_template is None else load_prompt_template(prompt_template)

    def convert(row):
        prompt = row[source_column] if render is None else render(row)
        prompt = [{"role": "user", "content": prompt}] if chat else prompt
        target = {} if target_column is None else {"completion": row[target_column]}
        return {"source": row[source_column], "prompt": prompt, **target}

    return Dataset.from_list([convert(row) for row in dataset])


def build_engine(
    name: str,
    teacher: str,
    *,
    batch_tokens: int = 2048,
    dtype: str = "auto",
    tokenizer: str | None = None,
    base_url: str | None = None,
    requests_per_minute: float | None = None,
) -> Any:
    """Load a teacher into an engine.

    Args:
        name (`str`): `"transformers"`, `"ctranslate2"`, `"vllm"` or `"openai"`.
        teacher (`str`): Folder or name of the teacher.
        batch_tokens (`int`, *optional*): Most tokens of a batch.
        dtype (`str`, *optional*): Of the weights in transformers.
        tokenizer (`str`, *optional*): Folder or name of the tokenizer; the teacher's own by default.
        base_url (`str`, *optional*): Of an endpoint.
        requests_per_minute (`float`, *optional*): Rate limit of an endpoint.

    Raises:
        ValueError: The teacher cannot be loaded, or is not a causal language model.
    """
    if name == "openai":
        loaded = None if tokenizer is None else AutoTokenizer.from_pretrained(tokenizer)
        return OpenAIEngine(teacher, loaded, base_url, requests_per_minute=requests_per_minute)
    local_files_only = not Path(teacher).is_dir() and not check_hub_name(teacher)
    try:
        if name != "transformers":
            check_no_adapter(teacher, local_files_only=local_files_only)
        loaded = AutoTokenizer.from_pretrained(tokenizer or teacher, local_files_only=local_files_only)
        if name == "ctranslate2":
            return CTranslate2Engine(find_checkpoint_folder(teacher), loaded, batch_tokens)
        if name == "vllm":
            return VLLMEngine(teacher, loaded)
        model = load_causal_model(teacher, dtype=dtype, local_files_only=local_files_only)
    except (OSError, KeyError, ValueError) as error:
        reason = summarize_error(error).partition(" for this kind of AutoModel")[0]  # a list of all classes follows
        raise ValueError(
            f"The teacher {teacher!r} could not be loaded ({reason}). Give the folder or the name of a decoder-only "
            "model."
        ) from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return TransformersEngine(model.to(device), loaded, batch_tokens)
