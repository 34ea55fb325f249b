# SPDX-License-Identifier: Apache-2.0
"""Small encoder-decoder language models for transformers; importing this registers them with the Auto classes."""

if __name__ != "encdec_slm":
    raise ImportError("Import this package as `encdec_slm`: a second name would make a second set of classes.")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
)

from .configuration_encdec_slm import EncDecSLMConfig
from .configuration_encdec_vlm import EncDecVLMConfig
from .modeling_encdec_slm import EncDecSLMEncoderModel, EncDecSLMForConditionalGeneration, EncDecSLMModel
from .modeling_encdec_vlm import EncDecVLMForConditionalGeneration, EncDecVLMModel
from .pipeline_encdec_slm import Text2TextGenerationPipeline, restore_text2text_pipelines


AutoConfig.register(EncDecSLMConfig.model_type, EncDecSLMConfig)
AutoModel.register(EncDecSLMConfig, EncDecSLMModel)
AutoModelForSeq2SeqLM.register(EncDecSLMConfig, EncDecSLMForConditionalGeneration)
AutoModelForTextEncoding.register(EncDecSLMConfig, EncDecSLMEncoderModel)
AutoConfig.register(EncDecVLMConfig.model_type, EncDecVLMConfig)
AutoModel.register(EncDecVLMConfig, EncDecVLMModel)
AutoModelForSeq2SeqLM.register(EncDecVLMConfig, EncDecVLMForConditionalGeneration)
AutoModelForImageTextToText.register(EncDecVLMConfig, EncDecVLMForConditionalGeneration)
AutoModelForMultimodalLM.register(EncDecVLMConfig, EncDecVLMForConditionalGeneration)

__version__ = "0.1.0"

__all__ = [
    "EncDecSLMConfig",
    "EncDecSLMEncoderModel",
    "EncDecSLMForConditionalGeneration",
    "EncDecSLMModel",
    "EncDecVLMConfig",
    "EncDecVLMForConditionalGeneration",
    "EncDecVLMModel",
    "Text2TextGenerationPipeline",
    "restore_text2text_pipelines",
]
