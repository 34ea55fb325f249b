# SPDX-License-Identifier: Apache-2.0
"""Quantize float32 graphs to int8 with onnxruntime's quantizers, and measure activations for it.

Products with a weight are quantized: weights to 7 of 8 bits with one scale per output, because sums of pairs of 8-bit
products overflow on CPUs without VNNI; activations to 8 bits with one scale per tensor. Embeddings are int8 with one
scale per token. Attention itself, norms and sums stay float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .bundles import import_engine
from .onnx_graphs import cache_names, flatten_caches


DYNAMIC, STATIC = QUANTIZATIONS = ("int8", "int8_static")
CALIBRATED_SOURCE_LENGTH = 512
CALIBRATED_TARGET_LENGTH = 32
CONTRIB_DOMAIN = "com.microsoft"
# Inputs that share a scale, by bits. Of 4-bit weights, fewer scales are faster and as accurate.
BLOCK_SIZES = {8: 32, 4: 64}
# Keeps onnxruntime's quantizers from advising a pass that these graphs do not need.
PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}


def check_arguments(quantization: Any, calibration: Any, static_lengths: Any) -> None:
    """Check the arguments of `export_onnx` that concern quantization.

    Raises:
        ValueError: `quantization` is unknown, or the arguments do not fit together.
    """
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(
            f"`quantization` is {quantization!r}, but must be left out (float32) or be one of "
            f"{', '.join(map(repr, QUANTIZATIONS))}."
        )
    if static_lengths is not None and quantization is not None:
        raise ValueError(
            f"`quantization` is {quantization!r} and `static_lengths` is given, but graphs of fixed shape are "
            "float32. Leave one of them out; the tools of the NPU's vendor quantize the graphs."
        )
    if (calibration is None) == (quantization == STATIC):
        raise ValueError(
            f"`quantization` is {quantization!r} and `calibration` is {'not ' if calibration is None else ''}given, "
            f"but {STATIC!r} measures activations on `calibration`, and nothing else reads it."
        )


@torch.no_grad()
def calibration_inputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Iterable[str | Sequence[int]],
) -> dict[str, list[dict[str, np.ndarray]]]:
    """Return what each graph reads while the model generates greedily from some sources, by file name.

    Both decoder graphs read whole targets, the second with an empty cache of the target. With equal scales a target
    gets the same logits in one step and in many.

    Args:
        model ([`~transformers.PreTrainedModel`]): A text model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Required for texts.
        calibration (`Iterable`): Texts or lists of token ids; the first 512 tokens of each are read.

    Raises:
        ValueError: There are no rows, no tokenizer for texts, or unknown ids, or the model reads images.
        TypeError: A row is neither a text nor token ids.
    """
    if model.config.model_type == "encdec_vlm":
        raise ValueError(
            f"`quantization` is {STATIC!r}, but the model reads images and `calibration` has texts only. Use "
            f"{DYNAMIC!r}."
        )
    rows = [] if isinstance(calibration, str) else list(calibration)
    if not rows:
        raise ValueError(f"`calibration` is {calibration!r}, but must be a list of at least one source.")
    inputs = {"encoder_model.onnx": [], "decoder_model.onnx": [], "decoder_with_past_model.onnx": []}
    for row in rows:
        input_ids = _encode_row(row, model.config.vocab_size, tokenizer)
        source = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        target_ids = model.generate(**source, do_sample=False, num_beams=1, max_new_tokens=CALIBRATED_TARGET_LENGTH)
        outputs = model(**source, decoder_input_ids=target_ids, use_cache=True)
        decoder = {"input_ids": target_ids, "encoder_attention_mask": source["attention_mask"]}
        states = {"encoder_hidden_states": outputs.encoder_last_hidden_state}
        inputs["encoder_model.onnx"].append(_to_numpy(source))
        inputs["decoder_model.onnx"].append(_to_numpy({**decoder, **states}))
        inputs["decoder_with_past_model.onnx"].append(_to_numpy({**decoder, **_first_past(outputs.past_key_values)}))
    return inputs


def _encode_row(row, vocab_size, tokenizer):
    if isinstance(row, str):
        if tokenizer is None:
            raise ValueError(
                "`calibration` has texts, but there is no tokenizer beside the model. Pass `tokenizer`, or lists of "
                "token ids as `calibration`."
            )
        row = tokenizer(row)["input_ids"]
    try:
        ids = torch.tensor([list(row)[:CALIBRATED_SOURCE_LENGTH]], dtype=torch.long)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"A row of `calibration` is a {type(row).__name__}, but must be a `str` or a list of token ids."
        ) from error
    if ids.ndim != 2 or ids.numel() == 0 or ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"A row of `calibration` has token ids {ids[0, :8].tolist()}..., but needs at least one, all from 0 to "
            f"{vocab_size - 1}. Use the tokenizer of this checkpoint."
        )
    return ids


def _first_past(caches):
    """Return the inputs of the first step: an empty cache of the target, and the cross keys and values."""
    tensors = flatten_caches(caches.self_attention_cache, caches.cross_attention_cache)
    names = cache_names(len(caches.self_attention_cache.layers), "past_key_values", "decoder", "encoder")
    return {
        name: tensor[:, :, :0] if ".decoder." in name else tensor for name, tensor in zip(names, tensors, strict=True)
    }


def _to_numpy(tensors):
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def quantize_graphs(folder: Path, inputs: dict[str, list[dict[str, np.ndarray]]] | None) -> Iterator[tuple[str, Any]]:
    """Yield the graphs of a float32 folder in int8, as `(file name, onnx_ir.Model)`.

    Args:
        folder (`Path`): Gets temporary files.
        inputs (`dict`, *optional*): Inputs of each graph, to measure activations on. `None` measures them at run time.
    """
    ir, onnx, quantization = (import_engine(name) for name in ("onnx_ir", "onnx", "onnxruntime.quantization"))
    (folder / "quantized").mkdir()
    for path in sorted(folder.glob("*_*.onnx")):
        prepared, quantized = folder / "quantized" / f"float_{path.name}", folder / "quantized" / path.name
        options = _quantizer_options(_save_prepared(path, prepared))
        if inputs is None:
            quantization.quantize_dynamic(prepared, quantized, **options)
        else:
            options["activation_type"] = quantization.QuantType.QUInt8
            quantization.quantize_static(prepared, quantized, _calibration_reader(inputs[path.name]), **options)
        graph = ir.from_proto(onnx.load(quantized))
        _quantize_embeddings(graph)
        yield path.name, graph


def _save_prepared(path, prepared):
    """Save a graph for the quantizers, with the output head as a MatMul too; return the names of the products."""
    onnx, onnx_model = import_engine("onnx"), import_engine("onnxruntime.quantization.onnx_model")
    whole = onnx_model.ONNXModel(onnx.load(path))
    whole.replace_gemm_with_matmul()
    properties = (onnx.StringStringEntryProto(key=key, value=value) for key, value in PREPARED.items())
    whole.model.metadata_props.extend(properties)
    weights = {tensor.name for tensor in whole.model.graph.initializer}
    nodes = whole.model.graph.node
    names = [node.name for node in nodes if node.op_type == "MatMul" and node.input[1] in weights]
    onnx.save_model(whole.model, str(prepared), save_as_external_data=True, location=f"{prepared.name}_data")
    return names


def _quantizer_options(names):
    return {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_quantize": names,
        "per_channel": True,
        "reduce_range": True,
        "weight_type": import_engine("onnxruntime.quantization").QuantType.QInt8,
        "use_external_data_format": True,
        "extra_options": {"OpTypesToExcludeOutputQuantization": ["MatMul"]},
    }


def _calibration_reader(inputs):
    class Reader(import_engine("onnxruntime.quantization").CalibrationDataReader):
        rows = iter(inputs)

        def get_next(self):
            return next(self.rows, None)

    return Reader()


def _quantize_embeddings(graph):
    """Store embedding tables as int8 with one scale per row."""
    ir = import_engine("onnx_ir")
    for node in list(graph.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.const_value is None or table.const_value.dtype != ir.DataType.FLOAT:
            continue
        rows = table.const_value.numpy()
        scales = np.maximum(np.abs(rows).max(axis=-1, keepdims=True), np.finfo(np.float32).tiny) / 127
        parts = {"int8": np.round(rows / scales).astype(np.int8), "scale": scales.astype(np.float32)}
        values = {kind: ir.val(f"{table.name}_{kind}", const_value=ir.tensor(array)) for kind, array in parts.items()}
        for value in values.values():
            graph.graph.register_initializer(value)
        gathered = {kind: ir.node("Gather", [value, node.inputs[1]]) for kind, value in values.items()}
        cast = ir.node("Cast", [gathered["int8"].outputs[0]], {"to": ir.DataType.FLOAT})
        product = ir.node("Mul", [cast.outputs[0], gathered["scale"].outputs[0]], outputs=[ir.Value(name="unset")])
        new = [*gathered.values(), cast, product]
        ir.convenience.replace_nodes_and_values(graph.graph, node, [node], new, node.outputs, product.outputs)
        if not table.uses():
            del graph.graph.initializers[table.name]


# Weights that are stored in fewer bits, for computations in float32


def compress_weights(model: Any, quantization: str | None) -> None:
    """Store the weights of a graph (`onnx_ir.Model`) in fewer bits; biases and the weights of norms stay in float32.

    Args:
        quantization (`str`, *optional*): `"float16"`, or `"int8"` or `"int4"` with one scale per 32 or 64 inputs of
            an output. Embeddings and the output head have 8 bits with `"int4"` too; if they are tied, they are
            stored once. `None` changes nothing.
    """
    if quantization == "float16":
        _store_as_float16(model)
    elif quantization is not None:
        _quantize_blocks(model, {"int8": 8, "int4": 4}[quantization])
    for name, value in list(model.graph.initializers.items()):
        if not value.uses():
            del model.graph.initializers[name]


def _store_as_float16(model):
    ir = import_engine("onnx_ir")
    casts = []
    for name, value in list(model.graph.initializers.items()):
        if value.const_value.dtype == ir.DataType.FLOAT and len(value.shape) == 2:
            half = _add_weight(model, f"{name}_float16", value.const_value.numpy().astype(np.float16))
            casts.append(ir.node("Cast", [half], {"to": ir.DataType.FLOAT}))
            casts[-1].outputs[0].name = f"{name}_float32"
            value.replace_all_uses_with(casts[-1].outputs[0])
    model.graph.insert_before(model.graph[0], casts)


def _quantize_blocks(model, bits):
    ir = import_engine("onnx_ir")
    model.graph.opset_imports[CONTRIB_DOMAIN] = 1
    for node in list(model.graph.all_nodes()):
        table = node.inputs[node.op_type != "Gather"] if node.op_type in ("MatMul", "Gemm", "Gather") else None
        if table is None or table.const_value is None or table.const_value.dtype != ir.DataType.FLOAT:
            continue
        tape, rows = ir.tape.Tape(), table.const_value.numpy()
        rows, bits_of_node = (rows.T, bits) if node.op_type == "MatMul" else (rows, 8)
        arrays = zip(("blocks", "scales"), _round_to_blocks(rows, bits_of_node), strict=True)
        weights = [_add_weight(model, f"{table.name}_{name}{bits_of_node}", array) for name, array in arrays]
        if node.op_type == "Gather":
            output = _gather_blocks(model, tape, *weights, node.inputs[1], rows.shape[1])
        else:
            sizes = {"K": rows.shape[1], "N": rows.shape[0], "bits": bits_of_node}
            sizes["block_size"] = BLOCK_SIZES[bits_of_node]
            bias = [None, None, node.inputs[2]] if len(node.inputs) == 3 else []
            options = {"domain": CONTRIB_DOMAIN, "attributes": {**sizes, "accuracy_level": 4}}
            output = tape.op("MatMulNBits", [node.inputs[0], *weights, *bias], **options)
        for index, new in enumerate(tape.nodes):
            new.name = new.outputs[0].name = f"{node.name}.{index}"
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], tape.nodes, node.outputs, [output])


def _gather_blocks(model, tape, blocks, scales, ids, width):
    """Return embeddings from the rows of 8-bit blocks. Browsers do not have the operator GatherBlockQuantized."""
    ir = import_engine("onnx_ir")
    zero, last, shape, start, end = (
        _add_weight(model, f"gather_blocks.{name}", np.array(value, dtype))
        for name, value, dtype in (
            *(("zero", 128, np.float32), ("last", [-1], np.int64), ("shape", [0, 0, -1], np.int64)),
            *(("start", [0], np.int64), (f"width_{width}", [width], np.int64)),
        )
    )
    levels = tape.op("Cast", [tape.op("Gather", [blocks, ids])], {"to": ir.DataType.FLOAT})  # (B, T, blocks, 32)
    gathered = tape.op("Unsqueeze", [tape.op("Gather", [scales, ids]), last])
    rows = tape.op("Reshape", [tape.op("Mul", [tape.op("Sub", [levels, zero]), gathered]), shape])
    return tape.op("Slice", [rows, start, end, last]) if width % BLOCK_SIZES[8] else rows


def _round_to_blocks(rows, bits):
    """Return blocks and scales. Values are unsigned, with a zero point in the middle."""
    size = BLOCK_SIZES[bits]
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % size))).astype(np.float32)
    blocks = rows.reshape(len(rows), -1, size)
    zero = 2 ** (bits - 1)
    # The value of the largest magnitude becomes the lowest level, of which there is one more.
    index = np.abs(blocks).argmax(-1, keepdims=True)
    scales = np.take_along_axis(blocks, index, -1) / -zero
    scales[scales == 0] = 1
    levels = np.clip(np.round(blocks / scales) + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 4:
        levels = levels[..., ::2] | levels[..., 1::2] << 4
    return levels, scales[..., 0]


def _add_weight(model, name, array):
    """Add a weight to a graph, or return the one that has this name."""
    ir = import_engine("onnx_ir")
    if name not in model.graph.initializers:
        model.graph.register_initializer(ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name)))
    return model.graph.initializers[name]
