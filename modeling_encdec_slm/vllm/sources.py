# SPDX-License-Identifier: Apache-2.0
"""How a prompt becomes the source of the encoder: for vLLM, sources are items of a modality named `text`."""

import functools

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
    """Give the tokens of a prompt, whatever the endpoint, to the encoder."""

    def process_for_engine(self, prompt, arrival_time, **kwargs):
        return super().process_for_engine(_add_source(prompt), arrival_time, **kwargs)

    async def process_for_engine_async(self, prompt, arrival_time, **kwargs):
        return await super().process_for_engine_async(_add_source(prompt), arrival_time, **kwargs)


def _add_source(prompt):
    if "encoder_prompt" not in prompt:  # a chat
        prompt = {"encoder_prompt": prompt, "decoder_prompt": None}
    source = prompt["encoder_prompt"]
    if media := source.get("multi_modal_data"):
        raise ValueError(
            f"The prompt has data of the kinds {sorted(media)}, but the model reads text only. Send text."
        )
    if not source.get("prompt_token_ids"):
        raise ValueError(
            "The prompt has no tokens, but the encoder needs at least one. Send a prompt that is not empty."
        )
    source_ids = torch.tensor(source["prompt_token_ids"], dtype=torch.long)
    return {**prompt, "encoder_prompt": {**source, "multi_modal_data": {"text": [source_ids]}}}


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


@functools.cache
def encode_in_batch_order():
    """Make vLLM's V1 model runner encode new sources in the order of its batch, in which cross-attention stores them.

    vLLM 0.32 encodes in the order of the scheduler, which is another one when a request that was preempted resumes
    beside a new one: both then read the wrong source. Its V2 model runner does sort.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    encode = GPUModelRunner._execute_mm_encoder

    def encode_sorted(self, scheduler_output):
        if self.model_config.is_encoder_decoder:
            inputs, places = scheduler_output.scheduled_encoder_inputs, self.input_batch.req_id_to_index
            scheduler_output.scheduled_encoder_inputs = {name: inputs[name] for name in sorted(inputs, key=places.get)}
        return encode(self, scheduler_output)

    GPUModelRunner._execute_mm_encoder = encode_sorted
