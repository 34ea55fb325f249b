# SPDX-License-Identifier: Apache-2.0
"""The synopsis task: the one-line synopsis of a Debian package, from its long description.

    python -m encdec_slm.trainers.tasks.synopses Packages Translation-en --output_dir outputs/synopses

writes the rows to train.jsonl, validation.jsonl and test.jsonl. apt keeps both files of a repository:
`Acquire::Languages=en` makes `apt-get update` fetch the long descriptions, and `/usr/lib/apt/apt-helper cat-file FILE`
decompresses a file of /var/lib/apt/lists. /var/lib/dpkg/status has the installed packages, with their descriptions.
"""

import argparse
import gzip
import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict

from ...checkpoints import write_file
from ...errors import format_list, summarize_error
from .docstrings import SPLITS, split_of


OPENERS = {".gz": gzip.open, ".xz": lzma.open}
MIN_DESCRIPTION_WORDS, MIN_SYNOPSIS_WORDS = 10, 2


def build_synopsis_task(files: Sequence[str | Path]) -> DatasetDict:
    """Build rows of long descriptions and synopses.

    Binary packages that are built from one source package belong to one split, and equal descriptions are kept once,
    so that no held-out description was seen in training.

    Args:
        files (`Sequence[str]` or `Sequence[Path]`): Files of a package index, plain or compressed by gzip or xz.
            Several files complete each other: `Packages` names the source packages, and `Translation-en` has the long
            descriptions.

    Returns:
        [`~datasets.DatasetDict`]: Splits `train`, `validation` and `test` (about 80, 10 and 10 % of the source
        packages) with the text columns `source`, `target` and `name`.

    Raises:
        ValueError: A file cannot be read, or a split is empty. The message names the file.
    """
    source_packages, descriptions = {}, {}
    for file in files:
        for stanza in _read_stanzas(Path(file)):
            name = stanza.get("Package", "")
            if "Source" in stanza:
                source_packages[name] = stanza["Source"].split()[0]
            synopsis, _, lines = (stanza.get("Description-en") or stanza.get("Description", "")).partition("\n")
            if len(lines.split()) >= MIN_DESCRIPTION_WORDS and len(synopsis.split()) >= MIN_SYNOPSIS_WORDS:
                descriptions.setdefault(_join_lines(lines), (synopsis.strip(), name))
    rows = {split: [] for split in SPLITS}
    for description, (synopsis, name) in descriptions.items():
        split = split_of(source_packages.get(name, name))
        rows[split].append({"source": description, "target": synopsis, "name": name})
    if empty := [split for split in SPLITS if not rows[split]]:
        raise ValueError(
            f"{format_list(map(str, files))} have {len(descriptions)} packages with a long description, and none for "
            f"the split(s) {', '.join(empty)}. Add the file Translation-en of the repository, which has the long ones."
        )
    return DatasetDict({split: Dataset.from_list(rows[split]) for split in SPLITS})


def _read_stanzas(file: Path) -> Iterator[dict[str, str]]:
    """Yield the fields of each package; continued lines keep their line ends and lose one space."""
    stanza, field = {}, ""
    try:
        with OPENERS.get(file.suffix, open)(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                if not line.strip():
                    yield stanza
                    stanza, field = {}, ""
                elif line[0] in " \t":
                    if field:
                        stanza[field] += "\n" + line[1:].rstrip()
                else:
                    field, _, value = line.partition(":")
                    stanza[field] = value.strip()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ValueError(
            f"{file} cannot be read ({summarize_error(error)}). Give a file of a Debian package index; decompress it "
            "if its name does not end in .gz or .xz."
        ) from error
    yield stanza


def _join_lines(lines):
    """Join the lines of each paragraph; a verbatim line, which begins with a space, begins a new one."""
    paragraphs = [[]]
    for line in lines.split("\n"):
        if line == "." or line.startswith(" "):
            paragraphs.append([])
        paragraphs[-1] += line.split() if line != "." else []
    return "\n".join(" ".join(words) for words in paragraphs if words)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the rows of each split to a file; see the top of this module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="Packages and Translation-en, or a file that has everything")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/synopses"))
    args = parser.parse_args(arguments)
    try:
        task = build_synopsis_task(args.files)
    except ValueError as error:
        parser.error(str(error))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in task.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(args.output_dir / f"{split}.jsonl", "".join(lines))
        print(f"{len(rows):,} {split} rows")


if __name__ == "__main__":
    main()
