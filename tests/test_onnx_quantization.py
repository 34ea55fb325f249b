# SPDX-License-Identifier: Apache-2.0
"""int8 graphs: which weights and operators they have, how far they are from float32, and what calibrates them."""

import collections
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from datasets import Dataset
from onnx_bundles import (
    copy_of_bundle,
    padded_source,
    target_ids,
    tiny_onnx_bundle,
    tiny_text_model,
    word_tokenizer,
    write_graphs_of_bundle,
)

from conftest import randomised
from encdec_slm import EncDecVLMForConditionalGeneration
from encdec_slm.configuration import load_preset
from encdec_slm.export import onnx_export, onnx_quantization
from encdec_slm.export.bundles import MANIFEST
from encdec_slm.export.onnx_export import export_onnx
from encdec_slm.export.onnx_model import OrtEncDecSLM
from encdec_slm.trainers.tasks import docstrings


SCRIPT = Path(__file__).parent.parent / "examples" / "export_onnx.py"
NUM_WEIGHTS = {
    "encoder_model.onnx": 2 * 7,
    "decoder_model.onnx": 2 * 11 + 1,
    "decoder_with_past_model.onnx": 2 * 9 + 1,
}
ROWS = [torch.randint(3, 97, (length,)).tolist() for length in (20, 12, 31, 7, 25, 16)]


@pytest.fixture(scope="module")
def exported_int8(tmp_path_factory):
    """Exports the shared model in int8, over the float32 graphs that lie in its bundle already."""
    model, folders = tiny_onnx_bundle()[0], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_write_graphs", write_graphs_of_bundle)
        for quantization, calibration in (("int8", None), ("int8_static", ROWS)):
            folder = tmp_path_factory.mktemp(quantization) / "out"
            arguments = {"quantization": quantization, "calibration": calibration, "tokenizer": word_tokenizer()}
            folders[quantization] = export_onnx(model, folder, **arguments)
    return folders


def operators_of(folder, name):
    graph = onnx.load(folder / name, load_external_data=False).graph
    return collections.Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("name", NUM_WEIGHTS)
def test_every_product_with_a_weight_is_in_int8_and_no_other(exported_int8, name):
    """Two products of every attention have no weight."""
    attentions = 2 if name == "encoder_model.onnx" else 4
    dynamic = operators_of(exported_int8["int8"], name)
    assert dynamic["MatMulInteger"] == NUM_WEIGHTS[name] and dynamic["MatMul"] == 2 * attentions
    assert dynamic["DynamicQuantizeLinear"] > 0 and not dynamic["Gemm"]
    static = operators_of(exported_int8["int8_static"], name)
    assert static["DequantizeLinear"] == NUM_WEIGHTS[name] + static["QuantizeLinear"]
    assert not static["DynamicQuantizeLinear"]
    graph = onnx.load(exported_int8["int8_static"] / name, load_external_data=False).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    read = [[makers.get(value) for value in node.input] for node in graph.node if node.op_type == "MatMul"]
    assert read.count(["DequantizeLinear"] * 2) == NUM_WEIGHTS[name]
    assert (
        sum("DequantizeLinear" not in makers_of for makers_of in read)
        == 2 * attentions
        == len(read) - NUM_WEIGHTS[name]
    )


@pytest.mark.parametrize("quantization", ["int8", "int8_static"])
def test_weights_are_int8_of_one_scale_per_output_and_use_7_bits(exported_int8, quantization):
    folder = exported_int8[quantization]
    tensors = {
        tensor.name: onnx.numpy_helper.to_array(tensor, str(folder))
        for tensor in onnx.load(folder / "decoder_model.onnx", load_external_data=False).graph.initializer
    }
    name = "decoder.layers.1.mlp.down_proj.weight_transposed"
    weight = tiny_onnx_bundle()[0].model.decoder.layers[1].mlp.down_proj.weight.detach().numpy().T
    int8, scale = tensors[f"{name}_quantized"], tensors[f"{name}_scale"]
    assert int8.dtype == np.int8 and int8.min() >= -64 and int8.max() <= 64 and scale.shape == (32,)
    assert np.abs(int8 * scale - weight).max() <= scale.max() / 2 + 1e-6
    floats = [key for key, tensor in tensors.items() if tensor.dtype == np.float32 and tensor.ndim == 2]
    assert [key for key in floats if tensors[key].shape[1] > 1] == []


@pytest.mark.parametrize("quantization", ["int8", "int8_static"])
def test_embeddings_are_int8_of_one_scale_per_token(exported_int8, quantization):
    folder = exported_int8[quantization]
    model = tiny_onnx_bundle()[0]
    graph = onnx.load(folder / "encoder_model.onnx", load_external_data=False).graph
    tensors = {
        tensor.name.rpartition("_")[2]: onnx.numpy_helper.to_array(tensor, str(folder))
        for tensor in graph.initializer
        if "embed_tokens" in tensor.name
    }
    table = model.get_input_embeddings().weight.detach().numpy()
    assert tensors["int8"].dtype == np.int8 and tensors["scale"].shape == (97, 1)
    assert np.abs(tensors["int8"] * tensors["scale"] - table).max() <= tensors["scale"].max() / 2 + 1e-6


def test_the_folder_shrinks_and_weights_still_lie_in_it_once(exported_int8):
    """A table in int8 is not its head in int8: that has its scales across. All else is shared."""
    model, bundle = tiny_onnx_bundle()
    for folder in exported_int8.values():
        stored = {
            (entry["offset"], entry["length"])
            for name in NUM_WEIGHTS
            for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer
            if (entry := {item.key: int(item.value) for item in tensor.external_data if item.key != "location"})
        }
        num_weights = sum(parameter.numel() for parameter in model.parameters() if parameter.numel() >= 1024)
        assert sum(length for _, length in stored) == num_weights + model.lm_head.weight.numel()
        files = json.loads((folder / MANIFEST).read_text())["files"]
        assert {name for name in files if name.endswith((".onnx", "data"))} == {*NUM_WEIGHTS, "model.onnx_data"}
        assert files["model.onnx_data"] < (bundle / "model.onnx_data").stat().st_size


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.9), ("int8_static", 0.8)])
def test_int8_is_near_float32(exported_int8, quantization, share):
    """Random weights of this size are a hard case; wrong scales or saturation give shares below a half."""
    model, exported = tiny_onnx_bundle()[0], OrtEncDecSLM.from_pretrained(exported_int8[quantization])
    source, decoder_ids = padded_source(9, 20, 7, 15, side="left"), target_ids(4, 12)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=decoder_ids).logits
    logits = exported(**source, decoder_input_ids=decoder_ids).logits
    assert (logits - expected).std() < (1 - share) * 3 * expected.std()
    assert torch.corrcoef(torch.stack((logits.flatten(), expected.flatten())))[0, 1] > share


def test_calibrated_graphs_give_one_step_and_many_the_same_logits(exported_int8):
    """Scales of a tensor that is quantized when it runs are those of all tokens of a call; these are fixed."""
    exported = OrtEncDecSLM.from_pretrained(exported_int8["int8_static"])
    source, decoder_ids = padded_source(9, 5), target_ids(2, 6)
    whole = exported(**source, decoder_input_ids=decoder_ids)
    cache, logits = None, []
    for position in range(6):
        inputs = {**source, "decoder_input_ids": decoder_ids[:, position : position + 1]}
        outputs = exported(**inputs, past_key_values=cache)
        cache, logits = outputs.past_key_values, [*logits, outputs.logits]
    torch.testing.assert_close(torch.cat(logits, dim=1), whole.logits)


@pytest.mark.parametrize("quantization", ["int8", "int8_static"])
def test_a_quantized_model_generates_in_every_mode(exported_int8, quantization):
    exported = OrtEncDecSLM.from_pretrained(exported_int8[quantization])
    assert exported.manifest["quantization"] == quantization
    for arguments in ({}, {"num_beams": 3}, {"do_sample": True}):
        ids = exported.generate(**padded_source(9, 5), max_new_tokens=6, **arguments)
        assert ids.shape[0] == 2 and 2 <= ids.shape[1] <= 7


def test_calibration_reads_texts_with_the_tokenizer_and_ids_as_they_are():
    model, tokenizer = tiny_onnx_bundle()[0], word_tokenizer()
    rows = onnx_quantization.calibration_rows(["w1 w2", [7, 8, 9], "w3"], model, tokenizer)
    assert [row.tolist() for row in rows] == [[[5, 6, 2]], [[7, 8, 9]], [[7, 2]]]


def test_without_rows_calibration_reads_held_out_functions_of_the_docstring_task(monkeypatch):
    task = {split: {"source": [f"w{row % 93} {split}" for row in range(100)]} for split in ("train", "test")}
    monkeypatch.setattr(docstrings, "build_docstring_task", lambda: task)
    rows = onnx_quantization.calibration_rows(None, tiny_onnx_bundle()[0], word_tokenizer())
    firsts = [row[0, 0].item() - 4 for row in rows]
    assert len(rows) == 32 and firsts[:31] == list(range(0, 93, 3))


def test_calibration_writes_targets_that_the_model_would_write():
    model = tiny_onnx_bundle()[0]
    rows = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10]])]
    inputs = onnx_quantization.calibration_inputs(model, rows)
    assert {name: len(given) for name, given in inputs.items()} == dict.fromkeys(NUM_WEIGHTS, 2)
    written = model.generate(rows[1], max_new_tokens=32)
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        np.testing.assert_array_equal(inputs[name][1]["input_ids"], written.numpy())
    past = inputs["decoder_with_past_model.onnx"][0]
    assert past["past_key_values.1.decoder.key"].shape == (1, 2, 0, 14)
    assert past["past_key_values.1.encoder.value"].shape == (1, 2, 4, 14)


def test_quantizing_does_not_talk(tmp_path, caplog, capsys):
    folder = copy_of_bundle(tmp_path / "bundle")
    assert {name for name, _ in onnx_quantization.quantized_graphs(folder, None)} == set(NUM_WEIGHTS)
    assert caplog.text == "" and capsys.readouterr() == ("", "")


def test_the_script_exports_and_prints_the_agreement(tmp_path, monkeypatch, capsys):
    tiny_onnx_bundle()[0].save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = Dataset.from_list([{"source": f"w{row} w3 w{row + 1}", "target": f"w{row}"} for row in range(40)])
    task = {"test": rows, "validation": rows}
    monkeypatch.setattr(docstrings, "build_docstring_task", lambda: task)
    monkeypatch.setattr(onnx_export, "_write_graphs", write_graphs_of_bundle)
    options = ["--quantization", "int8", "--agreement", "--rows", "6"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "model"), str(tmp_path / "out"), *options])
    runpy.run_path(str(SCRIPT))["main"]()
    shown = capsys.readouterr().out
    assert "MB in int8 to" in shown and "On 6 held-out rows" in shown
    assert float(re.search(r"equal tokens +([\d.]+) %", shown)[1]) > 50


@pytest.mark.slow
def test_a_model_that_sees_is_quantized_but_not_calibrated(tmp_path):
    model = randomised(EncDecVLMForConditionalGeneration(load_preset("tiny-vlm"))).eval()
    exported = OrtEncDecSLM.from_pretrained(export_onnx(model, tmp_path / "out", quantization="int8"))
    assert operators_of(tmp_path / "out", "vision_encoder.onnx")["MatMulInteger"] == 2 * 6 + 2
    side = model.config.vision_config.image_size
    inputs = {"pixel_values": torch.randn(2, 3, side, side), "image_sizes": torch.tensor([[side, side]])}
    num_tokens = len(model.get_image_features(**inputs).pooler_output[0])
    inputs["input_ids"] = torch.tensor([[5, *[model.config.image_token_id] * num_tokens, 6]])
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=target_ids(1, 6)).logits
    logits = exported(**inputs, decoder_input_ids=target_ids(1, 6)).logits
    assert torch.corrcoef(torch.stack((logits.flatten(), expected.flatten())))[0, 1] > 0.95
    with pytest.raises(ValueError, match="calibration rows are texts"):
        export_onnx(model, tmp_path / "calibrated", quantization="int8_static")


@pytest.mark.slow
def test_an_untied_head_and_biases_are_quantized_too(tmp_path):
    model = tiny_text_model(tie_word_embeddings=False, lm_head_bias=True, mlp_bias=True, gated_mlp=False)
    exported = OrtEncDecSLM.from_pretrained(export_onnx(model, tmp_path / "out", quantization="int8"))
    source, decoder_ids = padded_source(9, 5), target_ids(2, 6)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=decoder_ids).logits
    logits = exported(**source, decoder_input_ids=decoder_ids).logits
    assert torch.corrcoef(torch.stack((logits.flatten(), expected.flatten())))[0, 1] > 0.95
