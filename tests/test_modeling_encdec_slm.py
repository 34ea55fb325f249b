# SPDX-License-Identifier: Apache-2.0
import copy
import inspect

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3DecoderLayer, Qwen3RotaryEmbedding

from conftest import build_config, build_model, randomize
from encdec_slm import EncDecSLMEncoderModel, EncDecSLMForConditionalGeneration, EncDecSLMModel
from encdec_slm.modeling_encdec_slm import EncDecSLMEncoderLayer, EncDecSLMRMSNorm, EncDecSLMRotaryEmbedding


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tiny_model):
    tiny_model.set_attn_implementation(request.param)
    return tiny_model


def caches(model, kind, source_length):
    if kind == "dynamic":
        return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    return EncoderDecoderCache(
        StaticCache(config=model.config, max_cache_len=16),
        StaticCache(config=model.config, max_cache_len=source_length),
    )


# Forward


def test_building_a_model_leaves_its_config_unchanged(tiny_config):
    before = tiny_config.to_dict()
    EncDecSLMForConditionalGeneration(tiny_config)
    assert tiny_config.to_dict() == before


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[1] * 6, [2, 4]], ids=str)
def test_cached_decoding_equals_uncached(model, source, target_ids, kind, chunks):
    expected = model(**source, decoder_input_ids=target_ids).logits
    past_key_values = caches(model, kind, source["input_ids"].shape[1])
    given = {"attention_mask": source["attention_mask"], "encoder_outputs": model.get_encoder()(**source)}
    logits = [
        model(**given, decoder_input_ids=ids, past_key_values=past_key_values).logits
        for ids in target_ids.split(chunks, dim=1)
    ]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected)


def test_layers_without_rotation_decode_with_a_cache(source, target_ids):
    model = build_model(encoder_no_rope_layers=[0, 1], decoder_no_rope_layers=[1, 0])
    expected = model(**source, decoder_input_ids=target_ids).logits
    first = model(**source, decoder_input_ids=target_ids[:, :3], use_cache=True)
    second = model(
        attention_mask=source["attention_mask"],
        encoder_outputs=(first.encoder_last_hidden_state,),
        decoder_input_ids=target_ids[:, 3:],
        past_key_values=first.past_key_values,
    )
    torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), expected)
    assert not torch.allclose(build_model()(**source, decoder_input_ids=target_ids).logits, expected, atol=1e-2)


def test_a_layer_without_rotation_ignores_the_order_of_its_source(source):
    model = build_model(encoder_num_hidden_layers=1, encoder_no_rope_layers=[0])
    ids = source["input_ids"][:1]
    forwards, backwards = (model.get_encoder()(ids).last_hidden_state for ids in (ids, ids.flip(1)))
    torch.testing.assert_close(forwards, backwards.flip(1))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_the_source_changes_no_logit(model, source, target_ids, side):
    row = source["input_ids"][1:2, :5]
    expected = model(row, decoder_input_ids=target_ids[:1]).logits
    padding = (4, 0) if side == "left" else (0, 4)
    padded = torch.nn.functional.pad(row, padding)
    mask = torch.nn.functional.pad(torch.ones_like(row), padding)
    torch.testing.assert_close(
        model(padded, attention_mask=mask, decoder_input_ids=target_ids[:1]).logits, expected, rtol=1e-4, atol=1e-5
    )


def test_a_masked_target_token_changes_no_later_logit(model, source, target_ids):
    mask = torch.ones_like(target_ids)
    mask[:, 2] = 0
    changed = target_ids.clone()
    changed[:, 2] = 50
    first = model(**source, decoder_input_ids=target_ids, decoder_attention_mask=mask).logits
    second = model(**source, decoder_input_ids=changed, decoder_attention_mask=mask).logits
    torch.testing.assert_close(first[:, 3:], second[:, 3:])
    unmasked = model(**source, decoder_input_ids=changed).logits
    assert not torch.allclose(first[:, 3:], unmasked[:, 3:])


def test_a_batch_equals_its_rows(model, source, target_ids):
    together = model(**source, decoder_input_ids=target_ids).logits
    for row in range(3):
        alone = model(
            **{name: value[row : row + 1] for name, value in source.items()},
            decoder_input_ids=target_ids[row : row + 1],
        ).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_no_target_token_sees_a_later_one(model, source, target_ids):
    changed = target_ids.clone()
    changed[:, 4:] = 33
    first = model(**source, decoder_input_ids=target_ids).logits
    second = model(**source, decoder_input_ids=changed).logits
    torch.testing.assert_close(first[:, :4], second[:, :4])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_eager_equals_sdpa(source, target_ids, qk_norm):
    model = build_model(qk_norm=qk_norm)
    logits = {}
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        logits[backend] = model(**source, decoder_input_ids=target_ids).logits
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=1e-4, atol=1e-5)


# What transformers 5.23 and torch 2.13 call on the way is deprecated in torch itself.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
def test_flex_attention_equals_eager(source, target_ids):
    model = build_model(head_dim=16)
    expected = model(**source, decoder_input_ids=target_ids).logits
    model.set_attn_implementation("flex_attention")
    with torch.no_grad():
        actual = model(**source, decoder_input_ids=target_ids).logits
        source["attention_mask"][1] = 0
        assert model(**source, decoder_input_ids=target_ids).logits.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_source_of_only_padding_gives_finite_logits_and_gradients(model, source, target_ids):
    source["attention_mask"][1] = 0
    outputs = model(**source, labels=target_ids)
    outputs.loss.backward()
    assert outputs.logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_embeddings_in_place_of_ids_give_the_same_logits(tiny_model, source, target_ids):
    embed = tiny_model.get_input_embeddings()
    expected = tiny_model(**source, decoder_input_ids=target_ids).logits
    actual = tiny_model(
        inputs_embeds=embed(source["input_ids"]),
        attention_mask=source["attention_mask"],
        decoder_inputs_embeds=embed(target_ids),
    ).logits
    torch.testing.assert_close(actual, expected)


def test_logits_to_keep_scores_only_the_last_positions(tiny_model, source, target_ids):
    expected = tiny_model(**source, decoder_input_ids=target_ids).logits
    actual = tiny_model(**source, decoder_input_ids=target_ids, logits_to_keep=2).logits
    torch.testing.assert_close(actual, expected[:, -2:])
    loss = tiny_model(**source, decoder_input_ids=target_ids, labels=target_ids, logits_to_keep=2).loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(expected[:, -2:].mT, target_ids[:, -2:]))


def test_attentions_and_hidden_states_are_recorded(tiny_model, source, target_ids):
    tiny_model.set_attn_implementation("eager")
    outputs = tiny_model(**source, decoder_input_ids=target_ids, output_attentions=True, output_hidden_states=True)
    assert [attention.shape for attention in outputs.encoder_attentions] == [(3, 4, 9, 9)] * 2
    assert [attention.shape for attention in outputs.decoder_attentions] == [(3, 4, 6, 6)] * 2
    assert [attention.shape for attention in outputs.cross_attentions] == [(3, 4, 6, 9)] * 2
    assert len(outputs.encoder_hidden_states) == len(outputs.decoder_hidden_states) == 3
    torch.testing.assert_close(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)


def test_the_encoder_model_reads_what_the_whole_model_reads(tiny_model, source, target_ids):
    encoder = EncDecSLMEncoderModel(tiny_model.config).eval()
    encoder.load_state_dict(tiny_model.model.state_dict(), strict=False)
    expected = tiny_model(**source, decoder_input_ids=target_ids).encoder_last_hidden_state
    torch.testing.assert_close(encoder(**source).last_hidden_state, expected)


def test_one_embedding_module_serves_the_whole_model(tiny_model):
    embeddings = [module for module in tiny_model.modules() if isinstance(module, torch.nn.Embedding)]
    assert embeddings == [tiny_model.get_input_embeddings()]
    assert tiny_model.lm_head.weight is embeddings[0].weight


@pytest.mark.parametrize("gated_mlp", [False, True])
def test_every_entry_of_the_tensor_parallel_plan_names_a_module(gated_mlp):
    model = build_model(gated_mlp=gated_mlp)
    names = {name.replace(".0.", ".*.") for name, _ in model.named_modules()}
    assert set(model.tp_plan) <= names
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.replace(".0.", ".*.").replace(".1.", ".*.") for name in linear} <= set(model.tp_plan)


def test_the_pipeline_plan_names_modules_and_arguments_of_their_layers(model):
    assert model.supports_pp_plan
    for name, (inputs, _) in model.pp_plan.items():
        module = model.get_submodule(name)
        if isinstance(module, torch.nn.ModuleList):
            assert set(inputs) <= set(inspect.signature(module[0].forward).parameters)
    stacks = {f"model.{stack}.{part}" for stack in ("encoder", "decoder") for part in ("layers", "norm")}
    assert stacks | {"model.encoder.embed_tokens", "lm_head"} == set(model.pp_plan)


# Parity with transformers' own modules


def test_rms_norm_equals_llamas_in_half_precision():
    hidden_states = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours, theirs = EncDecSLMRMSNorm(32, 1e-6).bfloat16(), LlamaRMSNorm(32, 1e-6).bfloat16()
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(0.1, 2, 32))
        theirs.weight.copy_(ours.weight)
    assert torch.equal(ours(hidden_states), theirs(hidden_states))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_an_encoder_layer_equals_qwen3s_without_a_causal_mask(backend):
    config = build_config(qk_norm=True)
    config._attn_implementation = backend
    theirs_config = Qwen3Config(
        hidden_size=32,
        intermediate_size=56,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_hidden_layers=1,
        attn_implementation=backend,
    )
    ours = randomize(EncDecSLMEncoderLayer(config, 0))
    theirs = Qwen3DecoderLayer(theirs_config, 0)
    theirs.load_state_dict(ours.state_dict())
    theirs.self_attn.is_causal = False
    hidden_states = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(7)[None]
    expected = theirs(hidden_states, position_embeddings=Qwen3RotaryEmbedding(theirs_config)(hidden_states, positions))
    actual = ours(hidden_states, None, EncDecSLMRotaryEmbedding(config)(hidden_states, positions))
    torch.testing.assert_close(actual, expected)


def test_a_cast_after_a_long_call_scales_the_next_long_one_again():
    rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    rotary = EncDecSLMRotaryEmbedding(build_config(rope_parameters=rope_parameters, max_position_embeddings=8))
    positions = torch.arange(20)[None]
    expected = rotary(torch.zeros(1), positions)
    torch.testing.assert_close(rotary.double()(torch.zeros(1), positions), expected)


def test_casting_the_model_keeps_rotary_frequencies_in_single_precision(tiny_model):
    rotary = tiny_model.get_decoder().rotary_emb
    positions = torch.arange(2000)[None]
    expected = rotary(torch.zeros(1), positions)[0]
    tiny_model.to(torch.bfloat16)
    torch.testing.assert_close(rotary(torch.zeros(1), positions)[0], expected, rtol=0, atol=0)
    assert tiny_model.get_encoder().norm.weight.dtype == torch.bfloat16


# Bad input


def test_ids_outside_of_the_vocabulary_are_named(tiny_model, source, target_ids):
    with pytest.raises(ValueError, match=r"`input_ids` .*97.* 96"):
        tiny_model(torch.tensor([[1, 97]]), decoder_input_ids=target_ids[:1])
    with pytest.raises(ValueError, match=r"`decoder_input_ids` .*-100"):
        tiny_model(**source, decoder_input_ids=target_ids.masked_fill(target_ids == 1, -100))
    labels = target_ids.clone().index_fill_(1, torch.tensor([2]), 120)
    with pytest.raises(ValueError, match=r"`labels` .*120"):
        tiny_model(**source, labels=labels, decoder_input_ids=target_ids)
    with pytest.raises(ValueError, match=r"`input_ids` .*400"):
        tiny_model.generate(torch.tensor([[1, 400]]))


@pytest.mark.parametrize("name", ["input_ids", "decoder_input_ids"])
def test_an_empty_argument_is_named(tiny_model, target_ids, name):
    arguments = {"input_ids": target_ids, "decoder_input_ids": target_ids, name: target_ids[:, :0]}
    with pytest.raises(ValueError, match=rf"`{name}` has shape \(3, 0\), but at least one token"):
        tiny_model(**arguments)


def test_labels_of_another_length_than_the_decoder_input_are_refused(tiny_model, source, target_ids):
    with pytest.raises(ValueError, match=r"`labels` .*\(3, 5\), `decoder_input_ids` \(3, 6\)"):
        tiny_model(**source, decoder_input_ids=target_ids, labels=target_ids[:, 1:])


@pytest.mark.parametrize("name", ["pad_token_id", "decoder_start_token_id"])
def test_a_missing_token_of_the_config_is_named_only_where_it_is_needed(source, target_ids, name):
    model = build_model(**{name: None})
    labels = target_ids.clone()
    shifted = build_model().prepare_decoder_input_ids_from_labels(labels)
    if name == "pad_token_id":
        assert torch.equal(model.prepare_decoder_input_ids_from_labels(labels), shifted)
        labels[:, -1] = -100  # the last label is not part of the decoder's input
        assert model(**source, labels=labels).loss.isfinite()
    labels[:, 2] = -100
    with pytest.raises(ValueError, match=name):
        model(**source, labels=labels)
    assert model(**source, labels=labels, decoder_input_ids=shifted).loss.isfinite()
    assert model.generate(**source, max_new_tokens=2).shape[0] == 3


def test_a_missing_source_or_target_is_named(tiny_model, source, target_ids):
    with pytest.raises(ValueError, match=r"`input_ids`.* neither"):
        tiny_model(decoder_input_ids=target_ids)
    with pytest.raises(ValueError, match=r"`decoder_input_ids`.* neither"):
        tiny_model(**source)
    with pytest.raises(ValueError, match=r"`inputs_embeds`.* both"):
        tiny_model(**source, inputs_embeds=torch.zeros(3, 9, 32), decoder_input_ids=target_ids)


def test_a_stack_is_not_saved_by_itself(tiny_model, tmp_path):
    with pytest.raises(TypeError, match=r"EncDecSLMEncoder is a part.*EncDecSLMEncoderModel"):
        tiny_model.get_encoder().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_for_decoder_only_models_is_refused(tiny_model, source, target_ids):
    with pytest.raises(TypeError, match=r"DynamicCache.*EncoderDecoderCache"):
        tiny_model(**source, decoder_input_ids=target_ids, past_key_values=DynamicCache())


def test_a_copied_model_is_independent(tiny_model, source, target_ids):
    clone = copy.deepcopy(tiny_model)
    expected = tiny_model(**source, decoder_input_ids=target_ids).logits
    torch.nn.init.zeros_(clone.lm_head.weight)
    torch.testing.assert_close(tiny_model(**source, decoder_input_ids=target_ids).logits, expected)


def test_the_base_model_has_no_head(tiny_config, source, target_ids):
    outputs = EncDecSLMModel(tiny_config).eval()(**source, decoder_input_ids=target_ids)
    assert outputs.last_hidden_state.shape == (3, 6, 32)
