# SPDX-License-Identifier: Apache-2.0
"""Turns float32 graphs into int8 ones with onnxruntime's quantizers, and finds rows to calibrate them with.

Products with a weight are quantized: weights to 7 of 8 bits with one scale per output, since sums of pairs of 8-bit
products overflow on CPUs without VNNI; what they are multiplied with to 8 bits, with one scale per tensor. Embeddings
are int8 with one scale per token. Attention itself, norms and sums stay float32.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .bundles import required
from .onnx_graphs import cache_names


DYNAMIC, STATIC = QUANTIZATIONS = ("int8", "int8_static")
NUM_CALIBRATION_ROWS = 32
CALIBRATED_SOURCE_LENGTH = 512
CALIBRATED_TARGET_LENGTH = 32
# Tells onnxruntime's quantizers not to ask for a pass that these graphs do not need.
PREPARED = {"onnx.quant.pre_process": "onnxruntime.quant"}


def check_arguments(quantization: Any, calibration: Any, static_lengths: Any) -> None:
    """Refuses arguments of `export_onnx` that name no quantization, or that would not be used."""
    if quantization is not None and quantization not in QUANTIZATIONS:
        raise ValueError(
            f"`quantization` is {quantization!r}, but must be None (float32) or one of "
            f"{', '.join(map(repr, QUANTIZATIONS))}."
        )
    if calibration is not None and quantization != STATIC:
        raise ValueError(
            f"`calibration` is given with `quantization` {quantization!r}, but only {STATIC!r} measures activations "
            "when it exports. Leave it out, or choose that."
        )
    if static_lengths is not None and quantization == DYNAMIC:
        raise ValueError(
            f"`quantization={DYNAMIC!r}` is given with `static_lengths`, but NPUs do not measure activations when "
            f"they run. Use {STATIC!r}, which measures them when it exports."
        )


def calibration_rows(
    calibration: Iterable[str | Sequence[int]] | None,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[torch.LongTensor]:
    """Sources of shape `(1, source_length)` to measure activations with; the first 512 tokens of each.

    Args:
        calibration (`Iterable`, *optional*): Texts, or lists of token ids. `None` means functions of the test split
            of the docstring task.
        model ([`~transformers.PreTrainedModel`]): Which is to read them.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): Needed for texts.

    Raises:
        ValueError: There are no rows, no tokenizer for texts, or ids outside of the vocabulary; or the model reads
            images.
        TypeError: A row is neither a text nor token ids.
    """
    if model.config.model_type == "encdec_vlm":
        raise ValueError(
            f'`quantization="{STATIC}"` was given for a model that reads images, but calibration rows are texts. '
            f'Use "{DYNAMIC}", which measures activations when it runs.'
        )
    given = _docstring_sources() if calibration is None else list(calibration)
    if not given or isinstance(calibration, str):
        raise ValueError(
            f"`calibration` is {calibration!r}, but must be a list of at least one source, like those that the model "
            "will read. A few dozen are enough."
        )
    return [_token_ids(row, model.config.vocab_size, tokenizer) for row in given]


def _docstring_sources():
    # Imported here: it needs `datasets`, of another extra.
    required("datasets")
    from ..trainers.tasks.docstrings import build_docstring_task

    rows = build_docstring_task()["test"]["source"]
    return list(islice(rows, 0, None, max(1, len(rows) // NUM_CALIBRATION_ROWS)))[:NUM_CALIBRATION_ROWS]


def _token_ids(row, vocab_size, tokenizer):
    if isinstance(row, str):
        if tokenizer is None:
            raise ValueError(
                "There is no tokenizer beside the model, but calibration reads texts. Pass `tokenizer`, or rows of "
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
            f"A row of `calibration` has token ids {ids[0, :8].tolist()}..., but needs at least one, and all of them "
            f"from 0 to {vocab_size - 1}. Use the tokenizer of this checkpoint."
        )
    return ids


@torch.no_grad()
def calibration_inputs(model: PreTrainedModel, rows: list[torch.LongTensor]) -> dict[str, list[dict[str, np.ndarray]]]:
    """What each graph reads while the model writes greedily after some sources, by file name.

    Both decoder graphs read whole targets, the second with an empty cache of the target: with equal ranges a target
    gets the same logits in one step and in many.
    """
    inputs = {"encoder_model.onnx": [], "decoder_model.onnx": [], "decoder_with_past_model.onnx": []}
    for input_ids in rows:
        mask = torch.ones_like(input_ids)
        source = {"input_ids": input_ids, "attention_mask": mask}
        target_ids = model.generate(**source, do_sample=False, num_beams=1, max_new_tokens=CALIBRATED_TARGET_LENGTH)
        outputs = model(**source, decoder_input_ids=target_ids, use_cache=True)
        decoder = {"input_ids": target_ids, "encoder_attention_mask": mask}
        inputs["encoder_model.onnx"].append(source)
        inputs["decoder_model.onnx"].append({**decoder, "encoder_hidden_states": outputs.encoder_last_hidden_state})
        inputs["decoder_with_past_model.onnx"].append({**decoder, **_first_past(outputs.past_key_values)})
    return {
        name: [{key: tensor.numpy() for key, tensor in row.items()} for row in of_graph]
        for name, of_graph in inputs.items()
    }


def _first_past(caches):
    own, cross = caches.self_attention_cache.layers, caches.cross_attention_cache.layers
    tensors = [
        *(
            (layer.keys[:, :, :0], layer.values[:, :, :0], source.keys, source.values)
            for layer, source in zip(own, cross, strict=True)
        )
    ]
    names = cache_names(len(own), "past_key_values", "decoder", "encoder")
    return dict(zip(names, (tensor for layer in tensors for tensor in layer), strict=True))


def quantized_graphs(folder: Path, inputs: dict[str, list[dict[str, np.ndarray]]] | None) -> Iterator[tuple[str, Any]]:
    """The graphs of a float32 folder in int8, as `(file name, onnx_ir.Model)`.

    Args:
        folder (`Path`): May be written to.
        inputs (`dict`, *optional*): Of each graph, to measure activations with. `None` measures them when it runs.
    """
    ir, onnx = required("onnx_ir"), required("onnx")
    for path in sorted(folder.glob("*_*.onnx")):
        prepared, quantized = folder / "prepared" / path.name, folder / "quantized" / path.name
        prepared.parent.mkdir(exist_ok=True)
        quantized.parent.mkdir(exist_ok=True)
        options = _options(_save_prepared(path, prepared))
        if inputs is None:
            required("onnxruntime.quantization").quantize_dynamic(prepared, quantized, **options)
        else:
            _quantize_static(prepared, quantized, inputs[path.name], options)
        graph = ir.from_proto(onnx.load(quantized))
        _quantize_embeddings(graph)
        yield path.name, graph


def _save_prepared(path, prepared):
    """Names of the products with a weight in a graph, which is written so that its head is one of them too."""
    onnx, quantization = required("onnx"), required("onnxruntime.quantization.onnx_model")
    whole = quantization.ONNXModel(onnx.load(path))
    whole.replace_gemm_with_matmul()
    whole.model.metadata_props.extend(
        onnx.StringStringEntryProto(key=key, value=value) for key, value in PREPARED.items()
    )
    weights = {tensor.name for tensor in whole.model.graph.initializer}
    products = [node for node in whole.model.graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    names = [node.name for node in products]
    onnx.save_model(whole.model, str(prepared), save_as_external_data=True, location=f"{prepared.name}_data")
    return names


def _options(names):
    quantization = required("onnxruntime.quantization")
    return {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_quantize": names,
        "per_channel": True,
        "reduce_range": True,
        "weight_type": quantization.QuantType.QInt8,
        "use_external_data_format": True,
        "extra_options": {"OpTypesToExcludeOutputQuantization": ["MatMul"]},
    }


def _quantize_static(path, output, inputs, options):
    quantization = required("onnxruntime.quantization")

    class Rows(quantization.CalibrationDataReader):
        def __init__(self):
            self.rows = iter(inputs)

        def get_next(self):
            return next(self.rows, None)

    quantization.quantize_static(path, output, Rows(), activation_type=quantization.QuantType.QUInt8, **options)


def _quantize_embeddings(graph):
    """Makes tables that rows are taken from int8, with one scale per row."""
    ir = required("onnx_ir")
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
        taken = {kind: ir.node("Gather", [value, node.inputs[1]]) for kind, value in values.items()}
        cast = ir.node("Cast", [taken["int8"].outputs[0]], {"to": ir.DataType.FLOAT})
        product = ir.node("Mul", [cast.outputs[0], taken["scale"].outputs[0]], outputs=[ir.Value(name="unset")])
        new = [*taken.values(), cast, product]
        ir.convenience.replace_nodes_and_values(graph.graph, node, [node], new, node.outputs, product.outputs)
        if not table.uses():
            del graph.graph.initializers[table.name]
