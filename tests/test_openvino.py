# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx_bundles import padded_source, target_ids, tiny_onnx_bundle, word_tokenizer
from static_bundles import SOURCE_LENGTHS, TARGET_LENGTH, tiny_static_bundle

from encdec_slm import Text2TextGenerationPipeline
from encdec_slm.export.bundles import REPORTER, read_manifest, required
from encdec_slm.export.openvino_model import OpenVINOEncDecSLM


BUNDLES = {"free lengths": tiny_onnx_bundle, "fixed lengths": tiny_static_bundle}


@pytest.fixture(scope="module", params=BUNDLES)
def exported(request):
    """A model, and its bundle in OpenVINO."""
    model, folder = BUNDLES[request.param]()
    return model, OpenVINOEncDecSLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def graphs():
    """Every graph of the static bundle, compiled for the CPU by OpenVINO itself."""
    openvino = required("openvino")
    folder = tiny_static_bundle()[1]
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    names = read_manifest(folder, "onnx-static")["graphs"]
    return {name: openvino.compile_model(str(folder / name), "CPU", exact) for name in names}


def padded(row, length, dtype):
    return np.pad(np.asarray(row, dtype), (0, length - len(row)))[None]


class Loop:
    """Decoding as an application without torch or this package would write it, from the manifest's names alone."""

    def __init__(self, graphs, bucket):
        self.encoder, self.step = (
            graphs[f"{name}_{bucket}.onnx"] for name in ("encoder_model", "decoder_with_past_model")
        )
        self.bucket = bucket

    def start(self, ids):
        self.mask = padded([1] * len(ids), self.bucket, np.float32)
        outputs = self.encoder({"input_ids": padded(ids, self.bucket, np.int32), "attention_mask": self.mask})
        self.state = {
            port.any_name.replace("present", "past_key_values"): outputs[port]
            for port in self.encoder.outputs
            if port.any_name.startswith("present")
        }
        for port in self.step.inputs:
            if ".decoder." in port.any_name:
                self.state[port.any_name] = np.zeros(port.shape, np.float32)
        self.position = 0

    def next_logits(self, token_id):
        own_mask = np.zeros((1, TARGET_LENGTH), np.float32)
        own_mask[:, TARGET_LENGTH - 1 - self.position :] = 1
        outputs = self.step(
            {
                **{"input_ids": np.int32([[token_id]]), "position_ids": np.int32([[self.position]])},
                **{"decoder_attention_mask": own_mask, "encoder_attention_mask": self.mask, **self.state},
            }
        )
        for port in self.step.outputs[1:]:
            self.state[port.any_name.replace("present", "past_key_values")] = outputs[port].copy()
        self.position += 1
        return outputs[self.step.outputs[0]][0, 0].copy()


@pytest.mark.parametrize("length", [1, 3, 4, 7, 9, 12])
def test_the_static_graphs_equal_eager_in_openvino_at_every_bucket(graphs, length):
    model, _ = tiny_static_bundle()
    source, target = padded_source(length), target_ids(1, TARGET_LENGTH)
    loop = Loop(graphs, min(bucket for bucket in SOURCE_LENGTHS if bucket >= length))
    loop.start(source["input_ids"][0].tolist())
    logits = torch.from_numpy(np.stack([loop.next_logits(token_id) for token_id in target[0].tolist()]))
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=target).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [2, 9, 11])
def test_a_greedy_loop_over_openvino_alone_writes_what_eager_writes(graphs, length):
    model, _ = tiny_static_bundle()
    source = padded_source(length, seed=length)
    loop = Loop(graphs, min(bucket for bucket in SOURCE_LENGTHS if bucket >= length))
    loop.start(source["input_ids"][0].tolist())
    written = [model.config.decoder_start_token_id]
    while len(written) <= TARGET_LENGTH and written[-1] != model.config.eos_token_id:
        written.append(int(loop.next_logits(written[-1]).argmax()))
    assert written == model.generate(**source, max_new_tokens=TARGET_LENGTH)[0].tolist()


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_eager(exported, side):
    model, runtime = exported
    source, target = padded_source(9, 1, 5, side=side), target_ids(3, 7)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=target).logits
    torch.testing.assert_close(runtime(**source, decoder_input_ids=target).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generated_text_equals_eager(exported, options):
    model, runtime = exported
    source = padded_source(9, 2, 5)
    expected = model.generate(**source, max_new_tokens=TARGET_LENGTH, **options)
    assert runtime.generate(**source, max_new_tokens=TARGET_LENGTH, **options).tolist() == expected.tolist()


def test_the_pipeline_works_on_it(exported):
    model, runtime = exported
    texts, tokenizer = ["w5 w6 w7", "w8"], word_tokenizer()
    expected = Text2TextGenerationPipeline(model, tokenizer)(texts, max_new_tokens=6, batch_size=2)
    assert Text2TextGenerationPipeline(runtime, tokenizer)(texts, max_new_tokens=6, batch_size=2) == expected


def test_bfloat16_and_float16_are_hints_that_keep_logits_near():
    model, folder = tiny_onnx_bundle()
    source, target = padded_source(9), target_ids(1, 4)
    for precision in ("bfloat16", "float16"):
        runtime = OpenVINOEncDecSLM.from_pretrained(folder, precision=precision)
        with torch.no_grad():
            expected = model(**source, decoder_input_ids=target).logits
        # Wide enough for a CPU that has such units.
        torch.testing.assert_close(runtime(**source, decoder_input_ids=target).logits, expected, rtol=0, atol=0.2)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="`precision` is 'int4', but must be one of 'float32', 'bfloat16'"):
        OpenVINOEncDecSLM.from_pretrained(tiny_static_bundle()[1], precision="int4")


def test_a_device_that_is_not_here_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"`device` is 'NPU', but OpenVINO finds .*CPU.* here"):
        OpenVINOEncDecSLM.from_pretrained(tiny_static_bundle()[1], device="NPU")


def test_a_damaged_graph_is_named(tmp_path):
    folder = shutil.copytree(tiny_static_bundle()[1], tmp_path / "bundle")
    path = folder / f"encoder_model_{SOURCE_LENGTHS[0]}.onnx"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(ValueError, match=rf"{path.name} cannot be read by OpenVINO .* damaged"):
        OpenVINOEncDecSLM.from_pretrained(folder).generate(**padded_source(3), max_new_tokens=2)
    path.write_bytes(b"cut")
    with pytest.raises(ValueError, match=rf"{path.name} of .* has 3 bytes, but was written with"):
        OpenVINOEncDecSLM.from_pretrained(folder)


def test_runtimes_are_loaded_without_the_package_that_reports_their_use(tmp_path, monkeypatch):
    for name, code in {REPORTER: "", "talkative": f"import {REPORTER}"}.items():
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=REPORTER):
        required("talkative")
    assert REPORTER not in sys.modules and os.environ["ORT_DISABLE_TELEMETRY"]


@pytest.mark.slow
def test_int8_compresses_weights_and_reports_to_nobody(tmp_path):
    script = """
import sys
from onnx_bundles import padded_source, target_ids, tiny_onnx_bundle
from encdec_slm.export.openvino_model import OpenVINOEncDecSLM

model, folder = tiny_onnx_bundle()
source, target = padded_source(9, 4), target_ids(2, 5)
expected = model(**source, decoder_input_ids=target).logits
runtime = OpenVINOEncDecSLM.from_pretrained(folder, precision="int8")
error = (runtime(**source, decoder_input_ids=target).logits - expected).abs().max()
assert 1e-4 < error < 0.1 * expected.abs().max(), error
assert "openvino_telemetry" not in sys.modules
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    # Where OpenVINO and onnxruntime would keep what they count.
    assert not (tmp_path / "intel").exists() and not (tmp_path / ".cache" / "Microsoft").exists()
