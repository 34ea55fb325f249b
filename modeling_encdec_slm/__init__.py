# SPDX-License-Identifier: Apache-2.0
"""Small encoder-decoder language models for transformers; importing this registers them with the Auto classes."""

if __name__ != "encdec_slm":
    raise ImportError("Import this package as `encdec_slm`: a second name would make a second set of classes.")

import importlib
import os
import sys


# The command line answers `--help` and the completion of a word at once: its commands import torch and transformers,
# and register the models, when they run. Processes that it starts are others: there `__main__` has no such file.
_MAIN_FILE = getattr(sys.modules.get("__main__"), "__file__", None) or ""
if os.path.basename(_MAIN_FILE) != "encdec-slm":
    from . import auto_classes as auto_classes
    from .configuration_encdec_slm import EncDecSLMConfig
    from .configuration_encdec_vlm import EncDecVLMConfig
    from .image_processing_encdec_vlm import EncDecVLMImageProcessor
    from .modeling_encdec_slm import EncDecSLMEncoderModel, EncDecSLMForConditionalGeneration, EncDecSLMModel
    from .modeling_encdec_vlm import EncDecVLMForConditionalGeneration, EncDecVLMModel
    from .pipeline_encdec_slm import Text2TextGenerationPipeline, restore_text2text_pipelines
    from .processing_encdec_vlm import EncDecVLMProcessor

_MODULES = (
    *("configuration_encdec_slm", "configuration_encdec_vlm", "image_processing_encdec_vlm", "modeling_encdec_slm"),
    *("modeling_encdec_vlm", "pipeline_encdec_slm", "processing_encdec_vlm"),
)


def __getattr__(name):
    """A public name within the command line, which has not imported it yet."""
    if name in __all__:
        importlib.import_module(".auto_classes", __name__)
        for module in _MODULES:
            if hasattr(found := importlib.import_module(f".{module}", __name__), name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "EncDecSLMConfig",
    "EncDecSLMEncoderModel",
    "EncDecSLMForConditionalGeneration",
    "EncDecSLMModel",
    "EncDecVLMConfig",
    "EncDecVLMForConditionalGeneration",
    "EncDecVLMImageProcessor",
    "EncDecVLMModel",
    "EncDecVLMProcessor",
    "Text2TextGenerationPipeline",
    "restore_text2text_pipelines",
]
