# SPDX-License-Identifier: Apache-2.0
"""A web page to try a model: on this machine (`app.serve`), or as a Space of the Hub (`write_space`)."""

import json
import os
from pathlib import Path
from string import Template

from ...checkpoints import write_folder


FILES = Path(__file__).parent
NAMES = ("app.py", "requirements.txt", "README.md")
# The release of gradio that the page is tested with.
GRADIO_VERSION = "6.31.0"


def write_space(output_dir: str | os.PathLike, model_id: str, revision: str) -> Path:
    """Write the folder of a Space: `app.py`, `requirements.txt`, and the `README.md` that configures it.

    Args:
        output_dir (`str` or `os.PathLike`): A new or empty folder, or an earlier output, which is replaced.
        model_id (`str`): Name of the model on the Hub, as `owner/name`.
        revision (`str`): Its commit, whose code runs in the Space.

    Raises:
        ValueError: `model_id` is not a name on the Hub, `revision` is empty, or `output_dir` holds other files.
    """
    if model_id.count("/") != 1 or not all(model_id.split("/")) or Path(model_id).exists():
        raise ValueError(
            f"`model_id` is {model_id!r}, but a Space loads its model from the Hub. Publish the model, and give its "
            "name there as owner/name."
        )
    if not revision:
        raise ValueError(
            f"`revision` is {revision!r}, but the code of the checkpoint runs in the Space. Give the hash of a commit "
            f"of {model_id} that you have read."
        )
    app, requirements, readme = ((FILES / name).read_text(encoding="utf-8") for name in NAMES)
    for variable, value in (("MODEL_ID", model_id), ("MODEL_REVISION", revision)):
        app = app.replace(f'os.environ.get("{variable}", "")', f'os.environ.get("{variable}", {json.dumps(value)})')
    fields = {"model_id": model_id, "revision": revision, "title": model_id.split("/")[1]}
    readme = Template(readme).substitute(fields, gradio_version=GRADIO_VERSION)
    with write_folder(output_dir, overwrite=True, find_foreign_files=_find_foreign_files) as folder:
        for name, text in zip(NAMES, (app, requirements, readme), strict=True):
            (folder / name).write_text(text, encoding="utf-8")
    return Path(output_dir)


def _find_foreign_files(folder):
    """Return the names in a folder that [`write_space`] did not write; all of them if its `app.py` is another one."""
    app, names = folder / "app.py", sorted(path.name for path in folder.iterdir())
    is_ours = app.is_file() and "def build_page(model" in app.read_text(encoding="utf-8", errors="replace")
    return [name for name in names if not is_ours or name not in NAMES]


__all__ = ["write_space"]
