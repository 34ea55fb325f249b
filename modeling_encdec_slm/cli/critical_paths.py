# SPDX-License-Identifier: Apache-2.0
"""Paths that a person rarely means to delete, move or overwrite."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .shell_syntax import UNKNOWN


SYSTEM_FOLDERS = frozenset(
    {
        *("/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib32", "/lib64", "/media", "/mnt", "/opt", "/proc"),
        *("/root", "/run", "/sbin", "/srv", "/sys", "/usr", "/var", "/usr/bin", "/usr/include", "/usr/lib"),
        *("/usr/lib64", "/usr/local", "/usr/local/bin", "/usr/local/lib", "/usr/sbin", "/usr/share", "/var/lib"),
        *("/var/log", "/var/mail", "/var/spool", "/var/lib/docker", "/var/lib/dpkg", "/var/lib/mysql"),
        *("/var/lib/postgresql", "/var/lib/rpm", "/mnt/c", "/Applications", "/Library", "/System", "/Users"),
        *("/Volumes", "/private", "/private/etc", "/private/var", "/etc/ssh"),
    }
)
# Folders of programs and libraries, without those where users install and remove packages themselves.
PROGRAM_TREES = r"(usr/)?(s?bin|lib32|lib64|lib(?!/(jvm|node_modules)\b|/python[\d.]*/(\w+-packages/|EXTERNALLY)))"
# Everything below these counts too.
SYSTEM_TREES = re.compile(rf"/({PROGRAM_TREES}|boot|dev(?!/shm\b)|proc|sys|var/lib/(mysql|postgresql))/")
HOME_FOLDERS = frozenset(
    {
        *("~/.config", "~/.gnupg", "~/.local", "~/.ssh", "~/Desktop", "~/Documents", "~/Library", "~/Music"),
        *("~/Pictures", "~/Videos"),
    }
)
CRITICAL_FILES = frozenset(
    {
        *("/etc/crontab", "/etc/crypttab", "/etc/fstab", "/etc/group", "/etc/gshadow", "/etc/hosts", "/etc/passwd"),
        *("/etc/profile", "/etc/shadow", "/etc/ssh/sshd_config", "/etc/sudoers", "/proc/sysrq-trigger"),
        *("~/.bashrc", "~/.bash_history", "~/.bash_profile", "~/.profile", "~/.zshrc", "~/.zsh_history"),
        *("~/.ssh/authorized_keys", "~/.ssh/id_dsa", "~/.ssh/id_ecdsa", "~/.ssh/id_ed25519", "~/.ssh/id_rsa"),
        "/var/lib/dpkg/status",
    }
)
CRITICAL_FILE_TREES = re.compile(rf"/({PROGRAM_TREES}|boot)/")
# The home folder in which a path lies; `~` stands for it in the tables above.
HOME = re.compile(r"\A(/(home|Users)/[^/]+|/root)(?=/)")
DEVICE = re.compile(
    r"/dev/((sd|hd|vd|xvd)[a-zA-Z*?\[{]|nvme\d|nvme|mmcblk|r?disk\d|disk/|dm-|md\d|mapper/|loop\d|nbd\d|block/|sr\d"
    r"|k?mem$|port$|<|\ue007)"
)


@dataclass(frozen=True)
class CriticalPath:
    """What a critical path names.

    Args:
        label (`str`): For messages, such as `"the system folder /etc"`.
        kind (`str`): `"system"`, `"home"`, `"here"` (the current folder or above) or `"repository"`.
        is_contents (`bool`): Whether it is a pattern for everything in the folder.
    """

    label: str
    kind: str
    is_contents: bool


def find_critical_path(path: str, folder: str = ".") -> CriticalPath | None:
    """Return what an expanded path names if that is critical.

    Args:
        path (`str`): With `UNKNOWN` variables, which may be empty.
        folder (`str`, *optional*): The current folder; "." is not known.
    """
    names = UNKNOWN.findall(path)
    text = UNKNOWN.sub("", path)
    if not text:
        return None
    text = normalize_path(text, folder)
    is_contents = False
    while text not in ("/", ".") and _matches_everything(text.rpartition("/")[2]):
        is_contents = True
        text = text.rpartition("/")[0] or ("/" if text.startswith("/") else ".")
    found = _classify(text)
    if found is None or (found[1] == "here" and names and not is_contents):
        return None
    label, kind = found
    if names:
        label += f" if ${names[0]} is empty" if names[0] else " if the command in it prints nothing"
    return CriticalPath(label, kind, is_contents)


def normalize_path(path: str, folder: str = ".") -> str:
    """Remove `.`, `..` and repeated slashes where that is possible, and join relative paths to `folder`."""
    home = re.match(r"~[\w+-]*(?=/|$)", path)
    if home:
        path = ("." if home[0] == "~+" else "~") + path[home.end() :]
    if not path.startswith(("/", "~")) and folder != ".":
        path = f"{folder}/{path}"
    is_absolute = path.startswith("/")
    parts = []
    for part in path.split("/"):
        if part == ".." and parts and parts[-1] not in ("..", "~"):
            parts.pop()
        elif part not in ("", ".") and not (part == ".." and is_absolute):
            parts.append(part)
    if parts[:2] == ["~", ".."]:
        parts, is_absolute = ["home", *parts[2:]], True
    text = "/".join(parts)
    return f"/{text}" if is_absolute else text or "."


def _matches_everything(name):
    """Return whether a pattern is one like `*`, `.*`, `?*` or `[!.]*`."""
    pattern = re.sub(r"\[[^\]]+\]", "?", name)
    return re.fullmatch(r"\.?[?*]*\*[?*]*|\.\?{2,}", pattern) is not None


def _classify(path):
    if path == "/":
        return "the whole file system (/)", "system"
    if path == "~":
        return "the whole home folder (~)", "home"
    if re.fullmatch(r"/(home|Users)/[^/]+", path):
        return f"the home folder {path}", "home"
    if re.fullmatch(r"/[^/]*[*?\[][^/]*", path) or _matches_any(path, SYSTEM_FOLDERS):
        return f"the system folder {path}", "system"
    if SYSTEM_TREES.match(path):
        return path, "system"
    if _matches_any(HOME.sub("~", path), HOME_FOLDERS):
        return f"the folder {path}", "home"
    if re.fullmatch(r"\.\.(/\.\.)*", path):
        return f"the folder above ({path})", "here"
    if path == ".":
        return "the whole current folder", "here"
    if path == ".git" or path.endswith("/.git"):
        return f"the history of a Git repository ({path})", "repository"
    return None


def _matches_any(path, folders):
    if not re.search(r"[*?\[]", path):
        return path in folders
    return any(path.count("/") == folder.count("/") and fnmatchcase(folder, path) for folder in folders)


def find_critical_file(path: str, folder: str = ".", in_trees: bool = True) -> str | None:
    """Return the name of a file that the system or an account depends on, if a path names one.

    Args:
        path (`str`): With `UNKNOWN` variables.
        folder (`str`, *optional*): The current folder; "." is not known.
        in_trees (`bool`, *optional*): Count all files in folders such as /boot, where installers add files.
    """
    text = normalize_path(UNKNOWN.sub("", path), folder) if UNKNOWN.sub("", path) else ""
    if HOME.sub("~", text) in CRITICAL_FILES or (in_trees and CRITICAL_FILE_TREES.match(text)):
        return text
    return None


__all__ = ["DEVICE", "CriticalPath", "find_critical_file", "find_critical_path", "normalize_path"]
