# SPDX-License-Identifier: Apache-2.0
"""Prompts of a teacher, rendered from the fields of a row by a Jinja template."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import summarize_error


def read_prompt_template(template: str | Path | None) -> str | None:
    """Return the text of a template; see [`load_prompt_template`].

    Raises:
        ValueError: There is no such file.
    """
    if template is None or _is_text(template):
        return template
    try:
        return Path(template).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"The prompt template {str(template)!r} cannot be read ({summarize_error(error)}). Give the path of a "
            "text file, or a text with fields such as {{ source }}."
        ) from error


def _is_text(template):
    return "{{" in str(template) or "{%" in str(template)


def load_prompt_template(template: str | Path) -> Callable[[Mapping[str, Any]], str]:
    """Load a template, and return the function that renders the prompt of a row.

    Args:
        template (`str` or `Path`): Path of a text file, or the text of the template itself if it has `{{` or `{%`. The
            fields of a row are variables; instructions and few-shot examples are plain text around them.

    Raises:
        ValueError: There is no such file, or it is not a template. The returned function raises it for a field that a
            row does not have.
    """
    text, name = read_prompt_template(template), "the template" if _is_text(template) else repr(str(template))
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=False)
    try:
        compiled = environment.from_string(text)
    except TemplateError as error:
        raise ValueError(f"The prompt template {name} is not a Jinja template: {error}.") from error

    def render(row: Mapping[str, Any]) -> str:
        try:
            return compiled.render(row)
        except UndefinedError as error:
            raise ValueError(
                f"The prompt template {name} asks for a field that a row does not have ({error}). The row has "
                f"{', '.join(f'`{field}`' for field in row)}."
            ) from error
        except (TemplateError, TypeError) as error:
            raise ValueError(f"The prompt template {name} cannot be rendered: {error}.") from error

    return render


__all__ = ["load_prompt_template", "read_prompt_template"]
