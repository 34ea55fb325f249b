# SPDX-License-Identifier: Apache-2.0
"""Build rows of the docstring task from the standard library and from installed packages with a permissive license.

    python examples/python_sources.py OUTPUT_FOLDER

Used to train `checkpoints/docstring-writer`. Not supported: packages from elsewhere than this environment.
"""

import json
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from hashlib import sha256
from importlib.metadata import Distribution, distributions
from pathlib import Path
from platform import python_version

from near_duplicates import NearDuplicates
from tqdm.auto import tqdm

from encdec_slm.checkpoints import write_folder
from encdec_slm.trainers.tasks.docstrings import SKIPPED_FOLDERS, SPLITS, build_docstring_task, documented_functions


# SPDX identifiers. A distribution is read if all licenses of its expression, or one of its alternatives, are listed.
PERMISSIVE = frozenset(
    (
        *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC"),
        *("MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
    )
)
CLASSIFIERS = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "Historical Permission Notice and Disclaimer (HPND)": "HPND",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "MIT No Attribution License (MIT-0)": "MIT-0",
    "Python Software Foundation License": "PSF-2.0",
    "The Unlicense (Unlicense)": "Unlicense",
    "zlib/libpng License": "Zlib",
}
# First lines of license fields from before SPDX; matched as a whole, so that "MIT and GPL" does not match.
STATEMENTS = {
    r"(the )?mit( license)?( \(mit\))?": "MIT",
    r"apache( software)?( license)?,?( version)?[ -]?2(\.0)?( license)?": "Apache-2.0",
    r"(new |modified )?bsd( license)?|bsd[ -]?[23][ -]clause( license)?|[23][ -]clause bsd( license)?": "BSD",
    r"psf(-2\.0|l)?|python software foundation license": "PSF-2.0",
    r"isc( license)?( \(iscl\))?": "ISC",
}
# Code of others, whose license the metadata of the distribution may not name.
VENDORED_FOLDERS = frozenset(
    (
        *("_vendor", "vendor", "vendored", "_vendored", "extern", "externals", "_external", "_extern"),
        *("third_party", "thirdparty", "_distutils"),
    )
)
HELD_OUT_PERCENT = 6
# Sentences of at least this many words are removed from training if a held-out row has them.
MIN_LONG_SENTENCE_WORDS = 6
# More would teach the model one sentence for everything.
MAX_ROWS_PER_TARGET = 10
NO_SENTENCE = re.compile(
    r"(args|arguments|params?|parameters|returns?|raises|yields|examples?|notes?|todo|usage|deprecated)\s*[:-]|[:.\\|=<*-]",
    re.IGNORECASE,
)
# Completed when the module is imported, so not a sentence yet.
PLACEHOLDER = re.compile(r"%\(\w+\)|\{\w*\}|%s")
STANDARD_LIBRARY = "Python standard library"
FILES = {**{split: f"{split}.jsonl" for split in SPLITS}, "held_out": "held_out_distributions.jsonl"}
PROVENANCE = "provenance.json"


def build_python_sources(output_dir: str | Path, site_packages: str | Path | None = None) -> dict[str, list[dict]]:
    """Write files of rows and their provenance.

    `validation.jsonl` and `test.jsonl` have the rows of the docstring task. `train.jsonl` adds those of installed
    distributions with a permissive license, except a few, chosen by a hash of the name, that are written to
    `held_out_distributions.jsonl`. Training rows are no near duplicates of any other row, and share no long sentence
    with held-out rows. The same installation gives the same files.

    Args:
        output_dir (`str` or `Path`): Created with its parents; replaces an earlier output.
        site_packages (`str` or `Path`, *optional*): Folder of the distributions, defaults to that of the running
            interpreter.

    Returns:
        `dict`: The content of `provenance.json`: lists `read` and `skipped` with `distribution`, `version` and
        `license`, and the number of `functions` and the `file`, or the `reason`.

    Raises:
        ValueError: The standard library has no source files, or `output_dir` holds other files.
    """
    folder = Path(sysconfig.get_path("purelib") if site_packages is None else site_packages)
    task = build_docstring_task()
    read, skipped, sources = [], [], {}
    # Interrupted installations leave distributions without a name.
    found = [distribution for distribution in distributions(path=[str(folder)]) if _name(distribution)]
    found.sort(key=lambda distribution: _name(distribution).lower())
    for distribution in tqdm(found, desc="Reading distributions"):
        license, reason = find_license(distribution)
        about = {"distribution": _name(distribution), "version": distribution.version, "license": license}
        if reason is None:
            sources[_name(distribution)] = list(_rows(distribution, folder))
            read.append(about)
        else:
            skipped.append({**about, "reason": reason})
    rows = _deduplicated(task, sources)
    library = {"distribution": STANDARD_LIBRARY, "version": python_version(), "license": "PSF-2.0"}
    provenance = {"read": _counted([library, *read], rows), "skipped": skipped}
    _write(Path(output_dir), rows, provenance)
    return provenance


def _counted(read, rows):
    """Add the number of functions in each file to the distributions that were read."""
    counts = Counter((row["distribution"], file) for file, file_rows in rows.items() for row in file_rows)
    files = [(about, file) for about in read for file in rows]
    return [
        {**about, "functions": count, "file": file}
        for about, file in files
        if (count := counts[about["distribution"], file])
    ]


# Licenses


def find_license(distribution: Distribution) -> tuple[str | None, str | None]:
    """Return the license of a distribution, and the reason why it is not read, or `None` if it is.

    Args:
        distribution ([`~importlib.metadata.Distribution`]): Its SPDX expression is used first, then its classifiers,
            then the first line of its license field.
    """
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return expression, None if is_permissive(expression) else "not only permissive licenses"
    stated = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or () if c.startswith("License :: ")]
    if stated := [name for name in stated if name != "OSI Approved"]:
        known = [CLASSIFIERS.get(name) for name in stated]
        return (", ".join(known), None) if all(known) else (", ".join(stated), "not only permissive licenses")
    line = next(iter((metadata.get("License") or "").strip().splitlines()), "").strip()
    if is_permissive(line):
        return line, None
    for pattern, license in STATEMENTS.items():
        if re.fullmatch(pattern, line.lower()):
            return license, None
    return line[:80] or None, "not on the list" if line else "no license is stated"


def is_permissive(expression: str) -> bool:
    """Return whether all licenses of an SPDX expression, or one of its alternatives, are permissive.

    In an expression with `AND` and `OR`, all must be.
    """
    names = [part.strip(" ()").split(" WITH ")[0] for part in re.split(r"\s+(?:AND|OR)\s+", expression)]
    only_alternatives = " AND " not in expression
    return (any if only_alternatives else all)(name in PERMISSIVE for name in names)


def split_of_distribution(name: str) -> str:
    """Return `"held_out"` or `"train"`, by a fixed hash of the name."""
    percentile = int(sha256(name.lower().encode()).hexdigest(), 16) % 100
    return "held_out" if percentile < HELD_OUT_PERCENT else "train"


# Rows


def _name(distribution):
    return distribution.metadata["Name"]


def _rows(distribution: Distribution, folder: Path) -> Iterator[dict[str, str]]:
    """Yield rows of the distribution's own files in `folder`, in the order of their paths."""
    for file in sorted(distribution.files or (), key=str):
        if file.suffix != ".py" or ".." in file.parts or {*SKIPPED_FOLDERS, *VENDORED_FOLDERS} & {*file.parts}:
            continue
        path = folder / file
        if path.is_file():
            for row in documented_functions(path, file.with_suffix("").parts):
                if not NO_SENTENCE.match(row["target"]) and not PLACEHOLDER.search(row["target"]):
                    yield {**row, "distribution": _name(distribution)}


def _deduplicated(task, sources) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each file: all held-out rows of the library, and the first of other near duplicates."""
    seen = NearDuplicates()
    library_rows = {split: [{**row, "distribution": STANDARD_LIBRARY} for row in task[split]] for split in SPLITS}
    known = library_rows["validation"] + library_rows["test"]
    for row in known:
        seen.add_if_new(row["source"])
    split_rows = {"train": library_rows["train"], "held_out": []}
    for name, rows in sources.items():
        split_rows[split_of_distribution(name)] += rows
    held_out = [row for row in split_rows["held_out"] if seen.add_if_new(row["source"])]
    sentences = {_words(row["target"]) for row in known + held_out}
    long_sentences = {words for words in sentences if len(words) >= MIN_LONG_SENTENCE_WORDS}
    train, target_counts = [], Counter()
    for row in split_rows["train"]:
        words = _words(row["target"])
        is_kept = words not in long_sentences and target_counts[words] < MAX_ROWS_PER_TARGET
        if is_kept and seen.add_if_new(row["source"]):
            target_counts[words] += 1
            train.append(row)
    return {FILES[name]: rows for name, rows in {**library_rows, "train": train, "held_out": held_out}.items()}


def _words(text):
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


# Files


def _write(output_dir, rows: dict[str, Iterable[dict]], provenance):
    with write_folder(output_dir, overwrite=True, find_foreign_files=_find_foreign_files) as folder:
        for name, file_rows in rows.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in file_rows)
            (folder / name).write_text(text, encoding="utf-8")
        text = json.dumps(provenance, indent=1, ensure_ascii=False) + "\n"
        (folder / PROVENANCE).write_text(text, encoding="utf-8")


def _find_foreign_files(folder):
    names = {path.name for path in folder.iterdir()}
    return sorted(names - {*FILES.values(), PROVENANCE} if PROVENANCE in names else names)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for entry in build_python_sources(sys.argv[1])["read"]:
        about = f"{entry['distribution']} {entry['version']} ({entry['license']})"
        print(f"{entry['functions']:6,} functions in {entry['file']} from {about}")
