# SPDX-License-Identifier: Apache-2.0
"""Decoder-only models of transformers against the encoder-decoders that are cut from them."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
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

from conftest import randomised
from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.adaptation import STRATEGIES, from_decoder_only, kept_layers


SIZES = {
    **{"vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "original_max_position_embeddings": 32}
SOURCES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=12),
    "llama 3": LlamaConfig(
        **SIZES, rope_parameters={**LLAMA3, "low_freq_factor": 1.0, "high_freq_factor": 4.0}, tie_word_embeddings=True
    ),
    "llama with yarn": LlamaConfig(
        **SIZES, rope_parameters={**LLAMA3, "rope_type": "yarn", "factor": 2.0}, rms_norm_eps=1e-3
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=12),
    "qwen3 with biases": Qwen3Config(**SIZES, head_dim=12, attention_bias=True),
    "smollm3": SmolLM3Config(**SIZES),
}
# Sums of equal numbers in another order.
CLOSE = {"rtol": 0, "atol": 1e-4}


def build(name="llama"):
    return randomised(AutoModelForCausalLM.from_config(SOURCES[name])).eval()


def make_tokenizer(num_words=90, **special_tokens):
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
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>", chat_template="{{ messages[0]['content'] }}")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))


def without_cross_attention(model):
    for layer in model.model.decoder.layers:
        for parameter in layer.cross_attn.o_proj.parameters():
            torch.nn.init.zeros_(parameter)
    return model


def assert_same_model(actual, expected):
    assert actual.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual.state_dict()[name], tensor), name


def edit_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), encoding="utf-8")


# Exactness


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SOURCES)
def test_without_cross_attention_a_decoder_of_full_depth_writes_what_the_source_writes(name, backend, ids):
    source = build(name)
    model = without_cross_attention(from_decoder_only(source, encoder_layers=2, decoder_layers=6))
    for built in (source, model):
        built.set_attn_implementation(backend)
    torch.testing.assert_close(model(input_ids=ids[:, :3], decoder_input_ids=ids).logits, source(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", SOURCES)
def test_with_a_causal_mask_an_encoder_of_full_depth_reads_as_the_source_does(name, ids):
    source = build(name)
    source.set_attn_implementation("eager")
    encoder = from_decoder_only(source, encoder_layers=6).get_encoder()
    encoder.set_attn_implementation("eager")
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    outputs = source(ids, output_hidden_states=True)
    position_embeddings = encoder.rotary_emb(outputs.hidden_states[0], torch.arange(9)[None])
    for layer, before, after in zip(
        encoder.layers[:-1], outputs.hidden_states[:-2], outputs.hidden_states[1:-1], strict=True
    ):
        torch.testing.assert_close(layer(before, causal, position_embeddings), after, **CLOSE)
    last = encoder.layers[-1](outputs.hidden_states[-2], causal, position_embeddings)
    torch.testing.assert_close(encoder.norm(last), outputs.hidden_states[-1], **CLOSE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["qwen2", "smollm3"])
def test_each_layer_is_the_one_that_the_strategy_names(name, strategy, ids):
    source = build(name)
    source.set_attn_implementation("eager")
    model = without_cross_attention(from_decoder_only(source, strategy=strategy))
    model.set_attn_implementation("eager")
    kept = kept_layers(strategy, 6, 4, 2)
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    hidden_states = source.get_input_embeddings()(ids)
    position_embeddings = source.model.rotary_emb(hidden_states, torch.arange(9)[None])
    rotation = {"position_embeddings": position_embeddings}
    for place, index in enumerate(kept[0]):
        expected = source.model.layers[index](hidden_states, attention_mask=causal, **rotation)
        actual = model.model.encoder.layers[place](hidden_states, causal, position_embeddings)
        torch.testing.assert_close(actual, expected, **CLOSE)
    for place, index in enumerate(kept[1]):
        expected = source.model.layers[index](hidden_states, attention_mask=causal, **rotation)
        actual = model.model.decoder.layers[place](hidden_states, hidden_states, causal, **rotation)
        torch.testing.assert_close(actual, expected, **CLOSE)


def test_cross_attention_is_a_copy_of_self_attention_that_trains_by_itself():
    model = from_decoder_only(build("qwen3 with biases"))
    for layer in model.model.decoder.layers:
        theirs = dict(layer.self_attn.named_parameters())
        for name, parameter in layer.cross_attn.named_parameters():
            assert torch.equal(parameter, theirs[name]) and parameter.data_ptr() != theirs[name].data_ptr()
        assert torch.equal(layer.pre_cross_attn_layernorm.weight, layer.input_layernorm.weight)
    model = from_decoder_only(build(), encoder_layers=6, decoder_layers=6)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_a_copied_encoder_reads_what_comes_later(ids):
    encoder = from_decoder_only(build()).get_encoder()
    changed = ids.clone()
    changed[:, -1] = 50
    assert not torch.allclose(encoder(ids).last_hidden_state[:, 0], encoder(changed).last_hidden_state[:, 0])


def test_heads_are_tied_as_in_the_source(tmp_path):
    for name, is_tied in (("llama", False), ("llama 3", True)):
        source = build(name)
        model = from_decoder_only(source)
        assert (model.lm_head.weight is model.get_input_embeddings().weight) is is_tied
        assert torch.equal(model.lm_head.weight, source.lm_head.weight)
        model.save_pretrained(tmp_path / name)
        assert_same_model(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name), model)


def test_every_field_of_the_source_is_there():
    model = from_decoder_only(build("llama with yarn"))
    theirs, ours = SOURCES["llama with yarn"], model.config
    for name in ("vocab_size", "hidden_size", "rms_norm_eps", "rope_parameters", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.rope_parameters is not theirs.rope_parameters
    assert (ours.attention_bias, ours.attention_out_bias, ours.qk_norm, ours.gated_mlp) == (False, False, False, True)


def test_a_source_in_memory_stays_as_it_was(ids):
    source = build()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    config = source.config.to_dict()
    model = from_decoder_only(source)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert source.config.to_dict() == config
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_is_in_the_sources_dtype(dtype, tmp_path):
    source = build().to(dtype)
    source.save_pretrained(tmp_path)
    for given in (source, tmp_path):
        model = from_decoder_only(given)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype} and model.dtype == dtype
        assert model.get_encoder().rotary_emb.inv_freq.dtype == torch.float32
        assert not model.training


# Sizes


def test_strategies_keep_the_layers_they_say():
    assert kept_layers("even", 6, 4, 2) == ([0, 2, 3, 5], [0, 5])
    assert kept_layers("even", 30, 20, 10)[1] == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert kept_layers("even", 5, 5, 1) == ([0, 1, 2, 3, 4], [0])
    assert kept_layers("first-last", 6, 4, 2) == ([0, 1, 2, 3], [4, 5])
    assert kept_layers("first-last", 6, 6, 3) == ([0, 1, 2, 3, 4, 5], [3, 4, 5])
    with pytest.raises(ValueError, match=r"Unknown strategy 'random'\. Available strategies: even, first-last"):
        kept_layers("random", 6, 4, 2)


@pytest.mark.parametrize("depth", range(1, 34))
def test_even_layers_rise_from_the_first_to_the_last(depth):
    for num_kept in range(2, depth + 1):
        layers = kept_layers("even", depth, num_kept, 1)[0]
        assert len(layers) == num_kept and layers[0] == 0 and layers[-1] == depth - 1
        assert layers == sorted(set(layers))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (4, 2)),
        ({"split": "1/2-1/2"}, (3, 3)),
        ({"split": "1/3-2/3"}, (2, 4)),
        ({"encoder_layers": 6}, (6, 2)),
        ({"decoder_layers": 1}, (4, 1)),
        ({"encoder_layers": 1, "decoder_layers": 6, "split": "1/2-1/2"}, (1, 6)),
    ],
)
def test_numbers_of_layers_are_those_given_or_the_splits_share(arguments, expected):
    config = from_decoder_only(build(), **arguments).config
    assert (config.encoder_num_hidden_layers, config.decoder_num_hidden_layers) == expected


def test_a_source_of_one_layer_gives_both_stacks_one():
    source = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    config = from_decoder_only(source).config
    assert (config.encoder_num_hidden_layers, config.decoder_num_hidden_layers) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_layers": 7}, r"`encoder_layers` is 7, but each layer is a copy of one of the source's 6"),
        ({"decoder_layers": 0}, r"`decoder_layers` is 0"),
        ({"split": "3/4-1/4"}, r"Unknown split '3/4-1/4'. Available splits: 2/3-1/3"),
        ({"strategy": "last"}, r"Unknown strategy 'last'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_decoder_only(build(), **arguments)


# Where the source lies


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


def test_a_sharded_folder_gives_what_a_whole_one_gives(folder, tmp_path):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_model(from_decoder_only(tmp_path), from_decoder_only(folder))


def test_blocks_of_rows_give_the_whole_tensor(folder, monkeypatch):
    expected = from_decoder_only(folder)
    monkeypatch.setattr("encdec_slm.adaptation.BLOCK_BYTES", 300)
    assert_same_model(from_decoder_only(folder), expected)


MEMORY = """
import sys, torch
from transformers import AutoModelForCausalLM
from encdec_slm.adaptation import from_decoder_only

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

from_decoder_only(sys.argv[1])
before = peak_bytes()
model = from_decoder_only(sys.argv[2], encoder_layers=int(sys.argv[3]), decoder_layers=1)
print((peak_bytes() - before) / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("encoder_layers", [1, 6])
def test_memory_stays_under_1_3_times_the_result(folder, tmp_path, encoder_layers):
    # A table of 67 MB and layers of 13 MB each: the table, and what is mapped of the file, must not count twice.
    sizes = {**SIZES, "vocab_size": 32768, "hidden_size": 512, "intermediate_size": 1536, "tie_word_embeddings": True}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path)
    command = [sys.executable, "-c", MEMORY, str(folder), str(tmp_path), str(encoder_layers)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.3


# Tokens


IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def test_generation_works_at_once(folder, ids, tmp_path):
    model = from_decoder_only(folder)
    config = model.generation_config
    assert (config.decoder_start_token_id, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        1,
        1,
        2,
        0,
    )
    written = model.generate(ids, max_new_tokens=5)
    assert written.shape[0] == 2 and (written[:, 0] == 1).all() and 1 < written.shape[1] <= 6
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "{{ messages[0]['content'] }}"
    pipe = pipeline("text2text-generation", model=str(tmp_path), trust_remote_code=True)
    assert isinstance(pipe("w1 w2", max_new_tokens=3)[0]["generated_text"], str)
    labels = ids.clone()
    labels[:, -2:] = -100
    assert model(input_ids=ids, labels=labels).loss.isfinite()


@pytest.mark.parametrize(
    ("config", "generation", "special_tokens", "expected"),
    [
        # As SmolLM2's and Llama's base models: nothing to pad with.
        ({"bos_token_id": 1, "eos_token_id": 2}, {}, {"bos_token": "<s>", "eos_token": "</s>"}, (2, 1, 2, 1)),
        # As Qwen's: the tokenizer begins no text, the config says what separates them.
        ({"bos_token_id": 4, "eos_token_id": 5}, {}, {"eos_token": "</s>", "pad_token": "w1"}, (4, 4, [2, 5], 4)),
        # As Llama 3's: more than one end, the tokenizer's first.
        ({"bos_token_id": 1, "eos_token_id": 5}, {"eos_token_id": [5, 6]}, {"eos_token": "w3"}, (6, 1, [6, 5], 1)),
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1}, {}, None, (2, 1, 2, 1)),
        ({"bos_token_id": None, "eos_token_id": 2}, {}, None, (2, 2, 2, 2)),
        ({"bos_token_id": None, "eos_token_id": None}, {}, None, (0, 0, None, 0)),
    ],
)
def test_token_ids_are_the_tokenizers_and_then_the_configs(config, generation, special_tokens, expected):
    source = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "pad_token_id": None, **config}))
    source.generation_config.update(**generation)
    tokenizer = None if special_tokens is None else make_tokenizer(**special_tokens)
    model = from_decoder_only(source, tokenizer=tokenizer)
    assert tuple(getattr(model.config, name) for name in IDS) == expected
    assert tuple(getattr(model.generation_config, name) for name in IDS) == expected
    if tokenizer is not None:
        assert tokenizer.pad_token_id == expected[0]


def test_a_tokenizer_can_be_named_by_its_folder(tmp_path):
    make_tokenizer(bos_token="w5", eos_token="w6", pad_token="w7").save_pretrained(tmp_path)
    config = from_decoder_only(build(), tokenizer=str(tmp_path)).config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (10, 8, [9, 2])


def test_tokens_added_at_the_end_are_no_other_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert from_decoder_only(folder, tokenizer=tokenizer).config.pad_token_id == 93


def test_a_tokenizer_with_other_tokens_is_refused(folder):
    larger = make_tokenizer(num_words=120, eos_token="</s>")
    with pytest.raises(ValueError, match=r"ids up to 122, but .* has embeddings for 97 tokens"):
        from_decoder_only(build(), tokenizer=larger)
    words = Tokenizer(models.WordLevel({"</s>": 0, "w1": 1, "<pad>": 2, "w0": 3}, unk_token="w0"))
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    for given in (folder, AutoModelForCausalLM.from_pretrained(folder)):
        with pytest.raises(ValueError, match=r"3 ids mean other tokens \(0 is '</s>', not '<pad>', 1 is 'w1'"):
            from_decoder_only(given, tokenizer=other)


# What cannot be represented


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (MistralConfig(**SIZES, sliding_window=16), r"a sliding window \(`sliding_window` 16\)"),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=2),
            r"a sliding window \(`sliding_window` 16\)",
        ),
        (LlamaConfig(**SIZES, attn_logit_softcapping=50.0), r"logit soft-capping \(`attn_logit_softcapping` 50.0\)"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
            r"partial rotary embeddings \(`partial_rotary_factor` 0.5\)",
        ),
    ],
)
def test_what_this_family_cannot_represent_is_named(config, found, tmp_path):
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        with pytest.raises(ValueError, match=rf"cannot be adapted: it has {found}.* which this family cannot"):
            from_decoder_only(given)


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (
            {"model_type": "gemma2", "final_logit_softcapping": 30.0, "sliding_window": 8},
            r"another architecture \(`model_type` 'gemma2'\); a sliding window .* \(`final_logit_softcapping` 30.0\)",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            r"a mixture of experts \(`num_local_experts` 8",
        ),
        ({"model_type": "phi", "partial_rotary_factor": 0.4}, r"'phi'\); partial rotary .*0.4"),
        ({"model_type": "a-new-one", "auto_map": {"AutoConfig": "evil.Config"}}, r"\(`model_type` 'a-new-one'\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized weights \(`quantization_config`\)"),
    ],
)
def test_a_folder_of_another_kind_is_refused_before_its_weights_are_read(fields, found, copied):
    (copied / "model.safetensors").unlink()
    edit_json(copied / "config.json", **fields)
    with pytest.raises(ValueError, match=found):
        from_decoder_only(copied)


def test_a_window_that_no_layer_uses_is_no_obstacle(tmp_path):
    model = AutoModelForCausalLM.from_config(Qwen2Config(**SIZES, use_sliding_window=False, sliding_window=16))
    assert from_decoder_only(model).config.encoder_num_hidden_layers == 4


# PEFT 0.21 asks for `is_gradient_checkpointing`, a name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_object_that_is_no_whole_language_model_is_refused():
    with pytest.raises(TypeError, match=r"is a PeftModelForCausalLM, but must be .* `merge_and_unload\(\)`"):
        from_decoder_only(get_peft_model(build(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")))
    with pytest.raises(TypeError, match="is a dict"):
        from_decoder_only({})
    with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight, .* and \d+ more"):
        from_decoder_only(LlamaModel(SOURCES["llama"]))
    with pytest.raises(ValueError, match=r"another architecture \(`model_type` 't5'\)"):
        from_decoder_only(AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=9, d_model=8, num_layers=1)))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SOURCES["llama"])
    with pytest.raises(ValueError, match="not in memory"):
        from_decoder_only(model)


# Damaged folders


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def without_a_config(folder):
    (folder / "config.json").unlink()


def without_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def lie_about_sizes(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content.replace(b'"shape":[97,32]', b'"shape":[97,64]'))


def lie_about_the_header(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + content[8:])


def swap_the_shape(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content.replace(b'"shape":[97,32]', b'"shape":[32,97]'))


def point_outside(folder):
    files = {"model.embed_tokens.weight": "../model.safetensors"}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def lose_a_shard(folder):
    point_outside(folder)
    edit_json(folder / "model.safetensors.index.json", weight_map={"model.embed_tokens.weight": "model-1.safetensors"})


def store_integers(folder):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": weights["model.norm.weight"].char()}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_config, r"has no config.json that can be read \(FileNotFoundError"),
        (lambda folder: (folder / "config.json").write_text("{"), r"has no config.json that can be read \(JSONDecode"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"is no JSON object"),
        (
            lambda folder: edit_json(folder / "config.json", num_attention_heads=3),
            r"config.json of .* does not describe",
        ),
        (lambda folder: edit_json(folder / "config.json", hidden_size="wide"), r"config.json of .* does not describe"),
        (without_weights, r"has neither model.safetensors nor .* but .*pytorch_model.bin.* `AutoModelForCausalLM`"),
        (cut_off, r"model.safetensors of .* is damaged"),
        (lie_about_sizes, r"model.safetensors of .* is damaged"),
        (lie_about_the_header, r"model.safetensors of .* is damaged"),
        (swap_the_shape, r"of another shape: model.embed_tokens.weight \(32, 97\) instead of \(97, 32\)"),
        (point_outside, r"`weight_map` in model.safetensors.index.json .* does not name files of the folder"),
        (lose_a_shard, r"model-1.safetensors of .* is damaged or missing"),
        (store_integers, r"no plain floating point numbers: model.norm.weight \(I8\)"),
        (
            lambda folder: change_weights(folder, lambda weights: weights.pop("model.norm.weight")),
            r"missing: model.norm.weight\.",
        ),
        (
            lambda folder: change_weights(folder, lambda weights: weights.update({"model.extra": torch.ones(2)})),
            r"not of this architecture: model.extra\.",
        ),
    ],
)
def test_a_damaged_folder_is_refused_with_what_is_wrong(copied, damage, message):
    damage(copied)
    with pytest.raises(ValueError, match=message):
        from_decoder_only(copied)


def test_tables_that_old_folders_carry_are_no_obstacle(folder, copied):
    change_weights(
        copied,
        lambda weights: weights.update(
            {
                "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    assert_same_model(from_decoder_only(copied), from_decoder_only(folder))


def test_the_result_is_of_this_family(folder):
    assert type(from_decoder_only(folder)) is EncDecSLMForConditionalGeneration
