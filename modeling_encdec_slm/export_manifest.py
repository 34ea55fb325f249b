# SPDX-License-Identifier: Apache-2.0
"""Find and read exports, and check that an export belongs to a model and to a tokenizer.

Every export has a manifest, `export_manifest.json`: the format, the files with their sizes, and fingerprints of the
exported model and its tokenizer.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .checkpoints import find_checkpoint_folder
from .errors import format_list, summarize_error


MANIFEST = "export_manifest.json"
# Formats of engines that generate by themselves, for which this package has no model class.
ENGINE_FORMATS = ("transformers-js", "ort-genai", "openvino-genai")
# The folder of each format in a published repository.
FORMAT_FOLDERS = {
    **{"ctranslate2": "ctranslate2", "onnx": "onnx", "onnx-static": "onnx"},
    **{name: name for name in ENGINE_FORMATS},
}
# Config fields that change what a model computes.
FINGERPRINT_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("encoder_num_hidden_layers", "decoder_num_hidden_layers", "hidden_act", "rms_norm_eps", "rope_parameters"),
    *("encoder_no_rope_layers", "decoder_no_rope_layers"),
)


def is_export(name_or_path: str | Path, *, revision: str | None = None, subfolder: str | None = None) -> bool:
    """Return whether a folder or a repository on the Hub is an export, at its top or in `subfolder`."""
    folder = Path(name_or_path)
    name = PurePosixPath(subfolder or "", MANIFEST)
    if not folder.is_dir():
        # The other files make sure that a snapshot of the repository exists.
        folder = find_checkpoint_folder(name_or_path, [str(name), "*config.json"], revision=revision)
    return (folder / name).is_file()


def find_export(
    name_or_path: str | Path,
    formats: Sequence[str] = tuple(FORMAT_FOLDERS),
    *,
    revision: str | None = None,
    subfolder: str | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Find an export and read its manifest; an export on the Hub is downloaded first.

    Args:
        name_or_path (`str` or `Path`): Folder of an export, or a repository on the Hub or a folder that `publish`
            wrote, which has exports in `ctranslate2/` and `onnx/`.
        formats (`Sequence[str]`, *optional*): Accepted formats, the preferred one first.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): Folder within `name_or_path`. `None` looks at the top, then in the folders that
            `publish` writes.

    Returns:
        `tuple[Path, dict]`: The local folder and its manifest.

    Raises:
        ValueError: There is no such export, it has another format, or a file is missing or incomplete.
    """
    subfolders = [subfolder] if subfolder else ["", *dict.fromkeys(FORMAT_FOLDERS[name] for name in formats)]
    names = [str(PurePosixPath(name, MANIFEST)) for name in subfolders]
    top = find_checkpoint_folder(name_or_path, [*names, "*config.json"], revision=revision)
    found = next((name for name in subfolders if (top / name / MANIFEST).is_file()), subfolders[0])
    if not Path(name_or_path).is_dir():
        top = find_checkpoint_folder(name_or_path, [str(PurePosixPath(found, "*"))], revision=revision)
    return top / found, read_manifest(top / found, *formats)


def read_manifest(folder: str | Path, *formats: str) -> dict[str, Any]:
    """Read the manifest of an export, and check that its files are complete.

    Args:
        folder (`str` or `Path`): Folder of the export.
        formats (`str`): Accepted formats.

    Raises:
        ValueError: There is no manifest, the format is another one, or a file is missing or incomplete.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        name, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder)!r} has no readable {MANIFEST} ({summarize_error(error)}). Give a folder that "
            "`encdec-slm export` wrote."
        ) from error
    if name not in formats:
        raise ValueError(f"{str(folder)!r} is an export to {name}, but {' or '.join(formats)} is required.")
    for file, size in files.items():
        found = (folder / file).stat().st_size if (folder / file).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise ValueError(
                f"{file} of {str(folder)!r} {state}, but the export has {size:,} bytes. Copy or download the folder "
                "again, or export again."
            )
    return manifest


def find_foreign_files(folder: str | Path) -> list[str]:
    """Return the names in a folder that do not belong to an earlier export; all of them, if it is not an export."""
    try:
        ours = {MANIFEST, *json.loads(Path(folder, MANIFEST).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    folders = {str(PurePosixPath(name).parent) for name in ours} - {"."}
    paths = [*Path(folder).iterdir(), *(path for name in folders for path in Path(folder, name).glob("*"))]
    return sorted({path.relative_to(folder).as_posix() for path in paths} - ours - folders)


# Fingerprints


def fingerprint_model(model: PreTrainedModel) -> dict[str, Any]:
    """Return the architecture of a model and a digest of its weights.

    Weights are rounded to bfloat16 first, so that a float32 checkpoint and a bfloat16 copy of it are equal.
    """
    config = model.config.get_text_config()
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy())
    fields = {name: getattr(config, name, None) for name in FINGERPRINT_FIELDS}
    return {"model_type": model.config.model_type, **fields, "weights_sha256": digest.hexdigest()}


def check_bundle_matches(manifest: dict[str, Any], model: PreTrainedModel) -> None:
    """Check that an export was made from a model.

    Args:
        manifest (`dict`): The manifest of the export, from [`read_manifest`].
        model ([`~transformers.PreTrainedModel`]): In any float dtype.

    Raises:
        ValueError: The architecture or the weights differ, or the manifest has no fingerprint.
    """
    exported = manifest.get("model")
    if not exported:
        raise ValueError(
            f"The {manifest.get('format')} export has no fingerprint of its model in {MANIFEST}. Export it again."
        )
    expected = json.loads(json.dumps(fingerprint_model(model)))
    differences = [
        f"`{name}` is {exported.get(name)!r:.60} in the export and {value!r:.60} in the model"
        for name, value in expected.items()
        if exported.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"The {manifest['format']} export was made from another model: {format_list(differences, 3)}. Export this "
            "model again."
        )


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of the vocabulary: equal for tokenizers that give each token the same id."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def check_tokenizer(manifest: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer is that of the exported model; an export without a tokenizer accepts any.

    Raises:
        ValueError: Its vocabulary differs.
    """
    expected, found = manifest["tokenizer_sha256"], hash_tokenizer(tokenizer)
    if expected not in (None, found):
        raise ValueError(
            f"The `tokenizer` (sha256 {found[:12]}, {len(tokenizer)} tokens) is not that of the exported model "
            f"(sha256 {expected[:12]}), so ids have other meanings. Load the tokenizer from the folder of the export."
        )


__all__ = [
    "ENGINE_FORMATS",
    "FORMAT_FOLDERS",
    "MANIFEST",
    "check_bundle_matches",
    "check_tokenizer",
    "find_export",
    "find_foreign_files",
    "fingerprint_model",
    "hash_tokenizer",
    "is_export",
    "read_manifest",
]
