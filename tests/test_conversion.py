# SPDX-License-Identifier: Apache-2.0
"""What the converter accepts and refuses; that its models compute what the predecessor's do is in test_golden_text."""

import builtins
import json
import os
import pickle
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from encdec_slm_cli import main
from reference_files import HEADS, MODEL_FILES, MU_CONFIG, make_weights
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.conversion import convert_reference_checkpoint, question_answering_prompt, reference_config


ROOT = Path(__file__).parent.parent
BEFORE, AFTER = "transformer.e.1.attn.q_linear.weight", "transformer.h.0.mlp.fc2.bias"


def weights_in(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(folder, other):
    weights, others = weights_in(folder), weights_in(other)
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def test_the_output_is_a_complete_folder(checkpoint, tmp_path):
    folder = convert_reference_checkpoint(str(checkpoint), str(tmp_path / "new" / "output"))
    assert folder == tmp_path / "new" / "output"
    assert {path.name for path in folder.iterdir()} == MODEL_FILES
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert (config["pad_token_id"], config["bos_token_id"], config["decoder_start_token_id"]) == (0, 1, 1)
    assert config["eos_token_id"] is None
    model, info = AutoModelForSeq2SeqLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert f"| {sum(p.numel() for p in model.parameters()):,} |" in (folder / "README.md").read_text()


def test_a_large_vocabulary_ends_texts_with_the_predecessors_token(save, tmp_path):
    weights = make_weights(vocab_size=32128)
    folder = convert_reference_checkpoint(save(weights), tmp_path / "output", model_config=HEADS)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 32000


def test_a_folder_with_one_checkpoint_will_do(checkpoint, tmp_path):
    convert_reference_checkpoint(checkpoint, tmp_path / "expected")
    (tmp_path / "folder").mkdir()
    checkpoint.rename(tmp_path / "folder" / "model_12.pt")
    convert_reference_checkpoint(tmp_path / "folder", tmp_path / "output")
    assert_same_weights(tmp_path / "output", tmp_path / "expected")


@pytest.mark.parametrize("is_bare", [True, False])
def test_a_checkpoint_without_a_config_gives_the_same_model(checkpoint, is_bare, tmp_path):
    convert_reference_checkpoint(checkpoint, tmp_path / "expected")
    weights = make_weights()
    torch.save(weights if is_bare else {"model_state_dict": weights}, tmp_path / "bare.pt")
    others = {"block_size": 512}
    convert_reference_checkpoint(tmp_path / "bare.pt", tmp_path / "output", model_config={**HEADS, **others})
    assert_same_weights(tmp_path / "output", tmp_path / "expected")
    config = (tmp_path / "output" / "config.json").read_text()
    assert config == (tmp_path / "expected" / "config.json").read_text()


def test_key_value_heads_follow_from_query_heads(save, tmp_path):
    folder = convert_reference_checkpoint(save(), tmp_path / "output", model_config={"n_head": 4})
    assert json.loads((folder / "config.json").read_text())["num_key_value_heads"] == 2


def test_the_released_widths_tell_the_released_heads(save, tmp_path):
    folder = convert_reference_checkpoint(save(make_weights(query=384, key_value=192)), tmp_path / "output")
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (6, 3, 64)
    assert (config["max_position_embeddings"], config["attention_dropout"]) == (1024, 0.1)


def test_queries_as_wide_as_the_model_need_no_width_of_their_own(save, tmp_path):
    path = save(make_weights(query=16, key_value=8), model_config={**MU_CONFIG, "qkv_embd": None})
    folder = convert_reference_checkpoint(path, tmp_path / "output")
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 4


def test_other_widths_need_the_heads_to_be_said(save, refused):
    message = refused(save())
    assert "width 48" in message and "width 24" in message and '"n_head"' in message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_kept(save, dtype, tmp_path):
    path = save(make_weights(dtype), model_config=MU_CONFIG)
    convert_reference_checkpoint(path, tmp_path / "output")
    assert {tensor.dtype for tensor in weights_in(tmp_path / "output").values()} == {dtype}
    assert json.loads((tmp_path / "output" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_an_output_head_with_a_copy_of_the_embeddings_is_tied_again(save, checkpoint, tmp_path):
    convert_reference_checkpoint(checkpoint, tmp_path / "expected")
    weights = make_weights()
    weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    convert_reference_checkpoint(save(weights, model_config=MU_CONFIG), tmp_path / "output")
    assert "lm_head.weight" not in weights_in(tmp_path / "output")
    assert_same_weights(tmp_path / "output", tmp_path / "expected")


def test_mixed_dtypes_become_the_widest(save, tmp_path):
    weights = make_weights(torch.bfloat16)
    weights["transformer.ln_e.weight"] = weights["transformer.ln_e.weight"].float()
    convert_reference_checkpoint(save(weights, model_config=MU_CONFIG), tmp_path / "output")
    assert {tensor.dtype for tensor in weights_in(tmp_path / "output").values()} == {torch.float32}


@pytest.mark.parametrize("key", [BEFORE, "transformer.e.0.mlp.fc1.weight", "transformer.wte.weight"])
def test_trainable_and_transposed_tensors_are_weights_too(save, checkpoint, key, tmp_path):
    convert_reference_checkpoint(checkpoint, tmp_path / "expected")
    weights = make_weights()
    changed = torch.nn.Parameter(weights[key].T.contiguous().T)
    weights |= {other: changed for other, tensor in weights.items() if tensor is weights[key]}
    convert_reference_checkpoint(save(weights, model_config=MU_CONFIG), tmp_path / "output")
    assert_same_weights(tmp_path / "output", tmp_path / "expected")


@pytest.mark.parametrize("others", [{"model_config": MU_CONFIG}, {}], ids=["with config", "without"])
def test_missing_extra_and_misshaped_weights_are_listed_in_one_message(save, refused, others):
    weights = make_weights()
    del weights[BEFORE], weights["transformer.ln_f.weight"]
    weights["transformer.p.weight"] = torch.ones(3)
    weights[AFTER] = torch.ones(17)
    message = refused(save(weights, **others), model_config=HEADS)
    assert f"2 missing: 'transformer.ln_f.weight', '{BEFORE}'" in message
    assert "1 left over: 'transformer.p.weight'" in message
    assert f"1 of another shape: '{AFTER}' (17,) instead of (16,)" in message


@pytest.mark.parametrize("key", ["transformer.wte.weight", "lm_head.weight", "transformer.e.0.ln1.weight"])
def test_each_single_weight_is_missed(save, refused, key):
    weights = make_weights()
    del weights[key]
    assert f"1 missing: '{key}'" in refused(save(weights, model_config=MU_CONFIG))


@pytest.mark.parametrize("shape", [(), (48,), (48, 16, 1), (0, 16), (47, 16)])
def test_one_weight_of_another_shape_is_listed_with_both(save, refused, shape):
    weights = {**make_weights(), BEFORE: torch.ones(shape)}
    assert f"1 of another shape: '{BEFORE}' {shape} instead of (48, 16)" in refused(save(weights), model_config=HEADS)


def test_a_missing_block_is_listed_beside_the_contradiction(save, refused):
    weights = {key: tensor for key, tensor in make_weights().items() if ".e.1." not in key}
    message = refused(save(weights, model_config=MU_CONFIG))
    assert "n_encoder_layer: the shapes say 1, the config says 2" in message
    assert "'transformer.e.1.ln1.weight'" in message


def test_long_lists_are_cut(save, refused):
    weights = {**make_weights(), **{f"extra.{index}": torch.ones(1) for index in range(1000)}}
    message = refused(save(weights, model_config=MU_CONFIG))
    assert "1,000 left over: 'extra.0'" in message and "'extra.9' and 990 more" in message
    assert "extra.10'" not in message


@pytest.mark.parametrize("index", ["999999999", "9" * 5000])
def test_an_absurd_block_number_costs_nothing(save, refused, index):
    hostile = {f"transformer.e.{index}.x": torch.ones(1), f"transformer.h.{index}.ln1.weight": torch.ones(16)}
    weights = {**make_weights(), **hostile}
    start = time.perf_counter()
    message = refused(save(weights), model_config=HEADS)
    assert "transformer.e.999" in message and "left over" in message and len(message) < 5000
    assert time.perf_counter() - start < 5


def test_a_key_that_is_no_weight_of_a_block_makes_no_block(save, refused):
    message = refused(save({**make_weights(), "transformer.e.2.x": torch.ones(1)}), model_config=HEADS)
    assert "1 left over: 'transformer.e.2.x'" in message and "missing" not in message


def test_an_absurd_depth_in_the_config_costs_nothing(save, refused):
    path = save(model_config={**MU_CONFIG, "n_encoder_layer": 10**11})
    assert "n_encoder_layer: the shapes say 2, the config says 100000000000" in refused(path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n_encoder_layer", 3, "n_encoder_layer: the shapes say 2, the config says 3"),
        ("n_decoder_layer", 2, "n_decoder_layer: the shapes say 1, the config says 2"),
        ("n_embd", 32, "n_embd: the shapes say 16, the config says 32"),
        ("hidden_dim", 25, "hidden_dim: the shapes say 24, the config says 25"),
        ("vocab_size", 401, "vocab_size: the shapes say 400, the config says 401"),
        ("qkv_embd", 96, "qkv_embd: the shapes say 48, the config says 96"),
        ("qkv_embd", None, "qkv_embd: the shapes say 48, the config says None"),
        ("n_head", 5, "qkv_embd: the shapes say 48, the config says 48 for 5 heads"),
        ("n_head", 8, "n_kv_head: the shapes say keys of width 24, the config says 2 heads of width 6"),
        ("n_kv_head", 1, "n_kv_head: the shapes say keys of width 24, the config says 1 heads of width 12"),
    ],
)
def test_a_stored_config_that_contradicts_the_shapes_is_refused(save, refused, name, value, said):
    assert said in refused(save(model_config={**MU_CONFIG, name: value}))


def test_all_contradictions_stand_in_one_message(save, refused):
    message = refused(save(model_config={**MU_CONFIG, "n_embd": 32, "hidden_dim": 25, "vocab_size": 401}))
    assert all(f"{name}: the shapes say" in message for name in ("n_embd", "hidden_dim", "vocab_size"))


def test_heads_that_do_not_divide_are_refused(save, refused):
    message = refused(save(make_weights(query=50), model_config={**HEADS, "n_kv_head": 2}))
    assert "n_head: the shapes say queries of width 50, the config says 4 heads" in message


@pytest.mark.parametrize(
    "change",
    [
        {"unheard_of": 1},
        {7: 1},
        {"n_head": "4"},
        {"n_head": 4.0},
        {"n_head": True},
        {"n_head": 0},
        {"n_embd": None},
        {"is_interleaved": 1},
        {"dropout": float("nan")},
        {"dropout": -0.1},
        {"rope_theta": 10**400},
        {"rope_factor": float("inf")},
        {"block_size": [1024]},
        {"pad_token_id": -1},
    ],
    ids=repr,
)
def test_what_no_config_holds_is_refused_by_name(save, refused, change):
    (name,) = change
    assert repr(name) in refused(save(model_config={**MU_CONFIG, **change}))
    assert repr(name) in refused(save(), model_config={**MU_CONFIG, **change})


@pytest.mark.parametrize("model_config", [["n_head", 4], "n_head", 4])
def test_a_config_that_is_no_mapping_is_refused(save, refused, model_config):
    assert "must map names to values" in refused(save(model_config=model_config))


@pytest.mark.parametrize("change", [{"dropout": 1.0}, {"pad_token_id": 400}], ids=repr)
def test_values_that_make_no_model_are_refused(save, refused, change):
    assert "make no model" in refused(save(model_config={**MU_CONFIG, **change}))


def test_odd_heads_are_refused(save, refused):
    message = refused(save(make_weights(query=12, key_value=6), model_config={**MU_CONFIG, "qkv_embd": 12}))
    assert "`head_dim` (3) must be even" in message


def test_a_given_config_must_agree_with_the_stored_one(checkpoint, refused, tmp_path):
    message = refused(checkpoint, model_config={"n_head": 2, "rope_theta": 500.0})
    assert "n_head is 2 and there 4" in message and "rope_theta is 500.0 and there 10000" in message
    convert_reference_checkpoint(checkpoint, tmp_path / "output", model_config=HEADS)


def test_an_output_head_of_its_own_is_refused(save, refused):
    weights = make_weights()
    weights["lm_head.weight"] = weights["lm_head.weight"].clone()
    weights["lm_head.weight"][399, 15] += 1
    assert "'lm_head.weight' differs from 'transformer.wte.weight'" in refused(save(weights, model_config=MU_CONFIG))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.ones(1, 1).expand(10**6, 10**6), "claims the shape (1000000, 1000000) with 4 bytes of data"),
        (lambda: torch.ones(48, 16, device="meta"), "on the device meta"),
        (lambda: torch.ones(48, 16).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.ones(48, 16, dtype=torch.int64), "torch.int64"),
        (lambda: torch.ones(48, 16, dtype=torch.complex64), "torch.complex64"),
        (lambda: torch.quantize_per_tensor(torch.ones(48, 16), 0.1, 0, torch.qint8), "torch.qint8"),
        (lambda: torch.nested.nested_tensor([torch.ones(48, 16)], layout=torch.jagged), "is a NestedTensor"),
        (lambda: torch.full((48, 16), float("nan")), "holds NaN or infinity"),
    ],
    ids=["stride 0", "meta", "sparse", "integer", "complex", "quantized", "nested", "NaN"],
)
@pytest.mark.filterwarnings("ignore")  # of making such tensors
def test_tensors_that_are_no_weights_are_refused_by_name(save, refused, make, said):
    message = refused(save({**make_weights(), BEFORE: make()}, model_config=MU_CONFIG))
    assert f"{BEFORE!r}" in message and said in message


def test_tensors_that_share_their_memory_are_refused(save, refused):
    table = torch.ones(400, 16)
    weights = {f"transformer.e.{index}.mlp.fc1.weight": table for index in range(1000)}
    assert "claims 25,600,000 bytes of the 25,600 that there are" in refused(save(weights))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(refused, tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    assert "its entries are larger than itself" in refused(tmp_path / "bomb.pt")


class Payload:
    """What it is pickled as is called by whoever unpickles it."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class OfAnotherPackage:
    pass


def save_zip(content, path):
    torch.save(content, path)


def save_old(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_pickle(content, path):
    path.write_bytes(pickle.dumps(content))


def save_beside_weights(content, path):
    torch.save({"model_state_dict": make_weights(), "model_config": MU_CONFIG, "score": content}, path)


@pytest.mark.parametrize("writer", [save_zip, save_old, save_pickle, save_beside_weights])
@pytest.mark.parametrize("kind", ["os.system", "eval", "exec in the state dict"])
def test_a_pickle_with_a_payload_is_refused_and_not_executed(writer, kind, refused, tmp_path):
    planted = tmp_path / "planted"
    payload = {
        "os.system": Payload(os.system, f"touch {planted}"),
        "eval": Payload(builtins.eval, f"open({str(planted)!r}, 'w').close()"),
        "exec in the state dict": {
            "model_state_dict": {"a": Payload(builtins.exec, f"open({str(planted)!r}, 'w').close()")}
        },
    }[kind]
    path = tmp_path / "model.pt"
    writer(payload, path)
    message = refused(path)
    assert str(path) in message and "not executed" in message and "weights_only" not in message
    assert not planted.exists()
    if writer is save_zip:  # the payload does work
        torch.load(path, weights_only=False)
        assert planted.exists()


@pytest.mark.parametrize("writer", [save_zip, save_old, save_pickle])
def test_an_object_of_a_foreign_class_is_refused(writer, refused, tmp_path):
    writer({"model_state_dict": OfAnotherPackage()}, tmp_path / "model.pt")
    assert "could not be read" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": 1}', bytes(range(256)) * 40, b"PK\x03\x04" + bytes(100), b"\x80\x02]q\x00."],
    ids=["empty", "JSON", "random", "zip header", "pickled list"],
)
def test_a_file_that_is_no_checkpoint_is_refused(content, refused, tmp_path):
    (tmp_path / "model.pt").write_bytes(content)
    assert f"{str(tmp_path / 'model.pt')!r} could not be read" in refused(tmp_path / "model.pt")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(checkpoint, refused, kept):
    os.truncate(checkpoint, int(checkpoint.stat().st_size * kept))
    assert "could not be read" in refused(checkpoint)


def test_a_pointer_of_git_lfs_is_told_from_weights(refused, tmp_path):
    (tmp_path / "model.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 664270379\n")
    assert "git lfs pull" in refused(tmp_path / "model.pt")


SOMETHING_ELSE = [{}, {"a": 1}, [torch.ones(1)], torch.ones(1), {1: torch.ones(1)}]


@pytest.mark.parametrize("content", [*SOMETHING_ELSE, {"model_state_dict": {}}, {"model_state_dict": 1}], ids=repr)
def test_a_file_of_something_else_is_refused(content, refused, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    assert "a checkpoint holds named tensors" in refused(tmp_path / "model.pt")


def test_weights_of_another_model_are_refused(refused, tiny_model, tmp_path):
    torch.save(tiny_model.state_dict(), tmp_path / "model.pt")
    assert "no text model of the predecessor" in refused(tmp_path / "model.pt")


def test_no_file_and_no_checkpoint_and_two_of_them_are_refused(refused, tmp_path):
    assert "There is no file or folder" in refused(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    assert "holds no checkpoint" in refused(tmp_path / "folder")
    for name in ("model_3.pt", "model_12.pt"):
        (tmp_path / "folder" / name).touch()
    assert "holds 2 checkpoints (model_12.pt, model_3.pt)" in refused(tmp_path / "folder")


def test_a_folder_in_use_is_refused_unless_it_may_be_overwritten(checkpoint, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "config.json").write_text("old")
    with pytest.raises(ValueError, match="not empty"):
        convert_reference_checkpoint(checkpoint, tmp_path / "output")
    assert (tmp_path / "output" / "config.json").read_text() == "old"
    convert_reference_checkpoint(checkpoint, tmp_path / "output", overwrite=True)
    assert {path.name for path in (tmp_path / "output").iterdir()} == MODEL_FILES


def test_a_folder_in_use_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "model.pt").write_text("no checkpoint")
    with pytest.raises(ValueError, match="not empty"):
        convert_reference_checkpoint(tmp_path / "model.pt", tmp_path)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("step", ["converted_card", "convert_reference_state_dict"])
def test_an_interrupted_conversion_leaves_no_folder(checkpoint, interruption, step, monkeypatch, tmp_path):
    def interrupt(*args):
        raise interruption

    monkeypatch.setattr(f"encdec_slm.conversion.{step}", interrupt)
    with pytest.raises(interruption):
        convert_reference_checkpoint(checkpoint, tmp_path / "output")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_an_interrupted_conversion_leaves_what_was_there(checkpoint, monkeypatch, tmp_path):
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("encdec_slm.conversion.converted_card", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert_reference_checkpoint(checkpoint, folder, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# Powers of one base, computed in two ways.
POWERS = {"rtol": 1e-4, "atol": 1e-3}


def frequencies(length, theta, factor, block_size, head_dim):
    """The predecessor's, written down plainly: the base grows with the length beyond the block."""
    ratio = factor * max(length, block_size) / block_size - (factor - 1)
    base = theta * ratio ** (head_dim / (head_dim - 2))
    return torch.tensor([base ** (-2 * index / head_dim) for index in range(head_dim // 2)])


@pytest.fixture
def scaled(save, tmp_path):
    """A function that loads one more copy of a model whose frequencies are scaled beyond 16 tokens."""
    path = save(model_config={**MU_CONFIG, "rope_factor": 4.0, "block_size": 16})
    folder = convert_reference_checkpoint(path, tmp_path / "output")
    return lambda: AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@pytest.fixture
def as_written_down(scaled):
    """A function for the logits of source and target with the frequencies of their lengths."""
    plain = EncDecSLMForConditionalGeneration(reference_config(MU_CONFIG, eos_token_id=None)).eval()
    plain.load_state_dict(scaled().state_dict())

    def logits(source, target):
        for stack, ids in ((plain.model.encoder, source), (plain.model.decoder, target)):
            stack.rotary_emb.inv_freq.copy_(frequencies(ids.shape[1], 10000.0, 4.0, 16, 12))
        return plain(source, decoder_input_ids=target).logits

    return logits


def random_ids(*shape):
    return torch.randint(3, 400, shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize(("source_length", "target_length"), [(9, 5), (16, 16), (40, 7), (23, 31)])
def test_scaled_frequencies_are_the_predecessors(scaled, as_written_down, source_length, target_length):
    source, target = random_ids(2, source_length), random_ids(2, target_length)
    model = scaled()
    logits = model(source, decoder_input_ids=target).logits
    torch.testing.assert_close(logits, as_written_down(source, target), **POWERS)
    # A shorter call begins anew.
    source, target = source[:, :9], target[:, :5]
    logits = model(source, decoder_input_ids=target).logits
    torch.testing.assert_close(logits, as_written_down(source, target), **POWERS)


@torch.no_grad()
def test_scaled_generation_without_a_cache_is_the_predecessors(scaled, as_written_down):
    source, target = random_ids(1, 20), torch.ones(1, 1, dtype=torch.long)
    options = {"do_sample": False, "max_length": 40}
    while target.shape[1] < 40:
        target = torch.cat([target, as_written_down(source, target)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(scaled().generate(source, use_cache=False, **options), target)
    assert not torch.equal(scaled().generate(source, **options), target)  # the limit that is documented


@torch.no_grad()
def test_scaled_frequencies_stay_as_long_as_calls_are_no_shorter_than_the_block(scaled):
    source, target = random_ids(1, 40), random_ids(1, 5)
    expected = scaled()(source[:, :20], decoder_input_ids=target).logits
    model = scaled()
    model(source, decoder_input_ids=target)
    assert not torch.allclose(model(source[:, :20], decoder_input_ids=target).logits, expected, **POWERS)


def test_a_factor_up_to_one_scales_nothing():
    for factor in (0.5, 1, 1.0):
        assert reference_config({**MU_CONFIG, "rope_factor": factor}).rope_parameters["rope_type"] == "default"
    scaled = reference_config({**MU_CONFIG, "rope_factor": 2}).rope_parameters
    assert scaled == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def test_heads_too_narrow_to_scale_are_refused(save, refused):
    path = save(make_weights(query=8, key_value=4), model_config={**MU_CONFIG, "qkv_embd": 8, "rope_factor": 2.0})
    assert "heads that are 2 wide" in refused(path)


def test_the_prompt_is_the_predecessors():
    assert question_answering_prompt("Who {is} it?", "It is I.") == (
        "Answer the following question based only on the context.\n###Question\nWho {is} it?\n###Context\nIt is I.\n"
        "###Answer\n"
    )


def test_the_card_works_in_a_process_without_the_package(checkpoint, tokenizer_folder, tmp_path):
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer_folder)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = question_answering_prompt("What is the capital?", "The capital is Denver.")
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=64, do_sample=False)[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    script = (
        "import sys; from hub_worker import PackageIsNotInstalled; sys.meta_path.insert(0, PackageIsNotInstalled())\n"
        + snippet.replace("path/or/name/of/this/repository", str(folder))
        + "assert type(pipe.model).__module__.startswith('transformers_modules.')\n"
    )
    own = {"PYTHONPATH": str(ROOT / "tests"), "HF_HOME": str(tmp_path / "hf"), "PYTHONUTF8": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **own, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    written = tokenizer.decode(ids, skip_special_tokens=True)
    assert written and run.stdout == f"{written}\n"


def test_the_command_converts_and_says_how_to_load(checkpoint, tokenizer_folder, capsys, tmp_path):
    arguments = ["convert", str(checkpoint), str(tmp_path / "output"), "--tokenizer", str(tokenizer_folder)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "tokenizer.json" in printed
    load = printed.splitlines()[-1].strip()
    assert type(eval(load, {"AutoModelForSeq2SeqLM": AutoModelForSeq2SeqLM})) is EncDecSLMForConditionalGeneration
    assert main(arguments) == 1
    assert main([*arguments, "--overwrite"]) == 0
