# SPDX-License-Identifier: Apache-2.0
"""Readers of the sources of the shell task: tldr-pages (CC-BY-4.0), Fig's completion specs and NL2Bash (both MIT)."""

import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..data_files import read_data_file


@dataclass(frozen=True)
class ShellRow:
    """A request and its command.

    Args:
        source (`str`): The request.
        target (`str`): One line that `bash -n` accepts.
        origin (`str`): Such as `"tldr"`, `"fig"`, `"nl2bash"` or `"everyday"`.
    """

    source: str
    target: str
    origin: str


def read_tldr(path: str | Path) -> list[dict]:
    """Read the examples of all English tldr pages.

    Args:
        path (`str` or `Path`): Clone of tldr-pages, ZIP or tar archive of it, or JSON Lines file of its examples.

    Returns:
        `list[dict]`: With `platform`, `page`, `command`, `about`, `description` and `example`.

    Raises:
        ValueError: There are no pages.
    """
    path = Path(path)
    if ".jsonl" in path.name:
        return list(read_data_file(path))
    rows = []
    for name, text in sorted(_read_pages(path)):
        platform, page = name.split("/")[-2:]
        rows += _parse_page(platform, page.removesuffix(".md"), text)
    if not rows:
        raise ValueError(f"{str(path)!r} holds no tldr pages (pages/PLATFORM/COMMAND.md). Give a clone or an archive.")
    return rows


def _read_pages(path) -> Iterator[tuple[str, str]]:
    is_page = re.compile(r"(^|/)pages/[^/]+/[^/]+\.md$")
    if path.is_dir():
        for file in path.glob("pages/*/*.md"):
            yield file.as_posix(), file.read_text(encoding="utf-8")
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if is_page.search(name):
                    yield name, archive.read(name).decode("utf-8")
    elif path.is_file() and tarfile.is_tarfile(path):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isfile() and is_page.search(member.name):
                    yield member.name, archive.extractfile(member).read().decode("utf-8")


def _parse_page(platform, page, text):
    command = next((line[2:].strip() for line in text.splitlines() if line.startswith("# ")), page)
    about = [line[1:].strip() for line in text.splitlines() if line.startswith(">")]
    about = " ".join(line for line in about if not line.startswith(("More information", "See also", "Note")))
    examples = re.findall(r"^- (.+?):?\s*\n\s*\n`(.+)`\s*$", text, re.MULTILINE)
    common = {"platform": platform, "page": page, "command": command, "about": about}
    return [{**common, "description": description, "example": example} for description, example in examples]


# Loads the completion specs of a package in Node and prints one JSON object per command and option.
FIG_SCRIPT = """
import { readdirSync } from "node:fs";
import { pathToFileURL } from "node:url";
const list = (value) => (value === undefined || value === null ? [] : Array.isArray(value) ? value : [value]);
const args = (spec) => list(spec.args).map((arg) => ({
  name: arg.name ?? null, optional: !!arg.isOptional, variadic: !!arg.isVariadic, description: arg.description ?? null,
}));
const print = (row) => row.description && console.log(JSON.stringify(row));
function walk(spec, prefix, depth) {
  const [name, ...aliases] = list(spec.name);
  const command = prefix ? `${prefix} ${name}` : name;
  print({ command, aliases, description: spec.description, args: args(spec), kind: "command" });
  for (const option of list(spec.options))
    print({ command, option: list(option.name), description: option.description, args: args(option), kind: "option" });
  if (depth < 6) for (const subcommand of list(spec.subcommands)) walk(subcommand, command, depth + 1);
}
for (const file of readdirSync(process.argv[1]).filter((name) => name.endsWith(".js")).sort()) {
  try {
    const spec = (await import(pathToFileURL(`${process.argv[1]}/${file}`))).default;
    if (spec && typeof spec === "object") walk(spec, "", 0);
  } catch {}
}
"""


def read_fig(path: str | Path) -> list[dict]:
    """Read what each command and option of Fig's completion specs does.

    Args:
        path (`str` or `Path`): Folder of the npm package `@withfig/autocomplete`, which needs Node, or a JSON Lines
            file of its descriptions.

    Returns:
        `list[dict]`: With `command`, `description`, `args`, `kind` and, for options, `option`.

    Raises:
        ValueError: The specs cannot be read.
    """
    path = Path(path)
    if ".jsonl" in path.name:
        return list(read_data_file(path))
    folder = path / "build" if (path / "build").is_dir() else path
    command = ["node", "--input-type=module", "--eval", FIG_SCRIPT, str(folder.resolve())]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(f"The specs in {str(path)!r} cannot be read: Node failed ({error}).") from error
    return [json.loads(line) for line in finished.stdout.splitlines()]


def read_nl2bash(path: str | Path) -> list[ShellRow]:
    """Read NL2Bash's pairs.

    Args:
        path (`str` or `Path`): Folder with `all.nl` and `all.cm`, or a JSON Lines file with `source` and `target`. If
            `target` is a list of commands, the first is read.

    Raises:
        ValueError: The two files have different numbers of lines.
    """
    path = Path(path)
    if path.is_dir():
        sources, targets = ((path / name).read_text(encoding="utf-8").splitlines() for name in ("all.nl", "all.cm"))
        if len(sources) != len(targets):
            raise ValueError(f"all.nl of {str(path)!r} has {len(sources)} lines, but all.cm has {len(targets)}.")
        pairs = zip(sources, targets, strict=True)
    else:
        pairs = ((row["source"], _first(row["target"])) for row in list(read_data_file(path)))
    return [ShellRow(_one_line(source), _one_line(target), "nl2bash") for source, target in pairs]


def _first(target):
    return target[0] if isinstance(target, list) else target


def _one_line(text):
    return " ".join(text.split())
