# SPDX-License-Identifier: Apache-2.0
"""How a prompt becomes the source of the encoder: for vLLM, sources are items of a modality named `text`."""

import torch
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseProcessingInfo,
    EncDecMultiModalProcessor,
    PromptReplacement,
)
from vllm.renderers.hf import HfRenderer


PLACEHOLDER = [0]  # vLLM replaces it by the source


class SourceRenderer(HfRenderer):
    """Give the tokens of a prompt, of either endpoint, to the encoder."""

    def _process_enc_dec(self, prompt, **kwargs):
        return super()._process_enc_dec(_with_source(prompt), **kwargs)

    async def _process_enc_dec_async(self, prompt, **kwargs):
        return await super()._process_enc_dec_async(_with_source(prompt), **kwargs)


def _with_source(prompt):
    source_ids = torch.tensor(prompt["encoder_prompt"]["prompt_token_ids"], dtype=torch.long)
    return {**prompt, "encoder_prompt": {**prompt["encoder_prompt"], "multi_modal_data": {"text": [source_ids]}}}


class SourceParser(MultiModalDataParser):
    def _get_subparsers(self):
        return {"text": lambda sources: ProcessorBatchItems(sources, "text")}


class SourceInfo(BaseProcessingInfo):
    def get_data_parser(self):
        return SourceParser()

    def get_supported_mm_limits(self):
        return {"text": 1}

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
        return {"text": seq_len}


class DummySources(BaseDummyInputsBuilder[SourceInfo]):
    """The longest source, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts):
        return ""

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        return {"text": [torch.zeros(seq_len, dtype=torch.long)]}


class SourceProcessor(EncDecMultiModalProcessor[SourceInfo]):
    """Pass the tokens of the source to the model. The decoder begins with its start token, which vLLM adds."""

    def create_encoder_prompt(self, prompt, mm_items):
        return PLACEHOLDER

    def create_decoder_prompt(self, prompt, mm_items):
        return []

    def _call_hf_processor(self, hf_data, hf_kwargs):
        return BatchFeature({"source_ids": hf_data["texts"]})

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        return {"source_ids": MultiModalFieldConfig.batched("text")}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        sources = mm_items.get_items("text", ProcessorBatchItems)
        return [PromptReplacement("text", PLACEHOLDER, lambda index: sources.get(index).tolist())]
