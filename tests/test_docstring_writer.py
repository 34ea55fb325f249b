# SPDX-License-Identifier: Apache-2.0
"""The checkpoint in this repository, and the script that generates docstrings with it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from encdec_slm.run_results import RunResults
from encdec_slm.trainers.evaluation import evaluate_checkpoint


ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "docstring-writer"
SCRIPT = ROOT / "examples" / "write_docstring.py"
MAX_BYTES = 14_000_000
# On 128 rows of the test split; the card has the value for all rows.
ROUGE_FLOOR = 16.0
WITHOUT_PACKAGE = """
import runpy, sys
sys.modules["encdec_slm"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TWO_FUNCTIONS = '''\
class Shape:
    @property
    def area(self):
        """Return anything."""
        return self.width * self.height

async def close(file): "Close it."
'''


@pytest.fixture(scope="module")
def script():
    """The functions of the script."""
    return runpy.run_path(str(SCRIPT))


def run_script(tmp_path, *arguments, **options):
    """Run the script in a process without `encdec_slm` and without network."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", WITHOUT_PACKAGE, str(SCRIPT), str(CHECKPOINT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, **options)


def test_the_checkpoint_is_small_and_has_safetensors_weights():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {"config.json", "generation_config.json", "LICENSE", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in files
    }
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".py", ".md", ".yaml", ""}


def test_the_code_files_equal_those_of_the_package():
    shipped = sorted(CHECKPOINT.glob("*.py"))
    assert shipped
    for path in shipped:
        expected = ROOT / "modeling_encdec_slm" / path.name
        assert path.read_bytes() == expected.read_bytes(), "run `python examples/publish_docstring_writer.py`"


def test_the_card_has_data_results_and_limits():
    card = ModelCard.load(CHECKPOINT / "README.md")
    assert card.data.pipeline_tag == "text2text-generation" and card.data.license == "apache-2.0"
    for part in ("PSF-2.0", "## Results", "rougeL", "Limits", "| distribution | version | license |", "Author:"):
        assert part in card.content
    stated = json.loads(CHECKPOINT.with_suffix(".json").read_text(encoding="utf-8"))
    for result in (*stated["evaluations"], stated["training"]):
        assert str(RunResults.from_dict(result).saved.metrics["rougeL"]) in card.text


def test_rouge_on_unseen_functions_is_above_a_floor():
    result = evaluate_checkpoint(CHECKPOINT, "docstrings", max_samples=128, batch_size=32, show_progress=False)
    assert result.num_rows == {"test": 128}
    assert result.saved.metrics["rougeL"].value > ROUGE_FLOOR


def test_the_script_works_without_the_package(tmp_path):
    run = run_script(tmp_path, "textwrap.shorten", timeout=120)
    assert run.returncode == 0, run.stderr
    name, sentence, *_ = run.stdout.splitlines()
    assert name == "textwrap.shorten"
    assert sentence.startswith('    """') and sentence.endswith('"""') and len(sentence.split()) >= 3
    assert "parameters" in run.stdout


def test_the_script_reads_files_and_standard_input(script, tmp_path, monkeypatch):
    path = tmp_path / "shapes.py"
    path.write_bytes(b"\xef\xbb\xbf" + TWO_FUNCTIONS.replace("\n", "\r\n").encode())
    area = "@property\ndef area(self):\n    return self.width * self.height"
    close = "async def close(file):\n    pass"
    assert script["find_functions"](str(path)) == {"Shape.area": area, "close": close}
    assert script["find_functions"](f"{path}:Shape.area") == {"Shape.area": area}
    assert script["find_functions"](f"{path}:area") == {"Shape.area": area}
    with path.open(encoding="utf-8") as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert set(script["find_functions"]("-")) == {"Shape.area", "close"}


def test_the_script_finds_functions_methods_and_properties_by_dotted_names(script):
    find = script["find_functions"]
    assert find("textwrap.dedent")["textwrap.dedent"].startswith("def dedent(text):")
    assert '"""' not in find("textwrap.dedent")["textwrap.dedent"]
    assert list(find("fractions.Fraction.numerator")) == ["fractions.Fraction.numerator"]
    assert {"JSONDecoder.__init__", "JSONDecoder.decode"} <= set(find("json.decoder.JSONDecoder"))
    assert {"textwrap.wrap", "textwrap.fill"} <= set(find("textwrap"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("math.sqrt", "math.sqrt"),
        ("no_such_module.f", "'no_such_module.f'"),
        ("os.path.no_such_name", "'os.path.no_such_name'"),
        ("no_such_file.py", "'no_such_file.py'"),
        ("no_such_file.py:f", "'no_such_file.py'"),
        ("", "''"),
        ("shapes.py:no_such_name", "'no_such_name' in shapes.py"),
        ("empty.py", "empty.py"),
        ("broken.py", "line 1"),
    ],
)
def test_the_script_explains_what_it_cannot_read(script, given, message, tmp_path, monkeypatch):
    for name, text in {"shapes.py": TWO_FUNCTIONS, "empty.py": "x = 1\n", "broken.py": "def f(:\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"write_docstring\.py: ") as raised:
        script["find_functions"](given)
    assert message in str(raised.value)
