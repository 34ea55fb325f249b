# SPDX-License-Identifier: Apache-2.0
"""The shell task: a request in English, the command out.

Rows come from what people ask every day, tldr-pages, Fig's completion specs and NL2Bash (arXiv 1802.08979);
`shell_sources` reads the last three. examples/shell_data.py and examples/everyday_rows.py write them.
"""

import hashlib
import json
import random
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ...errors import format_list
from ..evaluation.shell_metrics import is_valid_bash
from .shell_sources import ShellRow


# Pages of tldr about systems that have another shell.
OTHER_PLATFORMS = frozenset({"windows", "dos", "cisco-ios"})
MAX_COMMAND_CHARACTERS = 200
MAX_REQUEST_CHARACTERS = 300
MAX_FIG_ROWS = 25  # of one program
# Programs that requests need not name because people ask for what they do, and words to fill into commands. The values
# of a placeholder of tldr are those of the first entry that names a part of it.
WORDS = json.loads(Path(__file__).with_name("shell_words.json").read_text(encoding="utf-8"))
COMMON_PROGRAMS = frozenset(WORDS["common_programs"])
PLACEHOLDER = re.compile(r"\{\{(.*?)\}\}")
EVERYDAY = Path(__file__).with_name("shell_everyday")
# A kind of words of `shell_words.json`; which word of this kind; and which part of it, if it is a pair.
KIND = re.compile(r"\{\{([a-z_]+)(\d?)(?::(\d))?\}\}")


# Make rows


def fill_placeholders(example: str, generator: random.Random) -> tuple[str, list[str]]:
    """Replace the placeholders of a tldr example by what a person would type.

    `{{[-a|--all]}}` becomes the short or the long form; `{{a|b}}` one of the alternatives; a path becomes a file name
    with the same ending, or a folder; a number becomes another number of as many digits; other names become one of a
    few words of their kind; `a1 a2 ...` becomes two words. The same placeholder gets the same value.

    Args:
        example (`str`): Such as `"tar cf {{path/to/target.tar}} {{path/to/file1 path/to/file2 ...}}"`.
        generator (`random.Random`): Decides the values.

    Returns:
        `tuple[str, list[str]]`: The command, and the values that a request has to name.
    """
    values, named = {}, []

    def replace(match):
        text = match[1]
        if text not in values:
            values[text], names = _value(text, generator)
            named.extend(names)
        return values[text]

    return PLACEHOLDER.sub(replace, example), named


def _value(text, generator):
    """Return what a placeholder becomes, and which part of it a request has to name."""
    if text.startswith("[") and text.endswith("]") and "|" in text:
        return generator.choice(text[1:-1].split("|")), []
    if text.endswith("..."):
        first = text.split()[0]
        chosen = [_single_value(first, generator) for _ in range(2)]
        chosen = list(dict.fromkeys(chosen))
        return " ".join(chosen), chosen
    if "|" in text and not text.startswith("path/"):
        chosen = generator.choice(text.split("|"))
        return chosen, [chosen]
    value = _single_value(text.split("|")[0], generator)
    return (f'"{value}"' if " " in value else value), [value]


def _single_value(text, generator):
    if re.fullmatch(r"\d+", text):
        digits = len(text)
        return str(generator.randint(1 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))
    name = text.lower().rpartition("/")[2].strip("\"'")
    if text.startswith("path/") or "/" in text or re.search(r"\.\w{1,5}$", text):
        ending = re.search(r"(\.[\w.]+?)(\[.*)?$", name)
        if ending is None and ("dir" in name or "folder" in name or text in ("path/to", "path")):
            return generator.choice(WORDS["folders"])
        if ending is None and not text.startswith("path/"):
            return text
        stem = generator.choice(WORDS["file_stems"]) + generator.choice(("", "", "1", "_old", "2024"))
        return stem + (ending[1] if ending else generator.choice((".txt", ".log", "", ".md")))
    for entry in WORDS["placeholders"]:
        if any(part in name for part in entry["names"]):
            return generator.choice(entry["values"])
    return text.replace("_", "-")


def build_request(description: str, program: str, values: Sequence[str], generator: random.Random) -> str:
    """Write a request from a description: it names the program where that is not obvious, and the values.

    Args:
        description (`str`): Such as `"Create an archive from files"`.
        program (`str`): Such as `"tar"`.
        values (`Sequence[str]`): What the command names.
        generator (`random.Random`): Decides the form.
    """
    text = re.sub(r"\[(\w)\]", r"\1", description).replace("`", "").rstrip(".:")
    missing = [value for value in values if value not in text]
    words = program.split()[0]
    if words not in COMMON_PROGRAMS and words.lower() not in text.lower():
        text = generator.choice((f"{text} with {words}", f"{text} using {words}", f"{words}: {text}"))
    if missing:
        values = ", ".join(missing)
        text = generator.choice((f"{text}: {values}", f"{text} ({values})", f"{text} for {values}"))
    is_word = text[1:2].islower() or text[1:2] == " "
    return text[:1].lower() + text[1:] if is_word and generator.random() < 0.5 else text


def tldr_rows(examples: Iterable[dict], variants: int = 1, seed: int = 0) -> list[ShellRow]:
    """Make rows from tldr examples of systems with a POSIX shell.

    Args:
        examples (`Iterable[dict]`): From [`read_tldr`].
        variants (`int`, *optional*, defaults to 1): Rows per example; each has other values.
        seed (`int`, *optional*, defaults to 0): Of all choices.
    """
    rows = []
    for number, example in enumerate(examples):
        if example["platform"] in OTHER_PLATFORMS or re.search(r"<[\w\]\[]+>", example["example"]):
            continue
        for variant in range(variants):
            generator = random.Random(f"{seed} {number} {variant}")
            command, values = fill_placeholders(example["example"], generator)
            program = example["command"]
            rows.append(ShellRow(build_request(example["description"], program, values, generator), command, "tldr"))
    return keep_usable(rows)


def fig_rows(descriptions: Iterable[dict]) -> list[ShellRow]:
    """Make rows from Fig's descriptions: what a command, or a command with one option, does."""
    rows = []
    for entry in descriptions:
        options = entry.get("option") or []
        if any(not argument["optional"] for argument in entry["args"]) or not entry["description"]:
            continue
        if {"--help", "-h", "--version"} & set(options):
            continue
        command = entry["command"] if not options else f"{entry['command']} {options[0]}"
        text = " ".join(entry["description"].split()).rstrip(".")
        program = entry["command"].split()[0]
        request = text if program.lower() in text.lower() else f"{entry['command']}: {text}"
        rows.append(ShellRow(request, command, "fig"))
    return keep_usable(rows)


def everyday_rows(copies: int = 3, seed: int = 0, topics: Sequence[str] = ()) -> list[ShellRow]:
    """Make rows from the commands of the folder `shell_everyday`, each of which has several requests.

    Args:
        copies (`int`, *optional*, defaults to 3): Rows per request, with other words where it has placeholders.
        seed (`int`, *optional*, defaults to 0): Of all choices.
        topics (`Sequence[str]`, *optional*): Names of files in the folder, such as `"basics"`. Empty takes all.

    Raises:
        ValueError: There is no such topic.
    """
    rows = [
        _fill_everyday(request, command, random.Random(f"{seed} {command} {request} {copy}"))
        for request, command in _read_everyday(topics)
        for copy in range(copies)
    ]
    usable = {(row.source.lower(), row.target) for row in keep_usable(rows)}
    return [row for row in rows if (row.source.lower(), row.target) in usable]


def _read_everyday(topics=()):
    """Yield requests and commands, with placeholders."""
    files = {path.stem: path for path in sorted(EVERYDAY.glob("*.txt"))}
    for topic in topics or files:
        if topic not in files:
            raise ValueError(f"There are no everyday requests about {topic!r}, but about {format_list(files)}.")
        path, command = files[topic], ""
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("$ "):
                command = line[2:]
            elif not line.startswith("#"):
                yield line, command


def _fill_everyday(request, command, generator):
    chosen = {}

    def replace(match):
        kind, number, part = match.groups()
        if (kind, number) not in chosen:
            taken = chosen.values()
            value = generator.choice([word for word in WORDS["everyday"][kind] if word not in taken])
            if kind in WORDS["everyday_names"] and generator.random() < 0.6:
                value = _other_value(value, generator)
            chosen[kind, number] = value
        value = chosen[kind, number]
        return value if isinstance(value, str) else value[int(part or 0)]

    source, target = (KIND.sub(replace, text) for text in (request, command))
    is_word = source[1:2].islower()
    return ShellRow(
        source[0].upper() + source[1:] if is_word and generator.random() < 0.4 else source, target, "everyday"
    )


def _other_value(value, generator):
    """Return another value of the same form: a number, a date, an address, a path, or a name with the same ending."""
    if value in WORDS["kept_names"]:
        return value
    if re.fullmatch(r"\d+(\.\d+){3}", value):
        return ".".join(str(generator.randint(1, 254)) for _ in range(4))
    if re.fullmatch(r"\d{4}-\d\d-\d\d", value):
        return f"{generator.randint(2015, 2027)}-{generator.randint(1, 12):02}-{generator.randint(1, 28):02}"
    if number := re.fullmatch(r"(\d+)([a-zA-Z%]*)", value):
        return _number_like(number[1], generator) + number[2]
    if "://" in value:
        scheme, _, address = value.partition("://")
        return f"{scheme}://{_other_value(address, generator)}"
    if "/" in value.strip("/"):
        return "/".join(_other_value(part, generator) for part in value.split("/"))
    if "@" in value:
        return "@".join(_other_value(part, generator) for part in value.split("@"))
    start, ending = re.fullmatch(r"([/.~]*).*?((?:\.[a-z]\w*)*/?)", value).groups()
    return start + _new_name(generator) + ending


def _new_name(generator):
    """Invent the name of a file, a folder or a user, as people do."""
    word, other = generator.sample(WORDS["names"], 2)
    invented = "".join(generator.choices(WORDS["syllables"], k=generator.randint(1, 3)))
    number = generator.choice((str(generator.randint(1, 99)), f"20{generator.randint(10, 29)}", "old", "new", "v2"))
    separator = generator.choice("_--")
    return generator.choice(
        (
            *(invented, invented, word, word, word.capitalize(), invented.capitalize()),
            *(word + separator + other, word + separator + number, invented + separator + number),
            *(word + number, invented + generator.choice("123456789"), invented + separator + word),
        )
    )


# Vary literals

# A word of a request that more requests than this share is English ("home", "file"); others are names to copy.
MAX_LITERAL_FREQUENCY = 12
PIECE = re.compile(r"[A-Za-z0-9_]+(?:[-.][A-Za-z0-9_]+)*")
# Where a word is a literal whatever it means: in quotation marks, in a path or pattern, beside an ending or a digit.
MARKED = r"(?:(?<=['\"/*.$~_-]){0}|{0}(?=['\"/*_])|{0}(?=\.\w))"


class LiteralVariation:
    """Replace names, numbers and patterns that a request and its command share by others, the same in both.

    A model learns from such rows to copy what it has not seen. Options, programs and words of the language stay.

    Args:
        rows (`Sequence[ShellRow]`): Rows whose literals are the names to choose from, and whose requests show which
            words are English.
    """

    def __init__(self, rows: Sequence[ShellRow]):
        self._frequency = Counter(word for row in rows for word in _words(row.source))
        programs = {row.target.split()[0] for row in rows if row.target.split()}
        self._fixed = programs | COMMON_PROGRAMS
        literals = (piece for row in rows for piece in self.find_literals(row))
        self._names = sorted({name for name in literals if not name.isdigit()})

    def __call__(self, row: ShellRow, generator: random.Random) -> ShellRow:
        """Return the row with other literals."""
        source, target, taken = row.source, row.target, set(PIECE.findall(row.source + " " + row.target))
        for piece in self.find_literals(row):
            other = self._replacement(piece, target, generator)
            if other not in taken:
                taken.add(other)
                whole = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(piece)}(?![A-Za-z0-9_])")
                source, target = (whole.sub(other, text) for text in (source, target))
        return ShellRow(source, target, row.origin)

    def find_literals(self, row: ShellRow) -> list[str]:
        """Return the pieces of the command that the request names literally, the longest first."""
        pieces = {match[0] for match in PIECE.finditer(row.target) if not _is_option(row.target, match.start())}
        named = pieces.intersection(PIECE.findall(row.source))
        return sorted(
            (piece for piece in named if self._is_literal(piece, row)), key=lambda piece: (-len(piece), piece)
        )

    def _is_literal(self, piece, row):
        if piece.isdigit():
            return True
        if piece in self._fixed or len(piece) == 1:
            return False
        if self._frequency[piece.lower()] <= MAX_LITERAL_FREQUENCY:
            return True
        return re.search(MARKED.format(re.escape(piece)), row.source) is not None

    def _replacement(self, piece, target, generator):
        if piece.isdigit():
            return _other_number(piece, generator)
        stem, _, ending = piece.rpartition(".")
        if stem:
            return f"{self._replacement(stem, target, generator)}.{ending}"
        if f".{piece}" in target:
            return generator.choice(WORDS["file_endings"])
        name = generator.choice(self._names) if self._names and generator.random() < 0.6 else _new_name(generator)
        if f"${piece}" in target or f"{{{piece}" in target or f"{piece}=" in target:
            name = re.sub(r"\W", "_", name)  # a variable
        if piece.isupper():
            return name.upper()
        return name.capitalize() if piece[0].isupper() else name


def _other_number(number, generator):
    if re.fullmatch("[0-7]{3,4}", number):  # permissions
        return "".join(generator.choices("01234567", k=len(number)))
    return _number_like(number, generator)


def _number_like(number, generator):
    """Return a number of about as many digits."""
    length = max(1, len(number) + generator.choice((-1, 0, 0, 1)))
    return str(generator.randrange(10 ** (length - 1), 10**length))


def _is_option(text, start):
    """Return whether the piece that begins at `start` is the name of an option."""
    before = text[:start]
    return before.endswith("-") and not re.search(r"[\w/]-$", before)


def keep_usable(rows: Iterable[ShellRow]) -> list[ShellRow]:
    """Keep rows whose command is one printable line of bounded length that `bash -n` accepts; drop repetitions."""
    kept = {}
    for row in rows:
        is_short = 0 < len(row.source) <= MAX_REQUEST_CHARACTERS and 0 < len(row.target) <= MAX_COMMAND_CHARACTERS
        if is_short and "{{" not in row.target and (row.source + row.target).isprintable():
            kept.setdefault((row.source.lower(), row.target), row)
    valid = check_syntax([row.target for row in kept.values()])
    return [row for row, is_valid in zip(kept.values(), valid, strict=True) if is_valid]


def check_syntax(commands: Sequence[str]) -> list[bool]:
    """Return for each command whether `bash -n` accepts it; many are checked in one process."""
    # A shell function per command isolates most errors; a batch with an error is divided.
    if not commands:
        return []
    if len(commands) == 1:
        return [is_valid_bash(commands[0])]
    script = "\n".join(f"f{number}() {{\n{command}\n}}" for number, command in enumerate(commands))
    if len(commands) <= 512 and "\0" not in script:
        finished = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, check=False)
        # A comment or a here-document could hide the end of its function; they are checked one by one.
        if finished.returncode == 0 and not finished.stderr and not re.search(r"(^|\s)#|<<", script):
            return [True] * len(commands)
    middle = len(commands) // 2
    return check_syntax(commands[:middle]) + check_syntax(commands[middle:])


def build_training_rows(
    nl2bash: Sequence[ShellRow],
    examples: Iterable[dict],
    descriptions: Iterable[dict],
    held_out: Sequence[ShellRow],
    copies: int = 9,
    everyday_copies: int = 3,
    seed: int = 0,
) -> list[ShellRow]:
    """Build the training rows of the shell model, shuffled in the same way on every machine.

    Each NL2Bash row comes once as it is and `copies` times with other literals, each everyday request with
    `everyday_copies` choices of words, each tldr example with two, and at most 25 descriptions of each of Fig's
    programs. A tldr example is left out if its program is neither a common one nor in an everyday command.

    Args:
        nl2bash (`Sequence[ShellRow]`): Training rows of [`read_nl2bash`].
        examples (`Iterable[dict]`): From [`read_tldr`].
        descriptions (`Iterable[dict]`): From [`read_fig`].
        held_out (`Sequence[ShellRow]`): Validation and test rows; see [`decontaminate`].
        copies (`int`, *optional*, defaults to 9): Varied rows per NL2Bash row.
        everyday_copies (`int`, *optional*, defaults to 3): See [`everyday_rows`].
        seed (`int`, *optional*, defaults to 0): Of all choices.
    """
    nl2bash = keep_usable(nl2bash)
    vary = LiteralVariation(nl2bash)
    varied = (vary(row, random.Random(f"{seed} {copy} {row}")) for copy in range(copies) for row in nl2bash)
    per_program = Counter()
    chosen = []
    for row in sorted(fig_rows(descriptions), key=row_order):
        program = row.target.split()[0]
        per_program[program] += 1
        if per_program[program] <= MAX_FIG_ROWS:
            chosen.append(row)
    programs = {command.split()[0] for _, command in _read_everyday()} | COMMON_PROGRAMS
    known = [row for row in tldr_rows(examples, variants=2, seed=seed) if row.target.split()[0] in programs]
    rows = keep_usable([*nl2bash, *varied, *known, *chosen])
    rows += everyday_rows(everyday_copies, seed)
    return sorted(decontaminate(rows, [row.source for row in held_out]), key=row_order)


# Decontaminate


def decontaminate(rows: Iterable[ShellRow], held_out: Iterable[str], max_similarity: float = 0.8) -> list[ShellRow]:
    """Drop rows whose request is near a held-out request.

    Args:
        rows (`Iterable[ShellRow]`): Training rows.
        held_out (`Iterable[str]`): Requests of validation and test rows.
        max_similarity (`float`, *optional*, defaults to 0.8): Jaccard similarity of the sets of words (letters and
            digits, lower case) above which a row is dropped. Equal sets have 1.

    Returns:
        `list[ShellRow]`: The other rows, in their order.
    """
    held_out = [words for words in map(_words, held_out) if words]
    by_word: dict[str, list[int]] = {}
    for index, words in enumerate(held_out):
        for word in words:
            by_word.setdefault(word, []).append(index)
    return [row for row in rows if _nearest_similarity(_words(row.source), held_out, by_word) <= max_similarity]


def word_similarity(first: str, second: str) -> float:
    """Return the Jaccard similarity of the sets of words of two texts."""
    first, second = _words(first), _words(second)
    return len(first & second) / max(1, len(first | second))


def _words(text):
    return frozenset(re.findall(r"[a-z0-9]+", text.lower()))


def _nearest_similarity(words, held_out, by_word):
    shared: dict[int, int] = {}
    for word in words:
        for index in by_word.get(word, ()):
            shared[index] = shared.get(index, 0) + 1
    return max((count / (len(words) + len(held_out[index]) - count) for index, count in shared.items()), default=0.0)


def row_order(row: ShellRow) -> str:
    """Return a key that shuffles rows in the same way on every machine."""
    return hashlib.sha256(f"{row.source}\0{row.target}".encode()).hexdigest()
