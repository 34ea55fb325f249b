# SPDX-License-Identifier: Apache-2.0
"""Small encoder-decoder language models for transformers; importing this registers them with the Auto classes."""

if __name__ != "encdec_slm":
    raise ImportError("Import this package as `encdec_slm`: a second name would make a second set of classes.")

from . import auto_classes as auto_classes
from .configuration_encdec_slm import EncDecSLMConfig
from .configuration_encdec_vlm import EncDecVLMConfig
from .image_processing_encdec_vlm import EncDecVLMImageProcessor
from .modeling_encdec_slm import EncDecSLMEncoderModel, EncDecSLMForConditionalGeneration, EncDecSLMModel
from .modeling_encdec_vlm import EncDecVLMForConditionalGeneration, EncDecVLMModel
from .pipeline_encdec_slm import Text2TextGenerationPipeline, restore_text2text_pipelines
from .processing_encdec_vlm import EncDecVLMProcessor


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
