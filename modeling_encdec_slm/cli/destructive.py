# SPDX-License-Identifier: Apache-2.0
"""Recognize commands that destroy data, lock a machine, or run code from the network. Nothing is run.

docs/shell.md lists what is recognized.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from .critical_paths import DEVICE, find_critical_file, find_critical_path, normalize_path
from .shell_syntax import (
    UNKNOWN,
    Command,
    Word,
    expand_word,
    parse_commands,
    program_name,
    skip_options,
    unquote,
    unwrap,
)


MAX_DEPTH = 6
FORK_BOMB = "starts processes without end (a fork bomb)"
UNSEEN_CODE = "runs code from the network without showing it first"
DECODED_CODE = "runs code that was decoded from unreadable text"
LOST_DATA = "deletes data of a database"
SHELLS = frozenset(
    {"ash", "bash", "csh", "dash", "fish", "ksh", "mksh", "rbash", "runuser", "sh", "su", "tcsh", "zsh"}
)
INTERPRETERS = re.compile(r"(python|pypy|perl|ruby|node|nodejs|php|lua|pwsh|powershell|osascript|deno|bun)[\d.]*")
NETWORK = frozenset(
    {"GET", "aria2c", "curl", "fetch", "ftp", "http", "https", "lynx", "nc", "ncat", "netcat", "scp", "wget", "xh"}
)
DECODERS = re.compile(r"base(64|32) .*(-d|-D|--decode)|xxd .*-r|openssl .*-d\b|rev$")
DATABASES = re.compile(
    r"(mysql|mariadb|psql|sqlite3?|sqlcmd|sqlplus|clickhouse(-client)?|duckdb|mongo(sh)?|redis-cli|cqlsh|mysqladmin)$"
)
PARALLEL_OPTIONS = "ajN"
XARGS_OPTIONS = "EILPadns"
SSH_OPTIONS = "BDEFIJLOQRSWbceilmopw"
DELETERS = ("rm", "shred", "unlink")
SYSTEM_LOG = re.compile(r"/var/log/(auth\.log|btmp|dmesg|kern\.log|lastlog|messages|secure|syslog|wtmp)$")
QUOTATION = re.compile(r"'[^']*'|\"(?:\\.|[^\"\\])*\"")
# Labels of critical paths where `find` deletes too much even if a test leaves files out.
ALL_FILES_MATTER = re.compile(
    r"the whole (file system|home folder)|the system folder /((usr/)?s?bin|boot|dev|etc|lib(32|64)?)\b(?!/)"
)
# Labels of critical paths whose owners and permissions are often set again as a whole.
REPAIRED = re.compile(
    r"the folder |(the system folder )?/(etc/ssh\b|usr/lib/(?!\w*-linux)|var/lib/(mysql|postgresql)\b)"
)
# Tests of `find` that leave files out.
FILTERS = re.compile(
    r"-(i?name|i?path|i?regex|i?wholename|i?lname|size|[acm]time|[acm]min|newer|empty|perm|user|group|uid|gid|inum|links"
    r"|samefile|nouser|nogroup|used|xtype|type l)(?!\w* \*$)"
)
# Lines of one command that are recognized by their text alone: what matches first, and what does not matter then.
LINES = [
    (
        r"(shutdown|reboot|poweroff|halt)\b|(init|telinit) [06]\b|(systemctl|loginctl) (-\S+ )*((start|isolate) )?"
        r"(poweroff|reboot|halt|kexec|rescue|emergency)\b",
        r"--help|--version|--show|--wtmp-only| -[a-z]*[ckw]\b",
        "shuts down or restarts the machine",
    ),
    (r"crontab (.*-[a-z]*r|/dev/null)", r"--help", "deletes all scheduled jobs of a user (crontab -r)"),
    (
        r"ip6?tables .*(-[FX]\b|--flush\b|(-P|--policy) \w+ DROP\b)|nft (flush|delete) "
        r"(ruleset|table)|ufw (--force )?(reset|disable)\b",
        r"--help",
        "removes firewall rules or blocks all connections",
    ),
    (r"(userdel|deluser) .*(-[a-z]*r[a-z]*\b|--remove)", r"--help", "deletes a user with the home folder"),
    (
        r"kill .*(?<=\s)-1$|killall5|(pkill|killall) .*(-u ?root$| \.\*?$)",
        r"kill -1$|kill -[ls] -1$",
        "ends every process that it may end",
    ),
    (
        r"kill (-9|-KILL|-SIGKILL|-s \w+) (.* )?1$|(pkill|killall) .* (init|systemd)$",
        r"--help",
        "ends the first process of the system (init)",
    ),
    (
        r"(docker|podman) (system|volume|builder|container|image|network) prune|docker(-| )compose .*down .*(-v\b|"
        r"--volumes)|(docker|podman) ((container )?rm|rmi|volume rm) (.*\ue007|-[a-z]*a|--all)",
        r"--help",
        "deletes containers, images or volumes with their data",
    ),
    (
        r"kubectl (-.* )?delete (.*--all(?![\w-])|(--\S+ )*(ns|namespaces?)[ /])|terraform destroy"
        r"|aws s3 r[mb] .*(--recursive|--force)|gsutil .*rm .*-[a-z]*r",
        r"--help|--dry-run",
        "deletes resources of a cluster or in the cloud",
    ),
    (
        r"(mkfs|mke2fs|newfs|mkswap)\S* .*(/dev/|\ue007\S*$)",
        r"--help|--version|(mke2fs|mkfs(\.| -t )ext\d) (.* )?-[a-z]*n |(mkfs\.xfs|newfs) (.* )?-N ",
        "formats a device, which erases its data",
    ),
    (
        rf"(bsd)?tar.* (-?\w*f ?|--file[ =]){DEVICE.pattern}",
        r"tar -?\w*[tx]| -[tx]|--(list|extract|get)",
        "writes directly to a device",
    ),
    (
        r"(nwipe|scrub|srm|wipe) ",
        r"--help|--version| -[hV]$|scrub (-X|--freespace)",
        "overwrites data so that it cannot be recovered",
    ),
    (r"shred ", r"--help|--version", "overwrites files so that they cannot be recovered (shred)"),
    (r"wipefs .*(-[a-z]*[ao]|--all|--offset)", r"--help|--no-act|wipefs .*-[a-z]*n", "erases signatures of a device"),
    (
        r"blkdiscard /|badblocks .*-[a-z]*w|hdparm .*--security-erase|nvme (format|sanitize)|cryptsetup .*(luksFormat|"
        r"erase|luksErase)|(pv|vg|lv)remove |(zpool|zfs) destroy|mdadm .*--zero-superblock|diskutil (erase|zero|"
        r"partition)\w+",
        r"--help|--test|zfs destroy (.* )?-[a-zA-Z]*n",
        "erases a device or volume",
    ),
    (
        r"(apt|apt-get|aptitude|yum|dnf|zypper|pacman) .*(remove|purge|erase|-R\w*) (.* )?(apt|bash|coreutils|dpkg|"
        r"glibc|kernel|libc6|linux|linux-image\S*|systemd|\ue001|\*)( |$)|rpm .*--nodeps|dpkg .*--force-(all|remove-"
        r"essential)",
        r"--help|--simulate|--dry-run",
        "removes packages that the system needs",
    ),
    (
        r"(perl|sed) (.* )?(-[a-z0-9E]*i|--in-place)\S* (.*/etc/(passwd|shadow|group|gshadow|sudoers)( |$)|"
        r"(-e )?(1,\ue000)?d /etc/)|ln .*-\w*f\w* .*\S /etc/(crypttab|fstab|g?shadow|group|hosts|passwd|sudoers)$",
        r"--help",
        "overwrites a file that the system depends on",
    ),
    (r"dropdb \S|mysqladmin .*\bdrop\b", r"--help", "deletes a database"),
    (
        r"(nc|ncat|netcat) .*(-[a-z]*[ec] |--exec|--sh-exec)|socat .*(?i:exec|system):(\S*/)?(ba|c|da|k|z)?sh\b",
        r"--help",
        "opens a shell for another machine",
    ),
]
STATEMENTS = re.compile(
    r"\b(drop\s+(database|schema|table|user)\b|truncate\s+(table\s+)?\w|delete\s+from\s+[\w.`\"]+\s*(;|$)"
    r"|flushall|flushdb|dropDatabase\(|\.drop\(\))",
    re.IGNORECASE,
)


def find_dangers(command: str) -> list[str]:
    """Return why a command line is dangerous; nothing if no danger is recognized.

    Args:
        command (`str`): One or several lines for a POSIX shell. Wrappers such as `sudo`, strings for other shells,
            substitutions and quotation marks are looked through.

    Returns:
        `list[str]`: Ends of sentences, such as `"deletes the whole file system (/)"`.
    """
    return list(dict.fromkeys(_find(command)))


@dataclass
class _Line:
    """What is known while the commands of a line are read from left to right."""

    text: str
    depth: int
    upstream: list[list[str]] = field(default_factory=list)  # commands of the pipeline before
    variables: dict[str, list[str]] = field(default_factory=dict)
    folder: str = "."
    downloads: set[str] = field(default_factory=set)  # names of files and variables


def _find(text: str, depth: int = 0, upstream=None, positional=()) -> Iterator[str]:
    if depth > MAX_DEPTH:
        return
    yield from _find_endless_processes(text)
    line = _Line(text, depth, upstream or [], variables={"HOME": ["~"], "PWD": ["."], "IFS": [" "]})
    line.variables |= {str(number): [word] for number, word in enumerate(positional)}
    is_piped_to_group = re.search(r"\|&?\s*[({]", QUOTATION.sub("''", text))
    for number, command in enumerate(parse_commands(text)):
        if number and command.operator != "|" and not is_piped_to_group:
            line.upstream = []
        if command.operator in (";", "||", "&") and line.folder != ".":
            line.folder = "." if line.folder != "/" else "/"  # the change of folder may have failed
        words = [one for word in command.words for one in expand_word(word.text, line.variables)]
        yield from _check_substitutions(command, words, line)
        yield from _check_redirections(command, words, line)
        words = _assign_variables(words, line, is_download=any(map(_has_download, command.words)))
        if words:
            yield from _check_command(words, line)
            _note_download(words, command, line)
        line.upstream = [*line.upstream, words]


def _assign_variables(words, line, is_download):
    """Note values of variables; return the words after them."""
    if words[:1] == ["for"] and words[2:3] == ["in"]:
        line.variables[words[1]] = words[3:]
        return []
    start = 1 if words[:1] and words[0] in ("export", "local", "declare", "readonly") else 0
    while len(words) > start and (match := re.match(r"(\w+)=(.*)", words[start], re.DOTALL)):
        if match[2]:
            line.variables[match[1]] = [match[2]]
        if is_download:
            line.variables.pop(match[1], None)
            line.downloads.add(f"\ue007{match[1]}\ue008")
        words = [*words[:start], *words[start + 1 :]]
    return words


# Find what is run


def _check_command(words: list[str], line: _Line) -> Iterator[str]:
    words = unwrap(words) or (["sh"] if words[:1] == ["sudo"] else [])
    if not words:
        return
    program, arguments = program_name(words[0]), words[1:]
    plain = [unquote(word) for word in arguments]
    if program in CHECKS:
        yield from CHECKS[program](arguments, line)
    yield from _check_lines(program, arguments)
    yield from _check_strings(program, arguments, line)
    yield from _check_input(program, plain, line)
    if DATABASES.match(program) and STATEMENTS.search(" ".join(plain)):
        yield LOST_DATA
    if re.match(r"(drop|truncate|delete)$", program, re.IGNORECASE) and STATEMENTS.search(" ".join([program, *plain])):
        yield LOST_DATA
    if _runs_download(program, words, line):
        yield "runs a program that it downloads from the network"


def _check_lines(program, arguments):
    line = " ".join([program, *arguments])
    for pattern, harmless, reason in LINES:
        if re.match(pattern, line) and not re.search(harmless, line):
            yield reason


def _check_strings(program, arguments, line):
    """Look into strings that are commands for another shell or code of another language."""
    plain = [unquote(word) for word in arguments]
    if program in SHELLS:
        for number, word in enumerate(plain[:-1]):
            if re.match(r"-[a-z]*c$", word):
                yield from _find(plain[number + 1], line.depth + 1, line.upstream, arguments[number + 2 :])
        return
    if program == "eval":
        codes = [" ".join(plain)]
    elif program == "trap":
        codes = plain[:1]
    elif program == "script":
        codes = [plain[number + 1] for number, word in enumerate(plain[:-1]) if re.match(r"-[a-z]*c$", word)]
    elif program in ("docker", "kubectl", "podman") and plain[:1] == ["exec"]:
        yield from _check_command(skip_options(skip_options(arguments[1:], "cenuw")[1:], ""), line)
        return
    elif program == "alias":
        codes = [word.partition("=")[2] for word in plain]
    elif program == "ssh":
        codes = [" ".join(skip_options(plain, SSH_OPTIONS)[1:])]
    elif program == "tmux":
        runs = re.match(r"new|split|respawn|run|send", " ".join(plain[:1]))
        codes = [" ".join(skip_options(plain[1:], "Fcenstxy"))] if runs else []
    elif program == "parallel":
        code, _, values = " ".join(skip_options(plain, PARALLEL_OPTIONS)).partition(":::")
        codes = [code.replace("{}", values) if "{}" in code else f"{code} {values}"]
        if not values:  # the values are the lines of the input, as those of `xargs`
            yield from _check_xargs(code.split(), line)
    elif INTERPRETERS.fullmatch(program) or program in ("awk", "gawk", "mawk"):
        yield from _check_code(" ".join(plain), line)
        return
    else:
        return
    for code in codes:
        yield from _find(code, line.depth + 1, line.upstream)


def _check_code(code, line):
    if match := re.search(r"(?:rmtree|remove_tree|rm_rf|rmSync|remove_dir_all)\(?\s*['\"]([^'\"]+)['\"]", code):
        yield from _find(f"rm -rf {match[1]}", line.depth + 1)
    if match := re.search(r"\b(?:remove|unlink\w*)\(?\s*['\"]([^'\"]+)['\"]", code):
        yield from _find(f"rm {match[1]}", line.depth + 1)
    if re.search(r"\bfork\b.*\b(while|for)\b|\b(while|loop)\b.*\bfork\b", code, re.DOTALL):
        yield FORK_BOMB
    if re.search(r"\b(exec|eval)\b.*(urlopen|requests\.get|LWP|open-uri|http\.get|fetch\()", code, re.DOTALL):
        yield UNSEEN_CODE
    if re.search(r"\b(system|popen|exec\w*|run|call|Popen|check_\w+|getoutput|shell script)\b", code):
        for string in re.findall(r"'([^']+)'|\"([^\"]+)\"", code):
            yield from _find(string[0] or string[1], line.depth + 1)


def _check_substitutions(command: Command, words, line):
    """Look into `$(...)`, and find downloads and printed text that are run."""
    unwrapped = unwrap(words)
    program = program_name(unwrapped[0]) if unwrapped else ""
    runs_text = _runs_files(program) or program == "eval" or program.startswith("\ue007")
    targets = [target for operator, target in command.redirections if operator in ("<", "<<<")]
    for word in [*command.words, *(target for _, target in command.redirections)]:
        for substitution in word.substitutions:
            yield from _find(substitution, line.depth + 1)
            if runs_text and (word in command.words or word in targets):
                yield from _check_run_output(substitution, line)
    has_code = program == "eval" or any(re.fullmatch(r"-\w*[ce]", word) for word in unwrapped)
    code = unwrapped if has_code else unwrapped[:2]
    if runs_text and any(name in word for name in line.downloads if "\ue007" in name for word in code):
        yield UNSEEN_CODE


def _check_run_output(substitution, line):
    """Find what is wrong with running the output of a command."""
    if _has_download(Word(substitutions=[substitution])):
        yield UNSEEN_CODE
    stages = [
        [one for word in command.words for one in expand_word(word.text, {})]
        for command in parse_commands(substitution)
    ]
    stages = [words for words in map(unwrap, stages) if words]
    if any(map(_is_decoder, stages)):
        yield DECODED_CODE
    for text in _printed_texts(stages):
        yield from _find(text, line.depth + 1)


def _is_decoder(words):
    return DECODERS.match(" ".join(map(unquote, [program_name(words[0]), *words[1:]]))) is not None


def _runs_files(program):
    return program in SHELLS or program in ("source", ".") or INTERPRETERS.fullmatch(program) is not None


def _has_download(word, depth=0):
    """Return whether a command in a word reads from the network."""
    for substitution in word.substitutions if depth <= MAX_DEPTH else ():
        for command in parse_commands(substitution):
            words = unwrap([one for word in command.words for one in expand_word(word.text, {})])
            if words and program_name(words[0]) in NETWORK:
                return True
            if any(_has_download(inner, depth + 1) for inner in command.words):
                return True
    return False


def _check_input(program, arguments, line):
    """Find text from a pipe that a shell or a database runs."""
    if not line.upstream:
        return
    upstream = [unwrap(words) for words in line.upstream]
    upstream = [words for words in upstream if words]
    if DATABASES.match(program) and any(STATEMENTS.search(text) for text in _printed_texts(upstream)):
        yield LOST_DATA
    if program == "crontab" and arguments[-1:] == ["-"] and not re.search(r"\bcrontab\b[^|;&]* -l", line.text):
        yield "replaces all scheduled jobs of a user"
    if not _reads_code(program, arguments):
        return
    if any(program_name(words[0]) in NETWORK or line.downloads & {"".join(words[-1:])} for words in upstream):
        yield UNSEEN_CODE
    if any(map(_is_decoder, upstream)):
        yield DECODED_CODE
    for text in _printed_texts(upstream):
        yield from _find(text, line.depth + 1)


def _printed_texts(upstream):
    for words in upstream:
        if program_name(words[0]) in ("echo", "printf"):
            yield unquote(" ".join(word for word in words[1:] if not re.fullmatch("-[neE]+", word)))


def _reads_code(program, arguments):
    """Return whether a program runs what it reads from standard input."""
    if program == "xargs":
        inner = skip_options(arguments, XARGS_OPTIONS)
        is_shell = inner and program_name(inner[0]) in SHELLS and "-c" in inner
        return bool(is_shell) and (inner[-1] == "-c" or inner[inner.index("-c") + 1] in ("{}", "%"))
    if program in ("at", "batch"):
        return "-f" not in arguments
    if program == "parallel":
        return not skip_options(arguments, PARALLEL_OPTIONS)
    if program in ("source", "."):
        return arguments[:1] in (["/dev/stdin"], ["-"])
    if program == "ssh":
        return len(skip_options(arguments, SSH_OPTIONS)) == 1
    if program in SHELLS:
        if any(re.match(r"-[a-z]*c$", word) for word in arguments):
            return False
        operands = skip_options(arguments, "oO")
        is_from_input = any(re.fullmatch("-[a-z]*s[a-z]*", word) for word in arguments)
        return is_from_input or program == "su" or operands[:1] in ([], ["-"], ["/dev/stdin"])
    if INTERPRETERS.fullmatch(program):
        if any(re.match(r"-\w*[cemEnprR]|--(eval|print|run)", word) for word in arguments):
            return False
        return skip_options(arguments, "WX")[:1] in ([], ["-"], ["/dev/stdin"])
    return False


def _note_download(words, command, line):
    """Note the name of the file that a command downloads to."""
    words = list(map(unquote, unwrap(words)))
    if not words:
        return
    names = [target.text for operator, target in command.redirections if operator in (">", ">>")]
    is_piped = any(program_name(unwrap(one)[0]) in NETWORK for one in line.upstream if unwrap(one))
    if program_name(words[0]) == "read" and is_piped:
        names += [f"\ue007{word}\ue008" for word in words[1:]]
    elif program_name(words[0]) == "tee" and is_piped:
        names += words[1:]
    elif program_name(words[0]) not in NETWORK:
        return
    for number, word in enumerate(words[1:], 1):
        before = words[number - 1]
        if re.fullmatch(r"-\w*[oO]|--output(-document)?", before) and not (
            before.endswith("O") and "curl" in words[0]
        ):
            names.append(word)
        elif match := re.match(r"--output(?:-document)?=(.+)", word):
            names.append(match[1])
        elif "://" in word or not word.startswith("-"):
            name = word.partition("?")[0].rpartition("/")[2]
            folders = [words[i + 1] for i, one in enumerate(words[:-1]) if one in ("-P", "--directory-prefix")]
            names += [name, *(f"{folder}/{name}" for folder in folders)]
    line.downloads |= {name.removeprefix("./") for name in names if name not in ("", "-", "/dev/null")}


def _runs_download(program, words, line):
    names = [unquote(word).removeprefix("./") for word in words]
    if names[0] in line.downloads and ("/" in words[0]):
        return True
    operands = [word for word in names[1:] if not word.startswith("-")]
    return _runs_files(program) and any(name in line.downloads for name in operands[:1])


def _find_endless_processes(text):
    """Find functions and scripts that call themselves in the background, and loops that never wait."""
    text = QUOTATION.sub("''", text)
    text = re.sub(r"(?m)(?<!\S)#.*", "", text)
    for match in re.finditer(r"(?:function\s+)?([^\s(){};|&'\"$]+)\s*(?:\(\s*\))?\s*\{([^}]*)\}", text):
        name = rf"\s*{re.escape(match[1])}(?![\w./:-])"
        call = rf"(?:^|[;&|({{\n]|\b(?:do|else|then)\s){name}"
        is_function = "(" in match[0] or match[0].startswith("function")
        if is_function and re.search(rf"{call}[^;]*[|&]|[|&]{name}", match[2].replace("&&", ";")):
            yield FORK_BOMB
    if re.search(r"\$0\"?\s*[|&]\s*(\.?/?\"?\$0)", text):
        yield FORK_BOMB
    loops = re.finditer(
        r"(?:while\s+(?:true|:|1|\[\s*1\s*\])|until\s+false|for\s*\(\(\s*;\s*;\s*\)\))\s*;?\s*do\b(.{0,500}?)\bdone",
        text,
    )
    if any(
        re.search(r"(?<![&>])&(?![&>\d])", one[1]) and not re.search(r"\b(sleep|wait)\b[^&;|]*(;|$)", one[1])
        for one in loops
    ):
        yield FORK_BOMB


# Check what is deleted or overwritten


def _check_redirections(command, words, line):
    words = unwrap(words)
    program = program_name(words[0]) if words else ""
    for operator, target in command.redirections:
        if operator in ("<<", "<<<"):
            if _reads_code(program, list(map(unquote, words[1:]))):
                yield from _find(unquote(target.text), line.depth + 1)
            elif DATABASES.match(program) and STATEMENTS.search(target.text):
                yield LOST_DATA
        elif program in SHELLS and target.text.startswith(("/dev/tcp/", "/dev/udp/")):
            yield "opens a shell for another machine"
        elif operator in (">", ">>"):
            for path in expand_word(target.text, line.variables):
                yield from _check_written(path, line, appends=operator == ">>")


def _check_written(path, line, appends=False, in_trees=True):
    if DEVICE.match(path):
        yield f"writes directly to a device ({_show(path)})"
    elif not appends:
        file = find_critical_file(path, line.folder, in_trees)
        if file and not file.startswith("/usr/"):  # where programs are installed
            yield f"overwrites {_show(file)}"
        elif re.match(r"/(private/)?var/log(/|$)", normalize_path(path, line.folder) if path else ""):
            yield f"empties a log of the system ({_show(path)})"


def _show(path):
    return unquote(UNKNOWN.sub(r"$\1", path))


def _split_arguments(arguments, with_value=""):
    """Return the options, as single letters and long names, and the other arguments."""
    options, operands = set(), []
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        if word == "--":
            operands += remaining
            break
        if word.startswith("--"):
            options.add(word[2:].partition("=")[0])
        elif word.startswith("-") and len(word) > 1:
            options |= set(word[1:])
            if word[-1] in with_value:
                remaining = remaining[1:]
        else:
            operands.append(word)
    return options, operands


def _has(options, letters, *names):
    """Return whether an option is given; long names may be abbreviated."""
    is_named = any(len(option) > 1 and name.startswith(option) for option in options for name in names)
    return is_named or any(letter in options for letter in letters)


def _check_rm(arguments, line):
    options, paths = _split_arguments(arguments)
    if "no-preserve-root" in options:
        yield "switches off the protection of the root folder (--no-preserve-root)"
    is_recursive = _has(options, "rR", "recursive")
    for path in paths:
        found = find_critical_path(path, line.folder)
        if found and (is_recursive or (found.is_contents and found.kind in ("system", "home"))):
            yield f"deletes {found.label}"
        elif file := find_critical_file(path, line.folder):
            yield f"deletes {_show(file)}"
        elif DEVICE.match(path) or SYSTEM_LOG.match(path):
            yield f"deletes {_show(path)}"


def _check_permissions(arguments, line):
    options, operands = _split_arguments(arguments)
    mode = operands[0] if operands else ""
    is_open = re.fullmatch(r"0+|[0-7]*[2367]|([ugo]*[oa][ugoa]*|)[+=]\w*w\w*|a?-[rwx]+", mode) is not None
    for path in operands:
        found = find_critical_path(path, line.folder)
        is_wrong = found and (is_open or (_has(options, "R", "recursive") and not REPAIRED.match(found.label)))
        if is_wrong and found.kind in ("system", "home"):
            yield f"changes permissions of {found.label}"
        elif is_open and (file := find_critical_file(path, line.folder)):
            yield f"changes permissions of {_show(file)}"


def _check_owner(arguments, line, changed="the owner"):
    options, operands = _split_arguments(arguments)
    for path in operands if _has(options, "R", "recursive") else ():
        found = find_critical_path(path, line.folder)
        if found and found.kind == "system" and not REPAIRED.match(found.label):
            yield f"changes {changed} of {found.label}"


def _check_find(arguments, line):
    arguments = [word for word in arguments if word not in ("-H", "-L", "-P")]
    end = next((number for number, word in enumerate(arguments) if word[:1] in ("-", "(", "!")), len(arguments))
    end = next((number for number, word in enumerate(arguments[:end]) if unquote(word) in ("(", "!")), end)
    roots, tests = arguments[:end] or ["."], arguments[end:]
    is_filtered = False
    for number, word in enumerate(tests):
        if word == "-delete":
            yield from _check_found(roots, is_filtered, line)
        elif word in ("-exec", "-execdir"):
            stop = next((i for i, one in enumerate(tests) if i > number and unquote(one) in (";", "+")), len(tests))
            command = unwrap(tests[number + 1 : stop])
            if command and program_name(command[0]) in DELETERS and "{}" in command:
                yield from _check_found(roots, is_filtered, line)
            elif command:
                if program_name(command[0]) in ("chgrp", "chown"):
                    command = [command[0], "-R", *command[1:]]
                words = [one for word in command for one in _replace_braces(word, ["x"] if is_filtered else roots)]
                yield from _check_command(words, _inner(line))
        is_filtered |= FILTERS.match(unquote(" ".join(tests[number : number + 2]))) is not None


def _replace_braces(word, roots):
    return [word.replace("{}", root) for root in roots] if "{}" in word else [word]


def _check_found(roots, is_filtered, line):
    for root in roots:
        found = find_critical_path(root, line.folder)
        if found and (not is_filtered or ALL_FILES_MATTER.match(found.label)):
            yield f"deletes files in {found.label}"


def _inner(line):
    """What is known to a command that another one runs."""
    return _Line(line.text, line.depth + 1, variables=line.variables, folder=line.folder)


def _check_xargs(arguments, line):
    command = unwrap(skip_options(arguments, XARGS_OPTIONS))
    if not command:
        return
    inner = _inner(line)
    yield from _check_command(command, inner)
    producer = unwrap(line.upstream[0]) if line.upstream else []
    name, text = program_name(producer[0]) if producer else "", " ".join(producer)
    if name in ("echo", "printf", "ls") and len(line.upstream) == 1:
        operands = [word for word in producer[1:] if not word.startswith("-")]
        words = [word.replace("\\n", "").strip() for word in operands]
        if name == "ls":
            words = [f"{word.rstrip('/')}/*" for word in words if not re.search(r"[*?]", word)] or words or ["*"]
        yield from _check_command([*(word for word in command if word not in ("{}", "%")), *words], inner)
    elif (
        name in ("", "cat")
        and program_name(command[0]) == "rm"
        and _has(_split_arguments(command)[0], "rR", "recursive")
    ):
        yield "deletes everything that a list names (xargs rm -r)"
    elif name in ("docker", "podman") and len(line.upstream) == 1 and not re.search(" (-[a-z]*f|--filter)", text):
        yield from _check_command([*command, "\ue007\ue008"], inner)
    elif name == "find" and program_name(command[0]) in DELETERS:
        tests = [*producer[1:], *(["-name"] if len(line.upstream) > 1 else []), "-delete"]
        yield from _check_find(tests, inner)


def _check_mv(arguments, line):
    operands = _split_arguments(arguments, "tS")[1]
    if operands[-1:] == ["/dev/null"]:
        yield "replaces /dev/null or loses a file there (mv to /dev/null)"
    for path in operands[:-1]:
        found = find_critical_path(path, line.folder)
        if found and (found.kind == "system" or (found.kind == "home" and not found.is_contents)):
            yield f"moves {found.label}"
        elif file := find_critical_file(path, line.folder):
            yield f"moves {_show(file)}"
    yield from _check_copy(arguments, line)


def _check_copy(arguments, line):
    operands = _split_arguments(arguments, "tS")[1]
    if len(operands) > 1:
        yield from _check_written(operands[-1], line, in_trees=operands[:-1] == ["/dev/null"])


def _check_tee(arguments, line):
    options, paths = _split_arguments(arguments)
    for path in paths:
        yield from _check_written(path, line, appends=_has(options, "a", "append"))


def _check_truncate(arguments, line):
    for path in _split_arguments(arguments, "sro")[1]:
        yield from _check_written(path, line)


def _check_dd(arguments, line):
    for word in arguments:
        if word.startswith("of="):
            yield from _check_written(word[3:], line)


def _check_download(arguments, line, letter):
    for option, path in zip(arguments, [*arguments, ""][1:], strict=True):
        if match := re.fullmatch(rf"-\w*{letter}|--output(?:-document)?(?:=(.*))?", option):
            yield from _check_written(match[1] or path, line, in_trees=False)


def _check_partitioning(arguments, line, letters="lLhVJv", name="list"):
    options, operands = _split_arguments(arguments)
    is_reading = _has(options, letters, name, "list", "dump", "json", "help", "version", "print", "info", "verify")
    devices = [path for path in operands if re.search("/dev/|\ue007", path)]
    if devices and not is_reading and "print" not in operands:
        yield f"changes the partitions of a device ({_show(devices[0])})"


def _check_rsync(arguments, line):
    options, operands = _split_arguments(arguments, "e")
    found = find_critical_path(operands[-1], line.folder) if operands else None
    deletes = any(option.startswith("del") for option in options) and not _has(options, "n", "dry-run")
    if found and found.kind != "here" and deletes:
        yield f"deletes files in {found.label}"


def _check_git(arguments, line):
    arguments = list(arguments)
    while arguments and arguments[0].startswith("-"):
        arguments = arguments[2 if arguments[0] in ("-C", "-c", "--git-dir", "--work-tree") else 1 :]
    name, arguments = (arguments[0] if arguments else ""), arguments[1:]
    options, operands = _split_arguments(arguments, "o" if name == "push" else "")
    if name == "clean" and _has(options, "f", "force") and not _has(options, "n", "dry-run"):
        yield "deletes files that Git does not track (git clean)"
    elif name == "reset" and "hard" in options:
        yield "discards all changes that are not committed (git reset --hard)"
    elif name == "push" and ("f" in options or {"force", "mirror"} & options or any(o[:1] == "+" for o in operands)):
        yield "overwrites the history of a remote branch (git push --force)"
    elif name in ("checkout", "restore") and any(path in (".", ":/", "*") for path in operands):
        if not _has(options, "S", "staged") or _has(options, "W", "worktree"):
            yield f"discards changes that are not committed (git {name} .)"
    elif name in ("checkout", "switch") and _has(options, "f", "force", "discard-changes"):
        yield f"discards changes that are not committed (git {name} --force)"
    elif (name == "stash" and operands[:1] == ["clear"]) or (name == "reflog" and operands[:1] == ["expire"]):
        yield f"deletes saved changes (git {name} {operands[0]})"
    elif name in ("filter-branch", "filter-repo"):
        yield f"rewrites the history of the repository (git {name})"


def _check_cd(arguments, line):
    path = next((word for word in arguments if not word.startswith("-")), "~")
    line.folder = normalize_path(UNKNOWN.sub("", path), line.folder) if UNKNOWN.sub("", path) else "."
    return ()


CHECKS = {
    **dict.fromkeys(("rm", "srm", "unlink"), _check_rm),
    **{"find": _check_find, "xargs": _check_xargs, "chmod": _check_permissions},
    **dict.fromkeys(("chown", "chgrp"), _check_owner),
    "chattr": functools.partial(_check_owner, changed="the owner or attributes"),
    "setfacl": functools.partial(_check_owner, changed="permissions"),
    **{"mv": _check_mv, "cp": _check_copy, "install": _check_copy, "tee": _check_tee, "truncate": _check_truncate},
    **dict.fromkeys(("cfdisk", "cgdisk", "fdisk", "gdisk", "parted"), _check_partitioning),
    "sfdisk": functools.partial(_check_partitioning, letters="lLhVJvd"),
    "sgdisk": functools.partial(_check_partitioning, letters="lLhVvpib", name="backup"),
    "curl": functools.partial(_check_download, letter="o"),
    "wget": functools.partial(_check_download, letter="O"),
    **{"rsync": _check_rsync, "ddrescue": _check_copy},
    **{"dd": _check_dd, "git": _check_git, "cd": _check_cd, "pushd": _check_cd},
}

__all__ = ["find_dangers"]
