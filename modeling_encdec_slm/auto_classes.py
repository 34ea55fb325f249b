# SPDX-License-Identifier: Apache-2.0
"""Register the models and processors with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_encdec_slm import EncDecSLMConfig
from .configuration_encdec_vlm import EncDecVLMConfig
from .image_processing_encdec_vlm import EncDecVLMImageProcessor
from .modeling_encdec_slm import EncDecSLMEncoderModel, EncDecSLMForConditionalGeneration, EncDecSLMModel
from .modeling_encdec_vlm import EncDecVLMForConditionalGeneration, EncDecVLMModel
from .pipeline_encdec_slm import EncDecVLMPipeline
from .processing_encdec_vlm import EncDecVLMProcessor


AutoConfig.register(EncDecSLMConfig.model_type, EncDecSLMConfig)
AutoModel.register(EncDecSLMConfig, EncDecSLMModel)
AutoModelForSeq2SeqLM.register(EncDecSLMConfig, EncDecSLMForConditionalGeneration)
AutoModelForTextEncoding.register(EncDecSLMConfig, EncDecSLMEncoderModel)
AutoConfig.register(EncDecVLMConfig.model_type, EncDecVLMConfig)
AutoModel.register(EncDecVLMConfig, EncDecVLMModel)
AutoModelForSeq2SeqLM.register(EncDecVLMConfig, EncDecVLMForConditionalGeneration)
AutoModelForImageTextToText.register(EncDecVLMConfig, EncDecVLMForConditionalGeneration)
AutoModelForMultimodalLM.register(EncDecVLMConfig, EncDecVLMForConditionalGeneration)
# Under both names: with torchvision installed, transformers would otherwise warn that it falls back to Pillow.
AutoImageProcessor.register(
    EncDecVLMConfig, image_processor_classes=dict.fromkeys(("pil", "torchvision"), EncDecVLMImageProcessor)
)
AutoProcessor.register(EncDecVLMConfig, EncDecVLMProcessor)
# It behaves like transformers' own pipeline with processors of other families.
PIPELINE_REGISTRY.supported_tasks["image-text-to-text"]["impl"] = EncDecVLMPipeline
