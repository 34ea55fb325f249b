# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of this family for other runtimes: CTranslate2 and ONNX."""

import importlib


# Loaded when they are used: whoever wants one runtime does not wait for the others.
_MODULES = {
    "CT2EncDecSLM": "ctranslate2_model",
    "OpenVINOEncDecSLM": "openvino_model",
    "OrtEncDecSLM": "onnx_model",
    "export_ctranslate2": "ctranslate2_converter",
    "export_onnx": "onnx_export",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = sorted(_MODULES)
