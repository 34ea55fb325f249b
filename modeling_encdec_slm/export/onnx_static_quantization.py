# SPDX-License-Identifier: Apache-2.0
"""Quantizes graphs of fixed shape as Qualcomm's NPUs want it: 8-bit weights and 16-bit activations, all of them.

The format is that of quantize and dequantize nodes around every operator, by onnxruntime's own settings for QNN.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from .bundles import required
from .onnx_quantization import CALIBRATED_TARGET_LENGTH, PREPARED
from .onnx_static_runtime import StaticEngine


# The first version whose own operators quantize to 16 bits.
OPSET = 21
# Taken from scores of what must not be read: far enough for their exponentials, near enough for 16 bits to hold all.
MASKED = 128.0


def quantized_graphs(
    folder: Path, manifest: dict[str, Any], model: PreTrainedModel, rows: list[torch.LongTensor]
) -> Iterator[tuple[str, Any]]:
    """The graphs of a float32 static bundle, quantized, as `(file name, onnx_ir.Model)`.

    Args:
        folder (`Path`): Where the float32 graphs lie.
        manifest (`dict`): Theirs.
        model ([`~transformers.PreTrainedModel`]): Writes the targets that the decoder is measured with.
        rows (`list[torch.LongTensor]`): Sources of shape `(1, source_length)`; a bucket reads what fits it.
    """
    ir, onnx, quantization = (required(name) for name in ("onnx_ir", "onnx", "onnxruntime.quantization"))
    qnn = required("onnxruntime.quantization.execution_providers.qnn")
    targets = _targets(model, rows, manifest["target_length"])
    for name, graph in manifest["graphs"].items():
        inputs = _Inputs(folder, manifest, graph, rows, targets)
        with tempfile.TemporaryDirectory(dir=folder, prefix="quantized-") as temporary:
            prepared, output = Path(temporary, f"float-{name}"), Path(temporary, name)
            _save_prepared(folder / name, prepared)
            config = qnn.get_qnn_qdq_config(
                prepared,
                inputs,
                activation_type=quantization.QuantType.QUInt16,
                weight_type=quantization.QuantType.QUInt8,
                init_overrides=_embeddings_of_8_bits(prepared),
            )
            config.use_external_data_format = True
            quantization.quantize(prepared, output, config)
            yield name, ir.from_proto(onnx.load(output))


def _save_prepared(path, prepared):
    onnx = required("onnx")
    proto = onnx.load(path)
    proto.opset_import[0].version = OPSET
    proto.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in PREPARED.items())
    onnx.save_model(proto, str(prepared), save_as_external_data=True, location=f"{prepared.name}_data")


def _embeddings_of_8_bits(path):
    """What to tell the quantizer of the embedding table: what rows are taken from counts as activation to it.

    The table would get 16 bits, and the output head with it where they are one.
    """
    onnx, types = required("onnx"), required("onnxruntime.quantization").QuantType
    nodes = onnx.load(path, load_external_data=False).graph.node
    gather = next(node for node in nodes if node.op_type == "Gather" and node.input[1] == "input_ids")
    reshape = next(node for node in nodes if node.input[0] == gather.output[0])
    of_8_bits = {"quant_type": types.QUInt8}
    return {
        gather.input[0]: [of_8_bits],
        gather.output[0]: [of_8_bits],
        reshape.output[0]: [{**of_8_bits, "convert": {"quant_type": types.QUInt16}}],
    }


def _targets(model, rows, target_length):
    """What the model writes greedily after each source, start token first: at most as long as the cache."""
    length = min(target_length, CALIBRATED_TARGET_LENGTH)
    return [model.generate(row, do_sample=False, num_beams=1, max_new_tokens=length)[:, :length] for row in rows]


class _Inputs:
    """What one graph reads while a bundle reads sources and writes targets, made as it is asked for: caches are large.

    Its methods are those of onnxruntime's `CalibrationDataReader`.
    """

    def __init__(self, folder, manifest, graph, rows, targets):
        self._arguments = folder, manifest, graph, rows, targets
        self.rewind()

    def rewind(self):
        self._inputs = _recorded_inputs(*self._arguments)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._inputs, None)


def _recorded_inputs(folder, manifest, graph, rows, targets):
    recorded = []
    bucket, role = graph["source_length"], graph["role"]

    def opened(path):
        session = required("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])
        is_asked = manifest["graphs"][path.name] == graph

        def run(inputs):
            if is_asked:
                recorded.append(inputs)
            return session.run(None, inputs)

        return run

    engine = StaticEngine(folder, {**manifest, "source_lengths": [bucket]}, opened)
    for row, target in zip(rows, targets, strict=True):
        encoding = engine.encode(row[:, :bucket])
        if role == "decoder":
            engine.decode(target, encoding, None, engine.new_cache(1))
        yield from recorded
        recorded.clear()
