# SPDX-License-Identifier: Apache-2.0
"""A page to try a model: on this machine (`app.serve`), or as a Space of the Hub (`write_space`)."""

import json
import os
from pathlib import Path
from string import Template


FILES = Path(__file__).parent
# The release of gradio that the page is tested with.
GRADIO_VERSION = "6.31.0"


def write_space(output_dir: str | os.PathLike, model_id: str, revision: str) -> Path:
    """Folder of a ready Space of the Hub: `app.py`, `requirements.txt` and the `README.md` that configures it.

    Args:
        output_dir (`str` or `os.PathLike`): Made if it is not there; files of these names are replaced.
        model_id (`str`): The model on the Hub, as `owner/name`.
        revision (`str`): Its commit, whose code runs in the Space.

    Raises:
        ValueError: `model_id` is no name on the Hub, or there is no `revision`.
    """
    if model_id.count("/") != 1 or not all(model_id.split("/")) or Path(model_id).exists():
        raise ValueError(
            f"`model_id` is {model_id!r}, but a Space loads its model from the Hub. Publish the model first, then "
            "give its name there as owner/name."
        )
    if not revision:
        raise ValueError(
            f"`revision` is {revision!r}, but the code of the checkpoint runs in the Space. Give the commit hash of "
            f"{model_id} that you have read."
        )
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    app, requirements, readme = (
        (FILES / name).read_text(encoding="utf-8") for name in ("app.py", "requirements.txt", "README.md")
    )
    for variable, value in (("MODEL_ID", model_id), ("MODEL_REVISION", revision)):
        app = app.replace(f'os.environ.get("{variable}", "")', f'os.environ.get("{variable}", {json.dumps(value)})')
    fields = {"model_id": model_id, "revision": revision, "title": model_id.split("/")[1]}
    readme = Template(readme).substitute(fields, gradio_version=GRADIO_VERSION)
    for name, text in (("app.py", app), ("requirements.txt", requirements), ("README.md", readme)):
        (folder / name).write_text(text, encoding="utf-8")
    return folder


__all__ = ["write_space"]
