# SPDX-License-Identifier: Apache-2.0
"""Which tokenizer a converted checkpoint gets."""

import json
import shutil
from pathlib import Path

import pytest
from reference_files import MODEL_FILES, MU_CONFIG, make_weights
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from encdec_slm.conversion import convert_reference_checkpoint


TEXTS = [
    *(" ", "  lead", "Denver</s>  bar", "<|user|>\nhi", "x<unk>y", "a  b", "é 漢", "hello world"),
    *("hi<|endoftext|> ho", "<s>hi</s> there", ""),
]


def change_config(folder, **changes):
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, **changes}))


def assert_reads_as(tokenizer, original):
    for text in TEXTS:
        ids = original.encode(text).ids
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids, skip_special_tokens=True) == original.decode(ids), text


def test_ids_are_the_originals_where_transformers_gives_others(checkpoint, tokenizer_folder, original, tmp_path):
    rebuilt = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert [text for text in TEXTS if rebuilt(text)["input_ids"] != original.encode(text).ids]
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer_folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert_reads_as(tokenizer, original)
    assert (folder / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert special == ("<unk>", "<s>", "<|endoftext|>", "<unk>")
    assert tokenizer.padding_side == "right"
    config = json.loads((folder / "config.json").read_text())
    eos_token_id = original.token_to_id("<|endoftext|>")
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (0, 1, eos_token_id)
    tokenizer.save_pretrained(tmp_path / "again")
    assert_reads_as(AutoTokenizer.from_pretrained(tmp_path / "again"), original)


def test_padding_is_the_unknown_token_only_where_the_model_pads_with_its_id(save, tokenizer_folder, tmp_path):
    path = save(model_config={**MU_CONFIG, "pad_token_id": 2})
    folder = convert_reference_checkpoint(path, tmp_path / "output", tokenizer=tokenizer_folder)
    assert AutoTokenizer.from_pretrained(folder).pad_token == "<|endoftext|>"


def test_targets_begin_with_the_tokenizers_own_beginning(checkpoint, tmp_path):
    words = models.WordLevel({"<unk>": 0, "a": 1, "<s>": 5}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer)
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["decoder_start_token_id"], config["eos_token_id"]) == (5, 5, None)


def test_padding_and_truncation_in_the_file_are_no_mismatch(checkpoint, tokenizer_folder, original, tmp_path):
    other = Tokenizer.from_str(original.to_str())
    other.enable_padding(length=12)
    other.enable_truncation(2)
    other.save(str(tokenizer_folder / "tokenizer.json"))
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer_folder)
    assert_reads_as(AutoTokenizer.from_pretrained(folder), original)


def test_a_tokenizer_beside_the_checkpoint_is_taken(checkpoint, tokenizer_folder, original, tmp_path):
    shutil.copy(tokenizer_folder / "tokenizer.json", tmp_path)
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output")
    assert_reads_as(AutoTokenizer.from_pretrained(folder), original)


def test_a_tokenizer_in_memory_is_written_as_it_is(checkpoint, original, tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=original, padding_side="left")
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert_reads_as(loaded, original)
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == ("<unk>", "<|endoftext|>", "right")


def test_of_a_tokenizer_that_transformers_rebuilt_the_files_are_taken(
    checkpoint, tokenizer_folder, original, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer)
    assert_reads_as(AutoTokenizer.from_pretrained(folder), original)


def test_a_rebuilt_tokenizer_without_its_files_is_warned_of(checkpoint, tokenizer_folder, warnings_of_ours, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.name_or_path = "somewhere/else"
    convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer)
    assert any("Give its folder or name instead" in message for message in warnings_of_ours.messages)


def test_a_missing_tokenizer_is_warned_of(checkpoint, warnings_of_ours, tmp_path):
    convert_reference_checkpoint(checkpoint, tmp_path / "output")
    assert any("Convert it again with `tokenizer=`" in message for message in warnings_of_ours.messages)


@pytest.fixture
def warnings_of_ours(caplog, monkeypatch):
    # transformers' loggers, of which ours is one, do not reach the root, where caplog listens.
    monkeypatch.setattr("encdec_slm.conversion.logger.handlers", [caplog.handler])
    return caplog


def test_a_name_on_the_hub_is_downloaded(checkpoint, tokenizer_folder, original, monkeypatch, tmp_path):
    snapshot = tmp_path / "cache" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    tokenizer_folder.rename(tmp_path / "cache" / "blobs")
    for file in (tmp_path / "cache" / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    asked = []
    monkeypatch.setattr(
        "encdec_slm.checkpoint_folders.snapshot_download", lambda name, **kwargs: asked.append(name) or str(snapshot)
    )
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer="someone/tokenizer")
    assert asked == ["someone/tokenizer"]
    assert not any(file.is_symlink() for file in folder.iterdir())
    assert_reads_as(AutoTokenizer.from_pretrained(folder), original)


def test_only_tokenizer_files_of_the_folder_itself_are_copied(checkpoint, tokenizer_folder, tmp_path):
    for name in ("tokenizer_code.py", "tokenizer.pkl", "notes.json"):
        (tokenizer_folder / name).touch()
    (tokenizer_folder / "tokenizer_old").mkdir()
    (tokenizer_folder / "tokenizer_old" / "tokenizer.json").touch()
    change_config(tokenizer_folder, auto_map={"AutoTokenizer": ["tokenizer_code.Tokenizer", None]})
    folder = convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=tokenizer_folder)
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in folder.iterdir()} == MODEL_FILES | tokenizer_files
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())


def test_a_link_out_of_the_folder_is_refused(checkpoint, tokenizer_folder, refused, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tokenizer_folder / "tokenizer_extra.json").symlink_to(tmp_path / "secret")
    assert "links to a file outside of its folder" in refused(checkpoint, tokenizer=tokenizer_folder)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(save, tokenizer_folder, refused, original):
    size = original.get_vocab_size()
    path = save(make_weights(vocab_size=size - 1), model_config={**MU_CONFIG, "vocab_size": size - 1})
    message = refused(path, tokenizer=tokenizer_folder)
    assert f"has {size} tokens, but the model has embeddings for {size - 1}" in message


def test_a_special_token_outside_of_the_vocabulary_is_refused(save, tokenizer_folder, refused, original):
    size = original.get_vocab_size()
    change_config(tokenizer_folder, cls_token="[CLS]")
    path = save(make_weights(vocab_size=size), model_config={**MU_CONFIG, "vocab_size": size})
    assert f"has {size + 1} tokens" in refused(path, tokenizer=tokenizer_folder)


def test_a_tokenizer_that_does_more_than_its_file_is_refused(checkpoint, tokenizer_folder, refused, monkeypatch):
    class Other(PreTrainedTokenizerFast):
        def __call__(self, text):
            return {"input_ids": [1, *super().__call__(text)["input_ids"]]}

    monkeypatch.setattr("encdec_slm.conversion.AutoTokenizer.from_pretrained", Other.from_pretrained)
    message = refused(checkpoint, tokenizer=tokenizer_folder)
    assert "makes other ids than the `tokenizer.json`" in message and "'hello world'" in message


def test_a_tokenizer_without_its_file_is_refused(checkpoint, tokenizer_folder, refused):
    (tokenizer_folder / "tokenizer.json").rename(tokenizer_folder / "tokenizer.model")
    assert "has no `tokenizer.json`" in refused(checkpoint, tokenizer=tokenizer_folder)


DAMAGED = [
    (name, content)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    for content in ("", "{", "[]", '{"model": 1}')
    if name == "tokenizer.json" or "model" not in content
]


@pytest.mark.parametrize(("name", "content"), DAMAGED)
def test_damaged_tokenizer_files_are_refused(checkpoint, tokenizer_folder, refused, name, content):
    (tokenizer_folder / name).write_text(content)
    assert "make no tokenizer" in refused(checkpoint, tokenizer=tokenizer_folder)


def test_a_file_or_nothing_in_place_of_a_tokenizer_folder_is_refused(checkpoint, tokenizer_folder, refused, tmp_path):
    assert "is a file" in refused(checkpoint, tokenizer=tokenizer_folder / "tokenizer.json")
    assert "no folder here" in refused(checkpoint, tokenizer=tmp_path / "nowhere")
    with pytest.raises(TypeError, match="`tokenizer` is of type int"):
        convert_reference_checkpoint(checkpoint, tmp_path / "output", tokenizer=7)
