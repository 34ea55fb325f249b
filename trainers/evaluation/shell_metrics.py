# SPDX-License-Identifier: Apache-2.0
"""Metrics for shell commands: the score of the NLC2CMD competition, templates, first utilities and syntax.

The score compares the utilities of two commands position by position, and the flags of equal ones (NeurIPS 2020
NLC2CMD competition, arXiv 2103.02523, section 3). Arguments are not compared.
"""

import functools
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field

from ...errors import require_package


# Utilities whose options begin with one dash and are whole words.
LONG_OPTION_UTILITIES = ("find", "java", "gcc", "convert", "ffmpeg", "xset", "xrandr", "openssl")
# A parameter expansion that never ends, or not before its quotation does: bashlex would look for its end forever.
ENDLESS_EXPANSION = re.compile(r"\$\{[^}]*$|'[^']*\$\{[^}']*'")


@dataclass(frozen=True)
class Utility:
    """One program of a command, with its flags.

    Args:
        name (`str`): Such as `"tar"`.
        flags (`frozenset[str]`): Without values; `-xzf` counts as `-x`, `-z` and `-f`, `--mode=r` as `--mode`.
    """

    name: str
    flags: frozenset[str] = field(default_factory=frozenset)


@functools.lru_cache(maxsize=65_536)
def parse_utilities(command: str) -> tuple[Utility, ...] | None:
    """Return the utilities of a command in their order, or `None` if it cannot be parsed.

    Pipelines, lists, loops and substitutions are followed. What `find -exec`, `xargs` or `sudo` run counts as their
    arguments, and its options as their flags.
    """
    bashlex = require_package("bashlex")
    if ENDLESS_EXPANSION.search(command):
        return None
    try:
        trees = bashlex.parse(command)
    except (bashlex.errors.ParsingError, NotImplementedError, AttributeError, IndexError, AssertionError, TypeError):
        return None
    utilities = []
    for tree in trees:
        _collect_utilities(tree, utilities)
    return tuple(utilities)


def _collect_utilities(node, utilities):
    if node.kind == "command":
        words = [part.word for part in node.parts if part.kind == "word"]
        if words:
            name = words[0].rpartition("/")[2]
            utilities.append(Utility(name, frozenset(flag for word in words[1:] for flag in _flags(name, word))))
    children = [*getattr(node, "parts", []), *getattr(node, "list", []), getattr(node, "command", None)]
    for child in children:
        if hasattr(child, "kind"):
            _collect_utilities(child, utilities)


def _flags(utility, word):
    if word.startswith("--") and len(word) > 2:
        return [word.partition("=")[0]]
    if not word.startswith("-") or len(word) < 2 or word[1].isdigit():
        return []
    if utility in LONG_OPTION_UTILITIES or len(word) == 2:
        return [word.partition("=")[0]]
    letters = re.match(r"-([A-Za-z]+)", word)
    return [f"-{letter}" for letter in letters[1]] if letters else []


def nlc2cmd_score(prediction: str, reference: str) -> float:
    """Compute the score of one predicted command, from -1 to 1.

    Each position of the longer list of utilities counts equally: 1/2 (1 + f) for equal utilities, where
    f = (2 |F & G| - |F | G|) / max(|F|, |G|) for their flags F and G (1 if both have none), and -1 for unequal ones. A
    prediction that cannot be parsed scores -1.
    """
    expected = parse_utilities(reference)
    predicted = parse_utilities(prediction)
    if not predicted or not expected:
        return 1.0 if prediction.split() == reference.split() and prediction.split() else -1.0
    length = max(len(predicted), len(expected))
    scores = [_position_score(*pair) for pair in zip(predicted, expected, strict=False)]
    return (sum(scores) - (length - len(scores))) / length


def _position_score(predicted, expected):
    if predicted.name != expected.name:
        return -1.0
    largest = max(len(predicted.flags), len(expected.flags))
    if largest == 0:
        return 1.0
    both, either = predicted.flags & expected.flags, predicted.flags | expected.flags
    return 0.5 * (1 + (2 * len(both) - len(either)) / largest)


def nlc2cmd_list_score(predictions: Sequence[str], reference: str) -> float:
    """Compute the score of a list of up to five answers: its best if any is above 0, else its mean.

    An empty list scores -1.
    """
    scores = [nlc2cmd_score(prediction, reference) for prediction in predictions[:5]]
    if not scores:
        return -1.0
    return max(scores) if max(scores) > 0 else sum(scores) / len(scores)


def command_template(command: str) -> tuple[tuple[str, tuple[str, ...]], ...] | str:
    """Return what is left of a command without its arguments: utilities and sorted flags; the text if unparsable."""
    utilities = parse_utilities(command)
    if utilities is None:
        return " ".join(command.split())
    return tuple((utility.name, tuple(sorted(utility.flags))) for utility in utilities)


def first_utility(command: str) -> str | None:
    """Return the name of the first program of a command, or `None` if there is none."""
    utilities = parse_utilities(command)
    if utilities:
        return utilities[0].name
    words = command.split()
    return words[0].rpartition("/")[2] if words else None


@functools.lru_cache(maxsize=65_536)
def is_valid_bash(command: str) -> bool:
    """Return whether `bash -n` accepts a command, which it parses without running it."""
    if not command.strip() or "\0" in command:
        return False
    finished = subprocess.run(["bash", "-n", "-c", command], capture_output=True, check=False, timeout=10)
    return finished.returncode == 0


def parse_command(answer: str) -> str:
    """Return the command in a model's answer: the first line of code, without a prompt sign or code fences."""
    lines = [line.strip() for line in answer.strip().splitlines()]
    fences = [number for number, line in enumerate(lines) if line.startswith("```")]
    lines = [line for line in lines[fences[0] + 1 if fences else 0 :] if line and not line.startswith("```")]
    return re.sub(r"^[$#] +", "", lines[0]).strip("`") if lines else ""


def shell_metrics(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute all metrics of one row, each from 0 to 1 but the two scores, which go from -1 to 1.

    Args:
        predictions (`Sequence[str]`): Answers, the best first.
        references (`Sequence[str]`): Right commands. Each metric is that of the reference where it is highest.
    """
    best = predictions[0] if predictions else ""
    return {
        "nlc2cmd": max(nlc2cmd_score(best, reference) for reference in references),
        "nlc2cmd_top5": max(nlc2cmd_list_score(predictions, reference) for reference in references),
        "template": float(command_template(best) in map(command_template, references)),
        "exact": float(best.split() in [reference.split() for reference in references]),
        "first_utility": float(first_utility(best) in map(first_utility, references)),
        "valid_bash": float(is_valid_bash(best)),
    }
