# SPDX-License-Identifier: Apache-2.0
"""What all exporters share: importing engines, loading the model, and writing a folder with a manifest."""

import contextlib
import copy
import functools
import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..checkpoints import check_complete_model, load_checkpoint, load_processing_class, write_folder
from ..errors import require_package
from ..export_manifest import MANIFEST, find_foreign_files, fingerprint_model, hash_tokenizer


logger = logging.getLogger(__name__)
TELEMETRY_PACKAGE = "openvino_telemetry"


def import_engine(name: str) -> ModuleType:
    """Import a package of the `export` extra, or a module of one, with its telemetry switched off.

    Raises:
        ImportError: The package is not installed. The message gives the pip command.
    """
    with _telemetry_disabled():
        return require_package(name)


@functools.cache
def openvino_core() -> Any:
    """Return the only OpenVINO core (`openvino.Core`) of the process.

    A core with a CPU plugin replaces the stack on which the main thread handles signals. If there are two, the second
    to end brings back the stack of the first, which is freed already, and the next signal kills the process.
    """
    return import_engine("openvino").Core()


@contextlib.contextmanager
def _telemetry_disabled():
    """onnxruntime reads a variable when it is imported; OpenVINO and NNCF report through a package of their own."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    is_imported = TELEMETRY_PACKAGE in sys.modules
    if not is_imported:
        sys.modules[TELEMETRY_PACKAGE] = None
    try:
        yield
    finally:
        if not is_imported:
            del sys.modules[TELEMETRY_PACKAGE]


@dataclass
class Bundle:
    """An export in progress.

    Args:
        folder (`Path`): Write the files of the export here.
        model ([`~transformers.PreTrainedModel`]): In float32 and evaluation mode, on the CPU; may be changed.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Saved into the folder.
        processor ([`~transformers.ProcessorMixin`], *optional*): Of a vision-text model; saved into the folder.
        manifest (`dict`): Written to the folder; add entries to it.
    """

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    processor: ProcessorMixin | None
    manifest: dict[str, Any]


@contextlib.contextmanager
def write_bundle(
    model_or_path: PreTrainedModel | str | Path,
    output_dir: str | Path,
    format: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Iterator[Bundle]:
    """Load a model, yield a [`Bundle`] to fill, and write its tokenizer and manifest; all files appear at once.

    Args:
        model_or_path ([`~transformers.PreTrainedModel`], `str` or `Path`): A model, which is not changed, a folder, or
            a name on the Hub. Code in the repository is not run.
        output_dir (`str` or `Path`): Folder of the export.
        format (`str`): Format of the export, such as `"ctranslate2"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` uses the tokenizer in the folder of
            the model, if there is one.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an earlier export.

    Raises:
        ValueError: The model cannot be loaded or exported, `output_dir` is not empty and is not an earlier export that
            `overwrite` allows to replace, or it overlaps the folder of the model.
        TypeError: `model_or_path` is neither a model nor a path.
    """
    sources = [model_or_path] if isinstance(model_or_path, (str, Path)) else []
    options = {"overwrite": overwrite, "find_foreign_files": find_foreign_files, "sources": sources}
    with write_folder(output_dir, **options) as folder:
        model, processing_class = _load_model(model_or_path)
        processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
        if tokenizer is None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
        manifest = {"format": format, "model": fingerprint_model(model)}
        bundle = Bundle(folder, model, tokenizer, processor, manifest)
        yield bundle
        for part in (bundle.processor, bundle.tokenizer):
            if part is not None:
                part.save_pretrained(folder)
        for path in folder.glob("*.py"):  # the code of a processor, which an export does not run
            path.unlink()
        if bundle.tokenizer is None and sources:
            logger.warning(f"{sources[0]} has no tokenizer, so the export has none and reads token ids only.")
        manifest["tokenizer_sha256"] = None if bundle.tokenizer is None else hash_tokenizer(bundle.tokenizer)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest["files"] = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _load_model(model_or_path):
    """A model in float32 on the CPU, and its tokenizer or processor if there is one."""
    if isinstance(model_or_path, (str, Path)):
        model, processing_class = load_checkpoint(
            model_or_path, dtype=torch.float32, family_only=True, adapter="refuse"
        )
        check_complete_model(model, "model_or_path")
        return model, processing_class
    check_complete_model(model_or_path, "model_or_path")
    model = copy.deepcopy(model_or_path).to("cpu", torch.float32).eval()
    folder = model.config.name_or_path
    return model, load_processing_class(folder, model) if folder and Path(folder).is_dir() else None
