# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are converted and which are refused; the golden tests compare the numbers."""

import builtins
import json
import os
import pickle
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
from encdec_slm_cli import main
from reference_files import HEADS, MODEL_FILES, MU_CONFIG, make_weights
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.conversion import convert_reference_checkpoint, question_answering_prompt, reference_config


BEFORE, AFTER = "transformer.e.1.attn.q_linear.weight", "transformer.h.0.mlp.fc2.bias"


def weights_in(folder):
    return load_file(Path(folder) / "model.safetensors")


def config_in(folder):
    return json.loads((Path(folder) / "config.json").read_text())


@pytest.fixture
def convert(tmp_path):
    """A function that converts a checkpoint, or weights saved in one, to a new folder."""
    counter = iter(range(99))

    def convert(content, **kwargs):
        if not isinstance(content, Path):
            path = tmp_path / f"{next(counter)}.pt"
            torch.save(content, path)
            content = path
        return convert_reference_checkpoint(content, tmp_path / f"output-{next(counter)}", **kwargs)

    return convert


@pytest.fixture
def expected(checkpoint, convert):
    return weights_in(convert(checkpoint))


def assert_same_weights(folder, expected):
    weights = weights_in(folder)
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(weights[name], weight), name


# Converted


def test_the_output_is_a_complete_folder(checkpoint, tmp_path):
    folder = convert_reference_checkpoint(str(checkpoint), str(tmp_path / "new" / "output"))
    assert folder == tmp_path / "new" / "output"
    assert {path.name for path in folder.iterdir()} == MODEL_FILES
    config = config_in(folder)
    assert (config["pad_token_id"], config["bos_token_id"], config["decoder_start_token_id"]) == (0, 1, 1)
    assert config["eos_token_id"] is None
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is EncDecSLMForConditionalGeneration and not any(info.values()), info
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_texts_of_a_large_vocabulary_end_with_the_original_token(convert):
    folder = convert(make_weights(vocab_size=32128), model_config=HEADS)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 32000


def test_a_folder_with_one_checkpoint_is_enough(checkpoint, expected, convert, tmp_path):
    (tmp_path / "folder").mkdir()
    checkpoint.rename(tmp_path / "folder" / "model_12.pt")
    assert_same_weights(convert(tmp_path / "folder"), expected)


def test_a_checkpoint_without_a_config_gives_the_same_model(checkpoint, convert):
    others = {"model_config": {**HEADS, "block_size": 512}}
    folders = [convert(checkpoint), convert(make_weights(), **others)]
    folders.append(convert({"model_state_dict": make_weights()}, **others))
    for folder in folders:
        assert_same_weights(folder, weights_in(folders[0]))
        assert config_in(folder) == config_in(folders[0])


def test_heads_follow_from_what_is_stated(convert, save):
    assert config_in(convert(make_weights(), model_config={"n_head": 4}))["num_key_value_heads"] == 2
    released = config_in(convert(make_weights(query=384, key_value=192)))
    assert (released["num_attention_heads"], released["num_key_value_heads"], released["head_dim"]) == (6, 3, 64)
    assert (released["max_position_embeddings"], released["attention_dropout"]) == (1024, 0.1)
    as_wide = save(make_weights(query=16, key_value=8), model_config={**MU_CONFIG, "qkv_embd": None})
    assert config_in(convert(as_wide))["head_dim"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_kept(save, convert, dtype):
    folder = convert(save(make_weights(dtype), model_config=MU_CONFIG))
    assert {tensor.dtype for tensor in weights_in(folder).values()} == {dtype}
    assert config_in(folder)["dtype"] == str(dtype).removeprefix("torch.")


def test_mixed_dtypes_become_the_widest(save, convert):
    weights = make_weights(torch.bfloat16)
    weights["transformer.ln_e.weight"] = weights["transformer.ln_e.weight"].float()
    folder = convert(save(weights, model_config=MU_CONFIG))
    assert {tensor.dtype for tensor in weights_in(folder).values()} == {torch.float32}


def test_parameters_transposed_tensors_and_a_copied_head_are_accepted(save, convert, expected):
    weights = make_weights()
    for key in (BEFORE, "transformer.wte.weight"):
        weights[key] = torch.nn.Parameter(weights[key].T.contiguous().T)
    folder = convert(save(weights, model_config=MU_CONFIG))
    assert "lm_head.weight" not in weights_in(folder)
    assert_same_weights(folder, expected)


def add_inside(part):
    """Put a wrapper's name around each block, as FSDP and activation checkpointing do."""
    return lambda name: name.replace(".attn.", f".{part}.attn.").replace(".mlp.", f".{part}.mlp.")


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{add_inside('_fsdp_wrapped_module')(name)}",
        add_inside("_orig_mod"),
        add_inside("_checkpoint_wrapped_module._orig_mod"),
        lambda name: f"model.{name}",
        lambda name: f"module.student._orig_mod.{name}",
    ],
    ids=["ddp", "compiled", "ddp of compiled", "compiled ddp", "ddp twice", "fsdp", "blocks", "nested", "model", "kd"],
)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"model_state_dict": weights, "model_config": MU_CONFIG},
        lambda weights: {"model": weights, "optimizer": {"state": {}, "param_groups": []}, "model_config": MU_CONFIG},
        lambda weights: {"step": 3, "model_config": MU_CONFIG, "state_dict": {"module": weights}},
    ],
    ids=["original", "optimizer", "nested"],
)
def test_prefixes_of_wrappers_and_training_states_are_removed(convert, expected, rename, wrap):
    renamed = {rename(name): tensor for name, tensor in make_weights().items()}
    assert_same_weights(convert(wrap(renamed)), expected)


def test_averaged_weights_are_converted_and_weights_given_twice_refused(convert, expected, save, refused):
    averaged = {f"module.{name}": tensor for name, tensor in make_weights().items()}
    content = {"model_state_dict": {"n_averaged": torch.tensor(3), **averaged}, "model_config": MU_CONFIG}
    assert_same_weights(convert(content), expected)
    assert BEFORE in refused(save({**make_weights(), f"module.{BEFORE}": torch.ones(48, 16)}, model_config=MU_CONFIG))


def test_the_prompt_is_that_of_the_original():
    assert question_answering_prompt("Who {is} it?", "It is I.") == (
        "Answer the following question based only on the context.\n###Question\nWho {is} it?\n###Context\nIt is I.\n"
        "###Answer\n"
    )


# Refused: weights and configs


@pytest.mark.parametrize("others", [{"model_config": MU_CONFIG}, {}], ids=["with config", "without"])
def test_missing_extra_and_misshaped_weights_are_named_in_one_message(save, refused, others):
    weights = make_weights()
    del weights["transformer.ln_f.weight"]
    weights["transformer.p.weight"] = torch.ones(3)
    weights[AFTER] = torch.ones(17)
    message = refused(save(weights, **others), model_config=HEADS)
    for named in ("model.decoder.norm.weight", "transformer.p.weight", "down_proj.bias", "[17]", "[16]"):
        assert named in message


@pytest.mark.parametrize("key", ["transformer.wte.weight", "lm_head.weight", "transformer.e.0.attn.q_linear.weight"])
def test_each_single_weight_is_missed(save, refused, key):
    weights = make_weights()
    del weights[key]
    assert key in refused(save(weights, model_config=MU_CONFIG))


@pytest.mark.parametrize("shape", [(), (48,), (48, 16, 1), (0, 16), (47, 16)])
def test_a_weight_of_another_shape_is_refused(save, refused, shape):
    assert "q_proj" in refused(save({**make_weights(), BEFORE: torch.ones(shape)}), model_config=HEADS)


def test_long_lists_are_cut(save, refused):
    weights = {**make_weights(), **{f"extra.{index}": torch.ones(1) for index in range(1000)}}
    message = refused(save(weights, model_config=MU_CONFIG))
    assert "extra.0" in message and len(message) < 1500


@pytest.mark.parametrize("index", ["999999999", "9" * 5000])
def test_an_absurd_block_number_costs_nothing(save, refused, index):
    refused(save({**make_weights(), f"transformer.e.{index}.ln1.weight": torch.ones(16)}), model_config=HEADS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("n_encoder_layer", 3), ("n_decoder_layer", 2), ("n_embd", 32), ("hidden_dim", 25), ("vocab_size", 401)),
        *(("qkv_embd", 96), ("qkv_embd", None), ("n_encoder_layer", 10**11)),
    ],
)
def test_a_config_that_contradicts_the_shapes_is_refused(save, refused, name, value):
    assert f"{name} is " in refused(save(model_config={**MU_CONFIG, name: value}))


@pytest.mark.parametrize(("name", "value"), [("n_head", 5), ("n_head", 8), ("n_kv_head", 1)])
def test_heads_that_contradict_the_shapes_are_refused(save, refused, name, value):
    message = refused(save(model_config={**MU_CONFIG, name: value}))
    assert "_proj" in message or "num_attention_heads" in message


def test_heads_that_nobody_states_are_refused(save, refused):
    message = refused(save())
    assert "width 48" in message and "width 24" in message and '"n_head"' in message


@pytest.mark.parametrize(
    "change",
    [
        *({"unheard_of": 1}, {7: 1}, {"n_head": "4"}, {"n_head": 4.0}, {"n_head": 0}, {"n_embd": None}),
        *({"is_interleaved": 1}, {"dropout": float("nan")}, {"dropout": -0.1}, {"rope_theta": 10**400}),
        *({"rope_factor": float("inf")}, {"block_size": [1024]}, {"pad_token_id": -1}),
    ],
    ids=repr,
)
def test_invalid_fields_of_a_config_are_refused_by_name(save, refused, change):
    (name,) = change
    assert repr(name) in refused(save(model_config={**MU_CONFIG, **change}))
    assert repr(name) in refused(save(), model_config={**MU_CONFIG, **change})


@pytest.mark.parametrize("model_config", [["n_head", 4], "n_head", 4])
def test_a_config_that_is_no_mapping_is_refused(save, refused, model_config):
    assert type(model_config).__name__ in refused(save(model_config=model_config))


@pytest.mark.parametrize("change", [{"dropout": 1.0}, {"pad_token_id": 400}], ids=repr)
def test_values_that_make_no_model_are_refused(save, refused, change):
    assert "model_config" in refused(save(model_config={**MU_CONFIG, **change}))


def test_heads_of_widths_that_rotary_embeddings_lack_are_refused(save, refused):
    odd = save(make_weights(query=12, key_value=6), model_config={**MU_CONFIG, "qkv_embd": 12})
    assert "`head_dim` (3)" in refused(odd)
    narrow = {**MU_CONFIG, "qkv_embd": 8, "rope_factor": 2.0}
    assert "rope_factor" in refused(save(make_weights(query=8, key_value=4), model_config=narrow))


def test_a_given_config_must_agree_with_the_stored_one(checkpoint, refused, convert):
    message = refused(checkpoint, model_config={"n_head": 2, "rope_theta": 500.0})
    assert "n_head is 4 and 2" in message and "rope_theta is 10000 and 500.0" in message
    convert(checkpoint, model_config=HEADS)


def test_an_output_head_of_its_own_is_refused(save, refused):
    weights = make_weights()
    weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    weights["lm_head.weight"][399, 15] += 1
    assert "lm_head.weight" in refused(save(weights, model_config=MU_CONFIG))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: torch.ones(1, 1).expand(10**6, 10**6), "4,000,000,"),
        (lambda: torch.ones(48, 16, device="meta"), "meta"),
        (lambda: torch.ones(48, 16).to_sparse(), "sparse_coo"),
        (lambda: torch.ones(48, 16, dtype=torch.int64), "int64"),
        (lambda: torch.ones(48, 16, dtype=torch.complex64), "complex64"),
        (lambda: torch.quantize_per_tensor(torch.ones(48, 16), 0.1, 0, torch.qint8), "qint8"),
        (lambda: torch.nested.nested_tensor([torch.ones(48, 16)], layout=torch.jagged), "NestedTensor"),
        (lambda: torch.full((48, 16), float("nan")), "NaN"),
        (lambda: 7, "int"),
    ],
    ids=["stride 0", "meta", "sparse", "integer", "complex", "quantized", "nested", "NaN", "number"],
)
@pytest.mark.filterwarnings("ignore")  # of making such tensors
def test_tensors_that_are_no_weights_are_refused(save, refused, build, named):
    assert named in refused(save({**make_weights(), BEFORE: build()}, model_config=MU_CONFIG))


def test_tensors_that_share_their_memory_are_refused(save, refused):
    table = torch.ones(400, 16)
    shared = {f"transformer.e.{index}.mlp.fc1.weight": table for index in range(1000)}
    assert "25," in refused(save({**make_weights(), **shared}))


# Refused: files


def test_a_compressed_archive_is_refused_before_it_is_unpacked(refused, tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    assert "larger" in refused(tmp_path / "bomb.pt")


class Payload:
    """An object whose unpickling calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


WRITERS = {
    "zip": torch.save,
    "old": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "beside weights": lambda content, path: torch.save(
        {"model_state_dict": make_weights(), "model_config": MU_CONFIG, "score": content}, path
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["system", "eval", "nested exec"])
def test_a_pickle_with_a_payload_is_refused_and_not_executed(writer, kind, refused, tmp_path):
    planted, path = tmp_path / "planted", tmp_path / "model.pt"
    code = f"open({str(planted)!r}, 'w').close()"
    payload = {
        "system": Payload(os.system, f"touch {planted}"),
        "eval": Payload(builtins.eval, code),
        "nested exec": {"model_state_dict": {"a": Payload(builtins.exec, code)}},
    }[kind]
    WRITERS[writer](payload, path)
    message = refused(path)
    assert str(path) in message and "weights_only" not in message
    assert not planted.exists()
    if writer == "zip":  # the payload does work
        torch.load(path, weights_only=False)
        assert planted.exists()


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": 1}', bytes(range(256)) * 40, b"PK\x03\x04" + bytes(100), b"\x80\x02]q\x00."],
    ids=["empty", "JSON", "random", "zip header", "pickled list"],
)
def test_a_file_that_is_no_checkpoint_is_refused(content, refused, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    assert str(tmp_path / "model.pt") in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(checkpoint, refused, kept):
    os.truncate(checkpoint, int(checkpoint.stat().st_size * kept))
    assert str(checkpoint) in refused(checkpoint)


def test_a_damaged_checkpoint_is_refused_or_harmless(checkpoint, tmp_path):
    content, generator = checkpoint.read_bytes(), random.Random(0)
    for number in range(12):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 10, 1000))):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        checkpoint.write_bytes(damaged)
        try:
            convert_reference_checkpoint(checkpoint, tmp_path / f"output-{number}")
        except ValueError:
            assert not (tmp_path / f"output-{number}").exists()


def test_a_git_lfs_pointer_is_named(refused, tmp_path):
    (tmp_path / "model.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 664270379\n")
    assert "git lfs pull" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [{}, {"a": 1}, [torch.ones(1)], torch.ones(1), {1: torch.ones(1)}, {"model": {}}, {"model_state_dict": 1}],
    ids=repr,
)
def test_a_file_without_weights_is_refused(content, refused, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    assert "transformer.wte.weight" in refused(tmp_path / "model.pt")


def test_weights_of_another_model_are_refused(refused, tiny_model, tmp_path):
    torch.save(tiny_model.state_dict(), tmp_path / "model.pt")
    assert "transformer.wte.weight" in refused(tmp_path / "model.pt")


def test_no_file_no_checkpoint_and_two_of_them_are_refused(refused, tmp_path):
    assert "nowhere" in refused(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    assert "no checkpoint" in refused(tmp_path / "folder")
    for name in ("model_3.pt", "model_12.pt"):
        (tmp_path / "folder" / name).touch()
    assert "model_12.pt, model_3.pt" in refused(tmp_path / "folder")


# Folders


def test_overwrite_replaces_an_earlier_checkpoint_and_nothing_else(checkpoint, tmp_path):
    output = convert_reference_checkpoint(checkpoint, tmp_path / "output")
    with pytest.raises(ValueError, match="overwrite"):
        convert_reference_checkpoint(checkpoint, output)
    convert_reference_checkpoint(checkpoint, output, overwrite=True)
    (output / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        convert_reference_checkpoint(checkpoint, output, overwrite=True)
    assert {path.name for path in output.iterdir()} == {*MODEL_FILES, "thesis.tex"}


@pytest.mark.parametrize("output", ["source", ".", "link"])
def test_an_output_that_contains_the_checkpoint_is_refused(checkpoint, tmp_path, output):
    (tmp_path / "source").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "source")
    checkpoint.rename(tmp_path / "source" / "model.pt")
    before = sorted(tmp_path.rglob("*"))
    for path in (tmp_path / "source", tmp_path / "source" / "model.pt"):
        with pytest.raises(ValueError, match="contain each other"):
            convert_reference_checkpoint(path, tmp_path / output, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_changes_nothing(checkpoint, interruption, monkeypatch, tmp_path):
    output = convert_reference_checkpoint(checkpoint, tmp_path / "output")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupt(*args, **kwargs):
        raise interruption

    monkeypatch.setattr(EncDecSLMForConditionalGeneration, "save_pretrained", interrupt)
    for folder in (output, tmp_path / "new"):
        with pytest.raises(interruption):
            convert_reference_checkpoint(checkpoint, folder, overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


# Scaled rotary embeddings

# Powers of one base, computed in two ways.
POWERS = {"rtol": 1e-4, "atol": 1e-3}


def compute_frequencies(length, theta, factor, block_size, head_dim):
    """The original frequencies: the base grows with the length beyond the block (REFERENCE, `rope_factor`)."""
    ratio = factor * max(length, block_size) / block_size - (factor - 1)
    base = theta * ratio ** (head_dim / (head_dim - 2))
    return torch.tensor([base ** (-2 * index / head_dim) for index in range(head_dim // 2)])


@pytest.fixture
def scaled(save, convert):
    """A function that loads one more copy of a model whose frequencies are scaled beyond 16 tokens."""
    folder = convert(save(model_config={**MU_CONFIG, "rope_factor": 4.0, "block_size": 16}))
    return lambda: AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@pytest.fixture
def compute_logits(scaled):
    """A function for the logits of source and target with the frequencies of their lengths."""
    plain = EncDecSLMForConditionalGeneration(reference_config(MU_CONFIG, eos_token_id=None)).eval()
    plain.load_state_dict(scaled().state_dict())

    def compute_logits(source, target):
        for stack, ids in ((plain.model.encoder, source), (plain.model.decoder, target)):
            stack.rotary_emb.inv_freq.copy_(compute_frequencies(ids.shape[1], 10000.0, 4.0, 16, 12))
        return plain(source, decoder_input_ids=target).logits

    return compute_logits


def random_ids(*shape):
    return torch.randint(3, 400, shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize(("source_length", "target_length"), [(9, 5), (16, 16), (40, 7), (23, 31)])
def test_scaled_frequencies_are_those_of_the_original(scaled, compute_logits, source_length, target_length):
    source, target, model = random_ids(2, source_length), random_ids(2, target_length), scaled()
    for pair in ((source, target), (source[:, :9], target[:, :5])):  # a shorter call starts anew
        logits = model(pair[0], decoder_input_ids=pair[1]).logits
        torch.testing.assert_close(logits, compute_logits(*pair), **POWERS)


@torch.no_grad()
def test_scaled_generation_without_a_cache_is_that_of_the_original(scaled, compute_logits):
    source, target = random_ids(1, 20), torch.ones(1, 1, dtype=torch.long)
    options = {"do_sample": False, "max_length": 40}
    while target.shape[1] < 40:
        target = torch.cat([target, compute_logits(source, target)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(scaled().generate(source, use_cache=False, **options), target)
    assert not torch.equal(scaled().generate(source, **options), target)  # the documented limit


def test_a_factor_up_to_one_scales_nothing():
    for factor in (0.5, 1, 1.0):
        assert reference_config({**MU_CONFIG, "rope_factor": factor}).rope_parameters["rope_type"] == "default"
    scaled = reference_config({**MU_CONFIG, "rope_factor": 2}).rope_parameters
    assert scaled == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


# The command


def test_the_command_converts_writes_a_card_and_prints_how_to_load(checkpoint, tokenizer_folder, capsys, tmp_path):
    arguments = ["convert", str(checkpoint), str(tmp_path / "output"), "--tokenizer", str(tokenizer_folder)]
    assert main(arguments) == 0
    load = capsys.readouterr().out.splitlines()[-1].strip()
    model = eval(load, {"AutoModelForSeq2SeqLM": AutoModelForSeq2SeqLM})
    assert type(model) is EncDecSLMForConditionalGeneration
    card = (tmp_path / "output" / "README.md").read_text(encoding="utf-8")
    assert f"{model.num_parameters():,}" in card and "license: mit" in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(re.sub(r'"output"', repr(str(tmp_path / "output")), snippet), {})
    assert capsys.readouterr().out.strip()
    assert main(arguments) == 1
    assert main([*arguments, "--overwrite"]) == 0
