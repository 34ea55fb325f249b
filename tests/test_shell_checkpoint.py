# SPDX-License-Identifier: Apache-2.0
"""The shell model in this repository, and the script that shows it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from encdec_slm_cli.shell_model import load_shell_model
from encdec_slm_cli.shell_syntax import is_complete
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from encdec_slm import EncDecSLMForConditionalGeneration
from encdec_slm.constrained_decoding import SHELL_GRAMMAR, GrammarLogitsProcessor
from encdec_slm.hub_cards.publishing import find_changed_files


ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "shell"
WITHOUT_PACKAGE = """
import runpy, sys
sys.modules["encdec_slm"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_checkpoint_is_small_and_complete():
    files = {path.name: path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()}
    assert files["model.safetensors"] <= 20_000_000
    assert {"config.json", "generation_config.json", "LICENSE", "README.md", "tokenizer.json"} <= set(files)
    assert (CHECKPOINT / "results.png").read_bytes() == (ROOT / "docs" / "shell.png").read_bytes()
    del files["results.png"]
    assert {Path(name).suffix for name in files} <= {".json", ".safetensors", ".py", ".md", ".yaml", ".jinja", ""}


def test_the_folder_is_what_publish_wrote():
    assert find_changed_files(CHECKPOINT) == []


def test_the_code_files_equal_those_of_the_package():
    shipped = sorted(CHECKPOINT.glob("*.py"))
    assert shipped
    for path in shipped:
        expected = ROOT / "modeling_encdec_slm" / path.name
        assert path.read_bytes() == expected.read_bytes(), f"copy {path.name} to checkpoints/shell"


def test_the_card_has_data_results_and_limits():
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert card.data.pipeline_tag == "text2text-generation" and card.data.license == "apache-2.0"
    for part in ("NL2Bash", "CC-BY-4.0", "## Results", "nlc2cmd_top5", "Limits"):
        assert part in card.content


def test_the_card_and_the_guide_state_measured_numbers():
    card, guide = (CHECKPOINT / "README.md").read_text(), (ROOT / "docs" / "shell.md").read_text()
    results = json.loads((ROOT / "examples" / "shell_results.json").read_text(encoding="utf-8"))
    for evaluation in results["evaluations"]["shell"].values():
        for value, low, high in evaluation["metrics"].values():
            assert f"{value:.2f} [{low:.2f}, {high:.2f}]" in card
    threshold = f"{100 * load_shell_model().calibration.threshold:.0f} %"
    assert f"below {threshold}" in card and f"threshold, {threshold}" in guide


def test_commands_of_a_restricted_search_are_complete():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = EncDecSLMForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    requests = ['alias cats to konqueror "http://icanhazoves', "count the words in all Markdown files"]
    inputs = tokenizer(requests, return_tensors="pt", padding=True)
    processor = GrammarLogitsProcessor(tokenizer, grammar=SHELL_GRAMMAR)
    ids = model.generate(**inputs, num_beams=5, num_return_sequences=5, logits_processor=[processor])
    assert all(is_complete(command) for command in tokenizer.batch_decode(ids, skip_special_tokens=True))


def test_common_requests_have_the_right_program(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load_shell_model()
    for request, program in (
        ("find all files larger than 100 MB in /var", "find"),
        ("count the lines of notes.txt", "wc"),
        ("delete all empty files below the current directory", "find"),
        ("create a symbolic link named a to b", "ln"),
    ):
        assert program in model.answer(request)[0].command.split()
    answers = json.loads((ROOT / "examples" / "shell_results.json").read_text(encoding="utf-8"))["answers"]
    request, shown_in_readme = next(iter(answers.items()))
    assert model.answer(request)[0].command == shown_in_readme


def test_transformers_alone_runs_it(tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    script = ROOT / "examples" / "use_pipeline.py"
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(script), str(CHECKPOINT), "find all empty files"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("find ")


def test_the_demo_answers_requests_and_shows_the_speed_without_noise(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "examples" / "shell_demo.py"), "count the lines of notes.txt"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("> count the lines of notes.txt\n  ") and run.stdout.count(" ms]\n") == 7
    assert " times as long." in run.stdout
    assert run.stderr.count("\n") <= 1  # that the model is converted
