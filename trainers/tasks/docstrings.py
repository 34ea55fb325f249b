# SPDX-License-Identifier: Apache-2.0
"""The docstring task: summarize functions of Python's standard library, or of another folder, in one sentence."""

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
# Chosen from the numbers up to 2000 because it splits rows evenly: on Python 3.11 to 3.13, 12 % of the rows are test
# rows, and no module has more than a fifth of a held-out split.
SALT = "1780"
# Tests, and packages that are installed beside the standard library.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Old or pure-Python versions of other modules: held-out functions would be near-copies of training functions.
SKIPPED_MODULES = frozenset({"_pydatetime", "_pydecimal", "_pyio", "_strptime", "distutils", "lib2to3"})
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = FUNCTIONS | ast.ClassDef
MIN_TARGET_WORDS = 3
MAX_TARGET_CHARACTERS = 300


def build_docstring_task(folder: str | Path | None = None) -> DatasetDict:
    """Build rows of functions without their docstrings, and the first sentence of each docstring.

    The same folder gives the same rows in the same order on every machine. Each top-level module belongs to one split,
    so that no file with a held-out function is trained on.

    Args:
        folder (`str` or `Path`, *optional*): Folder of the top-level modules, defaults to the standard library of the
            running interpreter.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train`, `validation` and `test` (about 80, 10 and 10 % of the modules) with
        the text columns `source`, `target` and `name` (dotted path of the function).

    Raises:
        ValueError: A split is empty.
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
            f"{folder} has no functions with docstrings for the split(s) {', '.join(empty)}, but each split needs "
            "one. Install Python's standard library as `.py` files; some small images leave them out."
        )
    return DatasetDict({split: Dataset.from_list(rows[split]) for split in SPLITS})


def split_of(module: str) -> str:
    """Return the split of a top-level module, by a fixed hash of its name."""
    percentile = int(hashlib.sha256(f"{SALT}{module}".encode()).hexdigest(), 16) % 100
    return "test" if percentile < 10 else "validation" if percentile < 20 else "train"


def first_sentence(docstring: str) -> str:
    """Return the first sentence of a docstring's first paragraph, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    # A period in a name or an abbreviation ("os.path", "e.g. this") does not end a sentence.
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
    """Yield rows of `source`, `target` and `name` for the functions of a file with a usable docstring.

    Args:
        path (`Path`): Python file; yields nothing if it cannot be parsed.
        parts (`Iterable[str]`): Parts of its dotted name; `__init__` is skipped.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    tree = _parse(text)
    if tree is None:
        return
    lines = text.splitlines()
    prefix = ".".join(part for part in parts if part != "__init__")
    for qualified_name, function in _walk_functions(tree, prefix):
        target = first_sentence(ast.get_docstring(function) or "")
        if not _is_usable(target):
            continue
        source = _without_docstrings(function, lines)
        if source is not None and target not in source:
            yield {"source": source, "target": target, "name": qualified_name}


def _walk_functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            continue  # expressions contain no functions with docstrings
        name = f"{prefix}.{child.name}" if isinstance(child, DEFINITIONS) else prefix
        if isinstance(child, FUNCTIONS):
            yield name, child
        yield from _walk_functions(child, name)


def _without_docstrings(function: ast.AST, lines: list[str]) -> str | None:
    """Return the lines of a function without any docstring; `None` if the rest cannot be parsed."""
    removed = set()
    for node in ast.walk(function):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node, clean=False) is not None:
            removed.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    kept = [lines[number - 1] for number in range(first, function.end_lineno + 1) if number not in removed]
    source = textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))
    tree = _parse(source)
    return source if tree is not None and tree.body else None


def _is_usable(target: str) -> bool:
    num_words = len(re.findall(r"[A-Za-z]{2,}", target))
    looks_like_code = target.startswith((">>>", "@")) or "->" in target
    return num_words >= MIN_TARGET_WORDS and len(target) <= MAX_TARGET_CHARACTERS and not looks_like_code


def _parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in the strings of others
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return None
