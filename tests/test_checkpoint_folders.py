# SPDX-License-Identifier: Apache-2.0
import pytest

from encdec_slm.checkpoint_folders import folder_written_whole, local_folder


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_exists_is_taken_as_it_is(tmp_path):
    assert local_folder(tmp_path, ["*"]) == tmp_path


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ValueError, match="is a file"):
        local_folder(path, ["*"])


@pytest.mark.parametrize("name", ["no/such/folder", "nobody/no-such-model"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_named(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"'{name}' is no folder here, and could not be loaded from the Hub"):
        local_folder(name, ["*"])


def test_files_are_moved_when_all_of_them_are_written(tmp_path):
    with folder_written_whole(tmp_path / "new" / "model") as folder:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").touch()
        assert not (tmp_path / "new" / "model").exists()
    assert names_in(tmp_path / "new") == ["model"]
    assert names_in(tmp_path / "new" / "model") == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_nothing(tmp_path, interruption):
    with pytest.raises(interruption), folder_written_whole(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
        raise interruption
    assert names_in(tmp_path) == []


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty"), folder_written_whole(tmp_path):
        pass
    assert names_in(tmp_path) == ["notes.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    with folder_written_whole(tmp_path) as folder:
        (folder / "config.json").touch()
    assert names_in(tmp_path) == ["config.json"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "model").touch()
    with pytest.raises(ValueError, match="is a file"), folder_written_whole(tmp_path / "model", overwrite=True):
        pass


def test_overwriting_replaces_a_checkpoint_and_nothing_else(tmp_path):
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "notes.txt", "model.pt"):
        (tmp_path / name).write_text("old")
    with folder_written_whole(tmp_path, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        (folder / "model.safetensors").write_text("new")
    assert names_in(tmp_path) == ["config.json", "model.pt", "model.safetensors", "notes.txt"]
    assert (tmp_path / "config.json").read_text() == "new"


def test_a_move_that_is_interrupted_leaves_a_folder_without_a_config(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("encdec_slm.checkpoint_folders.os.replace", fail)
    with pytest.raises(OSError, match="disk full"), folder_written_whole(tmp_path, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert names_in(tmp_path) == []
