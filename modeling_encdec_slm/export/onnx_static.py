# SPDX-License-Identifier: Apache-2.0
"""Graphs without a free dimension for NPUs: a source is padded to one of a few lengths, the cache has a fixed size.

Per source length (bucket) there are two files. The encoder reads padded token ids and a mask, and gives its states and
the keys and values of every cross-attention. The decoder step reads one token, those keys and values and the cache of
the target, and gives logits and the cache with the token at its end: the cache moves by one place each step, so that
outputs of one step are inputs of the next without any index. Only operators that all of QNN, OpenVINO and CoreML
accept are used (see `operators.py`), so norms, rotations and masks are written out.

Axes in shape comments: S source, T cached target, D width, H query heads, K key/value heads, d width of a head,
V vocabulary. The batch is always one row: NPUs gain nothing from more.
"""

import contextlib
import copy
import hashlib
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import GELUTanh

from . import onnx_static_quantization
from .bundles import required
from .onnx_graphs import cache_names
from .operators import SOURCES, not_accepted


FORM = "onnx-static"
# Gelu is one operator from here on.
OPSET = 20
WEIGHTS = "model.onnx_data"
FILE_STEMS = {"encoder": "encoder_model", "decoder": "decoder_with_past_model"}
DEFAULT_TARGET_LENGTH = 128
# Taken from scores of what must not be read: finite in float16 too, and the exponential of what is left is 0.
MASKED = 1e4
TABLES = ("cos", "sin")
# Lengths of the traced graphs, in whose place those of a bundle are put. Of length 1, axes would be taken for another.
TRACED_SOURCE, TRACED_TARGET = 5, 7
# Smaller constants lie in the graph files.
MIN_SHARED_BYTES = 1024
ALIGNMENT = 4096


def parse_static_lengths(static_lengths: Any, max_length: int) -> tuple[list[int], int]:
    """Source lengths in ascending order, and the target length, from what `export_onnx` takes as `static_lengths`.

    Args:
        static_lengths (`Sequence[int]` or `dict`): Source lengths; or `{"source": lengths, "target": length}`. Without
            a target length it is 128, or `max_length` if that is less.
        max_length (`int`): The longest that the model is made for, in tokens.

    Raises:
        TypeError: It is something else.
        ValueError: A length is less than 1 or more than `max_length`, or there is none.
    """
    given = static_lengths if isinstance(static_lengths, Mapping) else {"source": static_lengths}
    source, target = given.get("source"), given.get("target", min(DEFAULT_TARGET_LENGTH, max_length))
    is_lengths = isinstance(source, Sequence) and all(map(_is_int, source)) and _is_int(target)
    if not is_lengths or not given.keys() <= {"source", "target"}:
        raise TypeError(
            f"`static_lengths` is {static_lengths!r}, but must be source lengths in tokens, such as [64, 256], or "
            'with the length of the cache {"source": [64, 256], "target": 64}.'
        )
    outside = [length for length in (*source, target) if not 1 <= length <= max_length]
    if outside or not source:
        raise ValueError(
            f"`static_lengths` has source lengths {list(source)} and target length {target}, but needs at least one "
            f"source length, and all between 1 and `max_position_embeddings` ({max_length})."
        )
    return sorted(set(source)), target


def _is_int(value):
    return isinstance(value, int) and not isinstance(value, bool)


def export_static(
    model: PreTrainedModel,
    folder: Path,
    manifest: dict[str, Any],
    static_lengths: Any,
    rows: list[torch.LongTensor] | None = None,
) -> None:
    """Writes the graphs of a text model for fixed lengths, and what they are into `manifest`.

    Args:
        model ([`~transformers.PreTrainedModel`]): In float32 and eval mode on the CPU. Its generation config gets no
            more tokens than the cache has room for.
        folder (`Path`): Gets `encoder_model_<S>.onnx` and `decoder_with_past_model_<S>.onnx` for every source length,
            and the weights of all of them once, in `model.onnx_data`.
        manifest (`dict`): Gets `source_lengths`, `target_length`, `opset`, `operators` and `graphs`: role, source
            length, and name, shape and dtype of every input and output of every file.
        static_lengths: As in [`parse_static_lengths`].
        rows (`list[torch.LongTensor]`, *optional*): Sources of shape `(1, source_length)` to calibrate with: weights
            get 8 bits, activations 16. `None` leaves both in float32.

    Raises:
        ValueError: `static_lengths` do not fit; the model is one for images; its rotary embedding depends on the
            length of the text; or it needs an operator that QNN, OpenVINO or CoreML does not accept.
    """
    _check_model(model)
    source_lengths, target_length = parse_static_lengths(static_lengths, model.config.max_position_embeddings)
    manifest.update(opset=OPSET, source_lengths=source_lengths, target_length=target_length, graphs={})
    # The last token is written, but never read.
    longest = model.generation_config.max_length
    model.generation_config.max_length = min(longest or target_length + 1, target_length + 1)
    if rows is None:
        operators = _write_graphs(model, folder, manifest, MASKED)
    else:
        operators = _write_quantized(model, folder, manifest, rows)
    manifest["operators"] = {"used": operators, "not_accepted": not_accepted(operators), "lists": SOURCES}


def _write_graphs(model, folder, manifest, masked):
    """Writes float32 graphs and describes them in `manifest`; gives the names of their operators, sorted."""
    weights = SharedWeights(folder / WEIGHTS)
    graphs = {"encoder": EncoderGraph(model, masked), "decoder": StepGraph(model, masked)}
    traced, operators = {}, set()
    for role, graph in graphs.items():
        traced[role] = _traced(graph, weights)
        operators |= {node.op_type for node in traced[role].graph.node}
        _check_operators(operators)
    target_length = manifest["target_length"]
    for source_length in manifest["source_lengths"]:
        for role, graph in graphs.items():
            tables = rotary_tables(model, role, source_length if role == "encoder" else target_length)
            proto = with_lengths(traced[role], graph.shapes, source_length, target_length, tables)
            name = f"{FILE_STEMS[role]}_{source_length}.onnx"
            (folder / name).write_bytes(proto.SerializeToString())
            manifest["graphs"][name] = {"role": role, "source_length": source_length, **tensors_of(proto)}
    return sorted(operators)


def _write_quantized(model, folder, manifest, rows):
    ir = required("onnx_ir")
    weights, operators = SharedWeights(folder / WEIGHTS), set()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-float-") as temporary:
        _write_graphs(model, Path(temporary), manifest, onnx_static_quantization.MASKED)
        for name, graph in onnx_static_quantization.quantized_graphs(Path(temporary), manifest, model, rows):
            operators |= {node.op_type for node in graph.graph}
            weights.share(graph)
            (folder / name).write_bytes(ir.to_proto(graph).SerializeToString())
    manifest["opset"] = onnx_static_quantization.OPSET
    return sorted(operators)


def _check_model(model):
    if model.config.model_type != "encdec_slm":
        raise ValueError(
            f"`static_lengths` was given for a model of `model_type` {model.config.model_type!r}, but graphs of fixed "
            "shape are made of text models only. Leave it out to export the image encoder and the text model with "
            "free shapes."
        )
    if (kind := model.config.rope_parameters["rope_type"]) in ("dynamic", "longrope"):
        raise ValueError(
            f"The model has `rope_type` {kind!r}, whose frequencies change with the length of the input, but those of "
            'a graph are fixed. Export a model of another type, such as "default", "linear", "llama3" or "yarn".'
        )


def _check_operators(operators):
    refused = {runtime: names for runtime, names in not_accepted(operators).items() if names}
    if refused:
        reasons = "; ".join(f"{runtime} does not accept {', '.join(names)}" for runtime, names in refused.items())
        raise ValueError(
            f"The graphs of this model have operators that NPUs do not run: {reasons}. The usual cause is an unusual "
            "`hidden_act`. Leave `static_lengths` out to export for runtimes on CPUs and GPUs."
        )


def _norm(module, states):
    if isinstance(module, nn.Identity):
        return states
    return states / torch.sqrt((states * states).mean(-1, keepdim=True) + module.eps) * module.weight


def _rotated(states, cos, sin):
    """`sin` has the sign of the rotation in it: CoreML does not negate."""
    first, second = states.split(states.shape[-1] // 2, dim=-1)
    return states * cos + torch.cat((second, first), dim=-1) * sin


def _split_heads(attention, states):
    return states.view(-1, states.shape[-1] // attention.head_dim, attention.head_dim)


def _query(attention, states):
    return _norm(attention.q_norm, _split_heads(attention, attention.q_proj(states))).transpose(0, 1)  # (H, S, d)


def _key_and_value(attention, states):
    key = _norm(attention.k_norm, _split_heads(attention, attention.k_proj(states))).transpose(0, 1)
    return key, _split_heads(attention, attention.v_proj(states)).transpose(0, 1)  # (K, S, d) each


def _attended(attention, query, key, value, mask):
    """What queries `(H, S, d)` read, `(S, D)`: those that share a key are rows of one query."""
    num_heads, head_dim = query.shape[0], attention.head_dim
    grouped = (query * attention.scaling).contiguous().view(key.shape[0], -1, head_dim)  # (K, H / K * S, d)
    probabilities = torch.softmax(torch.matmul(grouped, key.transpose(1, 2)) + mask, dim=-1)
    output = torch.matmul(probabilities, value).view(num_heads, -1, head_dim)
    return attention.o_proj(output.transpose(0, 1).contiguous().view(-1, num_heads * head_dim))


def _mlp(module, states):
    up = module.up_proj(states)
    if module.gated:
        return module.down_proj(_activation(module, module.gate_proj(states)) * up)
    return module.down_proj(_activation(module, up))


def _activation(module, states):
    if not isinstance(module.act_fn, GELUTanh):
        return module.act_fn(states)
    # Written out: not every runtime looks at the attribute of Gelu that says which of the two forms is meant.
    inner = 0.7978845608028654 * (states + 0.044715 * states * states * states)
    return 0.5 * states * (1 + torch.tanh(inner))


def rotary_tables(model: PreTrainedModel, stack: str, length: int) -> dict[str, torch.Tensor]:
    """Cosines and signed sines of positions 0 to `length - 1`, of shape `(length, head_dim)`, by initializer name."""
    rotary = getattr(model.model, stack).rotary_emb
    cos, sin = (table[0] for table in rotary(torch.zeros(1), torch.arange(length)[None]))
    first, second = sin.chunk(2, dim=-1)
    return {"cos": cos.clone(), "sin": torch.cat((-first, second), dim=-1)}


class StaticGraph(nn.Module):
    """What both graphs hold: the model, so that weights have a checkpoint's names, and tables of the rotation.

    Args:
        model ([`~transformers.PreTrainedModel`]): A text model.
        masked (`float`): What is taken from scores of what must not be read.
        stack (`str`): `"encoder"` or `"decoder"`.
        length (`int`): Of the tables.
    """

    def __init__(self, model, masked, stack, length):
        super().__init__()
        self.model = model.model
        self.masked = masked
        for name, table in rotary_tables(model, stack, length).items():
            setattr(self, name, nn.Buffer(table, persistent=False))

    @property
    def shapes(self):
        return {**self.input_shapes, **self.output_shapes}


class EncoderGraph(StaticGraph):
    """Token ids and their mask in; the encoder's states and every layer's cross keys and values out."""

    def __init__(self, model, masked):
        super().__init__(model, masked, "encoder", TRACED_SOURCE)
        config = model.config
        names = cache_names(config.decoder_num_hidden_layers, "present", "encoder")
        self.input_shapes = {"input_ids": (1, "S"), "attention_mask": (1, "S")}
        self.output_shapes = {
            "last_hidden_state": (1, "S", config.hidden_size),
            **dict.fromkeys(names, (1, config.num_key_value_heads, "S", config.head_dim)),
        }

    def forward(self, input_ids, attention_mask):
        encoder = self.model.encoder
        states = encoder.embed_tokens(input_ids).view(-1, encoder.embed_tokens.embedding_dim)  # (S, D)
        mask = (attention_mask - 1) * self.masked  # (1, S)
        for layer in encoder.layers:
            attention, normed = layer.self_attn, _norm(layer.input_layernorm, states)
            query, (key, value) = _query(attention, normed), _key_and_value(attention, normed)
            if attention.use_rope:
                query, key = (_rotated(heads, self.cos, self.sin) for heads in (query, key))
            states = states + _attended(attention, query, key, value, mask)
            states = states + _mlp(layer.mlp, _norm(layer.post_attention_layernorm, states))
        states = _norm(encoder.norm, states)
        cross = [heads for layer in self.model.decoder.layers for heads in _key_and_value(layer.cross_attn, states)]
        return states[None], *(heads[None] for heads in cross)


class StepGraph(StaticGraph):
    """One target token, its position, masks, the cache and the cross keys and values in; logits and the cache out."""

    def __init__(self, model, masked):
        super().__init__(model, masked, "decoder", TRACED_TARGET)
        self.lm_head = model.lm_head
        config = model.config
        heads = config.num_key_value_heads, config.head_dim
        own, cross = ((1, heads[0], length, heads[1]) for length in ("T", "S"))
        names = cache_names(config.decoder_num_hidden_layers, "past_key_values", "decoder", "encoder")
        self.input_shapes = {
            **{"input_ids": (1, 1), "position_ids": (1, 1)},
            **{"decoder_attention_mask": (1, "T"), "encoder_attention_mask": (1, "S")},
            **{name: own if ".decoder." in name else cross for name in names},
        }
        present = cache_names(config.decoder_num_hidden_layers, "present", "decoder")
        self.output_shapes = {"logits": (1, 1, config.vocab_size), **dict.fromkeys(present, own)}

    def forward(self, input_ids, position_ids, decoder_attention_mask, encoder_attention_mask, *past_key_values):
        embed_tokens = self.model.encoder.embed_tokens
        states = embed_tokens(input_ids).view(1, embed_tokens.embedding_dim)  # (1, D)
        cos, sin = (F.embedding(position_ids, table).view(1, -1) for table in (self.cos, self.sin))
        own_mask, cross_mask = ((mask - 1) * self.masked for mask in (decoder_attention_mask, encoder_attention_mask))
        presents = []
        for layer, past in zip(self.model.decoder.layers, _by_layer(past_key_values), strict=True):
            past_key, past_value, cross_key, cross_value = past
            attention, normed = layer.self_attn, _norm(layer.input_layernorm, states)
            query, (key, value) = _query(attention, normed), _key_and_value(attention, normed)
            if attention.use_rope:
                query, key = (_rotated(heads, cos, sin) for heads in (query, key))
            key, value = (_moved(*pair) for pair in ((past_key, key), (past_value, value)))  # (K, T, d)
            states = states + _attended(attention, query, key, value, own_mask)
            presents += [key[None], value[None]]
            attention = layer.cross_attn
            query = _query(attention, _norm(layer.pre_cross_attn_layernorm, states))
            states = states + _attended(attention, query, _row(cross_key), _row(cross_value), cross_mask)
            states = states + _mlp(layer.mlp, _norm(layer.post_attention_layernorm, states))
        logits = self.lm_head(_norm(self.model.decoder.norm, states))
        return logits[None], *presents


def _by_layer(tensors):
    return zip(*(tensors[start::4] for start in range(4)), strict=True)


def _row(cached):
    return cached.view(cached.shape[1], -1, cached.shape[3])


def _moved(past, new):
    """The cache with its oldest place given up and the new token at its end."""
    return torch.cat((_row(past)[:, 1:], new), dim=1)


def _traced(graph, weights):
    """The graph as a proto of the traced lengths, whose large weights lie in the shared file."""
    ir = required("onnx_ir")
    shapes = {name: _sized(shape, TRACED_SOURCE, TRACED_TARGET) for name, shape in graph.input_shapes.items()}
    inputs = tuple(torch.ones(shape, dtype=_input_dtype(name)) for name, shape in shapes.items())
    with quiet_export():
        program = _onnx_program(graph.eval(), inputs, list(shapes), list(graph.output_shapes))
    weights.share(program.model, kept=TABLES)
    return _without_notes(ir.to_proto(program.model))


def _without_notes(proto):
    """`proto` without what the exporter tells of its source: call stacks with paths of this machine, mostly."""
    graph = proto.graph
    for noted in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del noted.metadata_props[:]
        noted.doc_string = ""
    for node in graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend(kept)
    return proto


def _sized(shape, source_length, target_length):
    lengths = {"S": source_length, "T": target_length}
    return tuple(lengths.get(size, size) for size in shape)


def _input_dtype(name):
    return torch.int32 if name.endswith("_ids") else torch.float32


def _onnx_program(graph, inputs, input_names, output_names):
    op = required("onnxscript").opset20

    def linear(states, weight, bias=None):
        # As the weights lie in a checkpoint: a transposed copy of the embedding table would double it.
        return op.Gemm(states, weight, bias, transB=1)

    return torch.onnx.export(
        graph,
        inputs,
        input_names=input_names,
        output_names=output_names,
        dynamo=True,
        opset_version=OPSET,
        custom_translation_table={torch.ops.aten.linear.default: linear},
        verbose=False,
    )


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Hides what `torch.onnx.export` tells of itself, and of operators of torchvision, which no model here has."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        registration.setLevel(level)


class SharedWeights:
    """One file in which each weight lies once, whichever graphs read it.

    Args:
        path (`Path`): The file, which is made. Graphs that use it must lie beside it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.offsets = {}
        path.touch()

    def share(self, model: Any, kept: Sequence[str] = ()) -> None:
        """Lets the large weights of a graph lie in this file.

        Args:
            model (`onnx_ir.Model`): Is changed.
            kept (`Sequence[str]`, *optional*): Names of weights that stay in the graph.
        """
        ir = required("onnx_ir")
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if name not in kept and tensor.nbytes >= MIN_SHARED_BYTES:
                value.const_value = ir.ExternalTensor(
                    *(self.path.name, self.offset(tensor.numpy()), tensor.nbytes, tensor.dtype),
                    **{"shape": tensor.shape, "name": name, "base_dir": self.path.parent},
                )

    def offset(self, array: np.ndarray) -> int:
        """Where the bytes of `array` lie in the file, to which they are added if they are new."""
        array = np.ascontiguousarray(array)
        digest = hashlib.blake2b(array.view(np.uint8)).digest()
        if digest not in self.offsets:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self.offsets[digest] = file.tell()
                array.tofile(file)
        return self.offsets[digest]


def with_lengths(proto, shapes, source_length, target_length, tables):
    """A traced graph for other lengths: those of its inputs, outputs and tables; all else follows from them.

    Args:
        proto (`onnx.ModelProto`): Of the traced lengths; it is not changed.
        shapes (`dict[str, tuple]`): Of inputs and outputs, with `"S"` and `"T"` where a length stands.
        source_length (`int`): In tokens.
        target_length (`int`): Of the cache, in tokens.
        tables (`dict[str, torch.Tensor]`): Initializers that depend on a length.
    """
    onnx = required("onnx")
    proto = copy.deepcopy(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        for dim, size in zip(
            value.type.tensor_type.shape.dim, _sized(shapes[value.name], source_length, target_length), strict=True
        ):
            dim.dim_value = size
    for tensor in proto.graph.initializer:
        if tensor.name in tables:
            tensor.CopyFrom(onnx.numpy_helper.from_array(tables[tensor.name].numpy(), tensor.name))
    del proto.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)


def tensors_of(proto) -> dict[str, list[dict[str, Any]]]:
    """Name, shape and dtype of the inputs and of the outputs of a graph."""
    onnx = required("onnx")

    def described(value):
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return {"name": value.name, "shape": [dim.dim_value for dim in tensor.shape.dim], "dtype": dtype}

    return {"inputs": [*map(described, proto.graph.input)], "outputs": [*map(described, proto.graph.output)]}
