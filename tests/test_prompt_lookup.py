# SPDX-License-Identifier: Apache-2.0
import importlib.util
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset


@pytest.fixture
def run(text_folder, monkeypatch):
    """A function that runs the script on a few rows; its attribute `script` is the module."""
    path = Path(__file__).parent.parent / "examples" / "prompt_lookup.py"
    spec = importlib.util.spec_from_file_location("prompt_lookup", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    rows = [{"source": f"def area_{side}(width): return width * {side}"} for side in range(6)]
    monkeypatch.setattr(script, "build_docstring_task", lambda: {"test": Dataset.from_list(rows)})

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prompt_lookup.py", str(text_folder), *arguments])
        script.main()

    run.script = script
    return run


def test_it_prints_a_line_for_each_number_of_candidates(run, capsys):
    run("--rows", "3", "--num-tokens", "1", "3")
    first, *lines = capsys.readouterr().out.strip().splitlines()
    assert first.startswith("3 texts of ")
    assert [line.partition("  ")[0] for line in lines] == ["greedy search", "up to 1 candidates", "up to 3 candidates"]
    rates = [float(re.search(r"([\d.]+) tokens per step", line)[1]) for line in lines]
    assert rates[0] == 1 and all(1 <= rate <= 1 + most for rate, most in zip(rates[1:], (1, 3), strict=True))


def test_a_text_that_differs_from_greedy_search_is_an_error(run, monkeypatch):
    generate = run.script.generate

    def changed(model, source_ids, num_tokens, max_new_tokens):
        return [num_tokens], *generate(model, source_ids, num_tokens, max_new_tokens)[1:]

    monkeypatch.setattr(run.script, "generate", changed)
    with pytest.raises(SystemExit, match="2 texts differ"):
        run("--rows", "2", "--num-tokens", "2")


def test_numbers_below_one_are_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--num-tokens", "0")
    assert "at least 1" in capsys.readouterr().err
