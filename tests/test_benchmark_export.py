# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/export.md and docs/speed.md, and the files that they are written from."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import benchmark_export
import speed_results


@pytest.mark.parametrize("script", [benchmark_export, speed_results], ids=lambda script: script.__name__)
def test_the_page_states_what_the_results_file_says(script):
    text, results = (path.read_text(encoding="utf-8") for path in (script.PAGE, script.RESULTS))
    assert script.update_blocks(text, script.BLOCKS, json.loads(results)) == text


def test_a_target_is_cut_before_its_end_token():
    assert benchmark_export.cut([5, 6, 2, 2], 2) == benchmark_export.cut([5, 6], 2) == [5, 6]
