# SPDX-License-Identifier: Apache-2.0
"""Rows from installed packages, on small folders: licenses, provenance and duplicates."""

import json
import sys
from email.message import Message
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import python_sources
from near_duplicates import NearDuplicates
from python_sources import (
    MAX_ROWS_PER_TARGET,
    build_python_sources,
    find_license,
    is_permissive,
    split_of_distribution,
)


# One name per file, by the fixed hash.
TRAINED, HELD_OUT = "alpha", "package4"
LONG_SENTENCE = "Return how many rows of the table are in use now."


def function(name, docstring, body="return {name} + 1"):
    return f'def {name}(rows, table):\n    """{docstring}"""\n    {body.format(name=name)}\n'


def different(number, docstring):
    """A function that shares little with one of another number."""
    words = [f"w{number}_{index}" for index in range(12)]
    return function(f"f{number}", docstring, f"return {' * '.join(words)}")


def install(folder, name, files, **metadata):
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = {"Metadata-Version": "2.4", "Name": name, "Version": "1.0", **metadata}
    (info / "METADATA").write_text("".join(f"{key.replace('_', '-')}: {value}\n" for key, value in lines.items()))
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def site_packages(tmp_path, monkeypatch):
    """An empty folder of packages, beside a standard library of one function per split."""
    rows = {}
    for split in ("train", "validation", "test"):
        words = " * ".join(f"{split}_{index}" for index in range(12))
        source = f"def {split}(rows):\n    return {words}"
        rows[split] = [{"source": source, "target": f"Return all rows of the {split} split here.", "name": split}]
    task = DatasetDict({split: Dataset.from_list(split_rows) for split, split_rows in rows.items()})
    monkeypatch.setattr(python_sources, "build_docstring_task", lambda: task)
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return folder


def names_in(folder, file="train.jsonl"):
    return [json.loads(line)["name"] for line in (folder / file).read_text(encoding="utf-8").splitlines()]


def build(site_packages):
    output = site_packages.parent / "rows"
    return output, build_python_sources(output, site_packages)


def test_the_packages_of_these_tests_belong_to_their_files():
    assert (split_of_distribution(TRAINED), split_of_distribution(HELD_OUT)) == ("train", "held_out")


def test_rows_of_permissive_packages_are_added_and_counted_in_the_provenance(site_packages):
    install(site_packages, TRAINED, {"alpha/core.py": different(1, LONG_SENTENCE)}, License_Expression="MIT")
    install(site_packages, HELD_OUT, {"beta.py": different(2, "Return two.")}, License_Expression="BSD-3-Clause")
    install(site_packages, "copyleft", {"gamma.py": different(3, "Return three rows.")}, License="GPL-3.0")
    output, provenance = build(site_packages)
    assert names_in(output) == ["train", "alpha.core.f1"]
    assert names_in(output, "validation.jsonl") == ["validation"] and names_in(output, "test.jsonl") == ["test"]
    assert provenance == json.loads((output / "provenance.json").read_text(encoding="utf-8"))
    alpha = {"distribution": "alpha", "version": "1.0", "license": "MIT", "functions": 1, "file": "train.jsonl"}
    assert alpha in provenance["read"]
    assert [row["license"] for row in provenance["read"] if row["file"] == "test.jsonl"] == ["PSF-2.0"]
    skipped = {"distribution": "copyleft", "version": "1.0", "license": "GPL-3.0", "reason": "not on the list"}
    assert provenance["skipped"] == [skipped]


def test_held_out_packages_have_their_own_file(site_packages):
    install(site_packages, HELD_OUT, {"beta.py": different(2, LONG_SENTENCE)}, License_Expression="MIT")
    output, _ = build(site_packages)
    assert names_in(output) == ["train"]
    assert names_in(output, "held_out_distributions.jsonl") == ["beta.f2"]


def test_vendored_code_tests_and_files_outside_of_the_folder_are_skipped(site_packages):
    paths = ("alpha/_vendor/other.py", "alpha/tests/test_core.py", "alpha/third_party/x.py", "../outside.py")
    files = {path: different(number, LONG_SENTENCE) for number, path in enumerate(paths)}
    install(site_packages, TRAINED, files, License_Expression="MIT")
    output, _ = build(site_packages)
    assert names_in(output) == ["train"]


def test_copies_of_held_out_functions_are_skipped_even_with_other_names_and_comments(site_packages):
    words = " * ".join(f"test_{index}" for index in range(12))
    copied = f'def renamed(rows):\n    """Return something else."""\n    # a comment\n    return {words}\n'
    install(site_packages, TRAINED, {"alpha.py": copied + different(1, LONG_SENTENCE)}, License_Expression="MIT")
    output, _ = build(site_packages)
    assert names_in(output) == ["train", "alpha.f1"]


def test_long_sentences_of_held_out_functions_are_left_out(site_packages):
    text = different(1, "Return all rows of the TEST split here") + different(2, LONG_SENTENCE)
    install(site_packages, TRAINED, {"alpha.py": text}, License_Expression="MIT")
    output, _ = build(site_packages)
    assert names_in(output) == ["train", "alpha.f2"]


def test_repeated_sentences_are_limited_and_other_text_is_skipped(site_packages):
    text = "".join(different(number, LONG_SENTENCE) for number in range(MAX_ROWS_PER_TARGET + 3))
    text += different(98, "Args: the rows and the table") + different(99, "Return %(rows)s of the table.")
    install(site_packages, TRAINED, {"alpha.py": text}, License_Expression="MIT")
    output, _ = build(site_packages)
    assert len(names_in(output)) == 1 + MAX_ROWS_PER_TARGET


def test_the_same_packages_give_the_same_files(site_packages):
    text = "".join(different(number, f"Return row number {number} of it.") for number in range(5))
    install(site_packages, TRAINED, {"alpha.py": text}, License_Expression="MIT")
    output, _ = build(site_packages)
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    build(site_packages)
    assert before == {path.name: path.read_bytes() for path in output.iterdir()}


def test_a_folder_with_other_files_is_left_alone(site_packages):
    output = site_packages.parent / "rows"
    output.mkdir()
    (output / "train.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"train\.jsonl"):
        build(site_packages)
    assert (output / "train.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("expression", "permissive"),
    [
        ("MIT", True),
        ("Apache-2.0 AND BSD-3-Clause", True),
        ("Apache-2.0 WITH LLVM-exception AND MIT", True),
        ("GPL-2.0-only OR MIT", True),
        ("MPL-2.0 AND MIT", False),
        ("MPL-2.0 AND (Apache-2.0 OR MIT)", False),
        ("MIT AND (GPL-3.0-only OR BSD-3-Clause)", False),
        ("GPL-3.0-or-later", False),
        ("", False),
    ],
)
def test_a_license_expression_is_permissive_if_it_can_be_met_by_permissive_licenses(expression, permissive):
    assert is_permissive(expression) is permissive


@pytest.mark.parametrize(
    ("fields", "license", "is_read"),
    [
        ({"License": "GPL", "License-Expression": "MIT"}, "MIT", True),
        ({"Classifier": "License :: OSI Approved :: BSD License"}, "BSD", True),
        ({"Classifier": "License :: OSI Approved :: GNU GPL v3 (GPLv3)", "License": "MIT"}, None, False),
        ({"License": "Apache License, Version 2.0"}, "Apache-2.0", True),
        ({"License": "The MIT License (MIT)\n\nCopyright (c) somebody"}, "MIT", True),
        ({"License": "3-Clause BSD License"}, "BSD", True),
        ({"License": "MIT and something else"}, "MIT and something else", False),
        ({"Classifier": "License :: OSI Approved"}, None, False),
        ({}, None, False),
    ],
)
def test_licenses_are_read_from_every_metadata_field(fields, license, is_read):
    metadata = Message()
    for key, value in fields.items():
        metadata[key] = value
    stated, reason = find_license(SimpleNamespace(metadata=metadata))
    assert (reason is None) is is_read
    if license is not None:
        assert stated == license


def test_near_duplicates_are_found():
    body = "\n".join(f"    total_{index} = first_{index} + second_{index}" for index in range(20))
    seen = NearDuplicates()
    for number in range(50):
        assert seen.add_if_new("\n".join(f"    row_{number}_{index} = other_{index}()" for index in range(20)))
    assert seen.add_if_new(f"def f(x):\n{body}")
    assert not seen.add_if_new(f"def renamed(x):  # a comment\n{body}")
    assert not seen.add_if_new(f"def f(x):\n{body}\n    return TOTAL_1")
    assert seen.add_if_new(f"def f(x):\n{body.replace('+', '* third -')}")


def test_very_short_code_is_distinguished():
    seen = NearDuplicates()
    assert seen.add_if_new("a b") and seen.add_if_new("a c") and not seen.add_if_new("A b")


def test_leftovers_of_interrupted_installations_are_skipped(site_packages):
    (site_packages / "broken-1.0.dist-info").mkdir()
    output, provenance = build(site_packages)
    assert {Path(entry["file"]).stem for entry in provenance["read"]} == {"train", "validation", "test"}
    assert (output / "held_out_distributions.jsonl").read_text(encoding="utf-8") == ""
