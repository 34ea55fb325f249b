# SPDX-License-Identifier: Apache-2.0
import json
import runpy
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent.parent / "examples" / "benchmark_packing.py"


def test_contenders_learn_from_the_same_tokens_with_less_padding(tmp_path):
    rows = [{"source": "a b c " * (1 + row % 7), "target": "d e " * (1 + row % 3)} for row in range(80)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = runpy.run_path(str(SCRIPT))
    options = "--preset tiny --vocab-size 300 --batch-size 8 --num-batches 2 --repetitions 1"
    arguments = script["parse_arguments"](["--train-file", str(file), *options.split()])
    report = script["run"](arguments)
    padding = report["padding_share"]
    assert 0 <= padding["packed"] < padding["padded"] and padding["length-grouped"] < padding["padded"]
    speeds = [speed["median"] * report["seconds"][name][0] for name, speed in report["tokens_per_second"].items()]
    assert speeds == pytest.approx([16 * report["tokens_per_row"]] * 3)
    assert len(script["format_table"](report).splitlines()) == 5
