# SPDX-License-Identifier: Apache-2.0
"""The vision-language model of microsoft/encoder-decoder-slm, converted, compared with the original code, in fp32."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast, pipeline

from encdec_slm import EncDecVLMForConditionalGeneration
from encdec_slm.configuration import load_preset
from encdec_slm.conversion import convert_reference_checkpoint, convert_vision_state_dict
from encdec_slm.modeling_encdec_vlm import merge_image_features


GOLDEN = Path(__file__).parent / "golden"
# Sums in another order; the smallest effect of a wrong convention is 3.5e-4.
CLOSE = {"rtol": 0, "atol": 1e-4}
# Images of each case, their (width, height), and the tokens of each.
CASES = {
    "landscape": (["landscape"], [(85, 64)], [64]),
    "portrait": (["portrait"], [(40, 90)], [61]),
    "small": (["small"], [(20, 20)], [36]),
    "batch": (["landscape", "small"], [(85, 64), (20, 20)], [64, 36]),
}


@pytest.fixture(scope="module")
def cases():
    return load_file(GOLDEN / "vision_tiny.cases.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder as the original code writes it."""
    folder = tmp_path_factory.mktemp("mu_vision")
    with safe_open(GOLDEN / "vision_tiny.weights.safetensors", "pt") as file:
        metadata = file.metadata()
    (folder / "config.json").write_text(metadata["config"], encoding="utf-8")
    torch.save(load_file(GOLDEN / "vision_tiny.weights.safetensors"), folder / "pytorch_model.bin")
    return folder, json.loads(metadata["clip_vision_config"])


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(checkpoint, request, tmp_path_factory):
    folder, vision_config = checkpoint
    output = tmp_path_factory.mktemp("converted") / request.param
    convert_reference_checkpoint(folder, output, model_config={"vision_config": vision_config})
    return AutoModelForImageTextToText.from_pretrained(output, attn_implementation=request.param).eval()


def inputs_of(cases, case, image_token_id):
    """Inputs with as many image tokens as the original spliced features in."""
    names, sizes, counts = CASES[case]
    counts = iter(counts)
    rows = [
        [token for given in row for token in ([image_token_id] * next(counts) if given == -200 else [given]) if token]
        for row in cases[f"{case}.input_ids"].tolist()
    ]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.cat([cases[f"image.{name}.pixel_values"] for name in names]),
        "image_sizes": torch.tensor([(height, width) for width, height in sizes]),
    }


def test_the_tower_and_the_projector_equal_the_reference(model, cases):
    encoder, patches = model.model.encoder, []
    hook = encoder.multi_modal_projector.register_forward_pre_hook(lambda _, args: patches.append(args[0]))
    projected = encoder.encode_tiles(cases["image.small.pixel_values"]).pooler_output
    hook.remove()
    torch.testing.assert_close(patches[0], cases["small.clip_patch_features"], **CLOSE)
    torch.testing.assert_close(projected, cases["small.projected"], **CLOSE)


def test_features_of_an_image_equal_the_reference(model, cases):
    outputs = model.get_image_features(cases["image.landscape.pixel_values"], torch.tensor([[64, 85]]))
    torch.testing.assert_close(outputs.pooler_output, (cases["landscape.image_features"],), **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_merged_embeddings_equal_the_reference(model, cases, case):
    inputs = inputs_of(cases, case, model.config.image_token_id)
    is_real = inputs.pop("attention_mask").bool()
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    merged = merge_image_features(model.config, inputs["input_ids"], embeds, features)
    assert torch.equal(is_real, cases[f"{case}.attention_mask"])
    torch.testing.assert_close(merged[is_real], cases[f"{case}.merged_embeds"][is_real], **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_encoding_and_logits_equal_the_reference(model, cases, case):
    inputs = inputs_of(cases, case, model.config.image_token_id)
    target = cases[f"{case}.decoder_input_ids"]
    mask = (target != 0).long()
    outputs = model(**inputs, decoder_input_ids=target, decoder_attention_mask=mask)
    is_real = inputs["attention_mask"].bool()
    encoded = outputs.encoder_last_hidden_state
    torch.testing.assert_close(encoded[is_real], cases[f"{case}.encoder_hidden"][is_real], **CLOSE)
    is_real = mask.bool()
    torch.testing.assert_close(outputs.logits[is_real], cases[f"{case}.logits"][is_real], **CLOSE)


def test_the_loss_equals_the_reference(model, cases):
    inputs = inputs_of(cases, "landscape", model.config.image_token_id)
    given = {"decoder_input_ids": cases["landscape.decoder_input_ids"], "labels": cases["landscape.labels"]}
    torch.testing.assert_close(model(**inputs, **given).loss, cases["landscape.loss"], **CLOSE)


def test_a_converted_folder_sees_and_writes_by_itself(checkpoint, cases, tmp_path):
    folder, vision_config = checkpoint
    words = {"<unk>": 0, "<s>": 1, "<|endoftext|>": 79}
    words |= {f"w{index}": index for index in range(90) if index not in words.values()}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    options = {"model_config": {"vision_config": vision_config}, "tokenizer": tokenizer}
    original = tmp_path / "original"
    original.mkdir()
    # Room for a question beside the 64 tokens of the image.
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"block_size": 128}
    (original / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    (original / "pytorch_model.bin").symlink_to(folder / "pytorch_model.bin")
    converted = convert_reference_checkpoint(original, tmp_path / "converted", **options)
    processor = AutoProcessor.from_pretrained(converted)
    image = Image.fromarray(cases["image.landscape.uint8_hwc"].numpy())
    inputs = processor(images=image, text="<image> w5", return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], cases["image.landscape.pixel_values"], rtol=0, atol=1e-6)
    assert int((inputs["input_ids"] == 90).sum()) == 64
    pipe = pipeline("image-text-to-text", model=str(converted), trust_remote_code=True)
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "w7"}]}
    model = AutoModelForImageTextToText.from_pretrained(converted)
    from_objects = pipeline("image-text-to-text", model=model, processor=processor)
    for given in ({"text": [message]}, {"images": image, "text": "w7"}, {"images": [image], "text": ["<image> w7"]}):
        results = [one(**given, max_new_tokens=3, return_full_text=False) for one in (pipe, from_objects)]
        assert results[0] == results[1]
        written = results[0][0][0] if isinstance(results[0][0], list) else results[0][0]
        assert isinstance(written["generated_text"], str)


@pytest.mark.parametrize("case", CASES)
def test_greedy_ids_equal_the_reference(model, cases, case):
    inputs = inputs_of(cases, case, model.config.image_token_id)
    ids = model.generate(**inputs, max_new_tokens=10, eos_token_id=79)
    assert torch.equal(ids, cases[f"{case}.greedy_ids"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio 'pad'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature 'cls_patch'"),
        ({"image_grid_pinpoints": "(1x1),(2x2)"}, r"image_grid_pinpoints '\(1x1\),\(2x2\)'"),
        ({"mm_vision_select_layer": [1, 2]}, r"mm_vision_select_layer \[1, 2\]"),
        (None, r"config\.json"),
    ],
)
def test_settings_that_the_released_model_does_not_have_are_refused(checkpoint, change, message, tmp_path):
    folder, vision_config = checkpoint
    (tmp_path / "pytorch_model.bin").symlink_to(folder / "pytorch_model.bin")
    if change is not None:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8")) | change
        (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        convert_reference_checkpoint(tmp_path, tmp_path / "out", model_config={"vision_config": vision_config})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [("image_newline", None, "Missing.*image_newline"), (None, "foo", "Unexpected.*foo")],
)
def test_weights_that_are_missing_or_left_over_are_refused(checkpoint, dropped, added, message, tmp_path):
    folder, vision_config = checkpoint
    weights = load_file(GOLDEN / "vision_tiny.weights.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if name != dropped}
    torch.save(weights if added is None else {**weights, added: torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=message):
        convert_reference_checkpoint(tmp_path, tmp_path / "out", model_config={"vision_config": vision_config})


def test_a_file_of_all_1141_tensors_becomes_a_folder(tmp_path):
    """Names and depths of the released checkpoint in a file of random weights, narrower: no size stands for two."""
    key_map = json.loads((GOLDEN / "key_map.json").read_text(encoding="utf-8"))["vision"]
    narrow = {768: 32, 384: 16, 3072: 40, 32128: 96, 1024: 64, 4096: 72, 577: 17, 14: 7}
    generator = torch.Generator().manual_seed(0)
    weights = {
        key.replace("{i}", str(index)): torch.randn([narrow.get(size, size) for size in shape], generator=generator)
        for key, shape, count in key_map["keys"]
        for index in range(count)
    }
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    sizes = {"n_encoder_layer": 20, "n_decoder_layer": 20, "n_embd": 32, "hidden_dim": 40, "vocab_size": 96}
    heads = {"n_head": 16, "n_kv_head": 8, "pad_token_id": 0, "block_size": 4096, "mm_vision_select_feature": "patch"}
    (tmp_path / "config.json").write_text(json.dumps(sizes | heads), encoding="utf-8")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    convert_reference_checkpoint(tmp_path, tmp_path / "converted")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert len(weights) == 1141 and not any(info.values()), info
    own = model.state_dict()
    taken = convert_vision_state_dict(weights, model.config)
    assert own.keys() == taken.keys() and all(torch.equal(own[name], taken[name]) for name in own)


def test_the_released_checkpoint_fills_the_625m_model():
    """Its 1,141 tensors by name and shape; without memory, on the meta device."""
    key_map = json.loads((GOLDEN / "key_map.json").read_text(encoding="utf-8"))["vision"]
    with torch.device("meta"):
        weights = {
            key.replace("{i}", str(index)): torch.empty(shape)
            for key, shape, count in key_map["keys"]
            for index in range(count)
        }
        model = EncDecVLMForConditionalGeneration(load_preset("625m-vlm"))
    assert len(weights) == key_map["n_tensors"] == 1141
    converted = convert_vision_state_dict(weights, model.config)
    model.load_state_dict(converted, assign=True)
    model.tie_weights()
    assert sum(parameter.numel() for parameter in model.parameters()) == key_map["n_params"] == 624_874_624
