# SPDX-License-Identifier: Apache-2.0
"""Find files that must not be published: secrets, paths of this machine, training states, and pickles."""

import json
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import format_list
from ..export_manifest import MANIFEST


SECRET_NAMES = (
    *(".env", ".env.*", "*.env", ".netrc", "_netrc", ".git-credentials", ".npmrc", ".pypirc", "credentials*"),
    *("token", "*.token", "stored_tokens", "secret*", "service_account*.json", "id_rsa*", "id_dsa*", "id_ecdsa*"),
    *("id_ed25519*", "*.pem", "*.key", "*.p12", "*.pfx", "*.kdbx"),
)
TRAINING_STATES = (
    *("optimizer*", "scheduler*", "rng_state*", "scaler.pt", "trainer_state.json", "training_args.*", "*.distcp"),
    *("pytorch_model_fsdp*", "global_step*", "random_states_*", "custom_checkpoint_*"),
)
# Weights of exports to CTranslate2 and OpenVINO GenAI.
EXPORT_WEIGHTS = ("model.bin", *(f"openvino_{name}.bin" for name in ("model", "tokenizer", "detokenizer")))
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.joblib", "*.dill")
SECRETS = {
    "a token of the Hub": rb"\bhf_(?:oauth_)?[A-Za-z0-9]{20,}",
    "a token of the Hub's API": rb"\bapi_org_[A-Za-z0-9]{20,}",
    "an AWS key": rb"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "an AWS secret": rb"(?i)aws_secret_access_key\W{1,4}[A-Za-z0-9/+=]{40}",
    "a private key": rb"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    "a token of GitHub": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22})",
    "a key of Google": rb"\bAIza[0-9A-Za-z_-]{35}\b",
    "a token of Slack": rb"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "an API key": rb"\bsk-(?:[a-z0-9]{2,8}-)*[A-Za-z0-9_]{32,}",
    "a key or password": rb"\b[A-Z0-9_]*(?:API_KEY|_TOKEN|SECRET|PASSWORD)['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9/+_-]{16,}",
}
# Weights, code and images: a match would be accidental, and searching would take long.
UNSEARCHED = ("*.safetensors", "*.onnx", "*.onnx_data", "*.bin", "*.py", "*.png", "*.jpg")
TEXTS_WITH_PATHS = ("*.json", "*.md", "*.yaml", "*.yml", "*.jinja")
# Their strings are tokens, which can look like paths.
VOCABULARIES = ("tokenizer.json", "vocab.json", "added_tokens.json", "shared_vocabulary.json", "*vocabulary.json")
# Paths below folders of a machine; others can be addresses on a server.
PATH_IN_TEXT = re.compile(
    r"(?<![\w.:/~-])(?:file://)?/(?:home|Users|root|tmp|var|mnt|media|data|opt|srv|work|workspace|scratch|content|"
    r"kaggle|private|gpfs|lustre|nfs|export|project|projects|Volumes)/[^\s\"'`)<>\]]+"
    r"|(?<!\w)~/[\w.-]+[^\s\"'`)<>\]]*"
    r"|(?<!\w)[A-Za-z]:[\\/]{1,2}(?:Users|Documents|home|data|work|temp|tmp)[\\/][^\s\"'`)<>\]]*"
)
PATH_AS_VALUE = re.compile(r"(?:file://|/|~[/\\]|[A-Za-z]:[\\/]|\\\\)[^\s<>{}]+")
PATH_IN_COMMAND = re.compile(r"(?P<before>^|[\s='\"(\[,])(?P<path>(?:file://|~|[A-Za-z]:)?[/\\][^\s'\",)\]]*)")
ADVICE = "Remove them, or name them in `leave_out`."


def refuse_unsafe_files(folder: Path, paths: Iterable[Path], is_repository: bool = False) -> None:
    """Refuse files that must not be published.

    Args:
        folder (`Path`): Names in the message are relative to it.
        paths (`Iterable[Path]`): Files, and folders, of which only the name is checked.
        is_repository (`bool`, *optional*, defaults to `False`): Whether these are the files to upload, and not the
            source.

    Raises:
        ValueError: A file has a secret or an absolute path, or is a training state or a pickle. The message names all
            of them.
    """
    found = [f"{path.relative_to(folder).as_posix()} ({problem})" for path in paths if (problem := find_problem(path))]
    if found:
        raise ValueError(
            f"{str(folder)!r} has files that must not be published: {format_list(found, 20)}. "
            + ("Nothing was uploaded." if is_repository else ADVICE)
        )


def find_problem(path: Path) -> str | None:
    """Return why a file must not be published, or `None`."""
    if _is_named(path, SECRET_NAMES) and not _is_named(path, ("*.py",)):
        return "a file with secrets: do not publish it, and replace the secret if it was shared"
    if _is_named(path, TRAINING_STATES) and not _is_named(path, ("*.safetensors", "*.py")):
        return "a training state, which is not needed to load the model"
    if not path.is_file():
        return None
    if is_pickle(path):
        return "a pickle, which can run code when it is loaded: save the weights as safetensors"
    return _find_problem_in_content(path)


def is_pickle(path: Path) -> bool:
    """Return whether a file is a pickle by its name or first bytes. The weights of an export are not."""
    with path.open("rb") as file:
        start = file.read(512)
    # A pickle of protocol 2 or later, or an archive of `torch.save`.
    if (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05") or (start[:2] == b"PK" and b"data.pkl" in start):
        return True
    is_export = path.name in EXPORT_WEIGHTS and (path.parent / MANIFEST).is_file()
    return _is_named(path, PICKLES) and not is_export


def _find_problem_in_content(path):
    if _is_named(path, UNSEARCHED):
        return None
    content = path.read_bytes()
    for secret, pattern in SECRETS.items():
        if re.search(pattern, content):
            return f"contains {secret}: remove it, and replace it wherever it is used"
    if _is_named(path, TEXTS_WITH_PATHS) and not _is_named(path, VOCABULARIES):
        place = next(_absolute_paths(path, content.decode(errors="replace")), None)
        return place and f"contains a path of this machine, {place}: replace it by a name on the Hub, or remove it"
    return None


def _absolute_paths(path, text) -> Iterator[str]:
    if path.suffix == ".json":
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        for key, value in _strings(content):
            # A slash and one name can be anything, except under such a key.
            if PATH_AS_VALUE.fullmatch(value) and (re.search(r"[/\\]", value[1:]) or re.search("path|dir|file", key)):
                yield f"`{key}`: {value!r}"
            elif match := PATH_IN_TEXT.search(value):
                yield f"`{key}`: {match[0]!r}"
        if content is not None:
            return
    for number, line in enumerate(text.splitlines(), start=1):
        if match := PATH_IN_TEXT.search(line):
            yield f"line {number}: {match[0]!r}"


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield str(name), str(name)
            yield from _strings(value, str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _strings(value, key)


def remove_local_paths(text: str) -> str:
    """Replace every absolute path in a text, such as a command, by its last part."""
    return PATH_IN_COMMAND.sub(lambda match: match["before"] + _last_name(match["path"]), text)


def _last_name(path):
    return re.split(r"[/\\]+", path.rstrip("/\\"))[-1] or path


def _is_named(path, patterns):
    return any(fnmatch(path.name.lower(), pattern) for pattern in patterns)
