# SPDX-License-Identifier: Apache-2.0
"""Folders of checkpoints: found on disk or on the Hub, and written so that none is ever half there."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError


TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("vocab.*", "merges.txt"),
)
# What an earlier checkpoint leaves behind that would be read together with a new one.
REPLACED_FILES = ("*.safetensors", "*.safetensors.index.json", "generation_config.json", *TOKENIZER_FILES)


def local_folder(name_or_path: str | Path, patterns: Sequence[str]) -> Path:
    """The folder of a checkpoint: as it is, or downloaded from the Hub.

    Args:
        name_or_path (`str` or `Path`): A folder, or the name of a repository on the Hub.
        patterns (`Sequence[str]`): Which files to download.

    Raises:
        ValueError: There is no such folder, and no such repository can be reached.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    if Path(name_or_path).exists():
        raise ValueError(f"{str(name_or_path)!r} is a file, but a folder is needed. Give the folder that it lies in.")
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=list(patterns)))
    except (HFValidationError, OSError) as error:
        raise ValueError(
            f"{str(name_or_path)!r} is no folder here, and could not be loaded from the Hub "
            f"({first_line(error)}). Give the path of a folder, or the name of a repository on the Hub."
        ) from error


@contextlib.contextmanager
def folder_written_whole(output_dir: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to write a checkpoint to, whose files are moved to `output_dir` when all of them are there.

    `config.json` moves last, so that a folder without all other files is no checkpoint to anybody who loads it. When
    writing fails or is interrupted, `output_dir` stays as it was.

    Args:
        output_dir (`str` or `Path`): Where the checkpoint is to lie; created with its parents.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a checkpoint that lies there. Files that are not
            a checkpoint's stay.

    Raises:
        ValueError: `output_dir` is a file, or is not empty and `overwrite` is `False`.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{str(output_dir)!r} is a file, but a checkpoint is a folder. Give another path.")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not overwrite:
        raise ValueError(
            f"The folder {str(output_dir)!r} is not empty, and a checkpoint that lies there would be lost. Give "
            "another folder, or set `overwrite=True`."
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output_dir.name}.incomplete-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=output_dir.parent) as temporary:
        yield Path(temporary)
        _move_files(Path(temporary), output_dir)


def _move_files(folder, output_dir):
    output_dir.mkdir(exist_ok=True)
    (output_dir / "config.json").unlink(missing_ok=True)
    for pattern in REPLACED_FILES:
        for path in output_dir.glob(pattern):
            if path.is_file():
                path.unlink()
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output_dir / path.name)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file under another name first, so that nobody ever finds half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def first_line(error: BaseException) -> str:
    """What an error says first, for a message of ours; the kind of an error that says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300].rstrip(".:")


def listed(items: Iterable[Any], num_listed: int = 10) -> str:
    """The first of some items for a message, and how many more there are."""
    items = [text if len(text) <= 160 else f"{text[:160]}..." for text in map(str, items)]
    rest = f" and {len(items) - num_listed:,} more" if len(items) > num_listed else ""
    return ", ".join(items[:num_listed]) + rest
