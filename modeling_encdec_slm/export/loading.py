# SPDX-License-Identifier: Apache-2.0
"""Load an export of any format with its tokenizer or processor."""

import importlib
from pathlib import Path

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..checkpoints import load_processing_class
from ..export_manifest import find_export
from .exported_model import ExportedModel


# Classes of this package that load each format.
MODEL_CLASSES = {"ctranslate2": "CT2EncDecSLM", "onnx": "OrtEncDecSLM", "onnx-static": "OrtEncDecSLM"}


def load_export(
    name_or_path: str | Path, *, revision: str | None = None, subfolder: str | None = None
) -> tuple[ExportedModel, PreTrainedTokenizerBase | ProcessorMixin | None]:
    """Load an export on the CPU, in the engine of its format.

    Args:
        name_or_path (`str` or `Path`): Folder of the export, or a repository on the Hub that has it at its top, in
            `ctranslate2/` or in `onnx/`.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        subfolder (`str`, *optional*): Folder of the export within the repository or folder.

    Returns:
        `tuple`: The model, and its tokenizer or processor; `None` if the export has neither.

    Raises:
        ValueError: There is no such export, or a file is missing or damaged.
        ImportError: The engine is not installed.
    """
    folder, manifest = find_export(name_or_path, tuple(MODEL_CLASSES), revision=revision, subfolder=subfolder)
    model_class = getattr(importlib.import_module(__package__), MODEL_CLASSES[manifest["format"]])
    model = model_class.from_pretrained(folder)
    return model, load_processing_class(folder, model)


__all__ = ["load_export"]
