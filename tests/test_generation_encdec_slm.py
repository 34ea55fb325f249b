# SPDX-License-Identifier: Apache-2.0
"""Options, lengths and ends of generation."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from conftest import build_config, build_model, build_source, build_tokenizer, build_vision_inputs
from encdec_slm import EncDecSLMForConditionalGeneration, EncDecSLMModel, Text2TextGenerationPipeline
from encdec_slm.generation_encdec_slm import generated_lengths


def decoder_only_model():
    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2))


# Options


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
