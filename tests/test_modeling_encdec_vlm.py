# SPDX-License-Identifier: Apache-2.0
"""Contracts of the vision-text model; that it computes what the original computes is in test_golden_vision."""

import copy
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    SiglipVisionConfig,
)

from conftest import (
    TINY_CLIP,
    TINY_SIGLIP,
    build_config,
    build_vision_config,
    build_vision_inputs,
    build_vision_model,
    randomize,
)
from encdec_slm import EncDecVLMConfig, EncDecVLMForConditionalGeneration, EncDecVLMModel
from encdec_slm.configuration_encdec_vlm import feature_shape, num_image_tokens


IMAGE = 96
# Height and width: one tile, four with padding above and below, six that are shrunk.
SIZES = [(8, 8), (11, 16), (160, 240)]
MIXED = [[SIZES[1]], [], [SIZES[2], SIZES[0]]]

# transformers 5.23 calls it activation checkpointing; PEFT 0.21 and transformers 5.17 do not.
renamed_in_transformers = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(params=["clip", "siglip"])
def model(request):
    return build_vision_model(build_vision_config(vision_config=TINY_CLIP if request.param == "clip" else TINY_SIGLIP))


@pytest.fixture
def clip_model(tiny_vision_model):
    return tiny_vision_model


def logits_of(model, target_ids, rows=MIXED, **kwargs):
    inputs = build_vision_inputs(model.config, rows, **kwargs)
    return model(**inputs, decoder_input_ids=target_ids[: len(rows)]).logits


def test_building_a_model_leaves_its_config_unchanged():
    config = build_vision_config()
    before = config.to_dict()
    EncDecVLMForConditionalGeneration(config)
    assert config.to_dict() == before


# Images among tokens


def test_features_of_an_image_are_as_many_as_its_tokens(model):
    config = model.config
    inputs = build_vision_inputs(config, [SIZES])
    features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    assert sum(map(len, features)) == int((inputs["input_ids"] == IMAGE).sum())
    assert {feature.shape[1] for feature in features} == {config.text_config.hidden_size}
    assert feature_shape(SIZES[2], [[8, 8], [16, 16], [16, 24]], 8, 2, 3) == (
        2,
        4,
    )  # more than 3 tiles


def test_features_take_the_places_of_their_tokens_and_nothing_else(clip_model):
    inputs, embeds = build_vision_inputs(clip_model.config, MIXED), []
    clip_model.model.encoder.text_model.register_forward_pre_hook(
        lambda _, args, kwargs: embeds.append(args[3]), with_kwargs=True
    )
    clip_model.get_encoder()(**inputs)
    embedded = clip_model.get_input_embeddings()(inputs["input_ids"])
    is_image = inputs["input_ids"] == IMAGE
    assert torch.equal(embeds[0][~is_image], embedded[~is_image])
    features = clip_model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    assert torch.equal(embeds[0][is_image], torch.cat(features))


def test_a_batch_equals_its_rows(model, target_ids):
    together = logits_of(model, target_ids)
    whole = build_vision_inputs(model.config, MIXED)
    tiles = whole["pixel_values"].split([5, 7, 2])
    for row, (images, sizes) in enumerate([((0,), [0]), ((), []), ((1, 2), [1, 2])]):
        alone = {name: whole[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        length = int(alone["attention_mask"].sum())
        alone = {name: value[:, :length] for name, value in alone.items()}
        if images:
            alone |= {"pixel_values": torch.cat([tiles[index] for index in images])}
            alone |= {"image_sizes": whole["image_sizes"][sizes]}
        logits = model(**alone, decoder_input_ids=target_ids[row : row + 1]).logits
        torch.testing.assert_close(together[row : row + 1], logits, rtol=1e-4, atol=1e-4)


def test_padding_on_either_side_gives_the_same(model, target_ids):
    left = logits_of(model, target_ids, padding_side="left")
    torch.testing.assert_close(left, logits_of(model, target_ids), rtol=1e-4, atol=1e-4)


def test_images_change_what_is_written_after_them(clip_model, target_ids):
    inputs = build_vision_inputs(clip_model.config, MIXED)
    before = clip_model(**inputs, decoder_input_ids=target_ids).logits
    inputs["pixel_values"] = inputs["pixel_values"] + 1
    after = clip_model(**inputs, decoder_input_ids=target_ids).logits
    assert torch.equal(before[1], after[1])  # no image
    assert not torch.allclose(before[0], after[0], atol=1e-2) and not torch.allclose(before[2], after[2], atol=1e-2)


def test_without_images_it_is_the_text_model(clip_model, target_ids, source):
    logits = clip_model(**source, decoder_input_ids=target_ids).logits
    text = clip_model.model.encoder.text_model(**source).last_hidden_state
    outputs = clip_model(
        encoder_outputs=(text,), attention_mask=source["attention_mask"], decoder_input_ids=target_ids
    )
    assert torch.equal(logits, outputs.logits)


def test_rows_of_features_end_in_a_newline_only_where_asked(target_ids):
    model = build_vision_model(build_vision_config(image_newline=False))
    assert model.model.encoder.image_newline is None
    assert num_image_tokens((8, 8), [[8, 8], [16, 16], [16, 24]], 8, 2, 3, False) == 8
    assert logits_of(model, target_ids).isfinite().all()


def test_a_grid_without_a_row_leaves_the_whole_image():
    model = build_vision_model(build_vision_config(image_grid_pinpoints=[[8, 24]]))
    (features,) = model.get_image_features(torch.randn(4, 3, 8, 8), torch.tensor([[2, 1000]])).pooler_output
    assert features.shape == (4, 32)


# As every model of the library


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_cached_decoding_equals_uncached(clip_model, target_ids, backend):
    clip_model.set_attn_implementation(backend)
    inputs = build_vision_inputs(clip_model.config, MIXED)
    expected = clip_model(**inputs, decoder_input_ids=target_ids).logits
    first = clip_model(**inputs, decoder_input_ids=target_ids[:, :3], use_cache=True)
    second = clip_model(
        attention_mask=inputs["attention_mask"],
        encoder_outputs=(first.encoder_last_hidden_state,),
        decoder_input_ids=target_ids[:, 3:],
        past_key_values=first.past_key_values,
    )
    torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), expected)


def test_eager_equals_sdpa_in_every_part(model, target_ids):
    logits = {}
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        assert model.model.encoder.vision_tower.config._attn_implementation == backend
        assert model.model.decoder.config._attn_implementation == backend
        logits[backend] = logits_of(model, target_ids)
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-4)


# What transformers 5.23 and torch 2.13 call on the way is deprecated in torch itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["flex_attention", {"text_config": "flex_attention", "vision_config": "sdpa"}], ids=str
)
def test_flex_attention_equals_eager_with_images(target_ids, backend):
    model = build_vision_model(build_vision_config(build_config(head_dim=16)))
    expected = logits_of(model, target_ids)
    model.set_attn_implementation(backend)
    assert model.model.decoder.config._attn_implementation == "flex_attention"
    with torch.no_grad():  # on a CPU torch has no gradient of it
        torch.testing.assert_close(logits_of(model, target_ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_images_are_encoded_once_per_generation(clip_model, settings):
    calls = {"tower": 0, "encoder": 0, "steps": 0}

    def count(module, name):
        module.register_forward_hook(lambda *_: calls.update({name: calls[name] + 1}))

    count(clip_model.model.encoder.vision_tower, "tower")
    count(clip_model.model.encoder, "encoder")
    count(clip_model.model.decoder, "steps")
    inputs = build_vision_inputs(clip_model.config, MIXED)
    clip_model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **settings)
    assert calls == {"tower": 1, "encoder": 1, "steps": 6}


def test_no_beam_carries_images_along(clip_model):
    given = []
    clip_model.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs), with_kwargs=True)
    clip_model.generate(**build_vision_inputs(clip_model.config, MIXED), max_new_tokens=3, num_beams=2)
    assert given and all(kwargs.get("pixel_values") is None for kwargs in given)


def test_greedy_search_equals_a_plain_loop(clip_model):
    inputs = build_vision_inputs(clip_model.config, MIXED)
    ids = torch.ones(3, 1, dtype=torch.long)
    for _ in range(5):
        ids = torch.cat((ids, clip_model(**inputs, decoder_input_ids=ids).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(clip_model.generate(**inputs, max_new_tokens=5, eos_token_id=None), ids)


def test_labels_are_shifted_once_and_train_every_part(clip_model, target_ids):
    clip_model.train()
    inputs = build_vision_inputs(clip_model.config, MIXED)
    labels = torch.cat((target_ids[:, 1:], torch.full((3, 1), 2)), dim=1)
    outputs = clip_model(**inputs, labels=labels)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(outputs.loss, expected)
    outputs.loss.backward()
    # What lies behind the layer that is read has no gradient, nor has a bias that shifts all scores alike.
    unread = ("vision_tower.encoder.layers.2.", "vision_tower.post_layernorm", "vision_tower.vision_model.encoder")
    for name, parameter in clip_model.named_parameters():
        if not any(part in name for part in unread) and "k_proj.bias" not in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@renamed_in_transformers
def test_gradient_checkpointing_changes_no_gradient(clip_model, target_ids):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(clip_model).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**build_vision_inputs(model.config, MIXED), labels=target_ids).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoModelForMultimodalLM])
def test_what_is_saved_loads_the_same(model, target_ids, auto_class, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = auto_class.from_pretrained(tmp_path, trust_remote_code=False).eval()
    assert type(loaded) is EncDecVLMForConditionalGeneration
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits_of(loaded, target_ids), logits_of(model, target_ids))
    assert loaded.generation_config.max_length == 64 and loaded.generation_config.decoder_start_token_id == 1


def test_the_body_saves_and_loads_by_itself(tmp_path):
    body = randomize(EncDecVLMModel(build_vision_config())).eval()
    body.save_pretrained(tmp_path)
    loaded = EncDecVLMModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in body.state_dict().items())


REMOTE = """
import sys
sys.modules["encdec_slm"] = None
import torch
from transformers import AutoModelForImageTextToText
inputs, expected = torch.load("case.pt", weights_only=True)
model = AutoModelForImageTextToText.from_pretrained("model", trust_remote_code=True).eval()
torch.testing.assert_close(model(**inputs).logits, expected)
model.save_pretrained("again")
"""


def test_a_folder_carries_its_code(clip_model, target_ids, tmp_path):
    inputs = {**build_vision_inputs(clip_model.config, MIXED), "decoder_input_ids": target_ids}
    with torch.no_grad():
        torch.save((inputs, clip_model(**inputs).logits), tmp_path / "case.pt")
    clip_model.save_pretrained(tmp_path / "model")
    run = subprocess.run([sys.executable, "-c", REMOTE], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "again" / "modeling_encdec_vlm.py").is_file()


@renamed_in_transformers
def test_adapters_fit_every_linear_part(clip_model, target_ids):
    targets = [".*(q_proj|v_proj)", ".*multi_modal_projector.linear_1"]
    adapted = get_peft_model(clip_model, LoraConfig(target_modules="|".join(targets), task_type="SEQ_2_SEQ_LM"))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for part in ("vision_tower", "multi_modal_projector", "text_model.layers", "decoder.layers"):
        assert any(part in name for name in names), part
    adapted(**build_vision_inputs(clip_model.config, MIXED), labels=target_ids).loss.backward()


def test_a_frozen_tower_learns_nothing(clip_model, target_ids):
    clip_model.model.encoder.vision_tower.requires_grad_(False)
    clip_model.train()(**build_vision_inputs(clip_model.config, MIXED), labels=target_ids).loss.backward()
    assert all(parameter.grad is None for parameter in clip_model.model.encoder.vision_tower.parameters())
    assert clip_model.model.encoder.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_embeddings_grow_with_the_vocabulary(clip_model, target_ids):
    before = logits_of(clip_model, target_ids)
    clip_model.resize_token_embeddings(101)
    assert clip_model.config.text_config.vocab_size == 101
    torch.testing.assert_close(logits_of(clip_model, target_ids)[..., :97], before)


def test_half_precision_sees_too(clip_model, target_ids):
    inputs = build_vision_inputs(clip_model.config, MIXED)
    assert clip_model.bfloat16()(**inputs, decoder_input_ids=target_ids).logits.isfinite().all()


# What does not fit


def test_images_and_their_tokens_must_be_as_many(clip_model, target_ids):
    inputs = build_vision_inputs(clip_model.config, MIXED)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 4] = 5
    counts = int((inputs["input_ids"] == IMAGE).sum())
    with pytest.raises(ValueError, match=rf"`input_ids` has {counts} .*3 images have {counts + 1}"):
        clip_model(**inputs, decoder_input_ids=target_ids)
    with pytest.raises(ValueError, match=rf"`input_ids` has {counts} .*0 images"):
        clip_model(inputs["input_ids"], inputs["attention_mask"], decoder_input_ids=target_ids)
    with pytest.raises(ValueError, match="0 images"):
        clip_model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2)
    inputs["input_ids"][0, 0] = 97
    with pytest.raises(ValueError, match=r"`input_ids` .*97.* 96"):
        clip_model(**inputs, decoder_input_ids=target_ids)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"pixel_values": lambda tiles: tiles[1:]}, "`pixel_values` has 13 tiles.* 14 "),
        ({"pixel_values": lambda tiles: tiles[..., :4]}, r"`pixel_values` has shape \(14, 3, 8, 4\)"),
        ({"image_sizes": lambda sizes: sizes * 0}, "`image_sizes`"),
        ({"image_sizes": lambda sizes: None}, "`image_sizes`"),
        ({"input_ids": lambda ids: None}, "`input_ids`"),
    ],
)
def test_tiles_and_sizes_must_fit(clip_model, target_ids, change, name):
    inputs = build_vision_inputs(clip_model.config, MIXED)
    ((argument, function),) = change.items()
    inputs[argument] = function(inputs[argument])
    with pytest.raises(ValueError, match=name):
        clip_model(**inputs, decoder_input_ids=target_ids)


def test_every_source_needs_a_target(clip_model, target_ids):
    with pytest.raises(ValueError, match="3 sources and 2 targets"):
        clip_model(**build_vision_inputs(clip_model.config, MIXED), decoder_input_ids=target_ids[:2])


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"image_grid_pinpoints": [[8, 12]]}, r"`image_grid_pinpoints`.*12.*\(8\)"),
        ({"image_grid_pinpoints": []}, "`image_grid_pinpoints`"),
        ({"image_token_id": 97}, r"`image_token_id` \(97\)"),
        ({"vision_feature_layer": 4}, "`vision_feature_layer` is 4.* 3 "),
        ({"max_num_tiles": 0}, "`max_num_tiles` is 0"),
        ({"vision_config": {**TINY_CLIP, "patch_size": 9}}, "`patch_size` 9"),
        ({"vision_config": {**TINY_CLIP, "num_channels": 1}}, "`num_channels` 1"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, names):
    with pytest.raises(StrictDataclassClassValidationError, match=names):
        build_vision_config(**{"vision_config": TINY_CLIP, **fields})


@pytest.mark.parametrize(
    ("vision_config", "names"),
    [
        ({"model_type": "no_tower"}, "'no_tower'"),
        ({"model_type": "resnet"}, "'resnet'.*`image_size`"),
        ({"model_type": "clip"}, "'clip'.*`vision_config`"),
        ({**TINY_CLIP, "image_size": [8, 16]}, r"`image_size` \[8, 16\]"),
        ({"model_type": "siglip2_vision_model"}, "'siglip2_vision_model'.*`image_size`"),
    ],
)
def test_towers_that_do_not_read_square_tiles_are_refused(vision_config, names):
    # `@strict` wraps what is found while fields are checked.
    for pinpoints in ([[8, 8]], None):
        with pytest.raises((ValueError, StrictDataclassClassValidationError), match=names):
            build_vision_config(vision_config=vision_config, image_grid_pinpoints=pinpoints)


def test_a_text_config_of_another_family_is_refused():
    with pytest.raises(ValueError, match=r"`text_config`.*'llama'"):
        EncDecVLMConfig(text_config={"model_type": "llama"})


def test_towers_without_a_class_token_keep_all_features():
    assert build_vision_config(vision_config=TINY_SIGLIP).vision_feature_select_strategy == "full"
    assert build_vision_config().vision_feature_select_strategy == "default"
    assert build_vision_config(vision_config=SiglipVisionConfig(**TINY_SIGLIP).to_dict()).patches_per_side == 2


@pytest.mark.parametrize(
    "tower",
    [
        {"model_type": "dinov2"},
        {"model_type": "dinov2_with_registers"},
        {"model_type": "vit"},
        {"model_type": "deit"},
        {"model_type": "internvl_vision", "image_size": [8, 8], "patch_size": [4, 4]},
        # As SigLIP's most used size, of 384 and 14: pixels are left over.
        {"model_type": "siglip_vision_model", "image_size": 11},
    ],
    ids=lambda tower: tower["model_type"],
)
def test_other_towers_see_as_clip_does(target_ids, tower, tmp_path):
    tile = 11 if tower.get("image_size") == 11 else 8
    fields = {"vision_config": {**TINY_CLIP, **tower}, "image_grid_pinpoints": [[tile, tile], [2 * tile, 2 * tile]]}
    model = build_vision_model(build_vision_config(**fields))
    logits = logits_of(model, target_ids)
    assert not torch.allclose(logits, logits_of(model, target_ids, seed=1))
    model.save_pretrained(tmp_path)
    loaded = EncDecVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(loaded, target_ids), logits)


def test_a_tower_that_has_no_feature_for_each_patch_is_refused(target_ids):
    model = build_vision_model(build_vision_config(vision_feature_select_strategy="full"))
    with pytest.raises(ValueError, match=r"\(14, 5, 16\).* 4 .* 14"):
        logits_of(model, target_ids)
