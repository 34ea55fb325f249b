# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands have, and builders of options."""

from functools import partial
from typing import Annotated

import typer

from .console import UsageError


def read_config(ctx: typer.Context, name_or_path: str | None) -> str | None:
    """Use the values of a YAML file as defaults of a command's options."""
    if name_or_path is not None and not ctx.resilient_parsing:
        from encdec_slm.configuration.recipe_files import check_keys, load_recipe

        names = {}
        for param in ctx.command.params:
            for name in (param.name, *param.opts):
                names.setdefault(name.lstrip("-").replace("-", "_"), param.name)
        try:
            values = {str(key).replace("-", "_"): value for key, value in load_recipe(name_or_path).items()}
            check_keys(values, names.keys() - {"config", "help"}, name_or_path)
        except ValueError as error:
            raise UsageError(str(error), ctx) from error
        ctx.default_map = {names[key]: value for key, value in values.items() if value is not None}
    return name_or_path


# Builders of options that differ in their help.
count = partial(typer.Option, metavar="N", min=1)
name = partial(typer.Option, metavar="NAME")
file = partial(typer.Option, metavar="FILE")
folder = partial(typer.Option, metavar="FOLDER")
recipe = partial(typer.Option, metavar="RECIPE")
revision = partial(typer.Option, metavar="REVISION")

CONFIG_HELP = "A YAML file with values for these arguments and options. The command line overrides it."
Config = Annotated[str | None, file(is_eager=True, callback=read_config, help=CONFIG_HELP)]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder that save_pretrained wrote, or a name on the Hub.")
]
Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output in OUTPUT.")]

__all__ = [
    *("Config", "Model", "Output", "Overwrite"),
    *("count", "file", "folder", "name", "recipe", "revision"),
]
