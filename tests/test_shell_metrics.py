# SPDX-License-Identifier: Apache-2.0
import pytest

from encdec_slm.trainers.evaluation.shell_metrics import (
    Utility,
    command_template,
    first_utility,
    is_valid_bash,
    nlc2cmd_list_score,
    nlc2cmd_score,
    parse_command,
    parse_utilities,
    shell_metrics,
)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("ls", [("ls", "")]),
        ("tar -xzf a.tgz", [("tar", "-x -z -f")]),
        ("/usr/bin/sort --numeric-sort --key=2 f", [("sort", "--numeric-sort --key")]),
        ("find . -type f -name '*.c' | wc -l", [("find", "-type -name"), ("wc", "-l")]),
        ("head -5 f", [("head", "")]),
        ("cd /tmp && rm -rf x; echo -n done", [("cd", ""), ("rm", "-r -f"), ("echo", "-n")]),
        ("echo $(date -u)", [("echo", ""), ("date", "-u")]),
        ("for f in *; do mv -v $f x; done", [("mv", "-v")]),
        ("find . -exec grep -l x {} \\;", [("find", "-exec -l")]),
        ("echo a > b 2>&1", [("echo", "")]),
        ("FOO=1 make -j", [("make", "-j")]),
    ],
)
def test_a_command_is_its_utilities_and_flags(command, expected):
    assert parse_utilities(command) == tuple(Utility(name, frozenset(flags.split())) for name, flags in expected)


@pytest.mark.parametrize("command", ["echo 'a", "ls |", "(", "if then"])
def test_what_is_no_command_has_no_utilities(command):
    assert parse_utilities(command) is None


@pytest.mark.parametrize("command", ["A='${1'", "A='${1' && ls ${B}", "~{`|${`1"])
def test_expansions_without_an_end_are_not_parsed(command):
    """bashlex would read them until the memory is full."""
    assert parse_utilities(command) is None
    assert command_template(command) == command


def test_expansions_with_an_end_are_parsed():
    assert parse_utilities("echo '${A}' ${B} 'c'") == (Utility("echo"),)


# Worked out by hand from the formula in section 3 of arXiv 2103.02523.
@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("ls", "ls", 1.0),
        ("ls -a", "ls -a", 1.0),
        ("ls /tmp", "ls /usr", 1.0),  # arguments are not compared
        ("ls -a", "ls", 0.5 * (1 + (0 - 1) / 1)),
        ("ls -a", "ls -l", 0.5 * (1 + (0 - 2) / 1)),  # -1/2
        ("ls -al", "ls -l", 0.5 * (1 + (2 * 1 - 2) / 2)),  # 1/2
        ("ls -alt", "ls -alr", 0.5 * (1 + (2 * 2 - 4) / 3)),  # 1/2
        ("du", "ls", -1.0),
        ("ls | wc -l", "ls", (1 - 1) / 2),
        ("ls | wc -l", "ls | wc", (1 + 0) / 2),
        ("ls | sort | head", "ls | head | sort", (1 - 1 - 1) / 3),
        ("echo 'a", "ls", -1.0),
        ("", "ls", -1.0),
    ],
)
def test_the_score_follows_the_formula(prediction, reference, expected):
    assert nlc2cmd_score(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        (["du", "ls"], 1.0),
        (["du", "df"], -1.0),
        (["du", "ls -a"], (-1 + 0) / 2),  # none is above 0: the mean
        (["du"] * 5 + ["ls"], -1.0),  # the sixth answer does not count
        ([], -1.0),
    ],
)
def test_a_list_scores_its_best_answer_if_that_is_above_0(predictions, expected):
    assert nlc2cmd_list_score(predictions, "ls") == pytest.approx(expected)


def test_templates_ignore_arguments_and_the_order_of_flags():
    assert command_template("tar -czf a.tgz b") == command_template("tar -f x.tgz -zc y")
    assert command_template("tar -czf a.tgz b") != command_template("tar -xzf a.tgz b")
    assert command_template("echo  'a") == "echo 'a"


def test_the_first_utility_is_known_even_of_a_command_that_cannot_be_parsed():
    assert first_utility("/bin/ls | wc") == "ls"
    assert first_utility("grep 'a") == "grep"
    assert first_utility("  ") is None


@pytest.mark.parametrize(
    ("command", "expected"), [("ls -l | wc", True), ("echo 'a", False), ("", False), ("ls |", False), ("a\0b", False)]
)
def test_bash_judges_syntax_without_running_anything(command, expected, tmp_path):
    assert is_valid_bash(command) == expected
    assert is_valid_bash(f"touch {tmp_path}/made")
    assert list(tmp_path.iterdir()) == []


def test_all_metrics_of_a_row():
    metrics = shell_metrics(["ls -l x", "du"], ["ls -l y"])
    assert metrics == {
        **{"nlc2cmd": 1.0, "nlc2cmd_top5": 1.0, "template": 1.0, "exact": 0.0},
        **{"first_utility": 1.0, "valid_bash": 1.0},
    }


def test_each_metric_is_that_of_the_nearest_right_command():
    metrics = shell_metrics(["du -s .", "ls"], ["df", "du -s x", "ls -s ."])
    assert metrics == shell_metrics(["du -s ."], ["du -s x"]) | {"exact": 0.0}
    assert shell_metrics(["du -s  ."], ["df", "du -s ."])["exact"] == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("ls -l", "ls -l"),
        ("  ls -l\nThis lists files.", "ls -l"),
        ("```bash\nls -l | wc\n```", "ls -l | wc"),
        ("Use this command:\n```\n$ ls -l\n```\nIt lists files.", "ls -l"),
        ("`ls -l`", "ls -l"),
        ("", ""),
        ("```", ""),
    ],
)
def test_the_command_is_the_first_line_of_code_in_an_answer(answer, expected):
    assert parse_command(answer) == expected
