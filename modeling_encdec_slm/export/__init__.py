# SPDX-License-Identifier: Apache-2.0
"""Exports to other runtimes: CTranslate2, ONNX Runtime, OpenVINO and transformers.js.

A new engine is one module here with an exporter ([`~encdec_slm.export.bundles.write_bundle`]) and a model
([`~encdec_slm.export.exported_model.ExportedModel`]), its names below, and its format in `FORMAT_FOLDERS` of
`export_manifest.py` and in `MODEL_CLASSES` of `loading.py`.
"""

import importlib


# Imported on first use, so that one engine does not wait for the others.
_MODULES = {
    "CT2EncDecSLM": "ctranslate2_model",
    "OpenVINOEncDecSLM": "openvino_model",
    "OrtEncDecSLM": "onnx_model",
    "export_ctranslate2": "ctranslate2_converter",
    "export_onnx": "onnx_export",
    "export_openvino_genai": "openvino_genai",
    "export_ort_genai": "ort_genai",
    "export_transformers_js": "transformers_js",
    "load_export": "loading",
}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


__all__ = sorted(_MODULES)
