# SPDX-License-Identifier: Apache-2.0
"""The table of one thread in docs/speed.md, and the file that it is written from."""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import speed_results


def test_the_page_states_what_the_results_file_says():
    text, results = (path.read_text(encoding="utf-8") for path in (speed_results.PAGE, speed_results.RESULTS))
    assert speed_results.update_blocks(text, speed_results.BLOCKS, json.loads(results)) == text
