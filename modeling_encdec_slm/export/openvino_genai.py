# SPDX-License-Identifier: Apache-2.0
"""Export a text model to OpenVINO GenAI.

The engine's `LLMPipeline` runs one model with states that looks decoder-only: the source is the prompt. In the first
call all positions are new. It fills the state of all cross keys and values with those of the encoder, and reads the
start token; later calls read the newest token. All cross keys and values are one state, because the CPU then runs the
encoder in the first call only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import EncoderDecoderCache

from ..errors import summarize_error
from .bundles import import_engine, openvino_core
from .engine_bundles import check_encoding, check_engine_version, list_eos_token_ids, write_engine_bundle
from .onnx_graphs import (
    MASKED,
    SOURCE,
    DecoderWithPastGraph,
    cache_names,
    cache_shapes,
    causal_mask,
    empty_caches,
    fill_cache,
    flatten_caches,
    pair_layers,
)
from .onnx_tracing import MIN_SHARED_BYTES, SharedWeights, trace


FORMAT, PACKAGE, TESTED_VERSION = "openvino-genai", "openvino_genai", "2026.4"
MODEL = "openvino_model.xml"


class WholeGraph(DecoderWithPastGraph):
    """Ids, mask and caches -> logits, grown keys and values of the target, and those of `input_ids` as a source."""

    def __init__(self, model):
        super().__init__(model)
        config = model.config
        masks = {"input_ids": SOURCE, "attention_mask": ("batch_size", "total_length")}
        past = cache_shapes(config, "past_key_values", decoder="past_length", encoder="cross_length")
        present = cache_shapes(config, "present", decoder="past_length + 1", encoder="source_length")
        self.inputs = masks | past
        self.outputs = {"logits": ("batch_size", 1, config.vocab_size), **present}
        self.encoder = model.model.encoder
        self.start_token_id = model.generation_config.decoder_start_token_id

    def forward(self, input_ids, attention_mask, past_key_values):
        pairs = pair_layers(past_key_values)
        caches = EncoderDecoderCache(fill_cache(pairs[::2]), fill_cache(pairs[1::2]))
        positions, mask = causal_mask(1, past_key_values[0].shape[2])
        newest = torch.where(positions == 0, self.start_token_id, input_ids[:, -1:])
        cross_mask = _additive_mask(attention_mask[:, : past_key_values[2].shape[2]])
        logits = self.decode(newest, positions, mask, cross_mask, caches)
        source = self._read_source(input_ids, attention_mask[:, : input_ids.shape[1]])
        return logits, *flatten_caches(caches.self_attention_cache, source)

    def _read_source(self, input_ids, attention_mask):
        """Return the cross keys and values of a source. The rest of this step is removed from the graph."""
        source_mask, caches = _additive_mask(attention_mask), empty_caches(self.num_layers)
        embeds = self.embed_tokens(input_ids)
        states = self.encoder(inputs_embeds=embeds, attention_mask=source_mask).last_hidden_state
        positions, mask = causal_mask(1)
        self.decoder(
            inputs_embeds=states[:, :1],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=caches,
            encoder_hidden_states=states,
            encoder_attention_mask=source_mask,
        )
        return caches.cross_attention_cache


def _additive_mask(attention_mask):
    """Return the additive mask `(B, 1, 1, S)` of a mask `(B, S)`."""
    return ((attention_mask.float() - 1) * MASKED)[:, None, None]


def export_openvino_genai(
    model_or_path: PreTrainedModel | str | Path,
    output_dir: str | Path,
    *,
    quantization: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> Path:
    """Export a text model to a folder that the `LLMPipeline` of OpenVINO GenAI loads.

    Args: as in [`~encdec_slm.export.export_transformers_js`]. NNCF quantizes the weights.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: The model or its tokenizer cannot be exported, `quantization` is unknown, or `output_dir` cannot be
            written.
        TypeError: `model_or_path` is neither a model nor a path.
        ImportError: A package of the `export` or `engines` extra is not installed.
    """
    if quantization == "int4":
        raise ValueError(
            "`quantization` is 'int4', which OpenVINO cannot run in a model of this form. Use 'int8' or 'float16'."
        )
    version = check_engine_version(PACKAGE, TESTED_VERSION)
    openvino = import_engine("openvino")
    options = {"quantization": quantization, "tokenizer": tokenizer, "overwrite": overwrite}
    with write_engine_bundle(model_or_path, output_dir, FORMAT, **options) as bundle:
        model, folder = bundle.model, bundle.folder
        if model.config.qk_norm:
            raise ValueError(
                "`qk_norm` is True, but OpenVINO cannot compile these norms as a part of a state. Export to ort-genai."
            )
        SharedWeights(folder).write_graph(trace(WholeGraph(model)), "graph.onnx")
        stateful = _add_states(openvino_core().read_model(folder / "graph.onnx"), model.config)
        stateful = _compress(stateful, quantization)
        openvino.save_model(stateful, folder / MODEL, compress_to_fp16=quantization == "float16")
        for path in folder.glob("*.onnx*"):
            path.unlink()
        bundle.manifest["engine_version"] = version
        token_ids = {"eos_token_id": list_eos_token_ids(model), "pad_token_id": model.generation_config.pad_token_id}
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **token_ids}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        model.generation_config.save_pretrained(folder)
        if bundle.tokenizer is not None:
            # The pipeline would apply it to each source.
            bundle.tokenizer.chat_template = None
            bundle.tokenizer.init_kwargs.pop("chat_template", None)
            _convert_tokenizer(openvino, bundle)
    return Path(output_dir)


def _add_states(graph: Any, config: Any) -> Any:
    """Return the graph with its caches as states, reordered by the input `beam_idx`."""
    openvino = import_engine("openvino")
    op = import_engine("openvino.opset13")
    inputs = {port.any_name: port.node for port in graph.inputs}
    outputs = {port.any_name: port.node.input_value(0) for port in graph.outputs}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    beam_idx = op.parameter([-1], np.int32, name="beam_idx")
    zero, axis = op.constant(np.array([0], np.int64)), op.constant(np.int64(0))
    num_heads, head_dim, depth = config.num_key_value_heads, config.head_dim, config.decoder_num_hidden_layers
    cross_names = cache_names(depth, "present", "encoder")
    num_cross_heads = num_heads * len(cross_names)
    sinks = []

    def add_state(name, heads, initial, rows):
        """Return the state's rows, and the variable to assign it to."""
        info = openvino.op.util.VariableInfo()
        info.data_shape, info.data_type = openvino.PartialShape([-1, heads, -1, head_dim]), openvino.Type.f32
        info.variable_id = name
        variable = openvino.op.util.Variable(info)
        value = op.read_value(initial, variable)
        return op.gather(value, rows, axis), variable

    def connect(name, source):
        for target in list(inputs[name.replace("present", "past_key_values")].output(0).get_target_inputs()):
            target.replace_source_output(source)

    one = op.constant(np.array([1], np.int64))
    is_first = op.equal(*(op.gather(op.shape_of(each, "i64"), one, axis) for each in (ids, mask)))
    num_rows = op.squeeze(op.gather(op.shape_of(ids, "i32"), zero, axis), zero)
    rows = op.range(op.constant(np.int32(0)), num_rows, op.constant(np.int32(1)), "i32")
    # In the first call `beam_idx` is 0 in each row.
    cross_rows = op.select(is_first, rows, beam_idx)
    # The shape of the concatenation is not known from the graph.
    shape = op.constant(np.array([0, num_cross_heads, -1, head_dim], np.int64))
    initial = op.reshape(op.concat([outputs[name] for name in cross_names], 1), shape, special_zero=True)
    cross, variable = add_state("cross", num_cross_heads, initial, cross_rows)
    sinks.append(op.assign(cross, variable))
    parts = op.split(cross, op.constant(np.int64(1)), len(cross_names))
    for index, name in enumerate(cross_names):
        connect(name, parts.output(index))
    batch_size = op.gather(op.shape_of(ids, "i64"), zero, axis)
    for name in cache_names(depth, "present", "decoder"):
        shape = op.concat([batch_size, op.constant(np.array([num_heads, 0, head_dim], np.int64))], 0)
        empty = op.broadcast(op.constant(np.float32(0)), shape)
        past, variable = add_state(name, num_heads, empty, beam_idx)
        connect(name, past.output(0))
        sinks.append(op.assign(outputs[name].get_node(), variable))
    result = op.result(outputs["logits"])
    result.output(0).set_names({"logits"})
    beam_idx.output(0).set_names({"beam_idx"})
    model = openvino.Model([result], sinks, [ids, mask, beam_idx], "encoder_decoder")
    _separate_shapes(model)
    model.validate_nodes_and_infer_types()
    return model


def _separate_shapes(model):
    """Give each reader of a small constant, and each Reshape, a copy of its own.

    What computes the first value of a state becomes a graph of its own when it is compiled, and shared values become
    its inputs. Axes and known sizes must not.
    """
    op = import_engine("openvino.opset13")
    for node in model.get_ops():
        shape = node.input_value(1).get_node() if node.get_type_name() == "Reshape" else None
        if shape is not None and shape.get_type_name() == "Concat":
            node.input(1).replace_source_output(op.concat(shape.input_values(), 0).output(0))
    for node in model.get_ops():
        if node.get_type_name() == "Constant" and node.get_byte_size() < MIN_SHARED_BYTES:
            for target in list(node.output(0).get_target_inputs())[1:]:
                target.replace_source_output(op.constant(node.get_data().copy()).output(0))


def _compress(model, quantization):
    if quantization in (None, "float16"):
        return model
    nncf = import_engine("nncf")
    nncf.set_log_level("ERROR")
    if quantization == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    # Of widths that 32 does not divide.
    parameters = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    mode = nncf.CompressWeightsMode.INT4_SYM
    return nncf.compress_weights(model, mode=mode, group_size=32, ratio=1.0, advanced_parameters=parameters)


def _convert_tokenizer(openvino, bundle):
    """Write the tokenizer in OpenVINO's format.

    Raises:
        ValueError: It cannot be converted, or gives other ids.
    """
    try:
        converted = import_engine("openvino_tokenizers").convert_tokenizer(bundle.tokenizer, with_detokenizer=True)
    except Exception as error:  # it raises nothing more specific
        raise ValueError(
            f"openvino-tokenizers cannot convert this tokenizer ({summarize_error(error)}). Use another tokenizer, or "
            "export to onnx."
        ) from error
    for name, model in zip(("openvino_tokenizer", "openvino_detokenizer"), converted, strict=True):
        openvino.save_model(model, bundle.folder / f"{name}.xml", compress_to_fp16=False)
    compiled = openvino_core().compile_model(converted[0], "CPU")
    check_encoding("openvino-tokenizers", bundle.tokenizer, lambda text: compiled([text])["input_ids"][0].tolist())
