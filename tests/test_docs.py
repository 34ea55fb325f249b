# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from encdec_slm_cli import app
from test_readme import demo_folder  # noqa: F401  a fixture
from transformers import Seq2SeqTrainingArguments
from trl import ModelConfig

from encdec_slm.configuration.recipe_files import list_recipes
from encdec_slm.trainers import Seq2SeqDistillationConfig
from encdec_slm.trainers.distill_job import DistillArguments
from encdec_slm.trainers.finetune_job import FinetuneArguments
from encdec_slm.trainers.pretrain_job import PretrainArguments
from encdec_slm.trainers.vision_job import VisionArguments


ROOT = Path(__file__).parent.parent
TRAINING_ARGUMENTS = (
    *(FinetuneArguments, Seq2SeqTrainingArguments, ModelConfig),
    *(DistillArguments, Seq2SeqDistillationConfig, VisionArguments, PretrainArguments),
)
WITH_KEYS = ("finetune", "distill", "pretrain", "adapt")
# devices.md and transformers.md have tests of their own: they need engines and compilers.
NAMES = (
    *("quickstart", "train", "distil", "adapt", "vision", "export", "publish", "security", "compatibility", "faq"),
    *("scale", "serving"),
)
DOCS = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in NAMES}
# Runs the snippets of each page, page by page, with a namespace for each.
RUNNER = """
import json, sys, traceback
for name, snippets in json.load(sys.stdin).items():
    namespace = {"__name__": name}
    for number, code in enumerate(snippets, start=1):
        try:
            exec(compile(code, f"{name}.md, snippet {number}", "exec"), namespace)
        except Exception:
            sys.exit(f"{name}.md, snippet {number}: {traceback.format_exc()}")
"""


def snippets_of(text):
    """Python that is to run as it stands; a fence that says `not run` names the reason."""
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_every_snippet_runs(demo_folder):  # noqa: F811
    workspace = demo_folder.parents[1]
    pages = {name: snippets_of(text) for name, text in DOCS.items()}
    assert sum(map(len, pages.values())) >= 15
    run = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(pages),
        cwd=workspace,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("name", NAMES)
def test_snippets_are_python_and_what_is_not_run_says_why(name):
    for info, code in re.findall(r"^```([^\n]+)\n(.*?)^```$", DOCS[name], flags=re.MULTILINE | re.DOTALL):
        assert info == "python" or re.fullmatch(r"python not run: \w.*|text|yaml", info)
        if info.startswith("python"):
            compile(code, name, "exec")


@pytest.mark.parametrize("path", sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"]), ids=lambda path: path.name)
def test_links_files_and_recipes_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (path.parent / target).exists(), target
    for name in re.findall(r"(?:examples|checkpoints|configuration)/[\w/.-]*\w", text):
        assert (ROOT / name).exists(), name
    for recipe in re.findall(r"--(?:config|distill|finetune) ([a-z_0-9]+)\b", text):
        assert recipe in list_recipes(), recipe


@pytest.mark.parametrize("path", sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"]), ids=lambda path: path.name)
def test_commands_and_their_options_exist(path):
    commands = typer.main.get_command(app).commands
    keys = {field.name for kind in TRAINING_ARGUMENTS for field in dataclasses.fields(kind)}
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    encdec-slm (.*?)(?:  +#.*)?$", text, re.MULTILINE):
        name, *words = shlex.split(line)
        options = {option for parameter in commands[name].params for option in parameter.opts}
        for word in words:
            if word.startswith("--"):
                assert word in options or (name in WITH_KEYS and word[2:] in keys), line
