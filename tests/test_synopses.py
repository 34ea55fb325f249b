# SPDX-License-Identifier: Apache-2.0
"""Rows of the synopsis task."""

import gzip
import json

import pytest

from encdec_slm.trainers.tasks.synopses import build_synopsis_task, main


def write_index(folder, num_sources=60):
    """An index as apt keeps it: two binary packages per source package, with equal long descriptions in pairs."""
    packages, translations = [], []
    for number in range(num_sources):
        for suffix in ("", "-data"):
            source = f"Source: pkg{number} (1.0-1)\n" if suffix else ""
            packages.append(f"Package: pkg{number}{suffix}\n{source}Description: a tool number {number}\n")
            translations.append(
                f"Package: pkg{number}{suffix}\nDescription-md5: 0\nDescription-en: a tool number {number}{suffix}\n"
                f" This package has the tool number {number}{suffix},\n which does one thing very well.\n .\n Parts:\n"
                "  * first\n  * second\n"
            )
    packages_file, translation_file = folder / "Packages.gz", folder / "Translation-en"
    packages_file.write_bytes(gzip.compress("\n".join(packages).encode()))
    translation_file.write_text("\n".join([*translations, translations[0].replace("pkg0", "other")]))
    return packages_file, translation_file


def test_rows_are_descriptions_and_synopses_split_by_source_package(tmp_path):
    splits = build_synopsis_task(write_index(tmp_path))
    rows = {row["name"]: (split, row) for split in splits for row in splits[split]}
    assert len(rows) == sum(map(len, splits.values())) == 120  # a second package with the same text is left out
    text = "This package has the tool number 3-data, which does one thing very well.\nParts:\n* first\n* second"
    assert rows["pkg3-data"][1] == {"source": text, "target": "a tool number 3-data", "name": "pkg3-data"}
    assert all(rows[f"pkg{number}"][0] == rows[f"pkg{number}-data"][0] for number in range(60))
    assert len(splits["train"]) > len(splits["test"]) > 0


def test_rows_are_written_for_the_commands_that_read_files(tmp_path, capsys):
    main([*map(str, write_index(tmp_path)), "--output_dir", str(tmp_path / "rows")])
    lines = (tmp_path / "rows" / "train.jsonl").read_text().splitlines()
    assert (
        set(json.loads(lines[0])) == {"source", "target", "name"}
        and f"{len(lines)} train rows" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("Packages", b"Package: a\nDescription: only a synopsis\n"),
        ("Packages", b"Package: a\nDescription: caf\xe9 noir\n"),
        ("Packages.gz", b"not compressed"),
        ("Packages.xz", b"not compressed"),
    ],
)
def test_files_without_descriptions_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        build_synopsis_task([tmp_path / name])
