# SPDX-License-Identifier: Apache-2.0
"""ONNX exports in onnxruntime and OpenVINO: `generate`, caches, images, and what is refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from export_fixtures import STATIC_LENGTHS, build_ascii_tokenizer
from transformers import AutoTokenizer, TextStreamer, pipeline
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.pipelines import base as pipelines_base

from conftest import (
    TINY_CLIP,
    TINY_SIGLIP,
    build_source,
    build_target_ids,
    build_vision_config,
    build_vision_inputs,
    build_vision_model,
    save_vision_folder,
)
from encdec_slm import Text2TextGenerationPipeline
from encdec_slm.export import OpenVINOEncDecSLM, OrtEncDecSLM, export_onnx, load_export
from encdec_slm.export.bundles import openvino_core
from encdec_slm.export_manifest import read_manifest


RUNTIMES = {"onnxruntime": OrtEncDecSLM, "openvino": OpenVINOEncDecSLM}
MODES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 30, "temperature": 0.8},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "without a cache": {"use_cache": False, "num_beams": 2},
    "a repetition penalty": {"repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2},
}
TARGET_LENGTH = STATIC_LENGTHS["target"]


@pytest.fixture(scope="module")
def exported(onnx_folder):
    return OrtEncDecSLM.from_pretrained(onnx_folder)


@pytest.fixture(scope="module")
def static(static_folder):
    return OrtEncDecSLM.from_pretrained(static_folder)


@pytest.fixture(scope="module", params=["exported", "static", "openvino", "static openvino"])
def each(request, onnx_folder, static_folder):
    """Every runtime with every kind of export."""
    if request.param in ("exported", "static"):
        return request.getfixturevalue(request.param)
    return OpenVINOEncDecSLM.from_pretrained(static_folder if "static" in request.param else onnx_folder)


def generate(model, inputs, **kwargs):
    torch.manual_seed(7)
    return model.generate(**inputs, **{"max_new_tokens": TARGET_LENGTH, **kwargs})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_the_ids_that_the_model_gives(export_model, each, mode, side):
    if mode == "without a cache" and "target_length" in each.manifest:
        pytest.skip("graphs of fixed shape always have a cache")
    source = build_source(9, 5, 12, padding_side=side)
    ids = generate(each, source, **MODES[mode])
    torch.testing.assert_close(ids, generate(export_model, source, **MODES[mode]))
    assert len(set(map(tuple, ids.tolist()))) > 1


@pytest.mark.parametrize("lengths", [(1,), (3,), (4,), (5,), (12,), (1, 4), (9, 2, 5), (12, 1)], ids=str)
def test_logits_are_those_of_the_model_for_every_length_and_padding(export_model, each, lengths):
    decoder_ids = build_target_ids(len(lengths), TARGET_LENGTH)
    for side in ("right", "left"):
        source = build_source(*lengths, padding_side=side)
        with torch.no_grad():
            expected = export_model(**source, decoder_input_ids=decoder_ids)
        found = each(**source, decoder_input_ids=decoder_ids)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        kept = source["attention_mask"].bool()
        states = (outputs.encoder_last_hidden_state[kept] for outputs in (found, expected))
        torch.testing.assert_close(*states, atol=1e-4, rtol=0)


def test_a_mask_with_gaps_hides_what_it_hides_in_the_model(export_model, each):
    source, decoder_ids = build_source(9), build_target_ids(1, 4)
    source["attention_mask"][:, [2, 5, 6]] = 0
    with torch.no_grad():
        expected = export_model(**source, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(each(**source, decoder_input_ids=decoder_ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_target_is_continued_from_a_cache(each, cut):
    source, decoder_ids = build_source(9, 5, 7, padding_side="left"), build_target_ids(3, 6)
    whole = each(**source, decoder_input_ids=decoder_ids)
    encoder_outputs = each.get_encoder()(**source)
    first = each(None, source["attention_mask"], decoder_ids[:, :cut], encoder_outputs=encoder_outputs)
    second = each(
        attention_mask=source["attention_mask"],
        encoder_outputs=encoder_outputs,
        decoder_input_ids=decoder_ids[:, cut:],
        past_key_values=first.past_key_values,
    )
    torch.testing.assert_close(second.logits, whole.logits[:, cut:])


def test_prompt_lookup_and_a_decoder_prompt_give_the_ids_of_the_model(export_model, exported):
    source, prompt = build_source(12), build_target_ids(1, 4)
    expected = generate(export_model, source)
    torch.testing.assert_close(generate(exported, source, prompt_lookup_num_tokens=3), expected)
    found, expected = (
        generate(model, source, decoder_input_ids=prompt, num_beams=2) for model in (exported, export_model)
    )
    torch.testing.assert_close(found, expected)


def test_scores_and_the_cache_are_returned_on_request(export_model, exported):
    options = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2}
    found, expected = (generate(model, build_source(9, 5), **options) for model in (exported, export_model))
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.scores[-1], expected.scores[-1], atol=1e-4, rtol=1e-4)
    length = found.past_key_values.get_seq_length()
    assert length == found.sequences.shape[1] - 1 == expected.past_key_values.get_seq_length()


def test_masks_and_states_may_have_any_number_type(each):
    source, decoder_ids = build_source(6, 4), build_target_ids(2, 2)
    expected = each(**source, decoder_input_ids=decoder_ids).logits
    for dtype in (torch.bool, torch.float32, torch.int32):
        mask = source["attention_mask"].to(dtype)
        torch.testing.assert_close(each(source["input_ids"], mask, decoder_ids.int()).logits, expected)
    full = build_source(6, 6)
    logits = [each(full["input_ids"], mask, decoder_ids).logits for mask in (None, full["attention_mask"])]
    torch.testing.assert_close(*logits)


def test_a_cache_of_transformers_is_filled_and_may_be_cropped(exported):
    source, decoder_ids = build_source(9, 5), build_target_ids(2, 6)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    whole = exported(**source, decoder_input_ids=decoder_ids, past_key_values=cache)
    torch.testing.assert_close(whole.logits, exported(**source, decoder_input_ids=decoder_ids).logits)
    assert cache.get_seq_length() == 6 and cache.cross_attention_cache.get_seq_length() == 9
    cache.crop(-4)
    again = exported(**source, decoder_input_ids=decoder_ids[:, 2:], past_key_values=cache)
    torch.testing.assert_close(again.logits, whole.logits[:, 2:])
    with pytest.raises(TypeError, match="DynamicCache"):
        exported(**source, decoder_input_ids=decoder_ids, past_key_values=DynamicCache())


def test_states_may_have_another_float_type(exported):
    source, decoder_ids = build_source(6, 4), build_target_ids(2, 2)
    expected = exported(**source, decoder_input_ids=decoder_ids)
    outputs = BaseModelOutput(last_hidden_state=expected.encoder_last_hidden_state.double())
    logits = exported(None, source["attention_mask"], decoder_ids, encoder_outputs=outputs).logits
    torch.testing.assert_close(logits, expected.logits)


def test_a_streamer_receives_the_text_that_generate_returns(each, capsys):
    tokenizer = build_ascii_tokenizer()
    ids = each.generate(
        **build_source(7), streamer=TextStreamer(tokenizer, skip_special_tokens=True), max_new_tokens=9
    )
    assert capsys.readouterr().out.split() == tokenizer.decode(ids[0], skip_special_tokens=True).split() != []


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3, "num_return_sequences": 2, "batch_size": 3}], ids=str)
def test_the_pipeline_gives_what_it_gives_with_the_model(export_model, each, arguments):
    texts = ["w5 w6 w7", "w", "abcdefghijk"]
    pipes = [
        Text2TextGenerationPipeline(model=model, tokenizer=build_ascii_tokenizer()) for model in (each, export_model)
    ]
    found, expected = (pipe(texts, max_new_tokens=9, **arguments) for pipe in pipes)
    assert found == expected and len(found) == 3


SOURCE = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "decoder_input_ids": torch.tensor([[1], [1]])}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"input_ids": torch.tensor([[5, 97], [7, 8]])}, "`input_ids` has ids from 5 to 97"),
        ({"decoder_input_ids": torch.tensor([[1], [-1]])}, "`decoder_input_ids` has ids from -1"),
        ({"decoder_input_ids": torch.tensor([[1]])}, "2 sources and 1 targets"),
        ({"decoder_input_ids": None}, "`decoder_input_ids`"),
        ({"input_ids": None}, "`input_ids`"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "`input_ids`"),
        ({"attention_mask": torch.ones(2, 3)}, r"`attention_mask` has shape \(2, 3\)"),
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "`pixel_values`"),
        ({"input_ids": torch.zeros(2, 2, dtype=torch.long, device="meta")}, "`input_ids` is on meta"),
        ({"output_attentions": True}, "`output_attentions`"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(exported, changes, name):
    with pytest.raises(ValueError, match=name):
        exported(**{**SOURCE, **changes})


def test_generate_refuses_what_no_graph_returns(exported):
    with pytest.raises(ValueError, match="`output_hidden_states`"):
        exported.generate(**build_source(4), output_hidden_states=True, return_dict_in_generate=True)


# Fixed shapes


def test_the_lengths_of_static_graphs_are_limits(static, static_folder, export_model):
    with pytest.raises(ValueError, match=r"13 tokens.* 12\b.*max_length=12"):
        static.generate(**build_source(13))
    with pytest.raises(ValueError, match=r"11 new tokens.* 10\b.*\"target\": 11"):
        static.generate(**build_source(7), max_new_tokens=TARGET_LENGTH + 1)
    source, never = build_source(7), {"eos_token_id": None}
    expected = export_model.generate(**source, max_length=TARGET_LENGTH + 1, **never)
    assert static.generate(**source, **never).tolist() == expected.tolist()
    tokenizer, text = AutoTokenizer.from_pretrained(static_folder), "x" * 20
    pipe = Text2TextGenerationPipeline(static, tokenizer)
    assert pipe([text, "w5"], truncation=True, batch_size=2) == pipe(["x" * 11, "w5"])
    with pytest.raises(ValueError, match=r"21 tokens.*12"):
        pipe(text)


def test_static_graphs_refuse_drafts_and_encodings_of_another_model(static, export_model):
    with pytest.raises(ValueError, match="`prompt_lookup_num_tokens`"):
        static.generate(**build_source(7), max_new_tokens=5, prompt_lookup_num_tokens=2)
    encoding = export_model.model.encoder(**build_source(5))
    with pytest.raises(ValueError, match="`encoder_outputs`"):
        static(encoder_outputs=encoding, decoder_input_ids=build_target_ids(1, 2))


class Loop:
    """Greedy decoding without torch or this package, with names from the manifest, as an application writes it."""

    def __init__(self, folder, bucket):
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        names = (f"{name}_{bucket}.onnx" for name in ("encoder_model", "decoder_with_past_model"))
        core = openvino_core()
        self.encoder, self.step = (core.compile_model(str(folder / name), "CPU", exact) for name in names)
        self.bucket = bucket

    def generate(self, ids, start_id, end_id):
        self.mask = (np.arange(self.bucket) < len(ids)).astype(np.float32)[None]
        padded = np.pad(np.int32(ids), (0, self.bucket - len(ids)))[None]
        state = self._rename(self.encoder, self.encoder({"input_ids": padded, "attention_mask": self.mask}))
        own = {
            port.any_name: np.zeros(port.shape, np.float32) for port in self.step.inputs if "decoder." in port.any_name
        }
        state, target = {**state, **own}, [start_id]
        while len(target) <= TARGET_LENGTH and target[-1] != end_id:
            own_mask = (np.arange(TARGET_LENGTH) >= TARGET_LENGTH - len(target)).astype(np.float32)[None]
            inputs = {"input_ids": np.int32([target[-1:]]), "position_ids": np.int32([[len(target) - 1]])}
            masks = {"decoder_attention_mask": own_mask, "encoder_attention_mask": self.mask}
            outputs = self.step({**inputs, **masks, **state})
            state |= self._rename(self.step, outputs)
            target.append(int(outputs[self.step.outputs[0]].argmax()))
        return target

    @staticmethod
    def _rename(graph, outputs):
        ports = [port for port in graph.outputs if port.any_name.startswith("present")]
        return {port.any_name.replace("present", "past_key_values"): outputs[port].copy() for port in ports}


@pytest.mark.parametrize("length", [2, 9, 11])
def test_a_loop_over_openvino_alone_generates_what_the_model_generates(static_folder, export_model, length):
    source = build_source(length, seed=length)
    bucket = min(bucket for bucket in STATIC_LENGTHS["source"] if bucket >= length)
    found = Loop(static_folder, bucket).generate(source["input_ids"][0].tolist(), 1, 2)
    assert found == export_model.generate(**source, max_new_tokens=TARGET_LENGTH)[0].tolist()


# Loading


@pytest.mark.parametrize("model_class", RUNTIMES.values(), ids=RUNTIMES)
def test_a_damaged_graph_is_named(model_class, onnx_folder, tmp_path):
    for name in ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"):
        folder = shutil.copytree(onnx_folder, tmp_path / name)
        (folder / name).write_bytes(b"\xff" * (folder / name).stat().st_size)
        with pytest.raises(ValueError, match=f"^{name} .* damaged"):
            model_class.from_pretrained(folder)


def test_a_provider_precision_or_device_that_is_not_there_is_refused(onnx_folder):
    for providers in (["NoSuchExecutionProvider"], []):
        with pytest.raises(ValueError, match=r"`providers`.*CPUExecutionProvider"):
            OrtEncDecSLM.from_pretrained(onnx_folder, providers=providers)
    with pytest.raises(ValueError, match="`precision` is 'int4'"):
        OpenVINOEncDecSLM.from_pretrained(onnx_folder, precision="int4")
    with pytest.raises(ValueError, match=r"`device` is 'NPU'.*CPU"):
        OpenVINOEncDecSLM.from_pretrained(onnx_folder, device="NPU")


@pytest.mark.parametrize("linked", ["folder", "*.onnx", "*.onnx_data"])
@pytest.mark.parametrize("model_class", RUNTIMES.values(), ids=RUNTIMES)
@pytest.mark.parametrize("kind", ["onnx", "static"])
def test_an_export_may_consist_of_links(kind, model_class, linked, export_model, tmp_path, request):
    original, folder = request.getfixturevalue(f"{kind}_folder"), tmp_path / "links"
    if linked == "folder":
        folder.symlink_to(original)
    else:
        shutil.copytree(original, folder)
        for number, path in enumerate(folder.glob(linked)):
            target = tmp_path / f"target{number}"
            shutil.move(path, target)
            path.symlink_to(target)
    found = generate(model_class.from_pretrained(folder), build_source(5))
    torch.testing.assert_close(found, generate(export_model, build_source(5)))


@pytest.mark.parametrize("model_class", RUNTIMES.values(), ids=RUNTIMES)
def test_an_export_can_be_moved(model_class, onnx_folder, export_model, tmp_path):
    shutil.copytree(onnx_folder, tmp_path / "first")
    shutil.move(tmp_path / "first", tmp_path / "second")
    moved = model_class.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(generate(moved, build_source(5)), generate(export_model, build_source(5)))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precisions_keep_logits_near(precision, onnx_folder, export_model):
    exported = OpenVINOEncDecSLM.from_pretrained(onnx_folder, precision=precision)
    source, decoder_ids = build_source(9), build_target_ids(1, 4)
    with torch.no_grad():
        expected = export_model(**source, decoder_input_ids=decoder_ids).logits
    # Wide enough for a CPU that computes in these types.
    torch.testing.assert_close(exported(**source, decoder_input_ids=decoder_ids).logits, expected, rtol=0, atol=0.2)


@pytest.mark.slow
def test_int8_compresses_weights_and_reports_nothing(tmp_path, onnx_folder):
    script = """
import sys
from conftest import build_model, build_source, build_target_ids
from export_fixtures import FIELDS
from encdec_slm.export import OpenVINOEncDecSLM

source, target = build_source(9, 4), build_target_ids(2, 5)
expected = build_model(**FIELDS)(**source, decoder_input_ids=target).logits
exported = OpenVINOEncDecSLM.from_pretrained(sys.argv[1], precision="int8")
error = (exported(**source, decoder_input_ids=target).logits - expected).abs().max()
assert 1e-4 < error < 0.1 * expected.abs().max(), error
assert "openvino_telemetry" not in sys.modules
"""
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", script, str(onnx_folder)]
    process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    # Folders in which OpenVINO and onnxruntime would keep their telemetry.
    assert not (tmp_path / "intel").exists() and not (tmp_path / ".cache" / "Microsoft").exists()


def test_signals_can_be_handled_after_two_openvino_models_have_ended(onnx_folder):
    script = """
import faulthandler, os, signal, sys
from encdec_slm.export import OpenVINOEncDecSLM

faulthandler.enable()
signal.signal(signal.SIGCHLD, lambda *_: print("handled"))
models = [OpenVINOEncDecSLM.from_pretrained(sys.argv[1]) for _ in range(2)]
models.pop(0)
models.pop(0)
os.kill(os.getpid(), signal.SIGCHLD)
"""
    command = [sys.executable, "-c", script, str(onnx_folder)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "handled\n"


# Images


@pytest.mark.slow
@pytest.mark.parametrize("model_class", RUNTIMES.values(), ids=RUNTIMES)
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_vision_model_generates_what_it_generates_in_transformers(build_once, model_class, tower):
    fields = {"vision_config": TINY_CLIP, "image_newline": True}
    if tower == "siglip":
        fields = {"vision_config": {**TINY_SIGLIP, "vision_use_head": False}, "image_newline": False}
    model = build_vision_model(build_vision_config(**fields))
    exported = model_class.from_pretrained(build_once(tower, lambda folder: export_onnx(model, folder)))
    inputs = build_vision_inputs(model.config, [[(8, 24)], [(40, 16), (9, 8)], []])
    decoder_ids = build_target_ids(3, 4)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(exported(**inputs, decoder_input_ids=decoder_ids).logits, expected, atol=1e-4, rtol=0)
    for mode in ("greedy", "beams", "sampling"):
        torch.testing.assert_close(generate(exported, inputs, **MODES[mode]), generate(model, inputs, **MODES[mode]))
    text = {"input_ids": inputs["input_ids"][2:, :4]}
    torch.testing.assert_close(generate(exported, text), generate(model, text))
    for name, changes in (("tiles", {"pixel_values": inputs["pixel_values"][1:]}), ("sizes", {"image_sizes": None})):
        with pytest.raises(ValueError, match=name):
            exported.generate(**{**inputs, **changes})


@pytest.mark.slow
@pytest.mark.parametrize("device", [None, 0, "cpu"])
def test_the_image_pipeline_leaves_an_export_where_it_is(build_once, tmp_path, device, monkeypatch):
    from PIL import Image

    def write(folder):
        save_vision_folder(tmp_path / "model")
        export_onnx(tmp_path / "model", folder)

    exported, processor = load_export(build_once("vision_export", write))
    question, picture = "what is it?", Image.new("RGB", (8, 24), "red")
    monkeypatch.setattr(pipelines_base, "is_torch_cuda_available", lambda: True)
    options = {} if device is None else {"device": device}
    pipe = pipeline("image-text-to-text", model=exported, processor=processor, **options)
    assert pipe.device.type == "cpu"
    assert pipe(images=picture, text=question, max_new_tokens=4)[0]["generated_text"]
    assert read_manifest(exported.config.name_or_path, "onnx")["format"] == "onnx"
