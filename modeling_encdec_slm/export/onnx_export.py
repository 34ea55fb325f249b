# SPDX-License-Identifier: Apache-2.0
"""Export a model to ONNX: with free lengths for CPUs, GPUs and browsers, or with fixed shapes for NPUs.

A text model with free lengths becomes `encoder_model.onnx`, `decoder_model.onnx` (the first step, which also computes
keys and values of the source) and `decoder_with_past_model.onnx` (all other steps). A vision-text model also has
`vision_encoder.onnx` and `embed_tokens.onnx`, and its encoder reads embeddings.

With fixed shapes there are two graphs per source length: `encoder_model_<length>.onnx`, which also computes keys and
values of all cross-attentions, and `decoder_with_past_model_<length>.onnx`, which reads one token. They use only
operators that QNN, OpenVINO and CoreML all accept.
"""

import copy
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints import has_vision
from . import onnx_quantization
from .bundles import Bundle, import_engine, write_bundle
from .onnx_graphs import (
    DecoderGraph,
    DecoderWithPastGraph,
    EmbeddingGraph,
    EncoderGraph,
    StaticDecoderGraph,
    StaticEncoderGraph,
    VisionGraph,
    set_plain_attention,
)
from .onnx_tracing import OPSET, SharedWeights, describe_tensors, trace
from .operators import SOURCES, find_unsupported


FORMAT, STATIC_FORMAT = "onnx", "onnx-static"
DEFAULT_TARGET_LENGTH = 128
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")


def export_onnx(
    model_or_path: PreTrainedModel | str | Path,
    output_dir: str | Path,
    *,
    static_lengths: Sequence[int] | dict[str, Any] | None = None,
    quantization: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    calibration: Iterable[str | Sequence[int]] | None = None,
) -> Path:
    """Export a model to ONNX. [`OrtEncDecSLM`] and [`OpenVINOEncDecSLM`] load the folder.

    It holds the graphs, their weights (`model.onnx_data`, each stored once), config, generation config, tokenizer or
    processor, and a manifest with the name, shape and dtype of all inputs and outputs.

    Args:
        model_or_path ([`~transformers.PreTrainedModel`], `str` or `Path`): A model of this family, a folder, or a name
            on the Hub.
        output_dir (`str` or `Path`): Folder of the export.
        static_lengths (`Sequence[int]` or `dict`, *optional*): Source lengths in tokens, for graphs of fixed shape; or
            `{"source": lengths, "target": length}`, where the target length defaults to 128. `None` leaves all lengths
            free. For text models.
        quantization (`str`, *optional*): `"int8"` (activations are quantized at run time) or `"int8_static"` (with
            scales measured on `calibration`). `None` exports float32, the only choice with `static_lengths`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` uses the tokenizer in the folder of
            the model.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an earlier export in `output_dir`.
        calibration (`Iterable`, *optional*): Typical sources for `"int8_static"`, as texts or lists of token ids. A
            few dozen are enough.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: The model cannot be exported, an argument has an unknown value or does not fit the others, or
            `output_dir` cannot be written.
        TypeError: `model_or_path` is neither a model nor a path, or an argument has another type.
        ImportError: A package of the `export` extra is not installed.
    """
    onnx_quantization.check_arguments(quantization, calibration, static_lengths)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        import_engine(name)
    format = FORMAT if static_lengths is None else STATIC_FORMAT
    with write_bundle(model_or_path, output_dir, format, tokenizer=tokenizer, overwrite=overwrite) as bundle:
        check_rope(bundle.model.config.get_text_config())
        if static_lengths is not None:
            _export_static(bundle, static_lengths)
        elif quantization is None:
            _export_dynamic(bundle.model, bundle.folder, bundle.manifest)
        else:
            _export_quantized(bundle, quantization, calibration)
        bundle.manifest["quantization"] = quantization
        _save_configs(bundle)
    return Path(output_dir)


def check_rope(config: PreTrainedConfig) -> None:
    """Check that the frequencies of a text model's rotary embeddings are constant.

    Raises:
        ValueError: They depend on the length of the input.
    """
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in LENGTH_DEPENDENT_ROPE_TYPES:
        raise ValueError(
            f"`rope_type` is {rope_type!r}, whose frequencies depend on the length of the input, but those of a graph "
            "are constant. Export a model with another type, such as 'default', 'linear', 'llama3' or 'yarn'."
        )


def _save_configs(bundle):
    config = copy.deepcopy(bundle.model.config)
    # The folder has no code.
    for name in ("auto_map", "custom_pipelines"):
        config.__dict__.pop(name, None)
    config.save_pretrained(bundle.folder)
    bundle.model.generation_config.save_pretrained(bundle.folder)


# Free lengths


def _export_dynamic(model, folder, manifest):
    set_plain_attention(model)
    weights = SharedWeights(folder)
    manifest.update(opset=OPSET, graphs={})
    for name, graph in _dynamic_graphs(model).items():
        traced = trace(graph)
        weights.write_graph(traced, name)
        manifest["graphs"][name] = describe_tensors(traced)


def _dynamic_graphs(model):
    images = {}
    if has_vision(model):
        images = {"vision_encoder.onnx": VisionGraph(model), "embed_tokens.onnx": EmbeddingGraph(model)}
    return {
        **images,
        "encoder_model.onnx": EncoderGraph(model, reads_embeddings=has_vision(model)),
        "decoder_model.onnx": DecoderGraph(model),
        "decoder_with_past_model.onnx": DecoderWithPastGraph(model),
    }


def _export_quantized(bundle: Bundle, quantization, calibration):
    inputs = None
    if quantization == onnx_quantization.STATIC:
        inputs = onnx_quantization.calibration_inputs(bundle.model, bundle.tokenizer, calibration)
    with tempfile.TemporaryDirectory(dir=bundle.folder) as temporary:
        _export_dynamic(bundle.model, Path(temporary), bundle.manifest)
        weights = SharedWeights(bundle.folder)
        for name, graph in onnx_quantization.quantize_graphs(Path(temporary), inputs):
            weights.write_graph(graph, name)


# Fixed shapes


def parse_static_lengths(static_lengths: Any, max_length: int) -> tuple[list[int], int]:
    """Return the source lengths in ascending order, and the target length, from `static_lengths` of [`export_onnx`].

    Args:
        static_lengths (`Sequence[int]` or `dict`): Source lengths, or `{"source": lengths, "target": length}`. The
            target length defaults to 128, or to `max_length` if that is smaller.
        max_length (`int`): The longest source and target of the model, in tokens.

    Raises:
        TypeError: `static_lengths` has another type.
        ValueError: There is no source length, or a length is less than 1 or greater than `max_length`.
    """
    lengths = static_lengths if isinstance(static_lengths, Mapping) else {"source": static_lengths}
    source, target = lengths.get("source"), lengths.get("target", min(DEFAULT_TARGET_LENGTH, max_length))
    are_integers = isinstance(source, Sequence) and all(type(length) is int for length in (*source, target))
    if not are_integers or not lengths.keys() <= {"source", "target"}:
        raise TypeError(
            f"`static_lengths` is {static_lengths!r}, but must be a list of source lengths in tokens, such as "
            '[64, 256], or {"source": [64, 256], "target": 64}.'
        )
    if not source or not all(1 <= length <= max_length for length in (*source, target)):
        raise ValueError(
            f"`static_lengths` has source lengths {list(source)} and target length {target}, but needs at least one "
            f"source length, and all lengths between 1 and `max_position_embeddings` ({max_length})."
        )
    return sorted(set(source)), target


def _export_static(bundle, static_lengths):
    model, manifest = bundle.model, bundle.manifest
    if model.config.model_type != "encdec_slm":
        raise ValueError(
            f"`static_lengths` is given for a model of type {model.config.model_type!r}, but only text models have "
            "graphs of fixed shape. Leave it out."
        )
    source_lengths, target_length = parse_static_lengths(static_lengths, model.config.max_position_embeddings)
    _limit_lengths(bundle, source_lengths[-1], target_length)
    set_plain_attention(model)
    manifest.update(opset=OPSET, source_lengths=source_lengths, target_length=target_length, graphs={})
    # The encoder is traced first, with the rotary embedding of the decoder still in its place.
    traced = {"encoder_model": _trace_for_npus(StaticEncoderGraph(model, source_lengths[-1]))}
    traced["decoder_with_past_model"] = _trace_for_npus(StaticDecoderGraph(model, target_length))
    operators = sorted({node.op_type for graph in traced.values() for node in graph.graph})
    manifest["operators"] = {"used": operators, "not_accepted": find_unsupported(operators), "lists": SOURCES}
    weights = SharedWeights(bundle.folder)
    for role, (stem, graph) in zip(("encoder", "decoder"), traced.items(), strict=True):
        weights.share(graph)
        for source_length in source_lengths:
            name, proto = f"{stem}_{source_length}.onnx", _fix_source_length(graph, source_length)
            (bundle.folder / name).write_bytes(proto.SerializeToString())
            tensors = describe_tensors(import_engine("onnx_ir").from_proto(proto))
            manifest["graphs"][name] = {"role": role, "source_length": source_length, **tensors}


def _limit_lengths(bundle, source_length, target_length):
    """Make tokenizer and generation config stop at the lengths of the graphs."""
    config = bundle.model.generation_config
    # The last token is generated, but not read.
    config.max_length = min(config.max_length or target_length + 1, target_length + 1)
    if bundle.tokenizer is not None and bundle.tokenizer.model_max_length > source_length:
        bundle.tokenizer = copy.deepcopy(bundle.tokenizer)
        bundle.tokenizer.model_max_length = source_length


def _trace_for_npus(graph):
    """Trace a graph; refuse operators that a runtime does not accept."""
    traced = trace(graph)
    refused = find_unsupported(node.op_type for node in traced.graph)
    if reasons := [f"{runtime} does not accept {', '.join(names)}" for runtime, names in refused.items() if names]:
        raise ValueError(
            f"The graphs of this model need operators that NPUs do not run: {'; '.join(reasons)}. The usual cause is "
            "an unusual `hidden_act`. Leave `static_lengths` out to export for CPUs and GPUs."
        )
    return traced


def _fix_source_length(graph, source_length):
    """Return a traced graph as a proto with a fixed source length and the shapes of all tensors."""
    onnx = import_engine("onnx")
    proto = import_engine("onnx_ir").to_proto(graph)
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = source_length
    inputs = {value.name: value for value in proto.graph.input}
    if "attention_mask" in inputs:  # the encoder, which knows its positions
        proto.graph.input.remove(inputs["position_ids"])
        positions = np.arange(source_length, dtype=np.int32)[None]
        proto.graph.initializer.append(onnx.numpy_helper.from_array(positions, "position_ids"))
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


__all__ = ["export_onnx", "parse_static_lengths"]
