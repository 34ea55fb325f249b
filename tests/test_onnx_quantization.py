# SPDX-License-Identifier: Apache-2.0
"""int8 graphs: which weights and operators they have, and how far they are from float32."""

import collections

import numpy as np
import onnx
import pytest
import torch

from conftest import (
    build_model,
    build_source,
    build_target_ids,
    build_tokenizer,
    build_vision_inputs,
    build_vision_model,
)
from encdec_slm.export import OrtEncDecSLM, export_onnx
from encdec_slm.export.onnx_quantization import calibration_inputs
from encdec_slm.export_manifest import read_manifest


NUM_WEIGHTS = {
    "encoder_model.onnx": 2 * 7,
    "decoder_model.onnx": 2 * 11 + 1,
    "decoder_with_past_model.onnx": 2 * 9 + 1,
}


def load_graph(folder, name):
    return onnx.load(folder / name, load_external_data=False).graph


def load_tensors(folder, name):
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor, str(folder)) for tensor in load_graph(folder, name).initializer
    }


@pytest.mark.parametrize("name", NUM_WEIGHTS)
def test_products_with_a_weight_are_quantized_and_no_others(int8_folder, name):
    graph = load_graph(int8_folder, name)
    operators = collections.Counter(node.op_type for node in graph.node)
    # Two products of every attention have no weight.
    num_plain = 2 * (2 if name == "encoder_model.onnx" else 4)
    if read_manifest(int8_folder, "onnx")["quantization"] == "int8":
        assert operators["MatMulInteger"] == NUM_WEIGHTS[name] and operators["MatMul"] == num_plain
        assert operators["DynamicQuantizeLinear"] > 0 and not operators["Gemm"]
    else:
        assert operators["DequantizeLinear"] == NUM_WEIGHTS[name] + operators["QuantizeLinear"]
        assert not operators["DynamicQuantizeLinear"]
        producers = {output: node.op_type for node in graph.node for output in node.output}
        inputs = [[producers.get(value) for value in node.input] for node in graph.node if node.op_type == "MatMul"]
        assert inputs.count(["DequantizeLinear"] * 2) == NUM_WEIGHTS[name] == len(inputs) - num_plain


def test_weights_use_7_bits_with_one_scale_per_output(int8_folder, export_model):
    tensors = load_tensors(int8_folder, "decoder_model.onnx")
    name = "decoder.layers.1.mlp.down_proj.weight_transposed"
    weight = export_model.model.decoder.layers[1].mlp.down_proj.weight.detach().numpy().T
    int8, scale = tensors[f"{name}_quantized"], tensors[f"{name}_scale"]
    assert int8.dtype == np.int8 and int8.min() >= -64 and int8.max() <= 64 and scale.shape == (32,)
    assert np.abs(int8 * scale - weight).max() <= scale.max() / 2 + 1e-6
    assert [
        key for key, array in tensors.items() if array.dtype == np.float32 and array.ndim == 2 and array.shape[1] > 1
    ] == []


def test_embeddings_are_int8_with_one_scale_per_token(int8_folder, export_model):
    tensors = load_tensors(int8_folder, "encoder_model.onnx")
    parts = {name.rpartition("_")[2]: array for name, array in tensors.items() if "embed_tokens" in name}
    table = export_model.get_input_embeddings().weight.detach().numpy()
    assert parts["int8"].dtype == np.int8 and parts["scale"].shape == (97, 1)
    assert np.abs(parts["int8"] * parts["scale"] - table).max() <= parts["scale"].max() / 2 + 1e-6


def test_the_folder_shrinks(int8_folder, onnx_folder):
    sizes = [read_manifest(folder, "onnx")["files"] for folder in (int8_folder, onnx_folder)]
    assert sizes[0]["model.onnx_data"] < sizes[1]["model.onnx_data"]
    assert {name for name in sizes[0] if name.endswith((".onnx", "data"))} == {*NUM_WEIGHTS, "model.onnx_data"}


def assert_correlated(logits, expected, limit):
    assert torch.corrcoef(torch.stack((logits.flatten(), expected.flatten())))[0, 1] > limit


def test_int8_is_near_float32_and_generates_in_every_mode(int8_folder, export_model):
    exported = OrtEncDecSLM.from_pretrained(int8_folder)
    source, decoder_ids = build_source(9, 20, 7, 15, padding_side="left"), build_target_ids(4, 12)
    with torch.no_grad():
        expected = export_model(**source, decoder_input_ids=decoder_ids).logits
    # Random weights of this size are a hard case. Wrong scales or saturation give values below a half.
    assert_correlated(exported(**source, decoder_input_ids=decoder_ids).logits, expected, 0.8)
    for arguments in ({}, {"num_beams": 3}, {"do_sample": True}):
        assert exported.generate(**source, max_new_tokens=6, **arguments).shape[0] == 4


@pytest.mark.parametrize("int8_folder", ["int8_static"], indirect=True)
def test_calibrated_graphs_give_the_same_logits_in_one_step_and_in_many(int8_folder):
    exported = OrtEncDecSLM.from_pretrained(int8_folder)
    source, decoder_ids = build_source(9, 5), build_target_ids(2, 6)
    whole = exported(**source, decoder_input_ids=decoder_ids)
    cache, logits = None, []
    for position in range(6):
        inputs = {**source, "decoder_input_ids": decoder_ids[:, position : position + 1]}
        outputs = exported(**inputs, past_key_values=cache)
        cache, logits = outputs.past_key_values, [*logits, outputs.logits]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits)


def test_calibration_reads_texts_and_ids_and_the_targets_that_the_model_generates(export_model):
    inputs = calibration_inputs(export_model, build_tokenizer(), ["w5 w6", [9, 10]])
    assert [row["input_ids"].tolist() for row in inputs["encoder_model.onnx"]] == [[[5, 6, 2]], [[9, 10]]]
    expected = export_model.generate(torch.tensor([[9, 10]]), max_new_tokens=32)
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        np.testing.assert_array_equal(inputs[name][1]["input_ids"], expected.numpy())
    past = inputs["decoder_with_past_model.onnx"][0]
    assert past["past_key_values.1.decoder.key"].shape == (1, 2, 0, 14)
    assert past["past_key_values.1.encoder.value"].shape == (1, 2, 3, 14)


@pytest.mark.slow
def test_a_vision_model_is_quantized_but_not_calibrated(tmp_path, caplog, capsys):
    model = build_vision_model()
    exported = OrtEncDecSLM.from_pretrained(export_onnx(model, tmp_path / "out", quantization="int8"))
    assert caplog.text == "" and capsys.readouterr() == ("", "")
    operators = collections.Counter(node.op_type for node in load_graph(tmp_path / "out", "vision_encoder.onnx").node)
    assert operators["MatMulInteger"] == 2 * 6 + 2
    inputs, decoder_ids = build_vision_inputs(model.config, [[(8, 8)]]), build_target_ids(1, 6)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=decoder_ids).logits
    assert_correlated(exported(**inputs, decoder_input_ids=decoder_ids).logits, expected, 0.95)
    with pytest.raises(ValueError, match="`calibration` has texts"):
        export_onnx(model, tmp_path / "calibrated", quantization="int8_static", calibration=["w5"])


@pytest.mark.slow
def test_an_untied_head_and_biases_are_quantized_too(tmp_path):
    model = build_model(tie_word_embeddings=False, lm_head_bias=True, mlp_bias=True, gated_mlp=False)
    exported = OrtEncDecSLM.from_pretrained(export_onnx(model, tmp_path / "out", quantization="int8"))
    source, decoder_ids = build_source(9, 5), build_target_ids(2, 6)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=decoder_ids).logits
    assert_correlated(exported(**source, decoder_input_ids=decoder_ids).logits, expected, 0.95)
