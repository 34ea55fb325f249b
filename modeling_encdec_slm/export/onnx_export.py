# SPDX-License-Identifier: Apache-2.0
"""Writes a model as ONNX graphs with free lengths, all weights once in one file beside them.

A text model becomes `encoder_model.onnx`, `decoder_model.onnx` (the first step, which also makes the keys and values
of the source) and `decoder_with_past_model.onnx` (every other step). For sources with images there are also
`vision_encoder.onnx` and `embed_tokens.onnx`, and the encoder takes embeddings.
"""

import ast
import contextlib
import copy
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import onnx_quantization, onnx_static
from .bundles import bundle_written_whole, exportable, required
from .onnx_graphs import (
    DecoderGraph,
    DecoderWithPastGraph,
    EmbeddedEncoderGraph,
    EmbeddingGraph,
    EncoderGraph,
    VisionGraph,
    cache_names,
    use_plain_attention,
)
from .onnx_static import OPSET, WEIGHTS, SharedWeights, quiet_export


FORM = "onnx"
# Sizes of the traced inputs: all differ, so that no two free lengths are taken for one.
TRACED = {"batch_size": 2, "source_length": 7, "target_length": 3, "past_length": 5, "num_tiles": 2}
LENGTH_DEPENDENT_ROPES = ("dynamic", "longrope")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "chat_template.*")


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
    """The folder of an ONNX bundle, which `OrtEncDecSLM.from_pretrained` and any ONNX runtime read.

    It has the graphs, their weights (`model.onnx_data`, each stored once), config, generation config, tokenizer, and
    a manifest with name, shape and dtype of all inputs and outputs. Masks are inputs of every graph that attends.

    Args:
        model_or_path ([`~transformers.PreTrainedModel`], `str` or `Path`): A model of this family, a folder, or a name
            on the Hub.
        output_dir (`str` or `Path`): Where the bundle is to lie.
        static_lengths (`Sequence[int]` or `dict`, *optional*): Source lengths in tokens; makes graphs of fixed shape
            for NPUs instead, see [`~encdec_slm.export.onnx_static.export_static`]. `None` leaves all lengths free.
        quantization (`str`, *optional*): `"int8"` (weights when exported, activations when run) or `"int8_static"`
            (both when exported, from calibration rows; of graphs of fixed shape, activations get 16 bits, as NPUs
            want it). `None` means float32.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): `None` means the one that lies beside the
            weights.
        overwrite (`bool`, *optional*, defaults to `False`): Replace an export that lies in `output_dir`.
        calibration (`Iterable`, *optional*): Sources for `"int8_static"`, like those that the model will read: texts,
            or lists of token ids. `None` means 32 held-out functions of the docstring task.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: The model cannot be exported, `quantization` is unknown, `calibration` is not used or empty, a
            length does not fit, or `output_dir` is not empty.
        TypeError: `model_or_path` is neither a model nor a path; a calibration row is neither text nor ids.
        ImportError: The `export` extra is not installed.
    """
    onnx_quantization.check_arguments(quantization, calibration, static_lengths)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        required(name)
    model, tokenizer = exportable(model_or_path, tokenizer)
    form = FORM
    if static_lengths is not None:
        form = onnx_static.FORM
        longest = model.config.get_text_config().max_position_embeddings
        tokenizer = _limited(tokenizer, onnx_static.parse_static_lengths(static_lengths, longest)[0][-1])
    with bundle_written_whole(output_dir, form, tokenizer, overwrite) as (folder, manifest):
        is_calibrated = quantization == onnx_quantization.STATIC
        rows = onnx_quantization.calibration_rows(calibration, model, tokenizer) if is_calibrated else None
        if static_lengths is not None:
            onnx_static.export_static(model, folder, manifest, static_lengths, rows)
        elif quantization is None:
            _write_graphs(model, folder, manifest)
        else:
            inputs = onnx_quantization.calibration_inputs(model, rows) if is_calibrated else None
            _write_quantized(model, folder, manifest, inputs)
        manifest["quantization"] = quantization
        _write_configs(model, folder)
    return Path(output_dir)


def _limited(tokenizer, max_length):
    """A tokenizer that truncates to what the largest graph holds, where it is asked to truncate."""
    if tokenizer is None or tokenizer.model_max_length <= max_length:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = max_length
    return tokenizer


@dataclass
class Part:
    """One graph to be: a module, and names and shapes of what goes in and comes out; a `str` is a free length."""

    module: nn.Module
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]


def _parts(model):
    """The graphs of a model by file name."""
    config = model.config.get_text_config()
    target, source = ("batch_size", "target_length"), ("batch_size", "source_length")
    states = (*source, config.hidden_size)
    heads, head_dim, depth = config.num_key_value_heads, config.head_dim, config.decoder_num_hidden_layers
    cross = dict.fromkeys(cache_names(depth, "present", "encoder"), ("batch_size", heads, "source_length", head_dim))
    lengths = {"first": "target_length", "past": "past_length", "grown": "past_length + target_length"}
    own = {state: ("batch_size", heads, length, head_dim) for state, length in lengths.items()}
    logits = {"logits": (*target, config.vocab_size)}
    first = {name: cross.get(name, own["first"]) for name in cache_names(depth, "present", "decoder", "encoder")}
    past = {name.replace("present", "past_key_values"): shape for name, shape in first.items()}
    past = {name: own["past"] if ".decoder." in name else shape for name, shape in past.items()}
    grown = dict.fromkeys(cache_names(depth, "present", "decoder"), own["grown"])
    masked = {"encoder_attention_mask": source}
    return {
        **(_text_parts if model.config.model_type == "encdec_slm" else _vision_parts)(model, source, states),
        "decoder_model.onnx": Part(
            DecoderGraph(model),
            {"input_ids": target, "encoder_hidden_states": states, **masked},
            {**logits, **first},
        ),
        "decoder_with_past_model.onnx": Part(
            DecoderWithPastGraph(model), {"input_ids": target, **masked, **past}, {**logits, **grown}
        ),
    }


def _text_parts(model, source, states):
    inputs = {"input_ids": source, "attention_mask": source}
    return {"encoder_model.onnx": Part(EncoderGraph(model), inputs, {"last_hidden_state": states})}


def _vision_parts(model, source, states):
    config = model.config
    side, width = config.tile_size, config.text_config.hidden_size
    tiles = ("num_tiles", config.vision_config.num_channels, side, side)
    features = {"image_features": ("num_tiles", config.patches_per_side**2, width)}
    newline = {"image_newline": (width,)} if config.image_newline else {}
    inputs = {"inputs_embeds": states, "attention_mask": source}
    return {
        "vision_encoder.onnx": Part(VisionGraph(model), {"pixel_values": tiles}, features | newline),
        "embed_tokens.onnx": Part(EmbeddingGraph(model), {"input_ids": source}, {"inputs_embeds": states}),
        "encoder_model.onnx": Part(EmbeddedEncoderGraph(model), inputs, {"last_hidden_state": states}),
    }


def _write_graphs(model, folder, manifest):
    _check_rope(model.config.get_text_config())
    use_plain_attention(model)
    weights = SharedWeights(folder / WEIGHTS)
    manifest.update(opset=OPSET, graphs={})
    for name, part in _parts(model).items():
        graph = _exported(part)
        _write_graph(graph, folder / name, weights)
        manifest["graphs"][name] = _described(graph)


def _write_quantized(model, folder, manifest, inputs):
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-float-") as temporary:
        _write_graphs(model, Path(temporary), manifest)
        weights = SharedWeights(folder / WEIGHTS)
        for name, graph in onnx_quantization.quantized_graphs(Path(temporary), inputs):
            _write_graph(graph, folder / name, weights)


def _check_rope(config):
    rope_type = config.rope_parameters["rope_type"]
    if rope_type in LENGTH_DEPENDENT_ROPES:
        raise ValueError(
            f'The model has `rope_type` "{rope_type}", whose frequencies change with the length of the input, but '
            "those of a graph are fixed. Export a model of another type, such as "
            '"default", "linear", "llama3" or "yarn".'
        )


def _exported(part):
    """The graph of a part, of plain operators, with our names for free lengths and the checkpoint's for weights."""
    shapes = list(part.inputs.values())
    inputs = [_traced_input(name, shape) for name, shape in part.inputs.items()]
    free = [{axis: size for axis, size in enumerate(shape) if isinstance(size, str)} for shape in shapes]
    if isinstance(part.module, DecoderWithPastGraph):
        inputs, free = [*inputs[:2], tuple(inputs[2:])], [*free[:2], tuple(free[2:])]
    with _quiet():
        program = torch.onnx.export(
            part.module.eval(),
            tuple(inputs),
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            dynamic_shapes=tuple(free),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=_translations(),
            verbose=False,
        )
    graph = program.model
    _name_weights(graph)
    ir = required("onnx_ir")
    for values, shapes in ((graph.graph.inputs, part.inputs), (graph.graph.outputs, part.outputs)):
        for value in values:
            value.shape = ir.Shape(shapes[value.name])
    return graph


def _traced_input(name, shape):
    sizes = [TRACED.get(size, size) for size in shape]
    return torch.ones(sizes, dtype=torch.long) if name.endswith(("_ids", "_mask")) else torch.zeros(sizes)


@contextlib.contextmanager
def _quiet():
    deduplication = logging.getLogger("onnx_ir.passes.common.initializer_deduplication")
    level = deduplication.level
    # It tells of weights that are outputs too, as a newline of images is.
    deduplication.setLevel(logging.ERROR)
    with quiet_export():
        # Equal names of free lengths are one length, as is meant.
        warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
        try:
            yield
        finally:
            deduplication.setLevel(level)


def _translations():
    """How operators of torch are written, where the exporter's own way has more nodes or copies more."""
    op = required("onnxscript").opset20

    def attention(query, key, value, attn_mask, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        num_heads, num_key_value_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        # Query heads that share a key are rows of one query, so that keys and values are not repeated. In a shape, 0
        # keeps a length and -1 takes what is left: no length is computed when the graph runs.
        grouped = op.Reshape(op.Mul(query, scale), [0, num_key_value_heads, -1, head_dim])
        scores = op.MatMul(grouped, op.Transpose(key, perm=[0, 1, 3, 2]))
        scores = op.Add(op.Reshape(scores, [0, num_heads, -1, 0]), attn_mask)
        probabilities = op.Reshape(op.Softmax(scores, axis=-1), [0, num_key_value_heads, -1, 0])
        return op.Reshape(op.MatMul(probabilities, value), [0, num_heads, -1, head_dim])

    def rms_norm(states, normalized_shape, weight=None, eps=None):
        # In the form that runtimes know as one operator of theirs.
        return op.Div(states, op.Sqrt(op.Add(op.ReduceMean(op.Pow(states, 2.0), [-1]), eps)))

    return {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten.rms_norm.default: rms_norm,
    }


def _name_weights(graph):
    """Names transposed weights after the layers that multiply by them, and forgets where the code of nodes lies."""
    for node in graph.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.const_value is not None and scopes is not None:
            weight.name = f"{ast.literal_eval(scopes)[-2]}.weight_transposed"
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _write_graph(graph, path, weights):
    weights.share(graph)
    path.write_bytes(required("onnx_ir").to_proto(graph).SerializeToString())


def _described(graph):
    def tensors(values):
        sizes = ([size if isinstance(size, int) else str(size) for size in value.shape] for value in values)
        return [
            {"name": value.name, "shape": shape, "dtype": value.dtype.numpy().name}
            for value, shape in zip(values, sizes, strict=True)
        ]

    return {"inputs": tensors(graph.graph.inputs), "outputs": tensors(graph.graph.outputs)}


def _write_configs(model, folder):
    config = copy.deepcopy(model.config)
    # The bundle has no code to load, whatever the checkpoint had.
    for name in ("auto_map", "custom_pipelines"):
        config.__dict__.pop(name, None)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    origin = Path(model.config.name_or_path or ".")
    if model.config.model_type == "encdec_vlm":
        for path in (path for pattern in PROCESSOR_FILES for path in origin.glob(pattern)):
            shutil.copy(path, folder)
