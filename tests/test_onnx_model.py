# SPDX-License-Identifier: Apache-2.0
"""An exported model as transformers sees it: `generate`, pipelines, caches, and what it refuses."""

import json
import shutil

import pytest
import torch
from onnx_bundles import copy_of_bundle, padded_source, target_ids, tiny_onnx_bundle, word_tokenizer
from transformers import CLIPVisionConfig, SiglipVisionConfig, TextStreamer
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from conftest import randomised
from encdec_slm import EncDecVLMConfig, EncDecVLMForConditionalGeneration, Text2TextGenerationPipeline
from encdec_slm.configuration import load_preset
from encdec_slm.configuration_encdec_vlm import grid_shape, num_image_tokens
from encdec_slm.export.bundles import MANIFEST
from encdec_slm.export.onnx_export import export_onnx
from encdec_slm.export.onnx_model import OrtEncDecSLM


MODES = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 30, "temperature": 0.8},
    "sampled beams": {"do_sample": True, "num_beams": 3},
    "without a cache": {"use_cache": False, "num_beams": 2},
    "a repetition penalty": {"repetition_penalty": 1.3, "encoder_no_repeat_ngram_size": 2},
}


@pytest.fixture(scope="module")
def model():
    return tiny_onnx_bundle()[0]


@pytest.fixture(scope="module")
def folder():
    return tiny_onnx_bundle()[1]


@pytest.fixture(scope="module")
def exported(folder):
    return OrtEncDecSLM.from_pretrained(folder)


def generated(model, inputs, **kwargs):
    torch.manual_seed(7)
    return model.generate(**inputs, max_new_tokens=24, **kwargs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
def test_generate_gives_the_ids_that_the_model_gives(model, exported, mode, side):
    source = padded_source(9, 5, 12, side=side)
    ids = generated(exported, source, **MODES[mode])
    torch.testing.assert_close(ids, generated(model, source, **MODES[mode]))
    assert len(set(map(tuple, ids.tolist()))) > 1


def test_prompt_lookup_gives_the_ids_of_greedy_search(model, exported):
    source = padded_source(12)
    ids = generated(exported, source, prompt_lookup_num_tokens=3)
    torch.testing.assert_close(ids, generated(model, source))


def test_a_prompt_for_the_decoder_is_continued(model, exported):
    source, prompt = padded_source(9, 5), target_ids(2, 4)
    ids = generated(exported, source, decoder_input_ids=prompt, num_beams=2)
    torch.testing.assert_close(ids[:, :4], prompt)
    torch.testing.assert_close(ids, generated(model, source, decoder_input_ids=prompt, num_beams=2))


def test_scores_and_the_cache_come_when_they_are_asked_for(model, exported):
    asked = {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2}
    found, expected = (generated(each, padded_source(9, 5), **asked) for each in (exported, model))
    torch.testing.assert_close(found.sequences_scores, expected.sequences_scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.scores[-1], expected.scores[-1], atol=1e-4, rtol=1e-4)
    length = found.past_key_values.get_seq_length()
    assert length == found.sequences.shape[1] - 1 == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_logits_are_those_of_the_model_cached_or_not(model, exported, length):
    source, decoder_ids = padded_source(9, 5, 7, side="left"), target_ids(3, 6)
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=decoder_ids).logits
    whole = exported(**source, decoder_input_ids=decoder_ids)
    torch.testing.assert_close(whole.logits, expected, atol=1e-4, rtol=0)
    first = exported(**source, decoder_input_ids=decoder_ids[:, :length])
    encoder_outputs = BaseModelOutput(last_hidden_state=first.encoder_last_hidden_state)
    second = exported(
        attention_mask=source["attention_mask"],
        encoder_outputs=encoder_outputs,
        decoder_input_ids=decoder_ids[:, length:],
        past_key_values=first.past_key_values,
    )
    torch.testing.assert_close(second.logits, whole.logits[:, length:])


def test_a_source_without_a_mask_is_read_whole(exported):
    source, decoder_ids = padded_source(6, 6), target_ids(2, 2)
    logits = [exported(**inputs, decoder_input_ids=decoder_ids).logits for inputs in (source, source | NO_MASK)]
    torch.testing.assert_close(*logits)


NO_MASK = {"attention_mask": None}


def test_masks_may_be_of_any_number_type(exported):
    source, decoder_ids = padded_source(6, 4), target_ids(2, 2)
    kinds = (torch.int64, torch.bool, torch.float32)
    logits = [
        exported(source["input_ids"], source["attention_mask"].to(kind), decoder_input_ids=decoder_ids).logits
        for kind in kinds
    ]
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])


def test_a_cache_of_transformers_is_filled(exported):
    source, decoder_ids = padded_source(9, 5), target_ids(2, 4)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    logits = exported(**source, decoder_input_ids=decoder_ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, exported(**source, decoder_input_ids=decoder_ids).logits)
    assert cache.get_seq_length() == 4 and cache.cross_attention_cache.get_seq_length() == 9
    with pytest.raises(TypeError, match="is a DynamicCache, but an encoder-decoder keeps two"):
        exported(**source, decoder_input_ids=decoder_ids, past_key_values=DynamicCache())


def test_ids_and_states_may_be_of_other_number_types(exported):
    source, decoder_ids = padded_source(6, 4), target_ids(2, 2)
    expected = exported(**source, decoder_input_ids=decoder_ids)
    ids = {"input_ids": source["input_ids"].int(), "decoder_input_ids": decoder_ids.int()}
    torch.testing.assert_close(exported(attention_mask=source["attention_mask"], **ids).logits, expected.logits)
    outputs = BaseModelOutput(last_hidden_state=expected.encoder_last_hidden_state.double())
    logits = exported(None, source["attention_mask"], decoder_ids, encoder_outputs=outputs).logits
    torch.testing.assert_close(logits, expected.logits)


def test_a_cache_without_its_last_tokens_goes_on_from_there(exported):
    source, decoder_ids = padded_source(9, 5), target_ids(2, 6)
    whole = exported(**source, decoder_input_ids=decoder_ids)
    whole.past_key_values.crop(-4)
    again = exported(**source, decoder_input_ids=decoder_ids[:, 2:], past_key_values=whole.past_key_values)
    torch.testing.assert_close(again.logits, whole.logits[:, 2:])


def test_a_streamer_gets_the_text_that_generate_returns(exported, capsys):
    tokenizer = word_tokenizer()
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    ids = exported.generate(**padded_source(7), streamer=streamer, max_new_tokens=9)
    assert capsys.readouterr().out.split() == tokenizer.decode(ids[0], skip_special_tokens=True).split() != []


@pytest.mark.parametrize("arguments", [{}, {"num_beams": 3, "num_return_sequences": 2, "batch_size": 3}])
def test_the_pipeline_writes_what_it_writes_with_the_model(model, exported, arguments):
    tokenizer = word_tokenizer()
    texts = ["w1 w2 w3 w4 w5", "w6", "w7 w8 w9 w10 w11 w12 w13"]
    pipes = [Text2TextGenerationPipeline(model=each, tokenizer=tokenizer, device="cpu") for each in (exported, model)]
    written, expected = (pipe(texts, max_new_tokens=12, **arguments) for pipe in pipes)
    assert written == expected and len(written) == 3


def test_the_pipeline_refuses_a_tokenizer_of_another_model(exported):
    with pytest.raises(ValueError, match="is not that of the exported model"):
        Text2TextGenerationPipeline(model=exported, tokenizer=word_tokenizer(words=90), device="cpu")


def test_the_config_and_the_generation_config_are_the_models(model, exported):
    assert exported.config.to_dict()["hidden_size"] == model.config.hidden_size
    assert exported.generation_config.to_dict() == model.generation_config.to_dict()
    assert exported.can_generate() and exported.device.type == "cpu" and exported.dtype == torch.float32


SOURCE = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "decoder_input_ids": torch.tensor([[1], [1]])}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input_ids": torch.tensor([[5, 97], [7, 8]])}, "`input_ids` has ids from 5 to 97, .* ids 0 to 96"),
        ({"decoder_input_ids": torch.tensor([[1], [-1]])}, "`decoder_input_ids` has ids from -1"),
        ({"decoder_input_ids": torch.tensor([[1]])}, "2 sources and 1 targets"),
        ({"decoder_input_ids": None}, "at least one, such as `decoder_start_token_id`"),
        ({"input_ids": None}, "`input_ids` is not given"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, "`input_ids` is of shape"),
        ({"attention_mask": torch.ones(2, 3)}, r"shape \(2, 3\), but the source has \(2, 2\)"),
        ({"pixel_values": torch.zeros(1, 3, 4, 4)}, "bundle is of a text model"),
        ({"input_ids": torch.zeros(2, 2, dtype=torch.long, device="meta")}, "lies on meta, but .* on the CPU"),
        ({"output_attentions": True}, "`output_attentions` is True"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(exported, changes, reason):
    with pytest.raises(ValueError, match=reason):
        exported(**{**SOURCE, **changes})


def test_generate_refuses_what_no_graph_gives(exported):
    with pytest.raises(ValueError, match="bring their own cache"):
        exported.generate(**padded_source(4), cache_implementation="static")
    with pytest.raises(ValueError, match="logits and caches only"):
        exported.generate(**padded_source(4), output_hidden_states=True, return_dict_in_generate=True)


def test_a_provider_that_is_not_there_is_refused(folder):
    with pytest.raises(ValueError, match=r"this onnxruntime has .*CPUExecutionProvider"):
        OrtEncDecSLM.from_pretrained(folder, providers=["NoSuchExecutionProvider"])
    with pytest.raises(ValueError, match="`providers` is"):
        OrtEncDecSLM.from_pretrained(folder, providers=[])


@pytest.mark.parametrize("name", ["encoder_model.onnx", "decoder_model.onnx", "model.onnx_data", "config.json"])
def test_a_file_that_is_cut_off_or_missing_is_named(tmp_path, name):
    folder = copy_of_bundle(tmp_path / "bundle")
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"^{name} of .* cut off"):
        OrtEncDecSLM.from_pretrained(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"^{name} of .* is missing"):
        OrtEncDecSLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"])
def test_a_graph_that_is_damaged_inside_is_named(tmp_path, name):
    folder = copy_of_bundle(tmp_path / "bundle")
    size = (folder / name).stat().st_size
    (folder / name).write_bytes(b"\xff" * size)
    with pytest.raises(ValueError, match=f"{name} cannot be (loaded|read) .* damaged"):
        OrtEncDecSLM.from_pretrained(folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder here, and could not be loaded from the Hub"):
        OrtEncDecSLM.from_pretrained(tmp_path / "nowhere")


def test_a_folder_that_is_no_onnx_bundle_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"no {MANIFEST}"):
        OrtEncDecSLM.from_pretrained(tmp_path)
    folder = copy_of_bundle(tmp_path / "bundle")
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "format": "ctranslate2"}))
    with pytest.raises(ValueError, match="an export to ctranslate2, but onnx or onnx-static"):
        OrtEncDecSLM.from_pretrained(folder)


CLIP = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS = {
    "clip": CLIPVisionConfig(**CLIP, image_size=12, patch_size=3),
    "siglip": SiglipVisionConfig(**CLIP, image_size=12, patch_size=3, vision_use_head=False),
}


def vision_model(tower):
    if tower == "preset":
        return randomised(EncDecVLMForConditionalGeneration(load_preset("tiny-vlm"))).eval()
    text = tiny_onnx_bundle()[0].config.to_dict()
    text = {key: value for key, value in text.items() if key not in ("model_type", "transformers_version")}
    config = EncDecVLMConfig(
        text_config=text, vision_config=TOWERS[tower], image_token_id=90, image_newline=tower == "clip"
    )
    return randomised(EncDecVLMForConditionalGeneration(config)).eval()


def images_and_text(config):
    """Three rows with one image, two images and none; images of different shapes, so of different grids."""
    side = config.vision_config.image_size
    sizes = [(side, 3 * side), (5 * side, 2 * side), (side + 1, side)]
    geometry = (config.image_grid_pinpoints, side, config.patches_per_side, config.max_num_tiles)
    counts = [num_image_tokens(size, *geometry, config.image_newline) for size in sizes]
    grids = [grid_shape(size, config.image_grid_pinpoints, side) for size in sizes]
    num_tiles = sum(1 + rows * columns for rows, columns in grids)
    generator = torch.Generator().manual_seed(5)
    image = config.image_token_id
    rows = [[5, *[image] * counts[0], 6], [*[image] * (counts[1] + counts[2]), 7], [8, 9, 10]]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "pixel_values": torch.randn(num_tiles, 3, side, side, generator=generator),
        "image_sizes": torch.tensor(sizes),
    }


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["preset", "clip", "siglip"])
def test_a_model_that_sees_writes_what_it_writes_in_transformers(tmp_path, tower):
    model = vision_model(tower)
    exported = OrtEncDecSLM.from_pretrained(export_onnx(model, tmp_path / "out"))
    inputs, decoder_ids = images_and_text(model.config), target_ids(3, 4)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=decoder_ids).logits
    logits = exported(**inputs, decoder_input_ids=decoder_ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    for mode in ("greedy", "beams", "sampling"):
        torch.testing.assert_close(generated(exported, inputs, **MODES[mode]), generated(model, inputs, **MODES[mode]))
    text = {"input_ids": inputs["input_ids"][2:, :3]}
    torch.testing.assert_close(generated(exported, text), generated(model, text))
    _check_images_are_refused(exported, inputs)
    graphs = {path.name for path in (tmp_path / "out").glob("*.onnx")}
    assert graphs == {
        *("vision_encoder.onnx", "embed_tokens.onnx", "encoder_model.onnx"),
        *("decoder_model.onnx", "decoder_with_past_model.onnx"),
    }


def _check_images_are_refused(exported, inputs):
    for changes, reason in (
        ({"pixel_values": inputs["pixel_values"][1:]}, "tiles, but 3 images"),
        ({"image_sizes": None}, "`pixel_values` is given with no `image_sizes`"),
        ({"input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == 5, 90)}, "each needs one"),
    ):
        if "input_ids" in changes and exported.config.image_token_id != 90:
            continue
        with pytest.raises(ValueError, match=reason):
            exported.generate(**{**inputs, **changes})


def test_a_bundle_can_be_moved(tmp_path, exported):
    folder = copy_of_bundle(tmp_path / "first")
    shutil.move(folder, tmp_path / "second")
    moved = OrtEncDecSLM.from_pretrained(tmp_path / "second")
    source = padded_source(5)
    torch.testing.assert_close(generated(moved, source), generated(exported, source))
