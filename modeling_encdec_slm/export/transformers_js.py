# SPDX-License-Identifier: Apache-2.0
"""Export a text model to transformers.js, which runs in browsers and under Node.

transformers.js has no class for this family, but loads graphs of any inside as a T5: an encoder, and a decoder whose
first step has no cache. Here the decoder also computes the encoder, in its first step: the embeddings are then stored
once. What transformers.js takes for the encoder returns its input.
"""

import copy
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .bundles import import_engine
from .engine_bundles import check_tokenizer_parts, list_eos_token_ids, write_engine_bundle
from .onnx_branches import merge_branches
from .onnx_graphs import SOURCE, DecoderGraph, DecoderWithPastGraph, EncoderGraph
from .onnx_quantization import compress_weights
from .onnx_tracing import Graph, SharedWeights, describe_tensors, trace


FORMAT = "transformers-js"
# Names of precisions in transformers.js, and what it appends to the names of their files.
DTYPES = {None: ("fp32", ""), "float16": ("fp16", "_fp16"), "int8": ("q8", "_quantized"), "int4": ("q4", "_q4")}
# Parts of tokenizers in @huggingface/tokenizers 0.2.
_PARTS = """
    BPE BPEDecoder BertNormalizer BertPreTokenizer BertProcessing ByteFallback ByteLevel CTC Digits FixedLength Fuse
    Lowercase Metaspace NFC NFD NFKC NFKD Precompiled Prepend Punctuation Replace RobertaProcessing Sequence Split
    Strip StripAccents TemplateProcessing Unigram Whitespace WhitespaceSplit WordPiece
"""
ENCODER, DECODER = "encoder_model", "decoder_model_merged"


class PassingEncoderGraph(Graph):
    """Token ids -> the same ids, which the decoder encodes."""

    def __init__(self):
        super().__init__({"input_ids": SOURCE}, {"last_hidden_state": SOURCE})

    def forward(self, input_ids):
        return input_ids.clone()


class FirstStepGraph(DecoderGraph):
    """The first step: reads the source's ids -> logits, and keys and values of target and source."""

    def __init__(self, model):
        super().__init__(model)
        self.inputs["encoder_hidden_states"] = SOURCE
        self.encoder = EncoderGraph(model)

    def example_input(self, name: str) -> torch.Tensor:
        return super().example_input("encoder_attention_mask" if name == "encoder_hidden_states" else name)

    def forward(self, input_ids, encoder_hidden_states, encoder_attention_mask):
        states = self.encoder(encoder_hidden_states, encoder_attention_mask)
        return super().forward(input_ids, states, encoder_attention_mask)


class LaterStepGraph(DecoderWithPastGraph):
    """A later step, which repeats end tokens: transformers.js stops a batch when the last token of each row is one."""

    def __init__(self, model, eos_token_ids):
        super().__init__(model)
        self.eos_token_ids = eos_token_ids

    def forward(self, input_ids, encoder_attention_mask, past_key_values):
        logits, *present = super().forward(input_ids, encoder_attention_mask, past_key_values)
        for eos_token_id in self.eos_token_ids:
            is_eos = torch.where(torch.arange(logits.shape[-1]) == eos_token_id, 1.0, 0.0)
            logits = torch.where((input_ids == eos_token_id)[..., None], is_eos, logits)  # (B, T, V)
        return logits, *present


def export_transformers_js(
    model_or_path: PreTrainedModel | str | Path,
    output_dir: str | Path,
    *,
    quantization: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a text model to a folder that transformers.js loads.

    Args:
        model_or_path ([`~transformers.PreTrainedModel`], `str` or `Path`): A model of this family, a folder, or a name
            on the Hub.
        output_dir (`str` or `Path`): Folder of the export.
        quantization (`str`, *optional*): Type of the stored weights: `"float16"`, `"int8"` or `"int4"`. `None` stores
            float32. Activations are float32.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` uses the tokenizer in the folder of
            the model.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an earlier export in `output_dir`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: The model or its tokenizer cannot be exported, `quantization` is unknown, or `output_dir` cannot be
            written.
        TypeError: `model_or_path` is neither a model nor a path.
        ImportError: A package of the `export` extra is not installed.
    """
    options = {"quantization": quantization, "tokenizer": tokenizer, "overwrite": overwrite}
    with write_engine_bundle(model_or_path, output_dir, FORMAT, **options) as bundle:
        if bundle.tokenizer is not None:
            check_tokenizer_parts(bundle.tokenizer, FORMAT, frozenset(_PARTS.split()))
            # transformers.js would remove spaces before dots.
            bundle.tokenizer.init_kwargs["clean_up_tokenization_spaces"] = False
        model, folder = bundle.model, bundle.folder / "onnx"
        dtype, suffix = DTYPES[quantization]
        later = LaterStepGraph(model, list_eos_token_ids(model))
        decoder = merge_branches(trace(FirstStepGraph(model)), trace(later), _is_later)
        compress_weights(decoder, quantization)
        graphs = {f"{ENCODER}{suffix}.onnx": trace(PassingEncoderGraph()), f"{DECODER}{suffix}.onnx": decoder}
        folder.mkdir()
        weights = SharedWeights(folder, f"{DECODER}{suffix}.onnx_data")
        for name, graph in graphs.items():
            weights.write_graph(graph, name)
        bundle.manifest["graphs"] = {f"onnx/{name}": describe_tensors(graph) for name, graph in graphs.items()}
        (bundle.folder / "config.json").write_text(json.dumps(_build_config(model, dtype), indent=2) + "\n", "utf-8")
        _build_generation_config(model).save_pretrained(bundle.folder)
    return Path(output_dir)


def _is_later(inputs, tape):
    ir = import_engine("onnx_ir")
    inputs["use_cache_branch"] = ir.val("use_cache_branch", dtype=ir.DataType.BOOL, shape=[1])
    return inputs["use_cache_branch"]


def _build_config(model, dtype):
    """Return a config of the class that runs these graphs in transformers.js."""
    config, generation_config = model.config, model.generation_config
    token_ids = {
        name: getattr(generation_config, name)
        for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id")
    }
    return {
        **{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
        **{"vocab_size": config.vocab_size, "d_model": config.hidden_size, "d_kv": config.head_dim},
        **{"num_heads": config.num_key_value_heads, "num_layers": config.encoder_num_hidden_layers},
        **{"num_decoder_layers": config.decoder_num_hidden_layers, **token_ids},
        "transformers.js_config": {"dtype": dtype, "use_external_data_format": {DECODER: 1}},
    }


def _build_generation_config(model):
    """Return the defaults of `generate`, without beams, which transformers.js lacks."""
    generation_config = copy.deepcopy(model.generation_config)
    generation_config.num_beams, generation_config.length_penalty = 1, None
    return generation_config
