# SPDX-License-Identifier: Apache-2.0
"""Code in, one sentence out: a summarisation task built from the standard library of the running interpreter."""

import ast
import hashlib
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict


SPLITS = ("train", "validation", "test")
# Module names alone decide the split. Of the salts up to 2000 this one spreads rows evenly: on Python 3.11 to 3.13 the
# test split has 12 % of them, and no module holds more than a fifth of a held-out split.
SALT = "1780"
# Tests, and what pip or a distributor put beside the standard library.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Old or pure-Python twins of other modules: with them, held-out functions would be near-copies of training ones.
SKIPPED_MODULES = frozenset({"_pydatetime", "_pydecimal", "_pyio", "_strptime", "distutils", "lib2to3"})
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = FUNCTIONS | ast.ClassDef
MIN_TARGET_WORDS = 3
MAX_TARGET_CHARACTERS = 300


def build_docstring_task(folder: str | Path | None = None) -> DatasetDict:
    """The docstring task: functions without their docstrings, and the first sentence of each docstring.

    The same folder gives the same rows in the same order on every machine. A top-level module is in one split only,
    so no file with a held-out function is trained on.

    Args:
        folder (`str` or `Path`, *optional*): Where the top-level modules lie. `None` means the standard library of
            the running interpreter.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train`, `validation` and `test` (about 80, 10 and 10 % of the modules) with
        string columns `source`, `target` and `name` (dotted path of the function).

    Raises:
        ValueError: A split would be empty.
    """
    folder = Path(sysconfig.get_path("stdlib") if folder is None else folder)
    rows = {split: [] for split in SPLITS}
    seen = set()
    for row in _documented_functions(folder):
        key = "".join(row["source"].split())
        if key not in seen:
            seen.add(key)
            rows[split_of(row["name"].partition(".")[0])].append(row)
    if empty := [split for split in SPLITS if not rows[split]]:
        raise ValueError(
            f"{folder} has no documented functions for the split(s) {', '.join(empty)}, but each split needs one. "
            "Python's standard library must be installed as `.py` files; some small images leave them out."
        )
    return DatasetDict({split: Dataset.from_list(rows[split]) for split in SPLITS})


def split_of(module: str) -> str:
    """The split of a top-level module: a fixed hash of its name, the same in every process and Python version."""
    percentile = int(hashlib.sha256(f"{SALT}{module}".encode()).hexdigest(), 16) % 100
    return "test" if percentile < 10 else "validation" if percentile < 20 else "train"


def first_sentence(docstring: str) -> str:
    """The first sentence of a docstring's first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    # A period inside of a name or an abbreviation ("os.path", "e.g. this") does not end a sentence.
    return re.split(r"(?<=[^.]\.)\s+(?=[A-Z`'\"*])", paragraph, maxsplit=1)[0]


def _documented_functions(folder: Path) -> Iterator[dict[str, str]]:
    for path in _python_files(folder):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[0] not in SKIPPED_MODULES:
            yield from documented_functions(path, parts)


def _python_files(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.suffix == ".py":
            yield entry
        elif entry.is_dir() and entry.name not in SKIPPED_FOLDERS:
            yield from _python_files(entry)


def documented_functions(path: Path, parts: Iterable[str]) -> Iterator[dict[str, str]]:
    """Rows of `source`, `target` and `name` of the functions in a file whose docstring is worth learning.

    Args:
        path (`Path`): A Python file; one that does not parse gives no rows.
        parts (`Iterable[str]`): Those of its dotted name; `__init__` is left out.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    tree = _parse(text)
    if tree is None:
        return
    lines = text.splitlines()
    prefix = ".".join(part for part in parts if part != "__init__")
    for qualified_name, function in _walk_functions(tree, prefix):
        target = first_sentence(ast.get_docstring(function) or "")
        if not _is_worth_learning(target):
            continue
        source = _without_docstrings(function, lines)
        if source is not None and target not in source:
            yield {"source": source, "target": target, "name": qualified_name}


def _walk_functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            continue  # an expression holds no function that has a docstring
        name = f"{prefix}.{child.name}" if isinstance(child, DEFINITIONS) else prefix
        if isinstance(child, FUNCTIONS):
            yield name, child
        yield from _walk_functions(child, name)


def _without_docstrings(function: ast.AST, lines: list[str]) -> str | None:
    """The function's lines less every docstring in it; `None` where nothing that parses is left."""
    removed = set()
    for node in ast.walk(function):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
            removed.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    kept = [lines[number - 1] for number in range(first, function.end_lineno + 1) if number not in removed]
    source = textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))
    tree = _parse(source)
    return source if tree is not None and tree.body else None


def _is_worth_learning(target: str) -> bool:
    num_words = len(re.findall(r"[A-Za-z]{2,}", target))
    looks_like_code = target.startswith((">>>", "@")) or "->" in target
    return num_words >= MIN_TARGET_WORDS and len(target) <= MAX_TARGET_CHARACTERS and not looks_like_code


def _parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's strings
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None
