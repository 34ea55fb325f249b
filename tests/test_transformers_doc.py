# SPDX-License-Identifier: Apache-2.0
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from encdec_slm import EncDecSLMConfig, EncDecSLMForConditionalGeneration
from encdec_slm.trainers.new_models import train_tokenizer


DOC = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")


def run_snippets(workspace, tiny_config, **environment):
    """All snippets but those for CUDA, one after the other in a new process, with a checkpoint of random weights."""
    tokenizer = train_tokenizer(["def area(width, height): return width * height"], 300, 64)
    config = EncDecSLMConfig(**{**tiny_config.to_dict(), "vocab_size": len(tokenizer)})
    folder = workspace / "outputs" / "finetune_docstrings"
    EncDecSLMForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    snippets = [snippet for snippet in re.findall(r"```python\n(.*?)```", DOC, re.DOTALL) if "cuda" not in snippet]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)],
        cwd=workspace,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_every_snippet_runs(tmp_path, tiny_config):
    pytest.importorskip("torchao")
    run = run_snippets(tmp_path, tiny_config, TORCHDYNAMO_DISABLE="1")  # compiled steps run as they are
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_every_snippet_runs_compiled(tmp_path, tiny_config):
    pytest.importorskip("torchao")
    run = run_snippets(tmp_path, tiny_config)
    assert run.returncode == 0, run.stderr
