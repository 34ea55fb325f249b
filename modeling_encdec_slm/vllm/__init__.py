# SPDX-License-Identifier: Apache-2.0
"""Plugin that lets vLLM serve the text models of this family. vLLM finds it by its entry point."""


def register():
    """Register the models, the renderer that reads prompts as sources, and the checks of their configuration."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import encdec_slm  # noqa: F401 registers the configuration with transformers

    from .checks import MODE, ModelChecks

    for architecture in ("EncDecSLMForConditionalGeneration", "EncDecVLMForConditionalGeneration"):
        ModelRegistry.register_model(architecture, f"{__name__}.model:EncDecSLMForConditionalGeneration")
        MODELS_CONFIG_MAP[architecture] = ModelChecks
    TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(MODE, f"{__name__}.sources", "SourceRenderer")
