# SPDX-License-Identifier: Apache-2.0
"""What all exports share: which models can be exported, and folders with a manifest that says what lies in them."""

import contextlib
import copy
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoint_folders import TOKENIZER_FILES, folder_written_whole, listed, local_folder


MANIFEST = "export_manifest.json"
FAMILY = ("encdec_slm", "encdec_vlm")
CHECKPOINT_FILES = ("*.safetensors", "*.json", *TOKENIZER_FILES)
ADAPTER_FILE = "adapter_config.json"
MERGE_FIRST = (
    "Merge them first: `model = PeftModel.from_pretrained(model, adapter).merge_and_unload()`, and export that."
)


REPORTER = "openvino_telemetry"


def required(name: str) -> ModuleType:
    """A module of the `export` extra, loaded so that it reports to nobody that it is used.

    Raises:
        ImportError: It is not installed.
    """
    try:
        with _without_reports():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        if error.name != package:
            raise
        raise ImportError(
            f"The package `{package}` is needed, but is not installed. Run `pip install encdec-slm[export]`."
        ) from error


@contextlib.contextmanager
def _without_reports():
    """onnxruntime tells its maker of its use unless this is set when it is loaded; OpenVINO and NNCF by a package."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    is_loaded = REPORTER in sys.modules
    if not is_loaded:
        sys.modules[REPORTER] = None
    try:
        yield
    finally:
        if not is_loaded:
            del sys.modules[REPORTER]


def exportable(
    model_or_path: PreTrainedModel | str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """A model of this family to export, in float32 and eval mode on the CPU, and its tokenizer if there is one.

    Args:
        model_or_path ([`~transformers.PreTrainedModel`], `str` or `Path`): A model, which is not changed; or a
            folder or the name of a repository on the Hub. No code of a repository is run.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` means the one that lies beside the
            weights, be it those that a given model was loaded from.

    Raises:
        ValueError: The checkpoint cannot be read, has adapters or quantized weights, or is of another family.
        TypeError: `model_or_path` is neither a model nor a path.
    """
    if isinstance(model_or_path, (str, Path)):
        folder = local_folder(model_or_path, CHECKPOINT_FILES)
        model = _loaded(folder, str(model_or_path))
    else:
        check_exportable(model_or_path)
        model = copy.deepcopy(model_or_path).to("cpu", torch.float32).eval()
        folder = Path(model.config.name_or_path) if model.config.name_or_path else None
    if tokenizer is None and folder is not None and folder.is_dir() and any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model, tokenizer


def _loaded(folder, name):
    if (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{name!r} holds adapters (`{ADAPTER_FILE}`), which no runtime reads. {MERGE_FIRST}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name!r} has no config.json that can be read ({type(error).__name__}). Give a folder that "
            "`save_pretrained` wrote, or the name of a model on the Hub."
        ) from error
    _check_config(config if isinstance(config, dict) else {}, name)
    options = {"trust_remote_code": False, "dtype": torch.float32, "output_loading_info": True}
    model, loading = AutoModelForSeq2SeqLM.from_pretrained(folder, **options)
    if loading["missing_keys"]:
        raise ValueError(
            f"{name!r} has no weights for {listed(sorted(loading['missing_keys']))}, which would be random. Give a "
            "folder that holds a whole `...ForConditionalGeneration`."
        )
    check_exportable(model)
    return model.eval()


def _check_config(config, name):
    if config.get("model_type") not in FAMILY:
        raise ValueError(
            f"{name!r} is of `model_type` {config.get('model_type')!r}, but this exports {' and '.join(FAMILY)}. "
            "Other families have exporters of their own."
        )
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(f"{name!r} is quantized ({method}). {_quantize_later()}")


def check_exportable(model: PreTrainedModel) -> None:
    """Refuses what no export can read.

    Raises:
        ValueError: It has adapters, quantized weights, weights without data or no output head, or is of another
            family.
        TypeError: It is no model of transformers.
    """
    kind = type(model).__name__
    # Both a PeftModel and a model with adapters of `add_adapter` have this.
    if getattr(model, "peft_config", None):
        raise ValueError(f"`model_or_path` is a {kind} with adapters, which no runtime reads. {MERGE_FIRST}")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model_or_path` is a {kind}, but must be a model of this family, the path of a folder, or a name on "
            "the Hub."
        )
    _check_config(model.config.to_dict(), kind)
    if not model.can_generate():
        raise ValueError(
            f"`model_or_path` is a {kind}, which has no output head. Give the `...ForConditionalGeneration` of it."
        )
    odd = {name: type(value).__name__ for name, value in model.named_parameters() if not _is_plain(value)}
    if odd or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"`model_or_path` has quantized weights ({listed(odd) or kind}). {_quantize_later()}")
    if any(value.is_meta for value in model.parameters()):
        raise ValueError("`model_or_path` has weights without data (on the meta device). Load it onto the CPU.")


def _is_plain(parameter):
    return type(parameter.data) is torch.Tensor and parameter.is_floating_point()


def _quantize_later():
    return "Export the model that it was made from, and let the export quantize it (`quantization`)."


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of which id each token has: equal for tokenizers that a model cannot tell apart by their ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


@contextlib.contextmanager
def bundle_written_whole(
    output_dir: str | Path,
    form: str,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool = False,
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A temporary folder for an export, and its manifest, a `dict` to add to; `output_dir` gets all of it or nothing.

    The tokenizer's files are written too. The manifest lists every file with its size in bytes.

    Args:
        output_dir (`str` or `Path`): Where the export is to lie.
        form (`str`): What kind of export it is, such as `"ctranslate2"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` leaves the bundle without one.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an export that lies there; other files stay.

    Raises:
        ValueError: `output_dir` is a file, or is not empty and `overwrite` is `False`.
    """
    before = _files_of_an_export(output_dir) if overwrite else []
    manifest = {"format": form, "tokenizer_sha256": None if tokenizer is None else tokenizer_hash(tokenizer)}
    with folder_written_whole(output_dir, overwrite) as folder:
        yield folder, manifest
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        manifest["files"] = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name in before:
        if name not in manifest["files"]:
            Path(output_dir, name).unlink(missing_ok=True)


def _files_of_an_export(folder):
    """Names of what an export left in a folder, as far as its manifest can be read."""
    try:
        return list(json.loads(Path(folder, MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def read_manifest(folder: str | Path, *forms: str) -> dict[str, Any]:
    """The manifest of an export, after a look at whether its files are there and whole.

    Args:
        folder (`str` or `Path`): What an export wrote.
        forms (`str`): The kinds of export that can be used here.

    Raises:
        ValueError: There is no manifest, it is of another kind, or a file is missing or cut off.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        form, files = manifest["format"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(folder)!r} has no {MANIFEST} that can be read ({type(error).__name__}), as every export has. Give "
            "a folder that `export_ctranslate2` or `export_onnx` wrote."
        ) from error
    if form not in forms:
        raise ValueError(f"{str(folder)!r} is an export to {form}, but {' or '.join(forms)} is needed here.")
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise ValueError(
                f"{name} of {str(folder)!r} {state}, but was written with {size:,}: it was cut off or exchanged. Copy "
                "the folder again, or export again."
            )
    return manifest


def check_tokenizer(manifest: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that is not the one that a bundle was exported with.

    Raises:
        ValueError: Its ids mean other tokens.
    """
    expected, found = manifest["tokenizer_sha256"], tokenizer_hash(tokenizer)
    if expected is not None and expected != found:
        raise ValueError(
            f"The tokenizer (sha256 {found[:12]}, {len(tokenizer)} tokens) is not that of the exported model (sha256 "
            f"{expected[:12]}): its ids mean other tokens. Load the one that lies in the folder of the export."
        )
