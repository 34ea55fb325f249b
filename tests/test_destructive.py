# SPDX-License-Identifier: Apache-2.0
"""Which command lines `encdec-slm shell` warns of."""

import random
from pathlib import Path

import pytest
from encdec_slm_cli.destructive import find_dangers


COMMANDS = Path(__file__).parent / "commands"
# A word of the warning and a command, one a line.
DANGEROUS = (COMMANDS / "dangerous.tsv").read_text(encoding="utf-8").splitlines()
HARMLESS = (COMMANDS / "harmless.txt").read_text(encoding="utf-8").splitlines()
CASES = [tuple(reversed(line.split("\t", 1))) for line in DANGEROUS]
CASES += [
    ("python -c 'import os\nwhile True: os.fork()'", "fork bomb"),
    ("bash <<EOF\nrm -rf /\nEOF", "deletes"),
    ("ls\nrm -rf /", "deletes"),
    ("rm -rf \\\n/", "deletes"),
    ("rm -rf\t/", "deletes"),
]
HARMLESS_CASES = [*HARMLESS, "", " ", "cat <<EOF\nrm -rf /\nEOF", "cat <<'EOF' > a.sh\nrm -rf /\nEOF\nls"]


@pytest.mark.parametrize(("command", "word"), CASES)
def test_a_dangerous_command_is_recognized(command, word):
    assert any(word in reason for reason in find_dangers(command)), find_dangers(command)


@pytest.mark.parametrize("command", HARMLESS_CASES)
def test_a_harmless_command_is_not_warned_of(command):
    assert find_dangers(command) == []


def test_any_text_is_read():
    generator = random.Random(0)
    pieces = [
        *"'\"`$(){}[]<>|&;#~*?!\\\n\t -=/x1",
        "rm ",
        "-rf ",
        "$(",
        "${",
        "<<E",
        "find ",
        "sudo ",
        "\ue000",
        "é",
        "\0",
    ]
    for _ in range(1000):
        find_dangers("".join(generator.choices(pieces, k=generator.randint(1, 40))))


def test_a_long_line_is_read():
    for piece in (
        "(",
        "$(",
        "`",
        "{a,b}",
        "'",
        "x ",
        "f(){ ",
        "| ",
        "{",
        "rm -rf {a,b}{c,d} ",
        '"$(',
        "while true; do & ",
    ):
        find_dangers(piece * 300)
