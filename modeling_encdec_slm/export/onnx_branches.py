# SPDX-License-Identifier: Apache-2.0
"""Merge the graphs of the first and of all later decoding steps into one graph, whose branches share their weights."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from .bundles import import_engine


def merge_branches(first: Any, later: Any, is_later: Callable[[dict[str, Any], Any], Any]) -> Any:
    """Merge two graphs into one that computes one of them at each step.

    Inputs with equal names are the same input. Outputs that only `first` has are empty in later steps.

    Args:
        first (`onnx_ir.Model`): Computes the first step; taken apart.
        later (`onnx_ir.Model`): Computes all other steps; taken apart.
        is_later (`Callable`): Given the inputs by name and an `onnx_ir.tape.Tape`, returns the boolean value that
            chooses `later`.

    Returns:
        `onnx_ir.Model`
    """
    ir = import_engine("onnx_ir")
    inputs = {value.name: _copy(value) for model in (first, later) for value in model.graph.inputs}
    outputs = [_copy(value) for value in first.graph.outputs]
    weights, tape = {}, ir.tape.Tape()
    condition = is_later(inputs, tape)
    branches = {
        "then_branch": _make_branch("later", later.graph, inputs, outputs, weights),
        "else_branch": _make_branch("first", first.graph, inputs, outputs, weights),
    }
    nodes = [*tape.nodes, ir.node("If", [condition], branches, outputs=outputs)]
    opsets = later.graph.opset_imports | first.graph.opset_imports
    graph = ir.Graph([*inputs.values()], outputs, nodes=nodes, opset_imports=opsets, name="decoder")
    for value in weights.values():
        graph.register_initializer(value)
    return ir.Model(graph, ir_version=first.ir_version)


def _copy(value):
    return import_engine("onnx_ir").Value(name=value.name, type=value.type, shape=value.shape)


def _make_branch(name, graph, inputs, outputs, weights):
    """Return the nodes of a graph as a branch that reads `inputs` and `weights`, which gets what it lacks."""
    ir = import_engine("onnx_ir")
    for value in graph.inputs:
        value.replace_all_uses_with(inputs[value.name])
    for value in list(graph.initializers.values()):
        value.replace_all_uses_with(_share(value, name, weights))
    results = {value.name: value for value in graph.outputs}
    graph.outputs.clear()
    nodes = list(graph)
    graph.remove(nodes)
    for value in outputs:
        if value.name not in results:
            empty = np.zeros([size if isinstance(size, int) else 0 for size in value.shape], value.dtype.numpy())
            nodes.append(ir.node("Constant", [], {"value": ir.tensor(empty)}))
            results[value.name] = nodes[-1].outputs[0]
            nodes[-1].outputs[0].name = value.name
    for index, node in enumerate(nodes):
        node.name = f"{name}.{index}"
        for value in node.outputs:
            value.name = f"{name}.{value.name}"
    return ir.Graph([], [results[value.name] for value in outputs], nodes=nodes, name=name)


def _share(value, name, weights):
    """Return the weight with the same elements; a new one if there is none."""
    array = np.ascontiguousarray(value.const_value.numpy())
    # `array` has at least one axis, the weight may have none.
    key = (array.dtype, tuple(value.shape), hashlib.blake2b(array.reshape(-1).view(np.uint8)).digest())
    if key not in weights:
        taken = any(weight.name == value.name for weight in weights.values())
        weights[key] = import_engine("onnx_ir").Value(
            name=f"{name}.{value.name}" if taken else value.name,
            type=value.type,
            shape=value.shape,
            const_value=value.const_value,
        )
    return weights[key]
