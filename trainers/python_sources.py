# SPDX-License-Identifier: Apache-2.0
"""The docstring task on a wider body: the standard library, and installed packages whose licence is permissive.

python -m encdec_slm.trainers.python_sources OUTPUT_FOLDER
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

from tqdm.auto import tqdm

from .docstring_task import SKIPPED_FOLDERS, SPLITS, build_docstring_task, documented_functions
from .near_duplicates import NearDuplicates
from .run_reports import write_file


# Identifiers of SPDX. A distribution is read if all of what its licence names is here, or one of two alternatives.
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
# First lines of licence fields from before SPDX; whole lines, so that "MIT and GPL" is none of them.
STATEMENTS = {
    r"(the )?mit( license)?( \(mit\))?": "MIT",
    r"apache( software)?( license)?,?( version)?[ -]?2(\.0)?( license)?": "Apache-2.0",
    r"(new |modified )?bsd( license)?|bsd[ -]?[23][ -]clause( license)?|[23][ -]clause bsd( license)?": "BSD",
    r"psf(-2\.0|l)?|python software foundation license": "PSF-2.0",
    r"isc( license)?( \(iscl\))?": "ISC",
}
# Somebody else's code, under a licence that the distribution's metadata need not name; and code about tests.
VENDORED_FOLDERS = frozenset(
    (
        *("_vendor", "vendor", "vendored", "_vendored", "extern", "externals", "_external", "_extern"),
        *("third_party", "thirdparty", "_distutils"),
    )
)
HELD_OUT_PERCENT = 6
# A sentence of so many words that a held-out row has too is hardly there by chance.
NUM_TELLING_WORDS = 6
# More would teach one sentence for everything.
MAX_ROWS_PER_TARGET = 10
NO_SENTENCE = re.compile(
    r"(args|arguments|params?|parameters|returns?|raises|yields|examples?|notes?|todo|usage|deprecated)\s*[:-]|[:.\\|=<*-]",
    re.IGNORECASE,
)
# Filled in when the module is imported: what is written is no sentence yet.
PLACEHOLDER = re.compile(r"%\(\w+\)|\{\w*\}|%s")
STANDARD_LIBRARY = "Python standard library"
FILES = {**{split: f"{split}.jsonl" for split in SPLITS}, "held_out": "held_out_distributions.jsonl"}
PROVENANCE = "provenance.json"


def build_python_sources(output_dir: str | Path, site_packages: str | Path | None = None) -> dict[str, list[dict]]:
    """Writes rows of code and sentence, and what they come from, of what the running interpreter has.

    Rows of the standard library are those of [`~encdec_slm.trainers.docstring_task.build_docstring_task`], split as
    there: `validation.jsonl` and `test.jsonl` have no others. `train.jsonl` adds the installed distributions with a
    permissive licence, less those that a hash of their name keeps for `held_out_distributions.jsonl`. No training row
    is nearly a row of any other file or of its own, and none has a long sentence of a held-out row. The same
    installation gives the same files.

    Args:
        output_dir (`str` or `Path`): Created with its parents; files in it are replaced.
        site_packages (`str` or `Path`, *optional*): Where the distributions lie. `None` means those of the running
            interpreter.

    Returns:
        `dict`: What `provenance.json` holds: `read` and `skipped`, lists with `distribution`, `version` and
        `licence` of each, and its number of `functions` and its `file`, or the `reason`.

    Raises:
        ValueError: The standard library has no source files.
    """
    folder = Path(sysconfig.get_path("purelib") if site_packages is None else site_packages)
    task = build_docstring_task()
    read, skipped, sources = [], [], {}
    # What an interrupted installation leaves behind has no name.
    found = [distribution for distribution in distributions(path=[str(folder)]) if _name(distribution)]
    found.sort(key=lambda distribution: _name(distribution).lower())
    for distribution in tqdm(found, desc="Reading distributions"):
        licence, reason = licence_of(distribution)
        about = {"distribution": _name(distribution), "version": distribution.version, "licence": licence}
        if reason is None:
            sources[_name(distribution)] = list(_rows(distribution, folder))
            read.append(about)
        else:
            skipped.append({**about, "reason": reason})
    rows = _deduplicated(task, sources)
    library = {"distribution": STANDARD_LIBRARY, "version": python_version(), "licence": "PSF-2.0"}
    provenance = {"read": _counted([library, *read], rows), "skipped": skipped}
    _write(Path(output_dir), rows, provenance)
    return provenance


def _counted(read, rows):
    """What was read, with the number of functions of each in each file, where there are any."""
    counts = Counter((row["distribution"], file) for file, of_file in rows.items() for row in of_file)
    files = [(about, file) for about in read for file in rows]
    return [
        {**about, "functions": count, "file": file}
        for about, file in files
        if (count := counts[about["distribution"], file])
    ]


# Licences


def licence_of(distribution: Distribution) -> tuple[str | None, str | None]:
    """The licence that a distribution's metadata states, and why it is not read, which is `None` for one that is.

    Args:
        distribution ([`~importlib.metadata.Distribution`]): Its SPDX expression is believed first, then its
            classifiers, then the first line of its licence field.
    """
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return expression, None if is_permissive(expression) else "not only permissive licences"
    stated = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or () if c.startswith("License :: ")]
    if stated := [name for name in stated if name != "OSI Approved"]:
        known = [CLASSIFIERS.get(name) for name in stated]
        return (", ".join(known), None) if all(known) else (", ".join(stated), "not only permissive licences")
    line = next(iter((metadata.get("License") or "").strip().splitlines()), "").strip()
    if is_permissive(line):
        return line, None
    for pattern, licence in STATEMENTS.items():
        if re.fullmatch(pattern, line.lower()):
            return licence, None
    return line[:80] or None, "not on the list" if line else "no licence is stated"


def is_permissive(expression: str) -> bool:
    """Whether all licences of an SPDX expression are permissive, or one of its alternatives is.

    An expression that mixes `AND` and `OR` is taken as if it demanded all of them.
    """
    names = [part.strip(" ()").split(" WITH ")[0] for part in re.split(r"\s+(?:AND|OR)\s+", expression)]
    only_alternatives = " AND " not in expression
    return (any if only_alternatives else all)(name in PERMISSIVE for name in names)


def split_of_distribution(name: str) -> str:
    """`held_out` or `train`: a fixed hash of the name, the same in every process."""
    percentile = int(sha256(name.lower().encode()).hexdigest(), 16) % 100
    return "held_out" if percentile < HELD_OUT_PERCENT else "train"


# Rows


def _name(distribution):
    return distribution.metadata["Name"]


def _rows(distribution: Distribution, folder: Path) -> Iterator[dict[str, str]]:
    """Rows of the distribution's own files in `folder`, in the order of their paths."""
    for file in sorted(distribution.files or (), key=str):
        if file.suffix != ".py" or ".." in file.parts or {*SKIPPED_FOLDERS, *VENDORED_FOLDERS} & {*file.parts}:
            continue
        path = folder / file
        if path.is_file():
            for row in documented_functions(path, file.with_suffix("").parts):
                if not NO_SENTENCE.match(row["target"]) and not PLACEHOLDER.search(row["target"]):
                    yield {**row, "distribution": _name(distribution)}


def _deduplicated(task, sources) -> dict[str, list[dict[str, str]]]:
    """Rows of each file. Held-out rows of the library stay all; of any other near duplicates the first is kept."""
    seen = NearDuplicates()
    of_library = {split: [{**row, "distribution": STANDARD_LIBRARY} for row in task[split]] for split in SPLITS}
    known = of_library["validation"] + of_library["test"]
    for row in known:
        seen.add_if_new(row["source"])
    of_split = {"train": of_library["train"], "held_out": []}
    for name, rows in sources.items():
        of_split[split_of_distribution(name)] += rows
    held_out = [row for row in of_split["held_out"] if seen.add_if_new(row["source"])]
    sentences = {_words(row["target"]) for row in known + held_out}
    telling = {words for words in sentences if len(words) >= NUM_TELLING_WORDS}
    train, num_of_target = [], Counter()
    for row in of_split["train"]:
        words = _words(row["target"])
        if words in telling or num_of_target[words] >= MAX_ROWS_PER_TARGET or not seen.add_if_new(row["source"]):
            continue
        num_of_target[words] += 1
        train.append(row)
    return {FILES[name]: rows for name, rows in {**of_library, "train": train, "held_out": held_out}.items()}


def _words(text):
    return tuple(re.findall(r"[a-z0-9]+", text.lower()))


# Files


def _write(output_dir, rows: dict[str, Iterable[dict]], provenance):
    output_dir.mkdir(parents=True, exist_ok=True)
    for name, of_file in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_file)
        write_file(output_dir / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))
    text = json.dumps(provenance, indent=1, ensure_ascii=False) + "\n"
    write_file(output_dir / PROVENANCE, lambda path: path.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for entry in build_python_sources(sys.argv[1])["read"]:
        about = f"{entry['distribution']} {entry['version']} ({entry['licence']})"
        print(f"{entry['functions']:6,} functions in {entry['file']} from {about}")
