# SPDX-License-Identifier: Apache-2.0
"""Recipes: YAML files whose keys are fields of the dataclasses of a run, or options of a command."""

import dataclasses
import difflib
import os
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml


RECIPES = Path(__file__).parent / "recipes"
# Keys that no dataclass has: environment variables of the run, and what `encdec-slm finetune` trains.
RESERVED_KEYS = ("env", "task")


def list_recipes() -> list[str]:
    """Return the names of all recipes of this package, in alphabetical order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, dataclass_types: Iterable[type] = ()) -> dict[str, Any]:
    """Read a recipe.

    Args:
        name_or_path (`str` or `Path`): One of [`list_recipes`], or the path of a YAML file.
        dataclass_types (`Iterable[type]`, *optional*): Each key must be a field of one of these dataclasses. Empty
            means that keys are not checked.

    Raises:
        ValueError: There is no such recipe, it is not a YAML mapping, or a key is unknown.
    """
    path = find_recipe(name_or_path)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML ({problem}). Write one `key: value` per line, in UTF-8.") from error
    if not isinstance(recipe, dict):
        raise ValueError(
            f"{path} holds a {type(recipe).__name__}, but a mapping is required. Write `key: value` lines."
        )
    if dataclass_types := tuple(dataclass_types):
        check_keys(recipe, _field_names(dataclass_types), str(path))
    return recipe


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the path of a recipe.

    Raises:
        ValueError: There is no such recipe.
    """
    for path in (Path(name_or_path), RECIPES / f"{name_or_path}.yaml"):
        if path.is_file():
            return path
    raise ValueError(
        f"Unknown recipe {os.fspath(name_or_path)!r}. Give the path of a YAML file, or one of the names "
        f"{', '.join(list_recipes())}."
    )


def check_keys(keys: Iterable[str], valid_keys: Collection[str], origin: str) -> None:
    """Check that keys are known, and name the nearest valid key if one is not.

    Args:
        keys (`Iterable[str]`): Keys of a recipe or of a command line.
        valid_keys (`Collection[str]`): At least one.
        origin (`str`): Where the keys are from, for the message.

    Raises:
        ValueError: A key is unknown.
    """
    for key in keys:
        if key not in valid_keys:
            nearest = difflib.get_close_matches(str(key), sorted(valid_keys), n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown key `{key}` in {origin}. The nearest valid key is `{nearest}`.")


def describe_keys(dataclass_types: Sequence[type]) -> str:
    """List the keys of a recipe with their defaults and help, by dataclass."""
    lines = []
    for kind in dataclass_types:
        lines += ["", f"{kind.__name__}:"]
        for field in dataclasses.fields(kind):
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            help_text = " ".join(field.metadata.get("help", "").split())
            if field.init and default is not dataclasses.MISSING:
                lines.append(f"  --{field.name} (default: {default})")
                lines.append(textwrap.fill(help_text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines[1:])


def parse_recipe(dataclass_types: Sequence[type], args: Sequence[str]) -> tuple:
    """Parse a command line, whose `--config` gives a recipe, into dataclasses. The command line overrides the recipe.

    Args:
        dataclass_types (`Sequence[type]`): Dataclasses without common fields.
        args (`Sequence[str]`): Such as `["--config", "finetune_xsum", "--seed", "1"]`.

    Returns:
        `tuple`: One instance of each dataclass.

    Raises:
        ValueError: There is no such recipe, a key is unknown, or a value does not fit.
    """
    from trl import TrlParser  # slow to import, and an optional dependency

    parser, args = TrlParser(dataclass_types, allow_abbrev=False), list(args)
    parser.error = _raise_value_error
    if "--config" in args[:-1]:
        position = args.index("--config")
        recipe = load_recipe(args[position + 1], dataclass_types)
        del args[position : position + 2]
        os.environ.update({name: str(value) for name, value in (recipe.get("env") or {}).items()})
        parser.set_defaults_with_config(**recipe)
    *parsed, remaining = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if remaining:
        keys = [word[2:].partition("=")[0].replace("-", "_") for word in remaining if word.startswith("--")]
        check_keys(keys, _field_names(dataclass_types), "the command line")
        raise ValueError(f"{remaining[0]!r} on the command line belongs to no key. Write `--key value`.")
    return tuple(parsed)


def _field_names(dataclass_types):
    fields = (field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init)
    return {*RESERVED_KEYS, *(field.name for field in fields)}


def _raise_value_error(message) -> NoReturn:
    raise ValueError(f"{message[:1].upper()}{message[1:]}.")


__all__ = ["check_keys", "describe_keys", "find_recipe", "list_recipes", "load_recipe", "parse_recipe"]
