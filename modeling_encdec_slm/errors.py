# SPDX-License-Identifier: Apache-2.0
"""Error messages: summaries of other libraries' errors, short lists, and optional packages that are missing."""

import importlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any


# The extra of this package that installs an optional package.
EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "matplotlib", "peft", "rouge_score", "sklearn", "trl"), "train"),
    **dict.fromkeys(("ctranslate2", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "torchao"), "export"),
    **dict.fromkeys(("bashlex", "sacrebleu"), "evaluation"),
    **dict.fromkeys(("onnxruntime_genai", "openvino_genai", "openvino_tokenizers"), "engines"),
    "gradio": "demo",
    "llguidance": "constrained",
    "vllm": "vllm",
    "openai": "openai",
    "ray": "ray",
}
MAX_SUMMARY_LENGTH = 600


def require_package(name: str) -> ModuleType:
    """Import an optional package, or a module of one.

    Args:
        name (`str`): Such as `"onnxruntime"` or `"onnxruntime.quantization"`.

    Raises:
        ImportError: The package is not installed. The message gives the pip command.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        message = missing_package_message(error)
        if message is None:
            raise
        raise ImportError(message, name=error.name) from error


def missing_package_message(error: ModuleNotFoundError) -> str | None:
    """Return how to install the optional package that an import did not find, or `None` for any other module."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"The package `{package}` is required but not installed. Run `pip install encdec-slm[{EXTRAS[package]}]`."


def summarize_error(error: BaseException) -> str:
    """Summarize an error in one line, for use inside another message.

    Line breaks and request ids are removed; long texts are cut at 600 characters. An error without a text is
    summarized by its class name. An `OSError` of the operating system is summarized by its reason and file name.
    """
    if isinstance(error, OSError) and error.strerror:
        file = f": {error.filename}" if error.filename else ""
        text = f"{error.strerror}{file}"
    else:
        text = re.sub(r"\(Request ID: [^)]*\)", "", str(error))
    text = " ".join(text.split()) or type(error).__name__
    if len(text) > MAX_SUMMARY_LENGTH:
        text = f"{text[:MAX_SUMMARY_LENGTH]}..."
    return text.rstrip(".:")


def format_list(items: Iterable[Any], max_items: int = 10) -> str:
    """Join items for a message; only the first `max_items` are named, the others are counted."""
    items = [text if len(text) <= 160 else f"{text[:160]}..." for text in map(str, items)]
    rest = f" and {len(items) - max_items:,} more" if len(items) > max_items else ""
    return ", ".join(items[:max_items]) + rest


__all__ = ["format_list", "missing_package_message", "require_package", "summarize_error"]
