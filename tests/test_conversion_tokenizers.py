# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of converted checkpoints."""

import json
import shutil

import pytest
from reference_files import MODEL_FILES, MU_CONFIG, make_weights
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from encdec_slm.conversion import convert_reference_checkpoint


TEXTS = [
    *(" ", "  lead", "Denver</s>  bar", "<|user|>\nhi", "x<unk>y", "a  b", "é 漢", "hello world"),
    *("hi<|endoftext|> ho", "<s>hi</s> there", "", "trail ", "\ttab\nline", "🙂", "###Answer\n"),
]


def assert_same_ids(tokenizer, original):
    for text in TEXTS:
        ids = original.encode(text).ids
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(ids), text


def test_ids_are_the_original_ones_where_transformers_gives_others(checkpoint, tokenizer_folder, original, tmp_path):
    rebuilt = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert [text for text in TEXTS if rebuilt(text)["input_ids"] != original.encode(text).ids]
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert_same_ids(tokenizer, original)
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert special == ("<unk>", "<s>", "<|endoftext|>", "<unk>")
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("right", 8192)
    config = json.loads((folder / "config.json").read_text())
    eos_token_id = original.token_to_id("<|endoftext|>")
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, eos_token_id)
    tokenizer.save_pretrained(tmp_path / "again")
    assert_same_ids(AutoTokenizer.from_pretrained(tmp_path / "again"), original)


def load_beside(folder, original, tmp_path):
    shutil.copy(folder / "tokenizer.json", tmp_path)


def load_rebuilt(folder, original, tmp_path):
    return AutoTokenizer.from_pretrained(folder)


def load_in_memory(folder, original, tmp_path):
    return PreTrainedTokenizerFast(tokenizer_object=original, padding_side="left")


def load_padded(folder, original, tmp_path):
    padded = Tokenizer.from_str(original.to_str())
    padded.enable_padding(length=12)
    padded.enable_truncation(2)
    padded.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("load", [load_beside, load_rebuilt, load_in_memory, load_padded])
def test_each_way_to_give_a_tokenizer_gives_the_original_ids(load, checkpoint, tokenizer_folder, original, tmp_path):
    tokenizer = load(tokenizer_folder, original, tmp_path)
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer)
    converted = AutoTokenizer.from_pretrained(folder)
    assert_same_ids(converted, original)
    assert (converted.pad_token, converted.eos_token, converted.padding_side) == ("<unk>", "<|endoftext|>", "right")


def test_the_padding_token_is_the_one_that_the_model_pads_with(save, tokenizer_folder, tmp_path):
    path = save(model_config={**MU_CONFIG, "pad_token_id": 2})
    folder = convert_reference_checkpoint(path, tmp_path / "output", tokenizer=tokenizer_folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 2


def test_targets_start_with_the_token_of_the_tokenizer(checkpoint, tmp_path):
    words = models.WordLevel({"<unk>": 0, "a": 1, "<s>": 5}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["decoder_start_token_id"], config["eos_token_id"]) == (5, 5, None)


@pytest.fixture
def warnings(caplog, monkeypatch):
    # transformers' loggers, of which this is one, do not propagate to the root, where caplog listens.
    monkeypatch.setattr("encdec_slm.conversion_tokenizers.logger.handlers", [caplog.handler])
    return caplog


def test_warnings_say_what_to_do(checkpoint, tokenizer_folder, warnings, tmp_path):
    convert_reference_checkpoint(checkpoint, tmp_path / "without")
    assert "`tokenizer`" in warnings.messages[-1]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.name_or_path = "somewhere/else"
    convert_reference_checkpoint(checkpoint, tmp_path / "rebuilt", tokenizer=tokenizer)
    assert "LlamaTokenizer" in warnings.messages[-1]


def test_a_name_on_the_hub_is_downloaded(checkpoint, tokenizer_folder, original, monkeypatch, tmp_path):
    snapshot = tmp_path / "models--someone--tokenizer" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--tokenizer" / "refs").mkdir()
    (tmp_path / "models--someone--tokenizer" / "refs" / "main").write_text("abc")
    for file in tokenizer_folder.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer="someone/tokenizer")
    assert not any(file.is_symlink() for file in folder.iterdir())
    assert_same_ids(AutoTokenizer.from_pretrained(folder), original)


def test_only_the_tokenizer_itself_is_taken_from_its_folder(checkpoint, tokenizer_folder, tmp_path):
    for name in ("tokenizer_code.py", "tokenizer.pkl", "notes.json"):
        (tokenizer_folder / name).touch()
    config = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenizer_code.Tokenizer", None]}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(config))
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer_folder)
    assert {path.name for path in folder.iterdir()} == MODEL_FILES | {"tokenizer.json", "tokenizer_config.json"}
    assert "auto_map" not in (folder / "tokenizer_config.json").read_text()


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(save, tokenizer_folder, refused, original):
    size = original.get_vocab_size()
    path = save(make_weights(vocab_size=size - 1), model_config={**MU_CONFIG, "vocab_size": size - 1})
    message = refused(path, tokenizer=tokenizer_folder)
    assert f"{size} tokens" in message and f"{size - 1}" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [*(("tokenizer.json", content) for content in ("", "{", "[]", '{"model": 1}')), ("tokenizer_config.json", "{")],
)
def test_damaged_tokenizer_files_are_refused(checkpoint, tokenizer_folder, refused, name, content):
    (tokenizer_folder / name).write_text(content)
    assert name in refused(checkpoint, tokenizer=tokenizer_folder)


def test_what_is_no_tokenizer_is_refused(checkpoint, tokenizer_folder, refused, tmp_path):
    assert "file" in refused(checkpoint, tokenizer=tokenizer_folder / "tokenizer.json")
    assert "no folder" in refused(checkpoint, tokenizer=tmp_path / "nowhere")
    with pytest.raises(TypeError, match="`tokenizer` is a int"):
        convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=7)
    (tokenizer_folder / "tokenizer.json").rename(tokenizer_folder / "tokenizer.model")
    assert "tokenizer.json" in refused(checkpoint, tokenizer=tokenizer_folder)
