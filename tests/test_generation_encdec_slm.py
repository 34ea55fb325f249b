# SPDX-License-Identifier: Apache-2.0
"""`generate`: searches, caches of both kinds, options, lengths, and where a row ends."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    CompileConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput

from conftest import (
    build_config,
    build_model,
    build_source,
    build_tokenizer,
    build_vision_config,
    build_vision_inputs,
    build_vision_model,
)
from encdec_slm import EncDecSLMForConditionalGeneration, EncDecSLMModel, Text2TextGenerationPipeline
from encdec_slm.generation_encdec_slm import generated_lengths


# Below, at and above a bucket's length, and far into the third bucket.
LENGTHS = [1, 63, 64, 65, 200]
BEAMS = {"num_beams": 3, "max_length": 10}


@pytest.fixture(params=["eager", "sdpa"])
def model(request, tiny_model):
    tiny_model.set_attn_implementation(request.param)
    return tiny_model


# Searches


def greedy(model, input_ids, attention_mask, length):
    """Greedy decoding without a cache; rows that ended are padded."""
    ids = torch.full((len(input_ids), 1), model.config.decoder_start_token_id)
    ended = torch.zeros(len(input_ids), dtype=torch.bool)
    while ids.shape[1] < length and not ended.all():
        logits = model(input_ids, attention_mask=attention_mask, decoder_input_ids=ids, use_cache=False).logits
        following = logits[:, -1].argmax(-1).masked_fill(ended, model.config.pad_token_id)
        ended |= following == model.config.eos_token_id
        ids = torch.cat((ids, following[:, None]), dim=1)
    return ids


@pytest.mark.parametrize("cache_implementation", [None, "static"])
def test_greedy_search_equals_a_plain_loop(model, source, cache_implementation):
    expected = greedy(model, **source, length=12)
    actual = model.generate(**source, max_length=12, cache_implementation=cache_implementation)
    assert torch.equal(actual, expected)


def beam_search(model, input_ids, num_beams, num_new_tokens):
    """The best sequence of a beam search over one row, without an end token."""
    beams = [(0.0, [model.config.decoder_start_token_id])]
    for _ in range(num_new_tokens):
        candidates = []
        for score, ids in beams:
            logits = model(input_ids, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            log_probabilities = logits.log_softmax(-1)
            candidates += [(score + value.item(), [*ids, token]) for token, value in enumerate(log_probabilities)]
        beams = sorted(candidates, reverse=True)[:num_beams]
    return beams[0][1]


def test_beam_search_equals_a_plain_one(model, source):
    model.generation_config.eos_token_id = None
    row = source["input_ids"][:1]
    with torch.no_grad():
        expected = beam_search(model, row, num_beams=3, num_new_tokens=5)
    actual = model.generate(row, num_beams=3, max_new_tokens=5, length_penalty=0.0)
    assert actual[0].tolist() == expected
    assert actual[0].tolist() != model.generate(row, max_new_tokens=5)[0].tolist()


@pytest.mark.parametrize("settings", [{"max_length": 12}, BEAMS], ids=str)
def test_a_batch_generates_what_its_rows_do(model, source, settings):
    together = model.generate(**source, **settings)
    lengths = source["attention_mask"].sum(1).tolist()
    for row, length in enumerate(lengths):
        alone = model.generate(source["input_ids"][row : row + 1, :length], **settings)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])
    rolled = [torch.roll(ids, 9 - length) for ids, length in zip(source["input_ids"], lengths, strict=True)]
    left = {"input_ids": torch.stack(rolled), "attention_mask": source["attention_mask"].flip(1)}
    assert torch.equal(model.generate(**left, **settings), together)


def test_sampling_returns_several_sequences_per_row(tiny_model, source):
    torch.manual_seed(0)
    ids = tiny_model.generate(**source, do_sample=True, num_return_sequences=4, max_length=8)
    assert len(ids) == 12
    assert len({tuple(row.tolist()) for row in ids[:4]}) > 1


@pytest.mark.parametrize("settings", [{}, {"no_repeat_ngram_size": 1}, {"do_sample": True, "top_k": 1}], ids=str)
def test_prompt_lookup_generates_what_greedy_search_does(tiny_model, source, settings):
    embed = tiny_model.get_input_embeddings()
    for row in range(3):
        inputs = {name: value[row : row + 1] for name, value in source.items()}
        expected = tiny_model.generate(**inputs, max_length=20, **settings)
        for num_tokens in (1, 3, 10):
            lookup = {"max_length": 20, "prompt_lookup_num_tokens": num_tokens, **settings}
            assert torch.equal(tiny_model.generate(**inputs, **lookup), expected)
            embedded = {"inputs_embeds": embed(inputs["input_ids"]), "attention_mask": inputs["attention_mask"]}
            assert torch.equal(tiny_model.generate(**embedded, **lookup), expected)


def test_prompt_lookup_finds_its_candidates_in_the_source(tiny_model, source):
    row = source["input_ids"][:1]
    # Without repetitions, so that nothing is found in the generated tokens.
    settings = {"max_new_tokens": 20, "eos_token_id": None, "no_repeat_ngram_size": 1}
    expected = tiny_model.generate(row, **settings)
    encoder_outputs = tiny_model.get_encoder()(row)
    steps = []
    tiny_model.get_decoder().register_forward_hook(lambda *_: steps.append(1))
    for found_in, num_steps in ((expected, 4), (torch.full_like(expected, 2), 20)):
        steps.clear()
        actual = tiny_model.generate(found_in, encoder_outputs=encoder_outputs, prompt_lookup_num_tokens=4, **settings)
        assert torch.equal(actual, expected)
        assert len(steps) == num_steps


def test_an_assistant_changes_nothing_in_greedy_search(tiny_model, source):
    row = source["input_ids"][:1]
    expected = tiny_model.generate(row, max_length=20)
    assert torch.equal(tiny_model.generate(row, max_length=20, assistant_model=build_model(seed=5)), expected)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_source_is_encoded_once(tiny_model, source, num_beams):
    calls = {"encoder": 0, "cross_keys": 0, "decoder": 0}

    def count(module, name):
        module.register_forward_hook(lambda *_: calls.__setitem__(name, calls[name] + 1))

    settings = {"min_new_tokens": 8, "max_new_tokens": 8, "num_beams": num_beams}
    count(tiny_model.get_encoder(), "encoder")
    count(tiny_model.get_decoder(), "decoder")
    count(tiny_model.get_decoder().layers[0].cross_attn.k_proj, "cross_keys")
    expected = tiny_model.generate(**source, **settings)
    assert calls == {"encoder": 1, "cross_keys": 1, "decoder": 8}
    encoded = {
        "encoder_outputs": tiny_model.get_encoder()(**source),
        "attention_mask": source["attention_mask"],
    }
    calls["encoder"] = 0
    assert torch.equal(tiny_model.generate(**encoded, **settings), expected)
    assert calls["encoder"] == 0


# Static caches


def padded_source(length, padding_side="right"):
    """Three rows of `length`, of half of it and of all but one token."""
    lengths = (length, (length + 1) // 2, max(1, length - 1))
    return build_source(*lengths, padding_side=padding_side, seed=length)


def generate_twice(model, seed=None, **kwargs):
    """Generate with growing caches, and with static ones."""
    results = []
    for cache_implementation in ("dynamic", "static"):
        if seed is not None:
            torch.manual_seed(seed)
        results.append(model.generate(**kwargs, max_new_tokens=8, cache_implementation=cache_implementation))
    return results


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_static_caches_change_nothing_at_any_length(model, padding_side):
    for length in LENGTHS:
        dynamic, static = generate_twice(model, **padded_source(length, padding_side))
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
def test_static_caches_change_nothing_in_any_search(tiny_model, settings):
    dynamic, static = generate_twice(tiny_model, **padded_source(66), **settings)
    assert torch.equal(static, dynamic)


def test_static_caches_accept_a_source_in_every_form_and_leave_it_unchanged(tiny_model):
    source = padded_source(40)
    encoder_outputs = tiny_model.get_encoder()(**source)
    states = encoder_outputs.last_hidden_state.clone()
    mask = {"attention_mask": source["attention_mask"]}
    forms = {
        "without a mask": {"input_ids": source["input_ids"][:1]},
        "embedded": {"inputs_embeds": tiny_model.get_input_embeddings()(source["input_ids"]), **mask},
        "encoded": {"encoder_outputs": encoder_outputs, **mask},
        "encoded, without a mask": {"encoder_outputs": BaseModelOutput(encoder_outputs.last_hidden_state[:1])},
        "a mask of booleans": {**source, "attention_mask": source["attention_mask"].bool()},
    }
    for name, inputs in forms.items():
        dynamic, static = generate_twice(tiny_model, **inputs)
        assert torch.equal(static, dynamic), name
    assert torch.equal(encoder_outputs.last_hidden_state, states)
    assert torch.equal(mask["attention_mask"], padded_source(40)["attention_mask"])


def test_static_caches_serve_images(tiny_vision_model):
    inputs = build_vision_inputs(tiny_vision_model.config, [[(11, 16)], [], [(160, 240), (8, 8)]])
    for settings in ({}, {"num_beams": 2}):
        dynamic, static = generate_twice(tiny_vision_model, **inputs, **settings)
        assert torch.equal(static, dynamic)


def test_attention_to_the_padding_of_a_bucket_is_zero(tiny_model):
    tiny_model.set_attn_implementation("eager")
    options = {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True}
    dynamic, static = generate_twice(tiny_model, **padded_source(9), **options)
    assert dynamic.cross_attentions[0][0].shape == (3, 4, 1, 9)
    for expected, actual in zip(dynamic.cross_attentions, static.cross_attentions, strict=True):
        for one, other in zip(expected, actual, strict=True):
            assert other.shape == (3, 4, 1, 64)
            torch.testing.assert_close(other[..., :9], one, rtol=1e-4, atol=1e-5)
            assert not other[..., 9:].any()
    # The encoder reads the source without padding.
    for name in ("encoder_attentions", "encoder_hidden_states"):
        torch.testing.assert_close(static[name], dynamic[name])


@pytest.fixture
def counting():
    """A `CompileConfig` that also compiles on the CPU, into one graph, and a list that grows with each graph."""
    torch._dynamo.reset()  # graphs of other models count towards the same limit
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


ONE_LAYER = {"encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1}


def test_a_step_is_compiled_once_per_bucket_of_source_lengths(counting):
    compile_config, graphs = counting
    model = build_model(**ONE_LAYER)
    for length, num_graphs in {5: 1, 64: 1, 65: 2, 30: 2}.items():
        assert compiled_equals_dynamic(model, compile_config, padded_source(length)), length
        assert len(graphs) == num_graphs, length
    # Nor does another form of the source, another number of new tokens or another way to choose them compile again.
    source = padded_source(20, "left")
    unmasked = {"input_ids": padded_source(33)["input_ids"].clamp(min=3)}
    assert compiled_equals_dynamic(model, compile_config, unmasked, max_new_tokens=40)
    encoded = {"encoder_outputs": model.get_encoder()(**source), "attention_mask": source["attention_mask"]}
    assert compiled_equals_dynamic(model, compile_config, encoded, do_sample=True, top_k=1)
    assert len(graphs) == 2


def test_images_of_any_number_share_one_compiled_step(counting):
    compile_config, graphs = counting
    model = build_vision_model(build_vision_config(build_config(**ONE_LAYER)))
    for sizes in ([(8, 8)], [(11, 16)], [(8, 8), (8, 8)]):
        inputs = build_vision_inputs(model.config, [sizes])
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


# Options


def decoder_only_model():
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("assistant_early_exit", {"assistant_early_exit": 1}),
        ("assistant_early_exit", {"assistant_early_exit": 1, "num_beams": 2}),
        ("guidance_scale", {"guidance_scale": 2.0}),
        ("token_healing", {"token_healing": True, "tokenizer": build_tokenizer()}),
        ("quantized", {"cache_implementation": "quantized"}),
        ("paged", {"cache_implementation": "paged"}),
        ("assistant_model", {"assistant_model": decoder_only_model()}),
    ],
    ids=str,
)
def test_options_for_decoder_only_models_are_refused_and_change_nothing(tiny_model, rows, name, options):
    inputs = {key: value[:rows] for key, value in build_source(9, 5, 7).items()}
    expected = tiny_model.generate(**inputs, max_new_tokens=4)
    before = tiny_model.config.to_dict(), tiny_model.generation_config.to_dict()
    with pytest.raises(ValueError, match=name):
        tiny_model.generate(**inputs, max_new_tokens=4, **options)
    assert (tiny_model.config.to_dict(), tiny_model.generation_config.to_dict()) == before
    assert torch.equal(tiny_model.generate(**inputs, max_new_tokens=4), expected)


def test_a_vision_text_model_refuses_the_same_options(tiny_vision_model):
    inputs = build_vision_inputs(tiny_vision_model.config, [[(8, 8)]])
    with pytest.raises(ValueError, match="assistant_early_exit"):
        tiny_vision_model.generate(**inputs, assistant_early_exit=1)
    assert tiny_vision_model.generate(**inputs, max_new_tokens=2).shape == (1, 3)


# Lengths


@pytest.mark.parametrize(("positions", "expected"), [(40, 40), (1024, 256)])
def test_the_default_length_is_256_or_what_the_model_is_made_for(positions, expected):
    model = EncDecSLMForConditionalGeneration(build_config(max_position_embeddings=positions))
    assert model.generation_config.max_length == expected
    assert model.generate(build_source(5)["input_ids"], eos_token_id=None).shape == (1, expected)


def test_a_folder_without_a_generation_config_has_the_default_length(tmp_path):
    build_model(EncDecSLMModel, max_position_embeddings=1024).save_pretrained(tmp_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert model.generation_config.max_length == 256


@pytest.mark.parametrize("settings", [{}, {"generation_max_length": 12}], ids=str)
def test_evaluation_while_training_generates_and_pads_to_a_sensible_length(settings, tmp_path):
    model = build_model(max_position_embeddings=1024)
    model.generation_config.eos_token_id = None
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9, 2]}]
    args = Seq2SeqTrainingArguments(
        tmp_path, predict_with_generate=True, use_cpu=True, report_to=[], disable_tqdm=True, **settings
    )
    output = Seq2SeqTrainer(model, args, processing_class=build_tokenizer()).predict(rows)
    assert output.predictions.shape == output.label_ids.shape == (1, 256)
    generated = (output.predictions != 0).sum()
    assert generated <= settings.get("generation_max_length", 256)
    assert model.generation_config.max_length == 256


def test_new_tokens_of_the_caller_replace_the_length_of_the_model_without_a_warning(tiny_model, source, capfd):
    tiny_model.generation_config.eos_token_id = None
    assert tiny_model.generate(**source, max_new_tokens=3).shape == (3, 4)
    assert tiny_model.generate(**source, max_length=3).shape == (3, 3)
    assert "max_length" not in capfd.readouterr().err


# The end of a row


@pytest.mark.parametrize(
    ("rows", "eos_token_id", "pad_token_id", "expected"),
    [
        ([[1, 5, 2, 0, 0], [1, 5, 6, 7, 2], [1, 5, 6, 7, 8]], 2, 0, [3, 5, 5]),
        ([[1, 5, 16, 2, 2], [1, 2, 2, 2, 2]], 2, 0, [4, 2]),  # beams are filled with the end token
        ([[1, 5, 16, 2, 2], [1, 5, 6, 2, 2]], [2, 16], 2, [3, 4]),
        ([[2, 5, 2, 2, 2], [2, 5, 6, 7, 8]], 2, 2, [3, 5]),  # the start token is the end token, as in BART
        ([[1, 5, 6, 0, 0], [1, 5, 0, 6, 0]], 2, 0, [3, 4]),  # ended by a stop string
        ([[1, 5, 2, 0, 0]], None, 0, [3]),
        ([[1, 5, 2, 0, 0]], None, None, [5]),
        ([[1, 0, 0]], 2, 0, [1]),
    ],
)
def test_a_row_ends_with_its_first_end_token(rows, eos_token_id, pad_token_id, expected):
    assert generated_lengths(torch.tensor(rows), eos_token_id, pad_token_id).tolist() == expected


def test_a_prompt_of_the_decoder_does_not_end_a_row():
    assert generated_lengths(torch.tensor([[1, 2, 5, 2, 0]]), 2, 0, num_prompt_tokens=2).tolist() == [4]


def test_beams_in_a_batch_have_the_token_ids_of_each_source_alone(tiny_tokenizer):
    model = build_model()
    options = {"num_beams": 3, "max_new_tokens": 12, "return_tensors": True}
    # One source ends early, so that its beams are filled up in a batch.
    sources = ["w4 w5 w6", "w7 w8", "w9 w10 w11 w12"]
    pipe = Text2TextGenerationPipeline(model, tiny_tokenizer, device="cpu")
    first = pipe(sources[0], **options)[0]["generated_token_ids"].tolist()
    options["eos_token_id"] = first[3]
    alone = [pipe(source, **options)[0]["generated_token_ids"].tolist() for source in sources]
    together = [row["generated_token_ids"].tolist() for row in pipe(sources, batch_size=3, **options)]
    assert len(set(map(len, alone))) > 1
    assert together == alone


# Wrapped embeddings


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning")  # PEFT, when it merges
@pytest.mark.parametrize(
    "options",
    [
        {"trainable_token_indices": [5], "target_modules": ["q_proj"]},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_wrapped_embeddings_train_generate_and_serve_pipelines(options, source, target_ids, tiny_tokenizer, tmp_path):
    model = build_model()
    with torch.no_grad():
        expected = model(**source, decoder_input_ids=target_ids).logits
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_2_SEQ_LM", **options))
    torch.testing.assert_close(adapted.eval()(**source, decoder_input_ids=target_ids).logits, expected)
    adapted.train()(**source, labels=target_ids).loss.backward()
    trained = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("embed_tokens" in name for name in trained)
    assert all(gradient is not None for gradient in trained.values())
    adapted.eval().generate(**source, max_new_tokens=2)
    pipe = Text2TextGenerationPipeline(adapted, tiny_tokenizer, device="cpu")
    assert isinstance(pipe("w5 w6", max_new_tokens=2)[0]["generated_text"], str)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**source, decoder_input_ids=target_ids).logits, expected)
