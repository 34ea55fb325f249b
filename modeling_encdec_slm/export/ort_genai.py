# SPDX-License-Identifier: Apache-2.0
"""Export a text model to onnxruntime-genai.

The engine has no encoder-decoders of text. To it the model looks decoder-only: the source is the prompt, and the cache
has one layer more than twice the decoder's layers. All layers have the shape (batch, key/value heads, length, head
size), and grow by one position per step:

- first those of self-attention. The prompt leaves its start token in the last position.
- then those of cross-attention. Positions after the prompt are unused.
- then one whose keys are 1 for the used positions of self-attention and whose values are 1 for those of
  cross-attention, and 0 for all others.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import EncoderDecoderCache

from ..errors import summarize_error
from .bundles import Bundle, import_engine
from .engine_bundles import check_encoding, check_engine_version, list_eos_token_ids, write_engine_bundle
from .onnx_branches import merge_branches
from .onnx_graphs import (
    SOURCE,
    DecoderGraph,
    DecoderWithPastGraph,
    EncoderGraph,
    additive_mask,
    fill_cache,
    flatten_caches,
    pair_layers,
)
from .onnx_quantization import compress_weights
from .onnx_tracing import SharedWeights, describe_tensors, trace


FORMAT, PACKAGE, TESTED_VERSION = "ort-genai", "onnxruntime_genai", "0.18"
GRAPH = "model.onnx"
SEARCH_OPTIONS = (
    *("do_sample", "early_stopping", "length_penalty", "no_repeat_ngram_size", "num_beams", "repetition_penalty"),
    *("temperature", "top_k", "top_p"),
)


def _cache_shapes(config, prefix, length):
    shape = ("batch_size", config.num_key_value_heads, length, config.head_dim)
    num_layers = 2 * config.decoder_num_hidden_layers + 1
    return {f"{prefix}.{layer}.{kind}": shape for layer in range(num_layers) for kind in ("key", "value")}


class PromptGraph(DecoderGraph):
    """The first step: reads a source -> logits of the first token, and the cache."""

    def __init__(self, model):
        super().__init__(model)
        config = model.config
        self.inputs = {"input_ids": SOURCE, "attention_mask": SOURCE}
        logits = {"logits": ("batch_size", 1, config.vocab_size)}
        self.outputs = logits | _cache_shapes(config, "present", "source_length")
        self.encoder = EncoderGraph(model)
        self.start_token_id = model.generation_config.decoder_start_token_id

    def forward(self, input_ids, attention_mask):
        states = self.encoder(input_ids, attention_mask)
        start_ids = torch.full_like(input_ids[:, :1], self.start_token_id)
        logits, *caches = super().forward(start_ids, states, attention_mask)
        pairs = pair_layers(caches)
        self_tensors, cross_tensors = ([each for pair in part for each in pair] for part in (pairs[::2], pairs[1::2]))
        unused = torch.zeros_like(cross_tensors[0][:, :, 1:])
        used = torch.ones_like(self_tensors[0])
        is_read = torch.where((attention_mask != 0)[:, None, :, None], torch.ones_like(cross_tensors[0]), 0.0)
        self_tensors = [torch.cat((unused, each), dim=2) for each in (*self_tensors, used)]
        return logits, *self_tensors[:-1], *cross_tensors, self_tensors[-1], is_read


class StepGraph(DecoderWithPastGraph):
    """Later steps: reads one token and the cache -> logits, and the grown cache."""

    def __init__(self, model):
        super().__init__(model)
        config = model.config
        self.inputs = {"input_ids": ("batch_size", 1), **_cache_shapes(config, "past_key_values", "past_length")}
        logits = {"logits": ("batch_size", 1, config.vocab_size)}
        self.outputs = logits | _cache_shapes(config, "present", "past_length + 1")

    def forward(self, input_ids, past_key_values):
        *pairs, (self_used, cross_used) = pair_layers(past_key_values)
        self_pairs, cross_pairs = pairs[: self.num_layers], pairs[self.num_layers :]
        caches = EncoderDecoderCache(fill_cache(self_pairs), fill_cache(cross_pairs))
        new = torch.ones_like(self_used[:, :, :1])
        self_used = torch.cat((self_used, new), dim=2)
        self_mask, cross_mask = (additive_mask(used[:, :1, :, 0] > 0)[:, None] for used in (self_used, cross_used))
        positions = self_used[:, 0, :, 0].sum(-1, keepdim=True).long() - 1
        logits = self.decode(input_ids, positions, self_mask, cross_mask, caches)
        unused = torch.zeros_like(new)
        cross_tensors = [torch.cat((each, unused), dim=2) for pair in cross_pairs for each in pair]
        cross_used = torch.cat((cross_used, unused), dim=2)
        return logits, *flatten_caches(caches.self_attention_cache), *cross_tensors, self_used, cross_used


def export_ort_genai(
    model_or_path: PreTrainedModel | str | Path,
    output_dir: str | Path,
    *,
    quantization: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a text model to a folder that onnxruntime-genai loads.

    Args: as in [`~encdec_slm.export.export_transformers_js`].

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: The model or its tokenizer cannot be exported, `quantization` is unknown, or `output_dir` cannot be
            written.
        TypeError: `model_or_path` is neither a model nor a path.
        ImportError: A package of the `export` or `engines` extra is not installed.
    """
    version = check_engine_version(PACKAGE, TESTED_VERSION)
    options = {"quantization": quantization, "tokenizer": tokenizer, "overwrite": overwrite}
    with write_engine_bundle(model_or_path, output_dir, FORMAT, **options) as bundle:
        model, folder = bundle.model, bundle.folder
        decoder = merge_branches(trace(PromptGraph(model)), trace(StepGraph(model)), _has_past)
        for value in decoder.graph.outputs[1:]:
            value.shape = _with_length(value, "total_length")
        compress_weights(decoder, quantization)
        SharedWeights(folder).write_graph(decoder, GRAPH)
        bundle.manifest.update(engine_version=version, graphs={GRAPH: describe_tensors(decoder)})
        config = json.dumps(build_config(model, 2 * model.config.decoder_num_hidden_layers + 1), indent=2) + "\n"
        (folder / "genai_config.json").write_text(config, encoding="utf-8")
        if bundle.tokenizer is not None:
            _check_tokenizer(bundle)
    return Path(output_dir)


def _has_past(inputs, tape):
    """Give the inputs their shapes in all steps; return whether the cache has positions."""
    ir = import_engine("onnx_ir")
    inputs["input_ids"].shape = ir.Shape(["batch_size", "length"])
    inputs["attention_mask"].shape = ir.Shape(["batch_size", "total_length"])
    length = tape.op("Shape", [inputs["past_key_values.0.key"]], {"start": 2, "end": 3})
    return tape.op("Cast", [length], {"to": ir.DataType.BOOL})


def _with_length(value, length):
    return import_engine("onnx_ir").Shape([length if axis == 2 else size for axis, size in enumerate(value.shape)])


def build_config(model: PreTrainedModel, num_layers: int, layer: str = "%d") -> dict[str, Any]:
    """Return the content of `genai_config.json`, where lengths count source and target together.

    Args:
        model ([`~transformers.PreTrainedModel`]): Has the sizes and the settings of the search.
        num_layers (`int`): Layers of the cache.
        layer (`str`, *optional*, defaults to `"%d"`): A layer in the names of the cache.
    """
    config, generation_config = model.config, model.generation_config
    eos_token_ids = list_eos_token_ids(model)
    pad_token_id = generation_config.pad_token_id
    search = {name: getattr(generation_config, name, None) for name in SEARCH_OPTIONS}
    return {
        "model": {
            **{"type": "decoder", "context_length": config.max_position_embeddings, "vocab_size": config.vocab_size},
            **{"bos_token_id": generation_config.decoder_start_token_id or 0, "eos_token_id": eos_token_ids},
            "pad_token_id": eos_token_ids[0] if pad_token_id is None else pad_token_id,
            "decoder": {
                **{"filename": GRAPH, "session_options": {}, "head_size": config.head_dim},
                **{"hidden_size": config.hidden_size, "num_attention_heads": config.num_attention_heads},
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": num_layers,
                "inputs": {
                    **{"input_ids": "input_ids", "attention_mask": "attention_mask"},
                    **{f"past_{kind}_names": f"past_key_values.{layer}.{kind}" for kind in ("key", "value")},
                },
                "outputs": {
                    "logits": "logits",
                    **{f"present_{kind}_names": f"present.{layer}.{kind}" for kind in ("key", "value")},
                },
            },
        },
        "search": {
            **{name: value for name, value in search.items() if value is not None},
            **{"max_length": config.max_position_embeddings, "past_present_share_buffer": False},
        },
    }


def _check_tokenizer(bundle: Bundle) -> None:
    """Check that the engine reads a text as the tokenizer does.

    Raises:
        ValueError: It cannot load the tokenizer, or gives other ids.
    """
    bundle.tokenizer.save_pretrained(bundle.folder)
    try:
        tokenizer = import_engine(PACKAGE).Tokenizer(str(bundle.folder))
    except Exception as error:  # the engine raises nothing more specific
        raise ValueError(
            f"onnxruntime-genai cannot load this tokenizer ({summarize_error(error)}). Use another tokenizer, or "
            "export to onnx."
        ) from error
    check_encoding("onnxruntime-genai", bundle.tokenizer, lambda text: tokenizer.encode(text).tolist())
