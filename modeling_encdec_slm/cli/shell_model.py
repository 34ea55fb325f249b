# SPDX-License-Identifier: Apache-2.0
"""The shell model in CTranslate2, without torch or transformers: a first answer must not wait for their imports."""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .calibration import Calibration
from .console import print_status
from .shell_syntax import close_line, first_program, is_complete, list_programs, outline, quote_literals


# The file and the folder of exports, as in `encdec_slm.export_manifest`, which imports torch.
MANIFEST = "export_manifest.json"
FORMAT = "ctranslate2"
MODEL_TYPE = "encdec_slm"
# Files that decide what an export contains.
SOURCE_PATTERNS = ("config.json", "generation_config.json", "*.safetensors", "tokenizer*", "special_tokens_map.json")
# Counts up when exports of the same files become others.
CACHE_VERSION = b"1"
TEMPORARY_PREFIX = ".incomplete-"
STALE_SECONDS = 3600
# The first answer is the same for any number of answers up to this one.
NUM_BEAMS = 20
# More threads cost more time to start than they save for a model of this size.
NUM_THREADS = 1
MAX_NEW_TOKENS = 256
# Of a checkout, beside this package, and of an installed wheel.
DEFAULT_FOLDERS = (
    Path(__file__).resolve().parents[2] / "checkpoints" / "shell",
    Path(sys.prefix, "share", "encdec-slm", "shell"),
)


@dataclass(frozen=True)
class Answer:
    """A command and how likely it is.

    Args:
        command (`str`): One line.
        log_probability (`float`): Of all generated commands with the same programs and options, in nats.
        confidence (`float`, *optional*): Calibrated probability that it is right; `None` without a calibration.
    """

    command: str
    log_probability: float
    confidence: float | None


class ShellModel:
    """A text model that generates commands.

    Args:
        folder (`Path`): CTranslate2 export of this package.
        calibration ([`Calibration`], *optional*): Turns log-probabilities into confidences.

    Attributes:
        translator (`ctranslate2.Translator`): Runs the model.

    Raises:
        ValueError: The export has no tokenizer, or a file is damaged.
        ImportError: CTranslate2 is not installed.
    """

    def __init__(self, folder: Path, calibration: Calibration | None = None):
        import ctranslate2
        from tokenizers import Tokenizer

        self.calibration = calibration
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        self._settings, self._config = manifest["generation_config"], manifest["config"]
        if not (folder / "tokenizer.json").is_file():
            raise ValueError(
                f"{str(folder)!r} has no tokenizer.json, so it cannot read a request. Save a fast tokenizer beside "
                "the model."
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokens = json.loads((folder / "shared_vocabulary.json").read_text(encoding="utf-8"))
            self.translator = ctranslate2.Translator(str(folder), intra_threads=NUM_THREADS)
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"{str(folder)!r} cannot be loaded ({error}). Export the model again.") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._ids = {token: token_id for token_id, token in enumerate(self._tokens)}
        self.max_request_tokens = _read_max_length(folder, self._config)

    def encode(self, request: str) -> tuple[list[str], int]:
        """Return the tokens that the model reads, the first ones of a long request, and how many it has."""
        ids = self._tokenizer.encode(request).ids
        num_tokens, limit = len(ids), self.max_request_tokens
        if num_tokens > limit:
            num_special = num_tokens - len(self._tokenizer.encode(request, add_special_tokens=False).ids)
            ids = ids[: limit - num_special] + ids[num_tokens - num_special :]
        return [self._tokens[token_id] for token_id in ids], num_tokens

    def answer(self, request: str, num_answers: int = 1) -> list[Answer]:
        """Return up to `num_answers` commands, the most probable first.

        Commands differ in programs or options: of those that differ in arguments alone, the most probable one stands
        for all, and their probabilities are added. Commands with open quotation marks or brackets come last, and are
        closed. Those with a program that the model was not trained on, and that is not in the request, are left out
        if there are others. Names that have quotation marks in the request get them in the command.

        Args:
            request (`str`): In English.
            num_answers (`int`, *optional*, defaults to 1): At least 1.
        """
        num_beams = max(NUM_BEAMS, num_answers)
        (result,) = self.translator.translate_batch(
            [self.encode(request)[0]],
            beam_size=num_beams,
            num_hypotheses=num_beams,
            length_penalty=0,  # the probability of a command, not its mean per token
            max_decoding_length=self._max_new_tokens(),
            max_input_length=0,
            return_scores=True,
            return_end_token=True,
            **self._end_tokens(),
        )
        groups: dict[tuple, dict[str, float]] = {}
        for tokens, log_probability in zip(result.hypotheses, result.scores, strict=True):
            if command := self._decode(tokens):
                group = groups.setdefault(outline(command), {})
                group[command] = group.get(command, 0.0) + math.exp(log_probability)
        answers = [self._build_answer(group, request) for group in groups.values()]
        # A confidence of 0 means a program that is not known.
        answers = [answer for answer in answers if answer.confidence != 0] or answers
        answers.sort(key=lambda answer: (not is_complete(answer.command), -answer.log_probability))
        return [replace(answer, command=close_line(answer.command)) for answer in answers[:num_answers]]

    def _build_answer(self, probabilities, request):
        """Build the answer that stands for commands with these probabilities."""
        log_probability = math.log(max(math.fsum(probabilities.values()), sys.float_info.min))
        command = max(probabilities, key=probabilities.get)
        programs = () if self.calibration is None else self.calibration.programs
        if self.calibration is None:
            confidence = None
        elif programs and not all(name in programs or name in request for name in list_programs(command)):
            confidence = 0.0
        else:
            confidence = self.calibration.confidence(log_probability, first_program(command))
        return Answer(quote_literals(command, request, programs), log_probability, confidence)

    def _max_new_tokens(self):
        limit = self._settings.get("max_new_tokens") or (self._settings.get("max_length") or MAX_NEW_TOKENS) - 1
        return max(1, min(limit, MAX_NEW_TOKENS))

    def _end_tokens(self):
        end = self._settings.get("eos_token_id")
        return {} if end is None else {"end_token": end if isinstance(end, list) else [end]}

    def _decode(self, tokens):
        """Return the first line of a command, without characters that a terminal would obey."""
        text = self._tokenizer.decode([self._ids[token] for token in tokens], skip_special_tokens=True)
        line = next((line for line in text.splitlines() if line.strip()), "")
        return "".join(character for character in line if character.isprintable()).strip()


def _read_max_length(folder, config):
    """Return the longest source, in tokens: that of the tokenizer if it has one, else that of the model."""
    try:
        declared = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"]
    except (OSError, ValueError, KeyError):
        declared = config["max_position_embeddings"]
    return min(declared, config["max_position_embeddings"])


def load_shell_model(name: str | None = None) -> ShellModel:
    """Load a shell model; convert it first if that has not been done before.

    Args:
        name (`str`, *optional*): Folder of a model or of its CTranslate2 export, or a name on the Hub. `None` is the
            model of this checkout or installation.

    Raises:
        ValueError: There is no such model, or it is none that generates commands from text.
        ImportError: CTranslate2 is not installed.
    """
    import ctranslate2  # noqa: F401  before a conversion, which would take seconds

    folder = find_model_folder(name)
    with _find_export(folder) as export:
        return ShellModel(export, Calibration.load(export, folder))


def find_model_folder(name: str | None) -> Path:
    """Return the local folder of a model; a name on the Hub is downloaded first."""
    if name is None:
        folder = next((folder for folder in DEFAULT_FOLDERS if (folder / "config.json").is_file()), None)
        if folder is None:
            raise ValueError(
                f"No shell model is installed: {' and '.join(map(str, DEFAULT_FOLDERS))} do not exist. Give the "
                "folder or the Hub name of one as --model."
            )
        return folder
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"{name!r} is neither a folder nor a name on the Hub. Give the folder of a shell model, or a name such as "
            "'user/model'."
        ) from None
    with contextlib.suppress(Exception):  # a name that is none, or that is not in the cache; explained below
        return Path(snapshot_download(name, local_files_only=True))
    from encdec_slm.checkpoints import find_checkpoint_folder

    return find_checkpoint_folder(name)


# Convert


@contextlib.contextmanager
def _find_export(folder: Path) -> Iterator[Path]:
    """Yield the CTranslate2 export of a model: its own, the one in the cache, or a new one."""
    for export in (folder, folder / FORMAT):
        if _is_export(export):
            yield export
            return
    _check_text_model(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "encdec_slm")
    export = cache / f"{FORMAT}-{_hash_files(folder)}"
    if _is_export(export):
        yield export
        return
    print_status(f"Converting {folder} to CTranslate2. This takes some seconds, once.")
    try:
        _write_export(folder, cache, export)
    except OSError as error:
        reason = error.strerror or error
        print_status(
            f"{cache} cannot be written ({reason}), so this is repeated. Set XDG_CACHE_HOME to another folder."
        )
        with tempfile.TemporaryDirectory() as temporary:
            yield _export(folder, Path(temporary, FORMAT))
        return
    yield export


def _check_text_model(folder):
    path = folder / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        raise ValueError(
            f"{str(folder)!r} has no readable config.json. Give the folder of a shell model, such as one that "
            "`encdec-slm finetune` wrote."
        ) from None
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"{str(folder)!r} is a model of type {model_type!r}, but {MODEL_TYPE!r} is required. Give the folder of a "
            "shell model."
        )


def _is_export(folder):
    """Return whether all files of a CTranslate2 export of this package are there, with their sizes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        return manifest["format"] == FORMAT and all((folder / name).stat().st_size == size for name, size in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _hash_files(folder):
    digest = hashlib.sha256(CACHE_VERSION)
    for path in sorted({path for pattern in SOURCE_PATTERNS for path in folder.glob(pattern)}):
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def _write_export(folder: Path, cache: Path, export: Path) -> None:
    """Write an export into the cache under a temporary name, and rename it; another process may do the same."""
    cache.mkdir(parents=True, exist_ok=True)
    for path in cache.glob(f"{TEMPORARY_PREFIX}*"):  # of processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=cache, ignore_cleanup_errors=True) as temporary:
        written = _export(folder, Path(temporary, FORMAT))
        if export.exists() and not _is_export(export):  # damaged
            os.replace(export, Path(temporary, "damaged"))
        try:
            os.replace(written, export)
        except OSError:
            if not _is_export(export):  # else another process was faster
                raise


def _export(folder: Path, output: Path) -> Any:
    from encdec_slm.export import export_ctranslate2

    return export_ctranslate2(folder, output)


__all__ = ["Answer", "ShellModel", "find_model_folder", "load_shell_model"]
