# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from huggingface_hub import constants

from conftest import build_tokenizer
from encdec_slm.checkpoints import (
    check_complete_model,
    check_no_adapter,
    check_no_overlap,
    find_checkpoint_folder,
    foreign_files,
    load_checkpoint,
    write_file,
    write_folder,
)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def checkpoint(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


# Write


def test_write_folder_creates_the_folder_with_its_parents(tmp_path):
    with write_folder(tmp_path / "a" / "b") as folder:
        (folder / "config.json").write_text("{}")
    assert contents(tmp_path) == {"a/b/config.json": b"{}"}


def test_write_folder_replaces_an_earlier_checkpoint_whole(checkpoint):
    with write_folder(checkpoint, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert contents(checkpoint) == {"config.json": b"new"}


@pytest.mark.parametrize("name", ["thesis.tex", "model.bin", "results.json"])
def test_write_folder_never_replaces_what_a_checkpoint_does_not_have(checkpoint, name):
    (checkpoint / name).write_text("precious")
    before = contents(checkpoint)
    with pytest.raises(ValueError, match=name), write_folder(checkpoint, overwrite=True):
        raise AssertionError("the block must not run")
    assert contents(checkpoint) == before


def test_a_readme_alone_is_not_an_earlier_checkpoint(tmp_path):
    (tmp_path / "README.md").write_text("precious")
    assert foreign_files(tmp_path) == ["README.md"]
    with pytest.raises(ValueError, match=r"README\.md"), write_folder(tmp_path, overwrite=True):
        raise AssertionError("the block must not run")


def test_write_folder_without_overwrite_refuses_a_folder_that_is_not_empty(checkpoint):
    before = contents(checkpoint)
    with pytest.raises(ValueError, match="overwrite"), write_folder(checkpoint):
        raise AssertionError("the block must not run")
    assert contents(checkpoint) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_an_earlier_output_as_it_was(checkpoint, error):
    before = contents(checkpoint)
    with pytest.raises(error), write_folder(checkpoint, overwrite=True) as folder:
        (folder / "config.json").write_text("half")
        raise error
    assert contents(checkpoint) == before
    assert [path.name for path in checkpoint.iterdir() if path.name.startswith(".")] == []


def test_a_failure_leaves_no_new_folder(tmp_path):
    with pytest.raises(RuntimeError), write_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_files_are_moved_is_undone(checkpoint, monkeypatch):
    before = contents(checkpoint)
    replace = os.replace

    def fail_at_new_config(source, target):
        if str(target) == str(checkpoint / "config.json") and "previous" not in str(source):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_new_config)
    with pytest.raises(OSError, match="No space"), write_folder(checkpoint, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        (folder / "another.safetensors").write_text("new")
    assert contents(checkpoint) == before


def test_write_folder_follows_a_link(checkpoint, tmp_path):
    (tmp_path / "link").symlink_to(checkpoint)
    with write_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert contents(checkpoint) == {"config.json": b"new"}


def test_write_folder_writes_to_the_working_directory_twice(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint)
    for text in ('{"model_type": "encdec_slm"}', "second"):
        with write_folder(".", overwrite=True) as folder:
            (folder / "config.json").write_text(text)
    assert contents(checkpoint) == {"config.json": b"second"}


def test_write_folder_replaces_a_folder_around_the_working_directory(tmp_path, monkeypatch):
    inside = tmp_path / "out" / "inside"
    inside.mkdir(parents=True)
    (inside / "old.txt").write_text("old")
    monkeypatch.chdir(inside)
    with write_folder("..", overwrite=True, find_foreign_files=lambda folder: []) as folder:
        (folder / "new.txt").write_text("new")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_process_that_writes_to_the_same_folder_is_refused(tmp_path):
    code = """
        import sys
        from encdec_slm.checkpoints import write_folder
        try:
            with write_folder(sys.argv[1]):
                pass
        except ValueError as error:
            print(error)
    """
    with write_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("first")
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")]
        second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Another process" in second.stdout
    assert contents(tmp_path / "out") == {"config.json": b"first"}


def test_files_that_appear_meanwhile_are_kept(tmp_path):
    with pytest.raises(ValueError, match="changed"), write_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("ours")
        (tmp_path / "out" / "theirs.txt").write_text("theirs")
    assert contents(tmp_path / "out") == {"theirs.txt": b"theirs"}


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    (tmp_path / "out" / ".encdec_slm-incomplete-abc").mkdir(parents=True)
    with write_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("new")
    assert contents(tmp_path / "out") == {"config.json": b"new"}


@pytest.mark.parametrize("output", ["checkpoint", "checkpoint/export", ".", "link"])
def test_an_output_that_overlaps_its_source_is_refused(checkpoint, tmp_path, output):
    (tmp_path / "link").symlink_to(checkpoint)
    before = contents(checkpoint)
    with pytest.raises(ValueError, match="contain each other"):
        check_no_overlap(tmp_path / output, [checkpoint])
    with (
        pytest.raises(ValueError, match="contain"),
        write_folder(tmp_path / output, overwrite=True, sources=[checkpoint]),
    ):
        raise AssertionError("the block must not run")
    assert contents(checkpoint) == before


def test_write_file_leaves_nothing_of_a_failure(tmp_path):
    write_file(tmp_path / "a.txt", "old")

    def fail(path):
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_file(tmp_path / "a.txt", fail)
    assert contents(tmp_path) == {"a.txt": b"old"}


# Find and load


def test_a_saved_model_loads_in_evaluation_mode(checkpoint, tiny_model, source, target_ids):
    model, processing_class = load_checkpoint(checkpoint)
    assert processing_class is None
    assert not model.training
    logits = [one(**source, decoder_input_ids=target_ids).logits for one in (model, tiny_model)]
    torch.testing.assert_close(*logits)


def test_a_tokenizer_without_a_padding_token_is_given_that_of_the_model(checkpoint, tiny_model):
    build_tokenizer(pad_token=None, ends_sources=False).save_pretrained(checkpoint)
    _, tokenizer = load_checkpoint(checkpoint)
    assert tokenizer.pad_token_id == tiny_model.config.pad_token_id
    assert tokenizer(["w5 w6", "w7"], padding=True)["attention_mask"] == [[1, 1], [1, 0]]


def test_an_adapter_is_never_dropped(checkpoint, tiny_model, tmp_path, source, target_ids):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.base_model.model.config._name_or_path = str(checkpoint)
    adapted.peft_config["default"].base_model_name_or_path = str(checkpoint)
    adapted.save_pretrained(tmp_path / "adapter")
    build_tokenizer().save_pretrained(checkpoint)
    expected = adapted(**source, decoder_input_ids=target_ids).logits
    for mode in ("load", "train"):
        model, tokenizer = load_checkpoint(tmp_path / "adapter", adapter=mode)
        assert len(tokenizer) == len(build_tokenizer())  # PEFT saves none with an adapter
        torch.testing.assert_close(model(**source, decoder_input_ids=target_ids).logits, expected)
        assert any(value.requires_grad for value in model.parameters()) == (mode == "train")
    with pytest.raises(ValueError, match="adapter"):
        load_checkpoint(tmp_path / "adapter", adapter="refuse")
    with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
        check_no_adapter(tmp_path / "adapter")
    check_no_adapter(checkpoint)


def test_missing_weights_are_refused(checkpoint, tiny_model):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("model.decoder.norm.weight")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.decoder\.norm\.weight"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("fields", [{"intermediate_size": 60}, {"vocab_size": 100}, {"decoder_num_hidden_layers": 1}])
def test_weights_that_do_not_fit_the_config_are_named(fields, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, **fields}))
    with pytest.raises(ValueError, match=r"model\.\w+\.(layers|embed_tokens)\..*config\.json"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"model_type": "unknown"}'])
def test_a_folder_without_a_readable_config_is_named(text, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_checkpoint(tmp_path)


def test_damaged_weights_name_the_folder(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="checkpoint"):
        load_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["/nowhere/model", "outputs/run/model", "./model", "~/model"])
def test_a_missing_path_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr("encdec_slm.checkpoints.HfApi", None)
    for find in (find_checkpoint_folder, load_checkpoint):
        with pytest.raises(ValueError, match="no folder"):
            find(name)


def test_a_mistyped_folder_beside_others_is_refused_without_asking_the_hub(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("encdec_slm.checkpoints.HfApi", None)
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(ValueError, match="no folder"):
        load_checkpoint(f"{tmp_path.name}/chekpoint")


def test_an_unreachable_hub_is_asked_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("encdec_slm.checkpoints.HfApi", lambda: HubThatIsDown())
    with pytest.raises(ValueError, match="someone/model"):
        load_checkpoint("someone/model")


class HubThatIsDown:
    def repo_info(self, *args, **kwargs):
        raise ConnectionError("no network")


def test_a_model_in_memory_is_checked(tiny_model, tiny_config):
    from peft import LoraConfig, get_peft_model

    from encdec_slm import EncDecSLMModel

    check_complete_model(tiny_model, "model")
    with pytest.raises(ValueError, match="output head"):
        check_complete_model(EncDecSLMModel(tiny_config), "model")
    with pytest.raises(TypeError, match="`model`"):
        check_complete_model(7, "model")
    with torch.device("meta"), pytest.raises(ValueError, match="meta"):
        check_complete_model(type(tiny_model)(tiny_config), "model")
    with pytest.raises(ValueError, match="adapters"):
        check_complete_model(get_peft_model(tiny_model, LoraConfig(target_modules=["q_proj"])), "model")
