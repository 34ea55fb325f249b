# SPDX-License-Identifier: Apache-2.0
"""Training recipes: YAML files whose keys are fields of the dataclasses that a script parses them into."""

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml


RECIPES = Path(__file__).parent / "recipes"
# TRL's parser sets environment variables from this key; it is no field of any dataclass.
ENVIRONMENT_KEY = "env"


def list_recipes() -> list[str]:
    """Names of all recipes, in alphabetical order: the stems of `recipes/*.yaml`."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, dataclass_types: Iterable[type] = ()) -> dict[str, Any]:
    """The keys and values of a recipe.

    Args:
        name_or_path (`str` or `Path`): One of [`list_recipes`], or the path of a YAML file.
        dataclass_types (`Iterable[type]`, *optional*): Dataclasses that the recipe is parsed into; each key must be a
            field of one of them. Empty means that keys are not checked.

    Raises:
        ValueError: There is no such recipe, it is no YAML mapping, or a key is no field of `dataclass_types`.
    """
    path = recipe_path(name_or_path)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML ({problem}). Write one `key: value` per line.") from None
    if not isinstance(recipe, dict):
        raise ValueError(
            f"{path} holds a {type(recipe).__name__}, but a recipe is a mapping: write `key: value` lines."
        )
    dataclass_types = tuple(dataclass_types)
    if dataclass_types:
        _refuse_unknown(recipe, dataclass_types, str(path))
    return recipe


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe, given by its name or its path.

    Raises:
        ValueError: There is no such recipe.
    """
    for path in (Path(name_or_path), RECIPES / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    raise ValueError(
        f"Unknown recipe {str(name_or_path)!r}: neither a file nor one of the names {', '.join(list_recipes())}. Give "
        "one of these, or the path of a YAML file."
    )


def parse_recipe(dataclass_types: Sequence[type], args: Sequence[str] | None = None) -> tuple:
    """One instance of every dataclass, from the recipe behind `--config` and the command line, which wins.

    Args:
        dataclass_types (`Sequence[type]`): As TRL's parser takes them; no field is in two of them.
        args (`Sequence[str]`, *optional*): The command line, such as `["--config", "finetune_xsum", "--seed", "1"]`.
            `None` means that of this process.

    Raises:
        ValueError: There is no such recipe, or a key of the recipe or of the command line is no field.
    """
    from trl import TrlParser  # slow to import, and an optional dependency of this package

    args = list(sys.argv[1:] if args is None else args)
    if "--config" in args[:-1]:
        position = args.index("--config") + 1
        path = recipe_path(args[position])
        load_recipe(path, dataclass_types)
        args[position] = str(path)
    parser = TrlParser(dataclass_types, usage="%(prog)s --config RECIPE [--key value ...]", allow_abbrev=False)
    *parsed, remaining = parser.parse_args_and_config(args, return_remaining_strings=True)
    if remaining:
        keys = [word.removeprefix("--").replace("-", "_") for word in remaining if word.startswith("--")]
        _refuse_unknown(keys, dataclass_types, "the command line")
        raise ValueError(f"The command line has {remaining[0]!r}, which belongs to no key. Write `--key value`.")
    return tuple(parsed)


def _refuse_unknown(keys, dataclass_types, origin):
    valid = {field.name for kind in dataclass_types for field in dataclasses.fields(kind) if field.init}
    for key in keys:
        if key not in valid | {ENVIRONMENT_KEY}:
            nearest = difflib.get_close_matches(str(key), sorted(valid), n=1, cutoff=0.0)[0]
            raise ValueError(
                f"Unknown key `{key}` in {origin}. The nearest valid key is `{nearest}`: use it or leave `{key}` out."
            )


__all__ = ["list_recipes", "load_recipe", "parse_recipe", "recipe_path"]
