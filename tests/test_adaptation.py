# SPDX-License-Identifier: Apache-2.0
import copy
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    T5Config,
    pipeline,
)

from conftest import build_byte_tokenizer, randomised
from encdec_slm.adaptation import STRATEGIES, from_decoder_only, select_layers
from encdec_slm.vocabulary import trim_tokenizer


SIZES = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
ROPE = {"rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {**ROPE, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SOURCES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=12),
    "llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama with yarn": LlamaConfig(**SIZES, rope_parameters={**ROPE, "rope_type": "yarn"}, rms_norm_eps=1e-3),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
    "qwen3 with biases": Qwen3Config(**SIZES, head_dim=12, attention_bias=True),
    "smollm3": SmolLM3Config(**SIZES),
}
IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
# Sums of equal numbers in another order.
CLOSE = {"rtol": 0, "atol": 1e-4}


def build(name="llama", **changes):
    config = SOURCES[name]
    config = type(config).from_dict({**config.to_dict(), **changes}) if changes else config
    return randomised(AutoModelForCausalLM.from_config(config)).eval()


def build_tokenizer(num_words=90, **special_tokens):
    """A tokenizer whose first ids are `<pad>`, `<s>`, `</s>`."""
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(num_words))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special_tokens)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied Llama with a tokenizer that has a chat template and no padding token."""
    folder = tmp_path_factory.mktemp("checkpoint")
    build("llama 3").save_pretrained(folder)
    build_tokenizer(bos_token="<s>", eos_token="</s>", chat_template="{{ messages[0] }}").save_pretrained(folder)
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))


def assert_same_model(actual, expected):
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name


def edit_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), encoding="utf-8")


# Weights


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_decoder_of_full_depth_starts_as_the_source(name, backend, ids):
    source = build(name)
    model = from_decoder_only(source, encoder_layers=2, decoder_layers=6)
    for one in (source, model):
        one.set_attn_implementation(backend)
    torch.testing.assert_close(model(input_ids=ids[:, :3], decoder_input_ids=ids).logits, source(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", SOURCES)
def test_an_encoder_of_full_depth_with_a_causal_mask_equals_the_source(name, ids):
    source = build(name)
    encoder = from_decoder_only(source, encoder_layers=6).get_encoder()
    for one in (source, encoder):
        one.set_attn_implementation("eager")
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    outputs = source(ids, output_hidden_states=True)
    hidden_states = outputs.hidden_states[0]
    position_embeddings = encoder.rotary_emb(hidden_states, torch.arange(9)[None])
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, causal, position_embeddings)
    final = encoder.norm(hidden_states) * source.model.norm.weight
    torch.testing.assert_close(final, outputs.hidden_states[-1], **CLOSE)


@pytest.mark.parametrize("strategy", [*STRATEGIES, ([0, 2, 4, 5], [3, 1])])
def test_each_layer_is_a_copy_of_the_one_that_the_strategy_selects(strategy):
    source = build("smollm3")
    model = from_decoder_only(source, strategy=strategy)
    selected = select_layers(strategy, 6, 4, 2) if isinstance(strategy, str) else strategy
    for stack, layers in zip((model.model.encoder, model.model.decoder), selected, strict=True):
        for layer, index in zip(stack.layers, layers, strict=True):
            weights = layer.state_dict()
            for name, tensor in source.model.layers[index].state_dict().items():
                assert torch.equal(weights[name], tensor), (name, index)
    use_rope = source.config.no_rope_layers
    assert model.config.encoder_no_rope_layers == [use_rope[index] for index in selected[0]]
    assert model.config.decoder_no_rope_layers == [use_rope[index] for index in selected[1]]


def test_cross_attention_reads_the_encoder_as_self_attention_reads_a_layer_and_adds_nothing():
    source = build("qwen3 with biases", tie_word_embeddings=False)
    for layer in source.model.layers:
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 2.0)
    model = from_decoder_only(source, encoder_layers=6)
    assert torch.equal(model.model.encoder.norm.weight, torch.ones(source.config.hidden_size))
    hidden_states = torch.randn(2, 3, source.config.hidden_size)
    for layer in model.model.decoder.layers:
        normalized = model.model.encoder.norm(hidden_states)
        for name in ("q_proj", "k_proj", "v_proj"):
            expected = getattr(layer.self_attn, name)(layer.input_layernorm(hidden_states))
            states = normalized if name != "q_proj" else layer.pre_cross_attn_layernorm(hidden_states)
            torch.testing.assert_close(getattr(layer.cross_attn, name)(states), expected)
        assert not any(parameter.any() for parameter in layer.cross_attn.o_proj.parameters())
        for name in ("q_norm", "k_norm"):
            assert torch.equal(getattr(layer.cross_attn, name).weight, getattr(layer.self_attn, name).weight)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_the_encoder_is_bidirectional(ids):
    encoder = from_decoder_only(build()).get_encoder()
    changed = ids.clone()
    changed[:, -1] = 50
    assert not torch.allclose(encoder(ids).last_hidden_state[:, 0], encoder(changed).last_hidden_state[:, 0])


@pytest.mark.parametrize(("name", "is_tied"), [("llama", False), ("llama 3", True)])
def test_heads_are_tied_as_in_the_source(name, is_tied, tmp_path):
    source = build(name)
    model = from_decoder_only(source)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is is_tied
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    model.save_pretrained(tmp_path)
    assert_same_model(AutoModelForSeq2SeqLM.from_pretrained(tmp_path), model)


def test_fields_of_the_source_are_copied():
    source = SOURCES["llama with yarn"]
    config = from_decoder_only(build("llama with yarn")).config
    for name in ("vocab_size", "hidden_size", "rms_norm_eps", "rope_parameters", "max_position_embeddings"):
        assert getattr(config, name) == getattr(source, name)
    assert (config.attention_bias, config.attention_out_bias, config.qk_norm, config.gated_mlp) == (
        *(False, False, False),
        True,
    )


def test_a_source_in_memory_is_not_changed():
    source = build()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    config = source.config.to_dict()
    model = from_decoder_only(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.config.rope_parameters["rope_theta"] = 1.0
    assert source.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_the_source(dtype, tmp_path):
    source = build().to(dtype)
    source.save_pretrained(tmp_path)
    for given in (source, tmp_path):
        model = from_decoder_only(given)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype} and model.dtype == dtype
        assert model.get_encoder().rotary_emb.inv_freq.dtype == torch.float32
        assert type(model).__name__ == "EncDecSLMForConditionalGeneration" and not model.training


# Sizes


def test_strategies_select_layers():
    assert select_layers("even", 6, 4, 2) == ([0, 2, 3, 5], [0, 5])
    assert select_layers("even", 30, 20, 10)[1] == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert select_layers("even", 5, 5, 1) == ([0, 1, 2, 3, 4], [0])
    assert select_layers("first-last", 6, 4, 2) == ([0, 1, 2, 3], [4, 5])
    assert select_layers("outer", 24, 16, 8) == (list(range(16)), [0, 1, 2, 15, 17, 19, 21, 23])
    assert select_layers("outer", 6, 4, 2) == ([0, 1, 2, 3], [0, 5])
    assert select_layers("outer", 6, 6, 1) == ([0, 1, 2, 3, 4, 5], [0])
    for depth in range(1, 34):
        for count in range(2, depth + 1):
            layers = select_layers("even", depth, count, 1)[0]
            assert (
                len(layers) == count and layers[0] == 0 and layers[-1] == depth - 1 and layers == sorted(set(layers))
            )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (4, 2)),
        ({"split": "1/2-1/2"}, (3, 3)),
        ({"split": "1/3-2/3"}, (2, 4)),
        ({"encoder_layers": 6}, (6, 2)),
        ({"encoder_layers": 1, "decoder_layers": 6, "split": "1/2-1/2"}, (1, 6)),
        ({"strategy": ([0, 1, 5], [5])}, (3, 1)),
    ],
)
def test_the_number_of_layers_is_given_or_follows_from_the_split(arguments, expected):
    config = from_decoder_only(build(), **arguments).config
    assert (config.encoder_num_hidden_layers, config.decoder_num_hidden_layers) == expected


def test_both_stacks_of_a_source_with_one_layer_have_one():
    config = from_decoder_only(build(num_hidden_layers=1)).config
    assert (config.encoder_num_hidden_layers, config.decoder_num_hidden_layers) == (1, 1)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"encoder_layers": 7}, {"decoder_layers": 0}, {"split": "3/4-1/4"}, {"strategy": "last"}),
        *({"strategy": ([0, 6], [1])}, {"strategy": ([0], [])}, {"strategy": ([0],)}),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=re.escape(f"`{name}` is {value!r}")):
        from_decoder_only(build(), **arguments)


# Folders


def test_a_folder_a_hub_name_and_a_model_give_the_same(folder, tmp_path, monkeypatch):
    expected = from_decoder_only(AutoModelForCausalLM.from_pretrained(folder))
    cached = tmp_path / "models--someone--small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(folder, cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for given in (folder, str(folder), "someone/small"):
        model = from_decoder_only(given)
        assert_same_model(model, expected)
        assert model.config.name_or_path == str(given)
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()


def test_shards_and_blocks_of_rows_give_the_whole_model(folder, tmp_path, monkeypatch):
    expected = from_decoder_only(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    monkeypatch.setattr("encdec_slm.adaptation.BLOCK_BYTES", 300)
    assert_same_model(from_decoder_only(tmp_path), expected)


MEMORY = """
import sys
from encdec_slm.adaptation import from_decoder_only

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

from_decoder_only(sys.argv[1])
before = peak_bytes()
model = from_decoder_only(sys.argv[2], encoder_layers=1, decoder_layers=1)
print((peak_bytes() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_below_1_3_times_the_result(folder, tmp_path):
    # Embeddings of 67 MB and layers of 13 MB: neither the table nor mapped pages of the file may count twice.
    sizes = {**SIZES, "vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1536, "tie_word_embeddings": True}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.3


# Tokens


def test_the_result_generates_and_trains_at_once(folder, ids, tmp_path):
    model = from_decoder_only(folder)
    assert tuple(getattr(model.generation_config, name) for name in IDS) == (0, 1, 2, 1)
    generated = model.generate(ids, max_new_tokens=5)
    assert generated.shape[0] == 2 and (generated[:, 0] == 1).all() and 1 < generated.shape[1] <= 6
    labels = ids.clone()
    labels[:, -2:] = -100
    assert model(input_ids=ids, labels=labels).loss.isfinite()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    pipe = pipeline("text2text-generation", model=str(tmp_path), trust_remote_code=True)
    assert isinstance(pipe("w1 w2", max_new_tokens=3)[0]["generated_text"], str)


@pytest.mark.parametrize(
    ("config", "generation", "special_tokens", "expected"),
    [
        # SmolLM2 and Llama base models: no padding token.
        ({"bos_token_id": 1, "eos_token_id": 2}, {}, {"bos_token": "<s>", "eos_token": "</s>"}, (2, 1, 2, 1)),
        # Qwen: the tokenizer has no beginning-of-sequence token, the config has a separator.
        ({"bos_token_id": 4, "eos_token_id": 5}, {}, {"eos_token": "</s>", "pad_token": "w1"}, (4, 4, [2, 5], 4)),
        # Llama 3: several end-of-sequence tokens, the tokenizer's first.
        ({"bos_token_id": 1, "eos_token_id": 5}, {"eos_token_id": [5, 6]}, {"eos_token": "w3"}, (6, 1, [6, 5], 1)),
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1}, {}, None, (2, 1, 2, 1)),
        ({"bos_token_id": None, "eos_token_id": 2}, {}, None, (2, 2, 2, 2)),
        ({"bos_token_id": None, "eos_token_id": None}, {}, {}, (0, 0, None, 0)),
    ],
)
def test_token_ids_come_from_the_tokenizer_then_from_the_configs(config, generation, special_tokens, expected, ids):
    source = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "pad_token_id": None, **config}))
    source.generation_config.update(**generation)
    tokenizer = None if special_tokens is None else build_tokenizer(**special_tokens)
    model = from_decoder_only(source, tokenizer=tokenizer)
    assert tuple(getattr(model.config, name) for name in IDS) == expected
    assert tuple(getattr(model.generation_config, name) for name in IDS) == expected
    if tokenizer is not None:
        assert tokenizer.pad_token_id == expected[0]
    assert model(input_ids=ids, labels=ids.masked_fill(ids > 50, -100)).loss.isfinite()
    assert model.generate(ids, max_new_tokens=2).shape[1] <= 3


def test_a_tokenizer_can_be_given_as_a_folder_and_can_have_added_tokens(folder, tmp_path):
    build_tokenizer(bos_token="w5", eos_token="w6", pad_token="w7").save_pretrained(tmp_path)
    config = from_decoder_only(build(), tokenizer=str(tmp_path)).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (10, 8, [9, 2])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert from_decoder_only(folder, tokenizer=tokenizer).config.pad_token_id == 93


@pytest.fixture(scope="module")
def trimmed_source(tmp_path_factory):
    """A folder whose model has padding rows, and its tokenizer trimmed."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = build_byte_tokenizer(words=["Ġtoken", "Ġtime", "Ġother"])
    assert len(tokenizer) == 273
    build("llama", vocab_size=280, eos_token_id=[272, 2, 263]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trimmed, old_ids = trim_tokenizer(tokenizer, [" time other"])
    return folder, trimmed, old_ids


@pytest.mark.parametrize("is_folder", [True, False])
def test_a_trimmed_tokenizer_takes_its_rows_of_embeddings_and_head(trimmed_source, is_folder, monkeypatch):
    monkeypatch.setattr("encdec_slm.adaptation.BLOCK_BYTES", 50 * 32 * 4)
    folder, trimmed, old_ids = trimmed_source
    source = folder if is_folder else AutoModelForCausalLM.from_pretrained(folder)
    full, model = from_decoder_only(source), from_decoder_only(source, tokenizer=trimmed)
    assert model.config.vocab_size == len(old_ids) == len(trimmed)
    ids = torch.tensor([trimmed.encode(" time and other times")])
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
        old = torch.tensor(old_ids)
        full_logits = full(input_ids=old[ids], decoder_input_ids=old[ids]).logits
    torch.testing.assert_close(logits, full_logits[..., old])
    # 272 is kept, 263 is not.
    assert model.config.eos_token_id == [2, old_ids.index(272)]


def test_a_trimmed_tokenizer_of_another_source_is_refused(trimmed_source):
    folder, trimmed, _ = trimmed_source
    other, _ = trim_tokenizer(build_byte_tokenizer(words=["Ġtimes"]), [" times"])
    with pytest.raises(ValueError, match="trim"):
        from_decoder_only(folder, tokenizer=other)
    with pytest.raises(ValueError, match="embeddings"):
        from_decoder_only(build("llama", vocab_size=270), tokenizer=trimmed)
    trimmed = copy.deepcopy(trimmed)
    trimmed.add_tokens(["<image>"])
    with pytest.raises(ValueError, match="embeddings"):
        from_decoder_only(folder, tokenizer=trimmed)


def test_a_tokenizer_with_other_tokens_is_refused(folder):
    larger = build_tokenizer(num_words=120, eos_token="</s>")
    with pytest.raises(ValueError, match=r"123 .* 97 "):
        from_decoder_only(build(), tokenizer=larger)
    words = Tokenizer(models.WordLevel({"</s>": 0, "w1": 1, "<pad>": 2, "w0": 3}, unk_token="w0"))
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    for given in (folder, AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(ValueError, match=r"3 ids .*\(0 is '</s>', not '<pad>', 1 is 'w1'"):
            from_decoder_only(given, tokenizer=other)


# Unsupported sources


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (MistralConfig(**SIZES, sliding_window=16), "sliding_window` 16"),
        (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=2), "sliding_window` 16"),
        (LlamaConfig(**SIZES, attn_logit_softcapping=50.0), "attn_logit_softcapping` 50.0"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            "partial_rotary_factor` 0.5",
        ),
    ],
)
def test_unsupported_features_are_named(config, field, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        with pytest.raises(ValueError, match=field):
            from_decoder_only(given)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (
            {"model_type": "gemma2", "final_logit_softcapping": 30.0, "sliding_window": 8},
            "'gemma2'.*sliding_window.*final_logit_softcapping` 30.0",
        ),
        ({"model_type": "mixtral", "num_local_experts": 8}, "num_local_experts` 8"),
        ({"model_type": "phi", "partial_rotary_factor": 0.4}, "'phi'.*0.4"),
        ({"model_type": "a-new-one", "auto_map": {"AutoConfig": "evil.Config"}}, "'a-new-one'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window` 4096"),
    ],
)
def test_an_unsupported_folder_is_refused_before_its_weights_are_read(fields, named, copied):
    (copied / "model.safetensors").unlink()
    edit_json(copied / "config.json", **fields)
    with pytest.raises(ValueError, match=named):
        from_decoder_only(copied)


def test_a_window_that_is_only_the_default_of_its_class_is_refused(copied):
    fields = json.loads((copied / "config.json").read_text("utf-8"))
    fields = {name: value for name, value in fields.items() if name not in ("sliding_window", "layer_types")}
    (copied / "config.json").write_text(json.dumps({**fields, "model_type": "mistral"}), encoding="utf-8")
    with pytest.raises(ValueError, match="sliding_window` 4096"):
        from_decoder_only(copied)


def test_a_window_that_no_layer_uses_is_accepted():
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=16))
    assert from_decoder_only(model).config.encoder_num_hidden_layers == 4


# PEFT 0.21 asks for `is_gradient_checkpointing`, a name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_is_no_complete_language_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"PeftModelForCausalLM.*merge_and_unload"):
        from_decoder_only(get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")))
    with pytest.raises(TypeError, match="dict"):
        from_decoder_only({})
    build().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"adapter.*merge_and_unload"):
        from_decoder_only(tmp_path)
    with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight, .* and \d+ more"):
        from_decoder_only(LlamaModel(SOURCES["llama"]))
    with pytest.raises(ValueError, match="`model_type` 't5'"):
        from_decoder_only(AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=9, d_model=8, num_layers=1)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SOURCES["llama"])
    with pytest.raises(ValueError, match=r"not in memory: model.embed_tokens.weight"):
        from_decoder_only(model)


# Damaged folders


def edit_weights(folder, **changes):
    """Set or, with `None`, remove weights; `__` stands for a dot."""
    changes = {name.replace("__", "."): tensor for name, tensor in changes.items()}
    weights = {**load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def edit_bytes(folder, edit):
    path = folder / "model.safetensors"
    path.write_bytes(edit(path.read_bytes()))


def write_index(folder, file):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.embed_tokens.weight": file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json"),
        (lambda folder: edit_json(folder / "config.json", num_attention_heads=3), "config.json"),
        (lambda folder: edit_json(folder / "config.json", hidden_size="wide"), "config.json"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "pytorch_model.bin.*AutoModelForCausalLM",
        ),
        (lambda folder: edit_bytes(folder, lambda data: data[: len(data) // 2]), "model.safetensors"),
        (lambda folder: edit_bytes(folder, lambda data: data.replace(b"[97,32]", b"[97,64]")), "model.safetensors"),
        (lambda folder: edit_bytes(folder, lambda data: (2**62).to_bytes(8, "little")), "model.safetensors"),
        (
            lambda folder: edit_bytes(folder, lambda data: data.replace(b'"shape":[97,32]', b'"shape":[32,97]')),
            r"another shape: model.embed_tokens.weight \(32, 97\) instead of \(97, 32\)",
        ),
        (lambda folder: write_index(folder, "../model.safetensors"), "model.safetensors.index.json"),
        (lambda folder: write_index(folder, "model-1.safetensors"), "model-1.safetensors"),
        (
            lambda folder: edit_weights(folder, model__norm__weight=torch.ones(32, dtype=torch.int8)),
            "not floating point: model.norm.weight",
        ),
        (lambda folder: edit_weights(folder, model__norm__weight=None), r"missing: model.norm.weight\."),
        (lambda folder: edit_weights(folder, model__extra=torch.ones(2)), r"unexpected: model.extra\."),
    ],
)
def test_a_damaged_folder_is_refused_by_name(copied, damage, named):
    damage(copied)
    with pytest.raises(ValueError, match=named):
        from_decoder_only(copied)


def test_redundant_tables_of_old_folders_are_ignored(folder, copied):
    table = load_file(copied / "model.safetensors")["model.embed_tokens.weight"]
    inv_freq = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.ones(4)}
    edit_weights(copied, lm_head__weight=table.clone(), **inv_freq)
    assert_same_model(from_decoder_only(copied), from_decoder_only(folder))


@pytest.mark.teacher
def test_a_real_teacher_is_adapted_with_a_trimmed_vocabulary():
    folder = os.environ["ENCDEC_TEACHER"]
    texts = [f"def add(a, b): return a + b  # {number}" for number in range(30)]
    trimmed, old_ids = trim_tokenizer(AutoTokenizer.from_pretrained(folder), texts)
    model = from_decoder_only(folder, encoder_layers=1, decoder_layers=1, tokenizer=trimmed)
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        table = file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(model.get_input_embeddings().weight, table[old_ids])
    assert model.config.vocab_size == len(trimmed) < 1000
    ends = trimmed.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert model.generation_config.eos_token_id == ends and model.config.pad_token_id == trimmed.pad_token_id
