# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM

from encdec_slm import (
    EncDecSLMConfig,
    EncDecSLMForConditionalGeneration,
    EncDecVLMConfig,
    EncDecVLMForConditionalGeneration,
    EncDecVLMImageProcessor,
    EncDecVLMProcessor,
)
from encdec_slm.configuration import decoder_only_twin, load_preset
from encdec_slm.configuration.sizes import preset_table
from encdec_slm.trainers.new_models import train_tokenizer


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def demo_folder(tmp_path, tiny_config):
    """A folder as `make demo` leaves it, with random weights."""
    folder = tmp_path / "outputs" / "distill_demo"
    tokenizer = train_tokenizer(["def area(width, height): return width * height"], 300, 64)
    config = EncDecSLMConfig(**{**tiny_config.to_dict(), "vocab_size": len(tokenizer)})
    student, teacher = EncDecSLMForConditionalGeneration(config), decoder_only_twin(config)
    for model, path in ((student, folder), (AutoModelForCausalLM.from_config(teacher), f"{folder}_teacher")):
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    write_vision_folder(folder.parent / "vqa_synthetic", tmp_path / "picture.png")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    return folder


def write_vision_folder(folder, picture):
    """A folder as `make demo-vision` leaves it, with random weights, and a picture."""
    tokenizer = train_tokenizer(["what digit is left of the 7?"], 300, 64)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    fields = load_preset("tiny-vlm").to_dict()
    fields["text_config"]["vocab_size"] = len(tokenizer)
    config = EncDecVLMConfig.from_dict({**fields, "image_token_id": len(tokenizer) - 1})
    EncDecVLMForConditionalGeneration(config).save_pretrained(folder)
    EncDecVLMProcessor(EncDecVLMImageProcessor.from_config(config), tokenizer).save_pretrained(folder)
    Image.new("RGB", (60, 40)).save(picture)


def test_every_snippet_runs(demo_folder):
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(snippets) == 3
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)], cwd=demo_folder.parents[1], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_size_table_is_what_the_command_prints():
    printed = preset_table().splitlines()
    shown = [line for line in README.splitlines() if line.startswith(("| preset", "| `"))]
    assert shown
    assert set(shown) <= set(printed)


def test_it_is_short_and_its_snippets_too():
    assert len(README.splitlines()) <= 150
    assert all(len(snippet.splitlines()) <= 8 for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL))


def test_every_file_that_it_names_exists():
    for path in re.findall(r"examples/\w+\.py|trainers/\w+\.py", README):
        assert (ROOT / path).is_file()
    recipes = re.findall(r"--(?:config|distill) (\w+)", README)
    assert all((ROOT / "configuration" / "recipes" / f"{name}.yaml").is_file() for name in recipes)
