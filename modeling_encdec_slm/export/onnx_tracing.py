# SPDX-License-Identifier: Apache-2.0
"""Trace torch modules as ONNX graphs of plain operators, and store the weights of several graphs in one file."""

import ast
import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from .bundles import import_engine


# The first version with Gelu as one operator.
OPSET = 20
WEIGHTS_FILE = "model.onnx_data"
# Sizes of free dimensions in traced inputs. All differ, so that no two dimensions are taken for the same one.
TRACED_SIZES = {
    **{"batch_size": 2, "source_length": 7, "target_length": 3, "past_length": 5, "num_tiles": 2},
    **{"cross_length": 6, "total_length": 11},
}
# Weights below this size are stored in the graph files.
MIN_SHARED_BYTES = 1024
ALIGNMENT = 4096
NOISY_LOGGERS = ("torch.onnx._internal.exporter._registration", "onnx_ir.passes.common.initializer_deduplication")


class Graph(nn.Module):
    """A part of a model that is traced as one graph.

    Args:
        inputs (`dict[str, tuple]`): Shape of each input, in the order of the arguments of `forward`; a `str` is the
            name of a free dimension. Inputs named `past_key_values.*` come last, as one tuple.
        outputs (`dict[str, tuple]`): Shape of each output.
    """

    id_dtype = mask_dtype = torch.long

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inputs, self.outputs = inputs, outputs

    def example_input(self, name: str) -> torch.Tensor:
        shape = [TRACED_SIZES.get(size, size) for size in self.inputs[name]]
        if name.endswith("_ids"):
            return torch.ones(shape, dtype=self.id_dtype)
        return torch.ones(shape, dtype=self.mask_dtype) if name.endswith("_mask") else torch.zeros(shape)


def trace(graph: Graph) -> Any:
    """Trace a graph; weights keep their names in the checkpoint.

    Returns:
        `onnx_ir.Model`
    """
    names = list(graph.inputs)
    num_first = sum(not name.startswith("past_key_values") for name in names)
    inputs = [graph.example_input(name) for name in names]
    free = [{axis: size for axis, size in enumerate(graph.inputs[name]) if isinstance(size, str)} for name in names]
    if num_first < len(names):
        inputs, free = ([*items[:num_first], tuple(items[num_first:])] for items in (inputs, free))
    with _quiet():
        program = torch.onnx.export(
            graph.eval(),
            tuple(inputs),
            input_names=names,
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(free),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=_translations(),
            verbose=False,
        )
    model = program.model
    _name_weights(model)
    shape_class = import_engine("onnx_ir").Shape
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = shape_class({**graph.inputs, **graph.outputs}[value.name])
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter reports about itself, torchvision and weights that are also outputs."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            # Equal names of free dimensions are meant to be the same dimension.
            warnings.filterwarnings("ignore", "# The axis name: .* will not be used", UserWarning)
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def _translations():
    """Return translations of torch operators into fewer or simpler nodes than the exporter's own."""
    op = import_engine("onnxscript").opset20

    def attention(query, key, value, attn_mask, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        num_heads, num_key_value_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        # Query heads that share a key are rows of one query, so that keys and values are not repeated. In the shape of
        # Reshape, 0 keeps a dimension and -1 takes the rest, so that no shape is computed at run time.
        grouped = op.Reshape(op.Mul(query, scale), [0, num_key_value_heads, -1, head_dim])
        scores = op.MatMul(grouped, op.Transpose(key, perm=[0, 1, 3, 2]))
        scores = op.Add(op.Reshape(scores, [0, num_heads, -1, 0]), attn_mask)
        probabilities = op.Reshape(op.Softmax(scores, axis=-1), [0, num_key_value_heads, -1, 0])
        return op.Reshape(op.MatMul(probabilities, value), [0, num_heads, -1, head_dim])

    def rms_norm(states, normalized_shape, weight=None, eps=None):
        # In this form runtimes fuse it.
        return op.Div(states, op.Sqrt(op.Add(op.ReduceMean(op.Pow(states, 2.0), [-1]), eps)))

    def negate(states):
        # CoreML has no Neg.
        return op.Mul(states, -1.0)

    def gelu(states, approximate="none"):
        if approximate == "none":
            return op.Gelu(states)
        # Some runtimes ignore the attribute of Gelu that selects this form.
        cubed = op.Mul(op.Mul(op.Mul(states, states), states), 0.044715)
        inner = op.Mul(op.Add(states, cubed), 0.7978845608028654)
        return op.Mul(op.Mul(states, 0.5), op.Add(op.Tanh(inner), 1.0))

    aten = torch.ops.aten
    return {
        aten.scaled_dot_product_attention.default: attention,
        aten.rms_norm.default: rms_norm,
        aten.neg.default: negate,
        aten.gelu.default: gelu,
    }


def _name_weights(model):
    """Name transposed weights after their layers, and remove call stacks with paths of this machine."""
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.const_value is not None and scopes is not None:
            weight.name = f"{ast.literal_eval(scopes)[-2]}.weight_transposed"
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


class SharedWeights:
    """A file that stores the weights of several graphs, equal ones once.

    Args:
        folder (`Path`): Folder of the file and of the graphs.
        name (`str`, *optional*, defaults to `"model.onnx_data"`): Name of the file.
    """

    def __init__(self, folder: Path, name: str = WEIGHTS_FILE):
        self.path = folder / name
        self._offsets = {}
        self.path.touch()

    def share(self, model: Any) -> None:
        """Move the large weights of a graph (`onnx_ir.Model`) to this file."""
        ir = import_engine("onnx_ir")
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if tensor.nbytes >= MIN_SHARED_BYTES:
                location = (self.path.name, self._store(tensor.numpy()), tensor.nbytes, tensor.dtype)
                options = {"shape": tensor.shape, "name": name, "base_dir": self.path.parent}
                value.const_value = ir.ExternalTensor(*location, **options)

    def write_graph(self, model: Any, name: str) -> None:
        """Write a graph beside this file, which gets its large weights."""
        self.share(model)
        (self.path.parent / name).write_bytes(import_engine("onnx_ir").to_proto(model).SerializeToString())

    def _store(self, array):
        """Return the offset of an array in the file; write it if it is new."""
        array = np.ascontiguousarray(array)
        digest = hashlib.blake2b(array.view(np.uint8)).digest()
        if digest not in self._offsets:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self._offsets[digest] = file.tell()
                # `array.tofile` would not name the reason if the disk is full.
                file.write(array.data)
        return self._offsets[digest]


def describe_tensors(model: Any) -> dict[str, list[dict[str, Any]]]:
    """Return name, shape and dtype of the inputs and outputs of a graph (`onnx_ir.Model`), for the manifest."""

    def describe(value):
        shape = [size if isinstance(size, int) else str(size) for size in value.shape]
        return {"name": value.name, "shape": shape, "dtype": value.dtype.numpy().name}

    return {"inputs": [*map(describe, model.graph.inputs)], "outputs": [*map(describe, model.graph.outputs)]}
