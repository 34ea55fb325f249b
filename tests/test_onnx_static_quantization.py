# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from onnx_bundles import padded_source, target_ids, tiny_text_model, word_tokenizer

from encdec_slm.export import OpenVINOEncDecSLM, OrtEncDecSLM, export_onnx
from encdec_slm.export.bundles import read_manifest, required


onnx = required("onnx")
LENGTHS = {"source": [3, 6], "target": 5}


@pytest.fixture(scope="module")
def model():
    return tiny_text_model(encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, qk_norm=True)


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "bundle"
    rows = [
        padded_source(length, seed=seed)["input_ids"][0].tolist() for seed, length in enumerate((2, 6, 9, 4, 5, 6))
    ]
    options = {"quantization": "int8_static", "calibration": rows, "tokenizer": word_tokenizer()}
    return export_onnx(model, folder, static_lengths=LENGTHS, **options)


def test_weights_have_8_bits_activations_16_and_shapes_stay_fixed(bundle):
    manifest = read_manifest(bundle, "onnx-static")
    assert manifest["quantization"] == "int8_static" and manifest["opset"] == 21
    for name, graph in manifest["graphs"].items():
        proto = onnx.load(bundle / name)
        onnx.checker.check_model(proto, full_check=True)
        assert {node.domain for node in proto.graph.node} == {""}
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        matrices = [array.dtype for array in weights.values() if array.ndim == 2 and array.size > 100]
        assert matrices and set(matrices) == {np.dtype(np.uint8)}
        measured = [weights[node.input[2]].dtype for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        # An embedding keeps the 8 bits of its table until it is summed.
        assert measured.count(np.dtype(np.uint8)) == 2 and measured.count(np.dtype(np.uint16)) == len(measured) - 2
        for kind, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
            shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
            assert shapes == {tensor["name"]: tensor["shape"] for tensor in graph[kind]}


def test_the_manifest_says_who_does_not_read_quantized_graphs(bundle):
    operators = read_manifest(bundle, "onnx-static")["operators"]
    quantizing = ["DequantizeLinear", "QuantizeLinear"]
    assert operators["not_accepted"] == {"qnn": [], "openvino": [], "coreml": quantizing}
    assert set(quantizing) < set(operators["used"])


@pytest.mark.parametrize("runtime", [OrtEncDecSLM, OpenVINOEncDecSLM])
def test_logits_stay_near_and_padding_changes_none(bundle, model, runtime):
    quantized = runtime.from_pretrained(bundle)
    source, target = padded_source(6, 3, 5), target_ids(3, 5)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=target).logits
    logits = quantized(**source, decoder_input_ids=target).logits
    assert (logits - expected).abs().mean() < 0.1 * expected.std()
    padded = {name: torch.nn.functional.pad(tensor[2:, :5], (1, 0)) for name, tensor in source.items()}
    torch.testing.assert_close(quantized(**padded, decoder_input_ids=target[2:]).logits, logits[2:], rtol=0, atol=0.1)


def test_quantized_weights_lie_on_disk_once(bundle, model):
    num_weights = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    padding = 4096 * len(list(model.parameters()))
    assert num_weights * 0.9 < (bundle / "model.onnx_data").stat().st_size < num_weights + padding
