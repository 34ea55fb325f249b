# SPDX-License-Identifier: Apache-2.0
"""The shell task: its sources, its rows, and that no held-out request is trained on."""

import gzip
import io
import json
import random
import re
import shutil
import tarfile

import pytest

from encdec_slm.trainers.tasks.shell import (
    EVERYDAY,
    KIND,
    WORDS,
    LiteralVariation,
    _other_value,
    build_request,
    build_training_rows,
    check_syntax,
    decontaminate,
    everyday_rows,
    fig_rows,
    fill_placeholders,
    keep_usable,
    tldr_rows,
)
from encdec_slm.trainers.tasks.shell_requests import choose_requests
from encdec_slm.trainers.tasks.shell_sources import ShellRow, read_fig, read_nl2bash, read_tldr


PAGE = """# tar

> Archiving utility.
> More information: <https://www.gnu.org/software/tar>.

- [c]reate an archive and write it to a [f]ile:

`tar {{[-cf|--create --file]}} {{path/to/target.tar}} {{path/to/file1 path/to/file2 ...}}`

- List the contents of a tar file:

`tar tvf {{path/to/source.tar}}`
"""
EXAMPLES = [
    {
        **{"platform": "common", "page": "tar", "command": "tar", "about": "Archiving utility."},
        **{"description": "[c]reate an archive and write it to a [f]ile"},
        **{"example": "tar {{[-cf|--create --file]}} {{path/to/target.tar}} {{path/to/file1 path/to/file2 ...}}"},
    },
    {
        **{"platform": "common", "page": "tar", "command": "tar", "about": "Archiving utility."},
        **{"description": "List the contents of a tar file", "example": "tar tvf {{path/to/source.tar}}"},
    },
]
OPTION = {"command": "ls", "option": ["-l"], "description": "List in long format", "args": [], "kind": "option"}
NL2BASH = [
    ShellRow(f"count lines of {name} that contain '{word}'", f"grep -c {word} {name}", "nl2bash")
    for name, word in (("notes.txt", "todo"), ("app.log", "fatal"), ("users.csv", "alice"))
]


def write_gzip(path, rows):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


# Sources


@pytest.mark.parametrize("kind", ["clone", "zip", "tar"])
def test_tldr_pages_are_read_from_a_clone_or_an_archive(kind, tmp_path):
    page = tmp_path / "tldr" / "pages" / "common" / "tar.md"
    page.parent.mkdir(parents=True)
    page.write_text(PAGE, encoding="utf-8")
    (tmp_path / "tldr" / "pages.de" / "common").mkdir(parents=True)
    (tmp_path / "tldr" / "pages.de" / "common" / "tar.md").write_text(PAGE, encoding="utf-8")
    path = tmp_path / "tldr"
    if kind != "clone":
        path = shutil.make_archive(tmp_path / "archive", {"zip": "zip", "tar": "gztar"}[kind], tmp_path, "tldr")
    assert read_tldr(path) == EXAMPLES


def test_sources_are_read_from_compressed_rows(tmp_path):
    assert read_tldr(write_gzip(tmp_path / "tldr.jsonl.gz", EXAMPLES)) == EXAMPLES
    assert read_fig(write_gzip(tmp_path / "fig.jsonl.gz", [OPTION])) == [OPTION]
    rows = write_gzip(tmp_path / "pairs.jsonl.gz", [{"source": " list  files ", "target": "ls"}])
    assert read_nl2bash(rows) == [ShellRow("list files", "ls", "nl2bash")]


def test_nl2bash_is_read_from_its_two_files(tmp_path):
    (tmp_path / "all.nl").write_text("list files\nshow the date\n", encoding="utf-8")
    (tmp_path / "all.cm").write_text("ls\ndate\n", encoding="utf-8")
    assert read_nl2bash(tmp_path) == [
        ShellRow("list files", "ls", "nl2bash"),
        ShellRow("show the date", "date", "nl2bash"),
    ]
    (tmp_path / "all.cm").write_text("ls\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 lines.* 1"):
        read_nl2bash(tmp_path)


def test_a_folder_or_archive_without_pages_is_refused(tmp_path):
    with tarfile.open(tmp_path / "empty.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("README.md"), io.BytesIO())
    for path in (tmp_path, tmp_path / "empty.tar", tmp_path / "missing"):
        with pytest.raises(ValueError, match="no tldr pages"):
            read_tldr(path)


@pytest.mark.skipif(shutil.which("node") is None, reason="Node reads the specs")
def test_fig_specs_are_read_by_node(tmp_path):
    spec = {
        **{
            "name": "demo",
            "description": "A demo",
            "options": [{"name": ["-v", "--verbose"], "description": "Say more"}],
        },
        "subcommands": [{"name": "run", "description": "Run it", "args": {"name": "file"}}],
    }
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "demo.js").write_text(f"export default {json.dumps(spec)};", encoding="utf-8")
    (tmp_path / "build" / "package.json").write_text('{"type": "module"}', encoding="utf-8")
    commands = {(row["command"], tuple(row.get("option", ()))): row["description"] for row in read_fig(tmp_path)}
    assert commands == {("demo", ()): "A demo", ("demo", ("-v", "--verbose")): "Say more", ("demo run", ()): "Run it"}


# Rows


def test_placeholders_become_what_a_person_would_type():
    example = "cp {{[-r|--recursive]}} {{path/to/file.tar.gz}} {{path/to/directory}} {{path/to/file.tar.gz}}"
    example += " {{10}} {{on|off}}"
    for seed in range(20):
        command, values = fill_placeholders(example, random.Random(seed))
        name, option, source, folder, again, number, switch = command.split()
        assert (name, source) == ("cp", again)
        assert option in ("-r", "--recursive")
        assert source.endswith(".tar.gz") and "path" not in command and "{" not in command
        assert 10 <= int(number) <= 99 and switch in ("on", "off")
        assert values == [source, folder, number, switch]


def test_a_request_names_an_unusual_program_and_the_values():
    for seed in range(20):
        request = build_request("[l]ist all pages.", "zathura-pdf", ["a.pdf"], random.Random(seed))
        assert "zathura-pdf" in request and "a.pdf" in request and "[" not in request
        assert "tar" not in build_request("List `all` members", "tar", [], random.Random(seed))


def test_rows_of_tldr_and_fig_are_commands_that_bash_accepts():
    examples = [*EXAMPLES, EXAMPLES[1] | {"platform": "windows"}, EXAMPLES[1] | {"example": "press <Ctrl c>"}]
    rows = tldr_rows(examples, variants=3)
    assert {row.target.split()[0] for row in rows} == {"tar"} and len(rows) == 6
    needs_value = OPTION | {"option": ["-w"], "args": [{"name": "n", "optional": False}]}
    assert fig_rows([OPTION, needs_value, OPTION | {"option": ["--help"]}]) == [
        ShellRow("ls: List in long format", "ls -l", "fig")
    ]


@pytest.mark.parametrize(
    "row",
    [("", "ls"), ("x", ""), ("x", "ls {{path}}"), ("x", "echo 'a"), ("x", "ls\nls"), ("x" * 400, "ls"), ("a\0", "ls")],
)
def test_rows_that_cannot_be_used_are_left_out(row):
    good = ShellRow("list files", "ls", "tldr")
    assert keep_usable([good, ShellRow(*row, "tldr"), ShellRow("List files", "ls", "nl2bash")]) == [good]


def test_the_syntax_of_many_commands_is_checked_together():
    commands = ["ls", "echo 'a", "cat <<E", "true # x", "}", "f() { ls; }", "", "if x; then y; fi"] * 3
    assert check_syntax(commands) == [True, False, True, True, False, True, False, True] * 3
    assert check_syntax([]) == []


def test_literals_vary_in_the_same_way_on_both_sides():
    vary = LiteralVariation([*NL2BASH, *(ShellRow(f"find files {number}", "find", "nl2bash") for number in range(99))])
    sources = set()
    for seed in range(30):
        row = vary(NL2BASH[0], random.Random(seed))
        command, option, word, name = row.target.split()
        assert (command, option) == ("grep", "-c")
        assert row.source == f"count lines of {name} that contain '{word}'"
        sources.add(row.source)
    assert len(sources) > 20
    same = ShellRow("find files in the current directory", "find . -type f", "nl2bash")
    assert vary(same, random.Random(0)) == same


def test_numbers_and_permissions_stay_numbers():
    vary = LiteralVariation(NL2BASH)
    for seed in range(20):
        row = vary(
            ShellRow("set 644 on files larger than 10 MB", "find -size +10M -exec chmod 644 {} +", "nl2bash"),
            random.Random(seed),
        )
        _, mode, size = row.source.split()[0], row.source.split()[1], row.source.split()[6]
        assert row.target == f"find -size +10M -exec chmod {mode} {{}} +"
        assert set(mode) <= set("01234567") and len(mode) == 3 and size == "10"


# Held-out requests


def test_no_training_request_is_near_a_held_out_request():
    held_out = ["Delete all empty files below the current directory"]
    near = ShellRow("delete all EMPTY files, below the current directory!", "find . -empty -delete", "tldr")
    far = ShellRow("delete all files of alice", "find . -user alice -delete", "tldr")
    assert decontaminate([near, far], held_out) == [far]
    assert decontaminate([near, far], held_out, max_similarity=0.1) == []
    assert decontaminate([near, far], []) == [near, far]


def test_training_rows_are_the_same_each_time_and_hold_no_held_out_request():
    held_out = [NL2BASH[1]]
    options = {"copies": 4, "everyday_copies": 1}
    rows = build_training_rows(NL2BASH, EXAMPLES, [OPTION], held_out, **options)
    assert rows == build_training_rows(NL2BASH, EXAMPLES, [OPTION], held_out, **options)
    assert {row.origin for row in rows} == {"nl2bash", "tldr", "fig", "everyday"}
    assert NL2BASH[0] in rows and NL2BASH[1] not in rows
    rows = [row for row in rows if row.origin != "everyday"]
    assert len(rows) == len(set(rows)) > 10


def test_everyday_requests_name_what_their_commands_name():
    options = {"copies": 3, "topics": ["basics"]}
    rows = everyday_rows(**options)
    assert rows == everyday_rows(**options) and rows != everyday_rows(**options, seed=1)
    num_requests = sum(line[0] not in "$#" for line in (EVERYDAY / "basics.txt").read_text().splitlines())
    assert len(rows) == 3 * num_requests
    assert not any("{{" in row.source + row.target for row in rows)
    requests = {row.source.lower(): row.target for row in rows}
    assert requests["show free memory"] == "free -h"
    copies = {row.target: row.source for row in rows if re.fullmatch(r"cp [\w.-]+ [\w.-]+", row.target)}
    assert copies
    for command, request in copies.items():
        first, second = command.split()[1:]
        assert first != second and first.removesuffix(".bak") in request


def test_everyday_requests_have_one_command_each_and_their_words_exist():
    commands = {}
    for path in EVERYDAY.iterdir():
        for line in path.read_text().splitlines():
            if line.startswith("#"):
                continue
            if line.startswith("$ "):
                command = line[2:]
            else:
                assert commands.setdefault(line.lower(), command) == command, line
            assert {match[1] for match in KIND.finditer(line)} <= WORDS["everyday"].keys(), line
            assert "{{" not in KIND.sub("", line), line


@pytest.mark.parametrize(
    ("value", "form"),
    [
        *[("notes.txt", r".+\.txt"), ("a.tar.gz", r".+\.tar\.gz"), (".bashrc", r"\..+"), ("src/", r"[^/]+/")],
        *[("10.0.0.5", r"\d+(\.\d+){3}"), ("500M", r"[1-9]\d{1,3}M"), ("2024-05-06", r"20\d\d-\d\d-\d\d")],
        *[
            ("/var/log", "/var/log"),
            ("~", "~"),
            ("/home/al/x.py", r"/home/[^/]+/[^/]+\.py"),
            ("http://a.org/b.iso", r"http://\S+\.org/\S+\.iso"),
        ],
        *[
            ("a@b.org", r"\S+@\S+\.org"),
        ],
    ],
)
def test_other_values_have_the_same_form(value, form):
    values = {_other_value(value, random.Random(seed)) for seed in range(8)}
    assert all(re.fullmatch(form, other) for other in values), values
    assert len(values) > 4 or values == {value}


def test_training_rows_of_tldr_are_about_programs_that_people_use():
    examples = [{**EXAMPLES[0], "command": program, "example": f"{program} a"} for program in ("asciiart", "cat")]
    rows = build_training_rows([], examples, [], [], everyday_copies=1)
    assert {row.target for row in rows if row.origin == "tldr"} == {"cat a"}


@pytest.mark.parametrize(
    ("candidates", "kept"),
    [
        (["how many lines has notes.txt?", "number of lines,  notes.txt"], [0, 1]),
        (["how many lines are there?", "lines of other.txt please"], []),  # another name
        (["notes.txt lines number", "lines notes.txt"], [0]),  # too short
        (["Count the lines of notes.txt!", "how long is notes.txt in lines", "how long is notes.txt in lines?"], [1]),
        (["wc -l notes.txt", "$ wc -l notes.txt "], []),  # the command itself
        (["show the beginning of notes.txt"], []),  # leads to another command
    ],
)
def test_requests_of_a_teacher_are_filtered(candidates, kept):
    row = ShellRow("count the lines of notes.txt", "wc -l notes.txt", "nl2bash")

    def answer(request):
        return ["head notes.txt"] if "beginning" in request else ["cat x", "wc -l other.txt"]

    chosen = choose_requests(row, candidates, LiteralVariation([row]), answer)
    assert [one.source for one in chosen] == [" ".join(candidates[index].split()) for index in kept]
    assert {(one.target, one.origin) for one in chosen} <= {(row.target, "teacher")}
