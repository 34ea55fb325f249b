# SPDX-License-Identifier: Apache-2.0
"""What vLLM cannot run of this family, refused before a model is loaded."""

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform


# Mode of tokenizer and renderer, by which vLLM finds the renderer of this plugin.
MODE = "encdec_slm"


class ModelChecks(VerifyAndUpdateConfig):
    """Select the renderer of this plugin, and refuse what the model class does not support."""

    @staticmethod
    def verify_and_update_model_config(model_config):
        config = model_config.hf_config
        if config.model_type != "encdec_slm":
            raise ValueError(
                f"The model has `model_type` {config.model_type!r}, but vLLM runs the text models of this family only "
                "(`encdec_slm`). Run vision-text models in transformers or ONNX Runtime."
            )
        if current_platform.is_cpu():
            from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

            supported = CPUAttentionBackend.get_supported_head_sizes()
            if config.head_dim not in supported:
                raise ValueError(
                    f"`head_dim` is {config.head_dim}, but vLLM's attention on a CPU takes {supported}. Use another "
                    "engine, or a GPU."
                )
        model_config.tokenizer_mode = MODE

    @staticmethod
    def verify_and_update_config(vllm_config):
        quantization = vllm_config.model_config.quantization
        if quantization is not None:
            raise ValueError(
                f"`quantization` is {quantization!r}, but vLLM runs this family in float32, bfloat16 or float16 only. "
                "Leave it out, and serve a checkpoint that is not quantized."
            )
