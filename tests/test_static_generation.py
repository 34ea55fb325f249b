# SPDX-License-Identifier: Apache-2.0
"""`generate` with caches of fixed sizes: it writes what growing ones write, and compiles a step for few shapes."""

import pytest
import torch
from test_modeling_encdec_vlm import build, make_config, make_inputs
from transformers import CompileConfig
from transformers.modeling_outputs import BaseModelOutput

from conftest import randomised
from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration


# Below, at and above a bucket's length, and far into the third bucket.
LENGTHS = [1, 63, 64, 65, 200]


def padded_source(length, padding_side="right"):
    """Three rows of `length`, of half of it and of all but one token."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, 97, (3, length), generator=generator)
    lengths = torch.tensor([length, (length + 1) // 2, max(1, length - 1)])[:, None]
    mask = torch.arange(length) < lengths
    if padding_side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def both(model, seed=None, **kwargs):
    """What is generated with growing caches, and with static ones."""
    texts = []
    for cache_implementation in ("dynamic", "static"):
        if seed is not None:
            torch.manual_seed(seed)
        texts.append(model.generate(**kwargs, max_new_tokens=8, cache_implementation=cache_implementation))
    return texts


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_static_caches_write_what_growing_ones_do_at_every_length(tiny_model, padding_side, backend):
    tiny_model.set_attn_implementation(backend)
    for length in LENGTHS:
        dynamic, static = both(tiny_model, **padded_source(length, padding_side))
        assert torch.equal(static, dynamic), length


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
        {"do_sample": True, "num_return_sequences": 2, "seed": 0},
        {"do_sample": True, "num_beams": 2, "seed": 1},
        {"encoder_repetition_penalty": 3.0, "encoder_no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_static_caches_write_what_growing_ones_do_in_every_search(tiny_model, settings):
    dynamic, static = both(tiny_model, **padded_source(66), **settings)
    assert torch.equal(static, dynamic)


def test_a_source_may_come_without_a_mask_embedded_or_encoded(tiny_model):
    source = padded_source(40)
    encoder_outputs = tiny_model.get_encoder()(**source)
    mask = {"attention_mask": source["attention_mask"]}
    forms = {
        "without a mask": {"input_ids": source["input_ids"][:1]},
        "embedded": {"inputs_embeds": tiny_model.get_input_embeddings()(source["input_ids"]), **mask},
        "encoded": {"encoder_outputs": encoder_outputs, **mask},
        "encoded, unmasked": {"encoder_outputs": BaseModelOutput(encoder_outputs.last_hidden_state[:1])},
        "a mask of truth values": {**source, "attention_mask": source["attention_mask"].bool()},
    }
    for name, inputs in forms.items():
        dynamic, static = both(tiny_model, **inputs)
        assert torch.equal(static, dynamic), name


def test_what_the_caller_gives_is_not_padded_in_place(tiny_model):
    source = padded_source(40)
    encoder_outputs = tiny_model.get_encoder()(**source)
    hidden_states, mask = encoder_outputs.last_hidden_state.clone(), source["attention_mask"].clone()
    both(tiny_model, encoder_outputs=encoder_outputs, attention_mask=source["attention_mask"])
    assert torch.equal(encoder_outputs.last_hidden_state, hidden_states)
    assert torch.equal(source["attention_mask"], mask)


def test_images_are_read_through_static_caches_too(tiny_config):
    model = build(make_config(tiny_config))
    inputs = make_inputs(model.config, [[(11, 16)], [], [(160, 240), (8, 8)]])
    for settings in ({}, {"num_beams": 2}):
        dynamic, static = both(model, **inputs, **settings)
        assert torch.equal(static, dynamic)


def test_attention_to_the_filling_of_a_bucket_is_zero(tiny_model):
    tiny_model.set_attn_implementation("eager")
    options = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    dynamic, static = both(tiny_model, **padded_source(9), **options)
    assert dynamic.cross_attentions[0][0].shape == (3, 4, 1, 9)
    for expected, actual in zip(dynamic.cross_attentions, static.cross_attentions, strict=True):
        for one, other in zip(expected, actual, strict=True):
            assert other.shape == (3, 4, 1, 64)
            torch.testing.assert_close(other[..., :9], one, rtol=1e-4, atol=1e-5)
            assert not other[..., 9:].any()
    # The encoder reads the source as it is.
    for name in ("encoder_attentions", "encoder_hidden_states"):
        for one, other in zip(dynamic[name], static[name], strict=True):
            torch.testing.assert_close(other, one)


# Compiled steps


@pytest.fixture
def shallow_model(tiny_config):
    """One layer per stack: fewer to trace."""
    layers = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    return randomised(EncDecSLMForConditionalGeneration(EncDecSLMConfig(**{**tiny_config.to_dict(), **layers}))).eval()


@pytest.fixture
def counting():
    """A `CompileConfig` that also compiles on the CPU, into one graph, and a list that grows with each graph."""
    torch._dynamo.reset()  # graphs of other models count towards one limit
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_config = CompileConfig(fullgraph=True, dynamic=False, mode=None, backend=backend)
    compile_config._compile_all_devices = True
    yield compile_config, graphs
    torch._dynamo.reset()


def compiled_equals_dynamic(model, compile_config, inputs, **options):
    options = {"max_new_tokens": 5, "eos_token_id": None, **options}
    expected = model.generate(**inputs, **options)
    static = {"cache_implementation": "static", "compile_config": compile_config}
    return torch.equal(model.generate(**inputs, **options, **static), expected)


def test_a_step_is_compiled_once_per_bucket_of_source_lengths(shallow_model, counting):
    compile_config, graphs = counting
    for length, num_graphs in {5: 1, 64: 1, 65: 2, 128: 2, 30: 2}.items():
        assert compiled_equals_dynamic(shallow_model, compile_config, padded_source(length)), length
        assert len(graphs) == num_graphs, length
    # Nor does another form of the source, another number of new tokens or another way to choose them.
    source = padded_source(20, "left")
    unmasked = {"input_ids": padded_source(33)["input_ids"].clamp(min=3)}
    assert compiled_equals_dynamic(shallow_model, compile_config, unmasked, max_new_tokens=40)
    encoded = {"encoder_outputs": shallow_model.get_encoder()(**source), "attention_mask": source["attention_mask"]}
    assert compiled_equals_dynamic(shallow_model, compile_config, encoded, do_sample=True, top_k=1)
    assert len(graphs) == 2


def test_images_of_any_number_compile_nothing_more(shallow_model, counting):
    compile_config, graphs = counting
    model = build(make_config(shallow_model.config))
    for sizes in ([(8, 8)], [(11, 16)], [(8, 8), (8, 8)]):
        inputs = make_inputs(model.config, [sizes])
        assert inputs["input_ids"].shape[1] <= 64
        assert compiled_equals_dynamic(model, compile_config, inputs)
    assert len(graphs) == 1


@pytest.mark.slow
def test_generation_compiles_to_machine_code(tiny_model):
    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True
    for length in LENGTHS:
        assert compiled_equals_dynamic(tiny_model, compile_config, padded_source(length), num_beams=1), length
    assert compiled_equals_dynamic(tiny_model, compile_config, padded_source(64), num_beams=2)
    torch._dynamo.reset()
