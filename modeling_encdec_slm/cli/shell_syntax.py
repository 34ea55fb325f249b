# SPDX-License-Identifier: Apache-2.0
"""Split shell command lines into simple commands, words and redirections, and expand what is known beforehand.

No line is refused: an open quotation mark or bracket ends with the line.
"""

import itertools
import re
import shlex
from collections.abc import Collection
from dataclasses import dataclass, field


# Quoted characters that would mean something without quotation marks, as characters of Unicode's private use area.
QUOTED = {"$": "\ue000", "*": "\ue001", "?": "\ue002", "[": "\ue003", "~": "\ue004", "{": "\ue005"}
# A `$` in double quotes: its value is not split into words.
QUOTED_DOLLAR = "\ue006"
PLAIN = str.maketrans({code: character for character, code in QUOTED.items()} | {QUOTED_DOLLAR: "$"})
PRIVATE = re.compile("[\ue000-\ue006]")
# Around the name of a variable without a known value, after expansion.
UNKNOWN = re.compile("\ue007(.*?)\ue008")
VARIABLE = re.compile(rf"([${QUOTED_DOLLAR}])(?:\{{((?:[^{{}}]|\{{[^{{}}]*\}})*)\}}|(\w+|[@*#?!$-]))")
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "e": "\x1b", "E": "\x1b"}
# Words before a command, which begin or continue a compound command.
RESERVED = frozenset(
    {"!", "{", "}", "if", "then", "else", "elif", "fi", "while", "until", "do", "done", "coproc", "esac"}
)
# Words that open a compound command, and those that close one.
OPENING = frozenset({"{", "if", "while", "until", "for", "select", "case"})
CLOSING = frozenset({"}", "fi", "done", "esac"})
TESTS = {"[": "]", "[[": "]]"}
# Programs that run the command in their arguments: options that take a value, and the number of arguments before it.
WRAPPERS = {
    **dict.fromkeys(("builtin", "busybox", "command", "fakeroot", "nohup", "pkexec", "setsid", "toybox"), ("", 0)),
    **{"sudo": ("CDRTUghprtu", 0), "doas": ("Cu", 0), "run0": ("gu", 0), "env": ("CSu", 0), "nice": ("n", 0)},
    **{"ionice": ("cnp", 0), "stdbuf": ("eio", 0), "time": ("fo", 0), "exec": ("a", 0), "timeout": ("ks", 1)},
    **{"chroot": ("", 1), "taskset": ("", 1), "chrt": ("", 1), "flock": ("Ew", 1), "watch": ("n", 0)},
    **{"strace": ("eopsu", 0), "unshare": ("", 0), "torsocks": ("", 0), "proxychains": ("f", 0)},
    **{"caffeinate": ("tw", 0), "systemd-run": ("pu", 0), "function": ("", 1), "screen": ("ShXceprstTx", 0)},
}
LONG_OPTIONS_WITH_VALUE = frozenset(
    {"adjustment", "chdir", "group", "interval", "jobs", "kill-after", "signal", "user"}
)
# Programs behind which `list_programs` looks for another one, if no option follows them.
RUNNERS = frozenset({"command", "env", "exec", "nohup", "sudo", "time", "xargs"})
# Text between quotation marks in a sentence; an apostrophe is none.
QUOTATION = re.compile(r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|`([^`]+)`|(?<!\w)'([^']+)'(?!\w)")
BRACES = re.compile(rf"(?<![${QUOTED_DOLLAR}])\{{([^{{}}]*,[^{{}}]*)\}}")
MAX_BRACES = 8
MAX_EXPANSIONS = 50


@dataclass
class Word:
    """A word without its quotation marks; the characters of `QUOTED` stand for quoted ones.

    Args:
        text (`str`): `${}` stands for the output of a command.
        substitutions (`list[str]`): The commands in `$(...)`, backticks, `<(...)` and `>(...)`.
    """

    text: str = ""
    substitutions: list[str] = field(default_factory=list)


@dataclass
class Command:
    """A simple command.

    Args:
        operator (`str`): What stands before it: `|`, `&&`, `||`, `;`, `&` or nothing.
        words (`list[Word]`): Program and arguments.
        redirections (`list[tuple[str, Word]]`): Operators, such as `>` or `<<<`, and their targets. The target of
            `<<` is the text of the here-document.
    """

    operator: str = ""
    words: list[Word] = field(default_factory=list)
    redirections: list[tuple[str, Word]] = field(default_factory=list)


def parse_commands(line: str) -> list[Command]:
    """Split a command line into its simple commands; lists, pipelines and compound commands become one flat list."""
    return _Parser(PRIVATE.sub("\ufffd", line)).parse()


def is_complete(line: str) -> bool:
    """Return whether all quotation marks, brackets and blocks of a line are closed, and no operator ends it."""
    parser = _Parser(PRIVATE.sub("\ufffd", line))
    parsed = parser.parse()
    commands = [[unquote(word.text) for word in command.words] for command in parsed]
    if parser.is_open or parser.num_blocks or (parser.depth and "case" not in line):
        return False
    if not all(is_complete(text) for command in parsed for word in command.words for text in word.substitutions):
        return False
    if any(words and TESTS.get(words[0], words[-1]) != words[-1] for words in commands):
        return False
    if any(words[:1] == ["find"] and words.count("(") != words.count(")") for words in commands):
        return False
    return not re.search(r"(\||&&)\s*$", line)


def close_line(line: str) -> str:
    """Add up to three quotation marks and brackets to a command line that is not complete, if that completes it."""
    if re.search(r"[|&<>\\]\s*$", line):
        return line
    endings = ("".join(signs) for length in range(4) for signs in itertools.product("'\"`)}", repeat=length))
    return next((line + ending for ending in endings if is_complete(line + ending)), line)


def outline(line: str) -> tuple:
    """Return the programs of a command line and their options, without arguments and their order."""
    parts = []
    for command in parse_commands(line):
        texts = [word.text for word in command.words]
        if texts:
            options = sorted({text for text in texts[1:] if text.startswith("-")})
            parts.append((command.operator, texts[0].rpartition("/")[2], *options))
        parts += [outline(text) for word in command.words for text in word.substitutions]
    return tuple(parts)


def first_program(line: str) -> str:
    """Return the name of the first program of a command line; empty if there is none."""
    return next((word.text.rpartition("/")[2] for command in parse_commands(line) for word in command.words), "")


def list_programs(line: str) -> list[str]:
    """Return the names of the programs that a command line runs, also in substitutions and after `sudo`.

    Those in variables are not known.
    """
    programs = []
    for command in parse_commands(line):
        texts = [word.text for word in command.words if not re.match(r"\w+=", word.text)]
        while len(texts) > 1 and texts[0] in RUNNERS and not texts[1].startswith("-"):
            programs.append(texts.pop(0))
        programs += [text.rpartition("/")[2] for text in texts[:1] if "$" not in text]
        programs += [name for word in command.words for text in word.substitutions for name in list_programs(text)]
    return programs


def unwrap(words: list[str]) -> list[str]:
    """Remove programs that run the command in their arguments, such as `sudo`, and the options of these programs."""
    while words:
        name = program_name(words[0])
        if name not in WRAPPERS:
            return words
        if name == "env" and words[1:2] == ["-S"]:
            words = [words[0], *unquote(" ".join(words[2:3])).split(), *words[3:]]
        with_value, num_positional = WRAPPERS[name]
        words = skip_options(words[1:], with_value)
        while name in ("env", "sudo") and words and re.match(r"\w+=", words[0]):
            words = words[1:]
        words = words[num_positional:]
        while words and words[0] in ("{", "!"):
            words = words[1:]
        if name == "watch" and len(words) == 1:
            return unquote(words[0]).split()
    return words


def skip_options(words: list[str], with_value: str) -> list[str]:
    """Remove the options before the first operand. `with_value` has the letters of options that take a value."""
    while words and words[0].startswith("-") and words[0] != "-":
        option, words = words[0], words[1:]
        if option == "--":
            break
        is_long_with_value = option.startswith("--") and option[2:] in LONG_OPTIONS_WITH_VALUE
        if is_long_with_value or (not option.startswith("--") and option[-1] in with_value):
            words = words[1:]
    return words


def program_name(word: str) -> str:
    """Return the name of a program without its folder."""
    return unquote(word).rpartition("/")[2]


def quote_literals(line: str, request: str, programs: Collection[str]) -> str:
    """Put quotation marks around the words of a command line that have them in the request: they are one name.

    Args:
        line (`str`): Command line, such as `rm my notes.txt`.
        request (`str`): In English, such as `delete "my notes.txt"`.
        programs (`Collection[str]`): Texts that begin with one of these may be commands, and stay as they are.
    """
    for match in QUOTATION.finditer(request):
        literal = next(filter(None, match.groups()))
        if len(literal.split()) < 2 or literal.split()[0] in programs:
            continue
        pattern = re.compile(rf"(?<![\w\\]){re.escape(literal)}(?!\w)")
        for found in reversed(list(pattern.finditer(line))):
            parser = _Parser(line[: found.start()])
            parser.parse()
            if not parser.is_open and parser.commands[-1].words:
                line = line[: found.start()] + shlex.quote(literal) + line[found.end() :]
    return line


def unquote(text: str) -> str:
    """Return the plain text of a word."""
    return text.translate(PLAIN)


class _Parser:
    def __init__(self, line):
        self.line, self.position = line, 0
        self.commands = [Command()]
        self.here_documents = []
        self.is_open = False  # a quotation mark or an expansion is not closed
        self.depth = 0  # of subshells; -1 after a bracket that closes none
        self.num_blocks = 0  # compound commands that are open

    def parse(self):
        while self.position < len(self.line):
            self._read_token()
        self._read_here_documents()
        return [command for command in self.commands if command.words or command.redirections]

    def _read_token(self):
        if self._skip(r"\\\n|[ \t\r]+|#[^\n]*"):
            return
        if self._skip(r"\n"):
            self._begin_command(";")
            self._read_here_documents()
        elif match := self._skip(r"\d*(<<<|<<-?|&>>?|[<>]&(?=[\d-])\d*-?|>>|>[|&]?|<>?)(?!\()|&>>?"):
            self._read_redirection(match[0].lstrip("0123456789"))
        elif match := self._skip(r"\|\||\|&?|&&|;;?&?|&|[()]"):
            self._begin_command(match[0][:1] if match[0] in ("|&", ";;", ";&", ";;&") else match[0])
        else:
            self._add_word(self._read_word())

    def _skip(self, pattern):
        match = re.compile(pattern).match(self.line, self.position)
        if match:
            self.position = match.end()
        return match

    def _begin_command(self, operator):
        current = self.commands[-1]
        is_bracket = operator in ("(", ")")
        if is_bracket and self.depth >= 0:
            self.depth += 1 if operator == "(" else -1
        if current.words or current.redirections:
            self.commands.append(Command("" if is_bracket else operator))
        elif not is_bracket:
            current.operator = operator

    def _add_word(self, word):
        words = self.commands[-1].words
        if not words or words[0].text in ("function", "time"):
            self.num_blocks += word.text in OPENING
        self.num_blocks -= not words and word.text in CLOSING
        if words or word.text not in RESERVED:
            words.append(word)

    def _read_redirection(self, operator):
        if operator[1:2] == "&" and operator != ">&":
            return  # of one stream to another
        self._skip(r"[ \t]+")
        self.is_open |= self.position == len(self.line)
        target = self._read_word()
        if operator in (">&", "&>", ">|"):
            operator = ">"
        operator = operator.replace("&", "")
        if operator.startswith("<<") and operator != "<<<":
            self.here_documents.append((unquote(target.text), target))
            operator = "<<"
        self.commands[-1].redirections.append((operator, target))

    def _read_here_documents(self):
        for end, target in self.here_documents:
            lines = []
            while self.position < len(self.line):
                text = self._skip(r"([^\n]*)\n?")[1]
                if text.strip() == end:
                    break
                lines.append(text)
            target.text = "\n".join(lines)
        self.here_documents = []

    def _read_word(self):
        word = Word()
        start = self.position
        while self.position < len(self.line):
            if self._skip(r"[<>]\("):
                self._substitute(word, self._read_balanced("(", ")"), "$")
            elif re.match(r"[\s;|&<>()]", self.line[self.position]):
                break
            else:
                self._read_part(word)
        if self.position == start and self.position < len(self.line):  # such as the target of `> >`
            self.position += 1
        return word

    def _read_part(self, word):
        if match := self._skip(r"[^\\'\"$`\s;|&<>()]+"):
            word.text += match[0]
        elif match := self._skip(r"\\(.|\n|$)"):
            word.text += "" if match[1] == "\n" else _quote(match[1])
            self.is_open |= not match[1]
        elif match := self._skip(r"'([^']*)('?)"):
            word.text += _quote(match[1])
            self.is_open |= not match[2]
        elif match := self._skip(r"\$'((?:[^'\\]|\\.)*)('?)"):
            word.text += _quote(_decode_escapes(match[1]))
            self.is_open |= not match[2]
        elif self._skip(r"\$?\""):
            self._read_double_quoted(word)
        else:
            self._read_expansion(word, "$")

    def _read_double_quoted(self, word):
        while not self._skip('"'):
            if self.position == len(self.line):
                self.is_open = True
                return
            if match := self._skip(r"[^\\\"$`]+"):
                word.text += _quote(match[0])
            elif match := self._skip(r"\\([$`\"\\\n])"):
                word.text += "" if match[1] == "\n" else _quote(match[1])
            elif self._skip(r"\\"):
                word.text += "\\"
            else:
                self._read_expansion(word, QUOTED_DOLLAR)

    def _read_expansion(self, word, dollar):
        if self._skip(r"\$\(\("):
            self._read_balanced("(", ")")
            self._skip(r"\)")
            word.text += "0"
        elif self._skip(r"\$\("):
            self._substitute(word, self._read_balanced("(", ")"), dollar)
        elif match := self._skip(r"`((?:[^`\\]|\\.)*)(`?)"):
            self._substitute(word, re.sub(r"\\([`$\\])", r"\1", match[1]), dollar)
            self.is_open |= not match[2]
        elif self._skip(r"\$\{"):
            word.text += f"{dollar}{{{self._read_balanced('{', '}')}}}"
        else:
            match = self._skip(r"\$(\w*|[@*#?!$-])")
            word.text += dollar + match[1] if match[1] else _quote("$")

    def _substitute(self, word, command, dollar):
        word.substitutions.append(command)
        output = re.fullmatch(r"\s*(?:which|type -p|command -v|echo|printf)\s+([\w./ ~*-]+?)\s*", command)
        is_folder = re.fullmatch(r"\s*pwd(\s+-[LP])?\s*", command)
        word.text += output[1] if output else "." if is_folder else f"{dollar}{{}}"

    def _read_balanced(self, opening, closing):
        """Return the text up to the bracket that closes the last one, and skip that bracket."""
        start, depth = self.position, 1
        while self.position < len(self.line):
            if self._skip(r"\\.|'[^']*'|\"(?:[^\"\\]|\\.)*\""):
                continue
            character = self.line[self.position]
            self.position += 1
            depth += (character == opening) - (character == closing)
            if depth == 0:
                return self.line[start : self.position - 1]
        self.is_open = True
        return self.line[start:]


def _quote(text):
    return "".join(QUOTED.get(character, character) for character in text)


def _decode_escapes(text):
    def decode(match):
        if match[1]:
            return chr(int(match[1], 16) % 0x110000)
        return chr(int(match[2], 8)) if match[2] else ESCAPES.get(match[3], match[3])

    return re.sub(r"\\(?:[xuU]([0-9a-fA-F]{1,8})|([0-7]{1,3})|(.))", decode, text)


# Expand


def expand_word(text: str, variables: dict[str, list[str]]) -> list[str]:
    """Expand braces and variables of a word.

    Args:
        text (`str`): Of a [`Word`].
        variables (`dict[str, list[str]]`): The possible values of each known variable.

    Returns:
        `list[str]`: The words, of all possible values. Variables that are not known become `UNKNOWN`.
    """
    words = []
    for piece in _expand_braces(text):
        words += _expand_variables(piece, variables)
    return words[:MAX_EXPANSIONS]


def _expand_braces(text):
    texts = [text]
    for _ in range(MAX_BRACES):
        texts = [choice for one in texts for choice in _expand_first_brace(one)][:MAX_EXPANSIONS]
    return texts


def _expand_first_brace(text):
    match = BRACES.search(text)
    if not match:
        return [text]
    return [text[: match.start()] + choice + text[match.end() :] for choice in match[1].split(",")]


def _expand_variables(text, variables):
    pieces, position = [[""]], 0
    is_split = False
    for match in VARIABLE.finditer(text):
        values = _values(match[2] if match[2] is not None else match[3], variables)
        is_split |= match[1] == "$" and any(re.search(r"\s", value) for value in values)
        pieces += [[text[position : match.start()]], values]
        position = match.end()
    combined = ["".join(parts) for parts in itertools.islice(itertools.product(*pieces), MAX_EXPANSIONS)]
    combined = [one + text[position:] for one in combined]
    return [part for one in combined for part in one.split()] if is_split else combined


def _values(expression, variables):
    name = re.match(r"\w*", expression)[0]
    modifier = expression[len(name) :]
    if name in variables and (not modifier or re.match(r":?[-?=]", modifier)):
        return variables[name]
    if re.match(r":?\?", modifier):
        return ["x"]  # the shell stops if the variable is empty
    default = re.match(r":?[-=](.+)", modifier)
    return [unquote(default[1])] if default else [f"\ue007{name or expression}\ue008"]


__all__ = [
    *("UNKNOWN", "Command", "Word", "close_line", "expand_word", "first_program", "is_complete"),
    *("list_programs", "outline", "parse_commands", "program_name", "quote_literals", "skip_options", "unquote"),
    "unwrap",
]
