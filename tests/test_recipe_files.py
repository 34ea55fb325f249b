# SPDX-License-Identifier: Apache-2.0
"""Recipes: found by name or path, checked key by key, and parsed into dataclasses."""

import os
from dataclasses import dataclass

import pytest
from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig

from encdec_slm.configuration.recipe_files import RECIPES, list_recipes, load_recipe, parse_recipe
from encdec_slm.trainers.finetune_job import FinetuneArguments


FINETUNE_CLASSES = (FinetuneArguments, Seq2SeqTrainingArguments, ModelConfig)
FINETUNE_RECIPES = [name for name in list_recipes() if name.startswith("finetune_")]


@dataclass
class Arguments:
    num_rows: int = 1
    folder: str | None = None


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.mark.parametrize("name", FINETUNE_RECIPES)
def test_every_recipe_parses_into_its_config_classes(name, tmp_path):
    # On a machine without a GPU, transformers refuses bf16 training of some kinds; this is about keys and types.
    args, training_args, model_args = parse_recipe(FINETUNE_CLASSES, ["--config", name, "--use_cpu", "true"])
    for key, value in load_recipe(name, FINETUNE_CLASSES).items():
        owner = next(parsed for parsed in (args, training_args, model_args) if hasattr(parsed, key))
        assert isinstance(value, str) or getattr(owner, key) in (value, [value])


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_opens_with_its_command_and_its_limits(name):
    head = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    command = name.split("_")[0] if name.startswith(("distill", "pretrain")) else "finetune"
    assert f"encdec-slm {command} --config {name}" in head
    assert "Not supported" in head or "not supported" in head


def test_a_recipe_is_found_by_its_name_and_by_its_path():
    assert load_recipe("finetune_docstrings") == load_recipe(RECIPES / "finetune_docstrings.yaml")


@pytest.mark.parametrize("name", [name for name in list_recipes() if name.startswith("vqa")])
def test_recipes_for_images_say_so(name):
    assert load_recipe(name)["task"] == "vision"


def test_the_command_line_overrides_the_recipe(recipe):
    path = recipe("\ufeffnum_rows: 2\nfolder: here\ntask: text")
    assert parse_recipe([Arguments], ["--config", path, "--num_rows", "3"]) == (Arguments(3, "here"),)


def test_a_recipe_sets_environment_variables(recipe, monkeypatch):
    monkeypatch.setenv("RECIPE_TEST", "0")
    parse_recipe([Arguments], ["--config", recipe("env:\n  RECIPE_TEST: 1")])
    assert os.environ["RECIPE_TEST"] == "1"


@pytest.mark.parametrize(
    ("text", "words", "match"),
    [
        ("num_row: 2", [], "`num_row` in .*mine.yaml.*`num_rows`"),
        ("num_rows: 2", ["--num-row", "3"], "`num_row` in the command line.*`num_rows`"),
        ("num_rows: 2", ["--num_row=3"], "`num_row` in the command line.*`num_rows`"),
        ("num_rows: 2", ["three"], "'three'"),
        ("num_rows: 2", ["--num_rows", "three"], "'three'"),
        ("num_rows: many", [], "'many'"),
        ("- a list", [], "list"),
        ("a: [1", [], "YAML"),
    ],
)
def test_recipes_and_command_lines_that_do_not_fit_are_refused(recipe, text, words, match):
    with pytest.raises(ValueError, match=match):
        parse_recipe([Arguments], ["--config", recipe(text), *words])


def test_an_unknown_recipe_is_answered_with_those_that_exist():
    with pytest.raises(ValueError, match=r"'finetune'.*finetune_docstrings, finetune_lora"):
        load_recipe("finetune")


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_for_accelerate_load_and_open_with_the_command_that_takes_them(path):
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    config = load_config_from_file(str(path))
    assert (config.distributed_type.value, config.num_processes) == (kinds[path.stem], 2)
    head = path.read_text(encoding="utf-8").split("compute_environment")[0]
    assert f"accelerate launch --config_file configuration/recipes/accelerate/{path.name} -m encdec_slm_cli" in head
